"""What serving engines believe of a checkpoint, as pure tables by version: one file per engine."""
