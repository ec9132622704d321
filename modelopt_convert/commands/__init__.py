"""The commands, one straight line each: what is asked for, which steps are taken, what is reported.

A step returns what it found; a command puts the report together at its end. Nothing here is known to a room below.
"""
