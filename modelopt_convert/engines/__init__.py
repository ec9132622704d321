"""What serving engines believe of a checkpoint, as pure tables by version: one file an engine.

Every line rests on the engine's own code, which the file names. What mopt writes because of an engine does not belong
here.
"""
