"""``mopt convert``: any dialect that mopt reads into any that it writes."""
