"""What a checkpoint is, how its modules lie and how that is known, and what is wrong with it.

A fault found here is data and never stops anything. What a format needs for that is the module with the format's
name.
"""
