"""What every run needs, whatever the command does: errors with their exit codes, progress, worker threads.

A module here knows nothing of tensors, files or formats. Nothing that only one command needs belongs here.
"""
