"""Run Python in a mount namespace of its own, where it may mount what it likes. No torch.

``unshare -rm`` does it for any user, unless the distribution forbids that: Ubuntu 24.04 does, by AppArmor, and .ci/run
allows it there. Where it is forbidden the tests fail, for what they guard cannot be seen otherwise.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from tracing import IMPORTS

_UNSHARE = ["unshare", "-rm"]
_HEAD = """
import errno, json, os, resource, signal, subprocess, sys
from pathlib import Path

top = Path(sys.argv[1])

def mount(*words):
    subprocess.run(["mount", *map(os.fspath, words)], check=True)

# All that is made lies in a file system of the namespace's own, and is gone with it.
mount("-t", "tmpfs", "tmpfs", top)
os.chdir("/")

"""


def in_own_mounts(top: Path, body: str) -> Any:
    """Run ``body``, which has ``top``, a tmpfs of its own, and ``mount``.

    Returns:
        The JSON that it prints.
    """
    path = [*map(str, IMPORTS), str(Path(__file__).parent)]
    environment = {"PYTHONPATH": os.pathsep.join(path), "LC_ALL": "C.UTF-8", "HOME": "/nonexistent"}
    script = _HEAD + textwrap.dedent(body)
    command = [*_UNSHARE, sys.executable, "-S", "-B", "-c", script, str(top)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
