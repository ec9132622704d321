"""The page of ``mopt verify --report``: one file that fetches nothing.

What the page shows of a checkpoint is escaped, since names may be hostile. Nothing here finds anything out: the page
is drawn from the report.
"""
