"""verification/levels."""
