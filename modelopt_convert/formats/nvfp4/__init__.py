"""formats/nvfp4."""
