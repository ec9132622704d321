"""verification/page."""
