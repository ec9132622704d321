"""ModelOpt's dialect, which mopt also writes.

What a module of a format consists of is the module with the format's name. The ``.pt`` of older exports is the only
pickle that is ever opened, and amax_file.py the only module that opens one.
"""
