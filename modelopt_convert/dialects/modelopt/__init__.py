"""dialects/modelopt."""
