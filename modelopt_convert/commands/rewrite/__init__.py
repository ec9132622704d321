"""``swap-nibbles`` and ``unswizzle-scales``, which are one command with several kinds of rewrite.

Each module is a step, and returns what it found. What builds need too lies in the folder above.
"""
