"""Run Python in a mount namespace of its own, where it may mount what it likes. No torch.

As root, or where unprivileged user namespaces are allowed, ``unshare -rm`` is enough. Where a distribution forbids them
(Ubuntu 24.04 and GitHub's runners, by AppArmor) sudo without a password does it. If neither may, the test fails: what
it guards cannot be seen otherwise.
"""

import functools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from tracing import IMPORTS

_WAYS = (["unshare", "-rm"], ["sudo", "-n", "unshare", "-m"])
_HEAD = """
import errno, json, os, resource, signal, subprocess, sys
from pathlib import Path

top = Path(sys.argv[1])

def mount(*words):
    subprocess.run(["mount", *map(str, words)], check=True)

# All that is made lies in a file system of the namespace's own, and is gone with it.
mount("-t", "tmpfs", "tmpfs", top)
os.chdir("/")

"""


@functools.cache
def _unshare() -> list[str]:
    """The command that may mount."""
    told = []
    for way in _WAYS:
        try:
            tried = subprocess.run([*way, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True)
        except FileNotFoundError as error:
            told.append(str(error))
            continue
        if tried.returncode == 0:
            return way
        told.append(f"{' '.join(way)}: {tried.stderr.strip()}")
    raise AssertionError(f"no mount namespace can be had here: {'; '.join(told)}")


def in_own_mounts(top: Path, body: str, *words: str) -> Any:
    """Run ``body``, which has ``top`` (a tmpfs of its own), ``mount`` and ``words`` in ``sys.argv[2:]``.

    Returns:
        The JSON that it prints.
    """
    path = [*map(str, IMPORTS), str(Path(__file__).parent)]
    environment = {"PYTHONPATH": os.pathsep.join(path), "LC_ALL": "C.UTF-8", "HOME": "/nonexistent"}
    command = [*_unshare(), "env", *(f"{name}={value}" for name, value in environment.items())]
    done = subprocess.run(
        [*command, sys.executable, "-S", "-B", "-c", _HEAD + textwrap.dedent(body), str(top), *words],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
