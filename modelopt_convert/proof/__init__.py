"""Whether packed weights are those of the base: detector, comparison, verdict.

What a format needs for that is the module with the format's name. Nothing here writes, and nothing here decides what
a command does with a verdict.
"""
