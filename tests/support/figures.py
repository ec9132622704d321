"""What a tier of tests counted, for the table in docs/reliability.md. No torch."""

import json
import os


def note(tier: int, **counts: int | str) -> None:
    """Append one line of JSON to the file named by MOPT_FIGURES; nothing where that is not set.

    Args:
        tier: Its number in the table.
        counts: What was counted (``cases``, ``torn``, ``missing``, ``recovered``, ``litter``) and of ``what``.
    """
    where = os.environ.get("MOPT_FIGURES")
    if where:
        line = json.dumps({"tier": tier} | counts) + "\n"
        # One write of an appending descriptor: the workers of xdist share the file.
        fd = os.open(where, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(fd, line.encode())
        finally:
            os.close(fd)
