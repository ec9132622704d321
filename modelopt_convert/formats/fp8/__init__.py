"""formats/fp8."""
