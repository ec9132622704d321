"""preset."""
