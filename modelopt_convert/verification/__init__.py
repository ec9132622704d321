"""The levels of ``mopt verify`` for one opened transformer, and the verdict on all of them.

Each level passes, fails, or says why it did not run; what did not run is never a pass. Opening checkpoints and ending
a run are a command's work, and do not belong here.
"""
