"""What producers write: tensor names, packing, config. One file each, pure."""
