"""Run a command under strace and strike it at one chosen system call. No torch."""

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

import modelopt_convert

DRIVER = Path(__file__).with_name("crash_driver.py")
IMPORTS = (Path(modelopt_convert.__file__).parent.parent, Path(xxhash.__file__).parent.parent)
# Nothing else of the environment may change how many calls the start of Python makes: the n-th call must be the same
# call in every run.
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
    """The command line of crash_driver.py: no site, no bytecode, so that few calls precede the first that counts."""
    return [sys.executable, "-S", "-B", str(DRIVER), *map(str, words)]


def run(command: Sequence[str], environment: Mapping[str, str] = ENVIRONMENT) -> Ended:
    """Run to the end."""
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False)
    return Ended(done.returncode, done.stdout, done.stderr, told_in(done.stdout))


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
    command: Sequence[str],
    folder: Path,
    log: Path,
    environment: Mapping[str, str] = ENVIRONMENT,
    names: Sequence[str] = (*CHANGING, *OPENING, *LOCKING),
) -> tuple[Ended, list[Call]]:
    """Run once and list the calls of the main thread that touch something in ``folder``, in order."""
    ended = run([*_strace(log, names), *command], environment)
    counts: Counter[str] = Counter()
    found = []
    for name, line in _main_thread(log):
        counts[name] += 1
        if str(folder) in line:
            found.append(Call(name, counts[name], line))
    return ended, found


def strike(
    command: Sequence[str],
    call: Call,
    fault: str,
    folder: Path,
    log: Path,
    environment: Mapping[str, str] = ENVIRONMENT,
) -> Ended:
    """Run with ``fault`` (``signal=KILL``, ``error=EIO``, ...) at ``call``; a trailing ``+`` means at all later ones.

    Asserts that the fault struck a call on something in ``folder``: counting could have gone wrong.
    """
    fault, persistent = fault.rstrip("+"), "+" * fault.endswith("+")
    inject = ["-e", f"inject={call.name}:{fault}:when={call.nth}{persistent}"]
    # strace 6.1 loses an injected signal where seccomp made it stop
    quick = fault.startswith("error=")
    ended = run([*_strace(log, [call.name], quick=quick), *inject, *command], environment)
    lines = [line for _, line in _main_thread(log)]
    struck = lines[call.nth - 1] if len(lines) >= call.nth else "nothing"
    assert str(folder) in struck, f"{call} was meant, {struck} was struck"
    if quick:
        assert "INJECTED" in struck, struck
    return ended


def _strace(log: Path, names: Sequence[str], *, quick: bool = True) -> list[str]:
    wanted = ",".join(f"?{name}" for name in names)  # with ?, a name need not exist on this machine
    stops = ["--seccomp-bpf"] if quick else []  # stop at the named calls only
    return ["strace", "-f", *stops, "-qq", "-y", "-o", str(log), "-e", f"trace={wanted}", "-e", "signal=none"]


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
