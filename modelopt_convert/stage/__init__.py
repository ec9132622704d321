"""The one place that changes the disk: stage, shards, swap, locks, and the rules where mopt will not write.

Every change goes through fsops.py, so that tests can record, fail and cut it. What the bytes mean is not known here.
"""
