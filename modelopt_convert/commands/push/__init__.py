"""``mopt push``: which files are published, whether they may be, and what stands on the Hub already.

Nothing is kept on disk between runs. Reading inputs from the Hub does not belong here.
"""
