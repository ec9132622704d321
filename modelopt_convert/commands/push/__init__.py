"""commands/push."""
