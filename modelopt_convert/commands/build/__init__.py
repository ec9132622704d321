"""commands/build."""
