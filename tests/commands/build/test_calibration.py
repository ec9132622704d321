"""``--calibration``: input scales of a base that is quantized here, and what of CALIB is refused."""
