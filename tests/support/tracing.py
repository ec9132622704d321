"""Run a command as a fork, under strace, and strike it at one chosen system call. No torch."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import xxhash
from forks import Forks

import modelopt_convert

DRIVER = Path(__file__).with_name("crash_driver.py")
IMPORTS = (Path(modelopt_convert.__file__).parent.parent, Path(xxhash.__file__).parent.parent)
# Nothing else of the environment may change what a run does: the n-th call must be the same call in every run.
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(map(str, IMPORTS)), "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}

WRITING = [
    "write",
    "writev",
    "pwrite64",
    "pwritev",
    "pwritev2",
    "copy_file_range",
    "fallocate",
    "ftruncate",
    "truncate",
]
NAMING = ["creat", "mkdir", "mkdirat", "rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat"]
REMOVING = ["unlink", "unlinkat", "rmdir"]
CHANGING = [*WRITING, *NAMING, *REMOVING, "fsync", "fdatasync", "chmod", "fchmod", "fchmodat", "fchmodat2"]
OPENING = ["open", "openat", "openat2"]
LOCKING = ["flock"]
READING = ["newfstatat", "statx", "readlink", "getdents64", "read", "pread64", "preadv", "lseek", "statfs"]

_ALL_OF_MOPT = """
import importlib, pkgutil, torch, modelopt_convert
for module in pkgutil.walk_packages(modelopt_convert.__path__, "modelopt_convert."):
    if not module.name.endswith(("ray_cluster", "triton_kernels")):  # Ray and Triton are not for these runs
        importlib.import_module(module.name)
"""


@dataclass(frozen=True)
class Call:
    """One system call of a run: the ``nth`` of its name in the main thread, and the line strace wrote."""

    name: str
    nth: int
    line: str

    @property
    def changes(self) -> bool:
        """Whether it can change what is on disk; opening to read and locking cannot."""
        return self.name in CHANGING or (self.name in OPENING and "O_CREAT" in self.line)


@dataclass(frozen=True)
class Ended:
    """How a run ended; ``told`` is the JSON it printed, if any."""

    code: int
    stdout: str
    stderr: str
    told: dict[str, Any]


def driver(*words: str | Path) -> list[str]:
    """The command line of crash_driver.py, in a process of its own: no site, so it starts at once."""
    return [sys.executable, "-S", "-B", str(DRIVER), *map(str, words)]


def mopt_forks(environment: Mapping[str, str]) -> Forks:
    """A server for runs of mopt."""
    return Forks(_ALL_OF_MOPT, "from modelopt_convert.__main__ import main; main()", environment)


def driver_forks() -> Forks:
    """A server for runs of crash_driver.py."""
    program = "import sys, crash_driver; sys.exit(crash_driver.main(sys.argv[1:]))"
    return Forks("import crash_driver", program, ENVIRONMENT, "-S", "-B")


def run(command: Sequence[str], environment: Mapping[str, str] = ENVIRONMENT) -> Ended:
    """Run to the end."""
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False)
    return Ended(done.returncode, done.stdout, done.stderr, told_in(done.stdout))


def fork(forks: Forks, words: Sequence[str | Path], tracer: Sequence[str] = ()) -> Ended:
    """Run a command line to the end, as a fork."""
    code, stdout, stderr = forks.run([str(word) for word in words], tracer)
    return Ended(code, stdout, stderr, told_in(stdout))


def told_in(stdout: str) -> dict[str, Any]:
    """The JSON object a run printed; empty if it died first."""
    return json.loads(stdout) if stdout.startswith("{") and stdout.endswith("}\n") else {}


def need_strace() -> None:
    """Skip the test where nothing can be traced, and say why."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: no crash can be placed")
    tried = run(["strace", "-f", "-qq", "-o", "/dev/null", "true"], os.environ)
    if tried.code != 0:
        pytest.skip(f"strace may not trace here (ptrace is refused, as in some containers): {tried.stderr.strip()}")


def calls_under(
    forks: Forks,
    words: Sequence[str | Path],
    folder: Path,
    log: Path,
    names: Sequence[str] = (*CHANGING, *OPENING, *LOCKING),
) -> tuple[Ended, list[Call]]:
    """Run once and list the calls of the main thread that touch something in ``folder``, in order."""
    ended = fork(forks, words, _strace(log, names))
    counts: Counter[str] = Counter()
    found = []
    for name, line in _main_thread(log):
        counts[name] += 1
        if str(folder) in line:
            found.append(Call(name, counts[name], line))
    return ended, found


def strike(forks: Forks, words: Sequence[str | Path], call: Call, fault: str, folder: Path, log: Path) -> Ended:
    """Run with ``fault`` (``signal=KILL``, ``error=EIO``, ...) at ``call``; a trailing ``+`` means at all later ones.

    Asserts that the fault struck a call on something in ``folder``: counting could have gone wrong.
    """
    fault, persistent = fault.rstrip("+"), "+" * fault.endswith("+")
    inject = ["-e", f"inject={call.name}:{fault}:when={call.nth}{persistent}"]
    ended = fork(forks, words, [*_strace(log, [call.name]), *inject])
    lines = [line for _, line in _main_thread(log)]
    struck = lines[call.nth - 1] if len(lines) >= call.nth else "nothing"
    assert str(folder) in struck, f"{call} was meant, {struck} was struck"
    if fault.startswith("error="):
        assert "INJECTED" in struck, struck
    return ended


def _strace(log: Path, names: Sequence[str]) -> list[str]:
    wanted = ",".join(f"?{name}" for name in names)  # with ?, a name need not exist on this machine
    options = ["-f", "-y", "-o", str(log), "-e", "quiet=exit,personality", "-e", "signal=none"]
    return ["strace", *options, "-e", f"trace={wanted}"]


def _main_thread(log: Path) -> list[tuple[str, str]]:
    """Name and text of each call begun by the first thread of the log."""
    lines = log.read_text(errors="replace").splitlines()
    main = lines[0].split()[0] if lines else ""
    found = []
    for line in lines:
        thread, _, rest = line.partition(" ")
        match = re.match(r"(\w+)\(", rest.lstrip())
        if thread == main and match:
            found.append((match[1], rest.lstrip()))
    return found
