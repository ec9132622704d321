"""Runs as forks of one process that has imported what they need: no run waits for imports.

    forks.py IMPORTS PROGRAM

Both are Python. The server runs IMPORTS once. For every request, a line of JSON with the words of a command line and
the files for stdout and stderr, it forks; the fork says that it is ready, waits until it may go on, and runs PROGRAM as
the main program with these words in ``sys.argv``. How the fork ended is the answer.
"""

import ctypes
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)


class Forks:
    """The server, from the side of a test.

    Args:
        imports: What every run would import.
        program: What a run does.
        environment: Of all runs.
        flags: For the server's Python.
    """

    def __init__(self, imports: str, program: str, environment: Mapping[str, str], *flags: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mopt-forks-")
        self._said = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        command = [sys.executable, *flags, __file__, imports, program]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._server = subprocess.Popen(command, env=dict(environment), text=True, **pipes)

    def close(self) -> None:
        """End the server."""
        self._server.kill()
        self._server.communicate()
        self._folder.cleanup()

    def run(self, words: Sequence[str], tracer: Sequence[str] = ()) -> tuple[int, str, str]:
        """Run to the end; the exit code (negative for a signal), stdout and stderr.

        Args:
            words: The command line, without the program.
            tracer: Command of strace, to which the process is added. The run begins when strace has attached itself.
        """
        self._tell(json.dumps([list(words), *map(str, self._said)]))
        pid = self._answer()
        if not tracer:
            self._tell("go")
        else:
            attach = [*tracer, "-p", str(pid)]
            with subprocess.Popen(attach, stderr=subprocess.PIPE, text=True) as strace:
                assert strace.stderr is not None
                attached = strace.stderr.readline()
                self._tell("go")
                strace.communicate()  # to the end of the run: a line for each thread could fill the pipe
            assert attached == f"{Path(tracer[0]).name}: Process {pid} attached\n", attached
        code = self._answer()
        stdout, stderr = (path.read_text(errors="replace") for path in self._said)
        return code, stdout, stderr

    def _tell(self, line: str) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(f"{line}\n")
        self._server.stdin.flush()

    def _answer(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())


def _become(words: list[str], stdout: str, stderr: str, may_go: int) -> None:
    """In the fork: take the streams and the words of the run, and wait."""
    answers = os.dup(1)
    for stream, path in enumerate((os.devnull, stdout, stderr)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, stream)
        os.close(opened)
    sys.argv = ["mopt", *words]
    # Where only ancestors may trace (Yama), strace is allowed to; elsewhere the call fails, and nothing is missing.
    ctypes.CDLL(None).prctl(_SET_PTRACER, _ANY, 0, 0, 0)
    os.write(answers, f"{os.getpid()}\n".encode())
    os.close(answers)
    select.select([may_go], [], [])  # no call that a test counts
    os.close(may_go)


def serve() -> bool:
    """Fork for every request; true in a fork, which is to go on as the main program."""
    while request := sys.stdin.readline():
        words, stdout, stderr = json.loads(request)
        may_go, hold = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(hold)
            _become(words, stdout, stderr, may_go)
            return True
        os.close(may_go)
        sys.stdin.readline()
        os.close(hold)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return False


if __name__ == "__main__":
    _, _imports, _program = sys.argv
    exec(_imports)
    if serve():
        exec(_program, {"__name__": "__main__"})
