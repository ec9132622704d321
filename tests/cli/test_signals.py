"""SIGINT, SIGTERM and SIGHUP from mopt's first instruction to its last: a documented code, one line, no half OUT."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from commands import CONVERSIONS, MOPT, buffered, words_of
from root import LONG, ROOT
from support import tree

from modelopt_convert.run.errors import Interrupted
from modelopt_convert.run.signals import Signals

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
_CAUGHT = 1 << (signal.SIGTERM - 1)


def started(*arguments: str | Path, **streams: int) -> "subprocess.Popen[bytes]":
    """mopt, once it has reached its first instruction: what comes before that is Python's own."""
    command = [*MOPT, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    process = subprocess.Popen(command, env=buffered(os.environ), **pipes)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        line = next(one for one in status.read_text().splitlines() if one.startswith("SigCgt:"))
        if int(line.split()[1], 16) & _CAUGHT:
            return process
        time.sleep(0.001)
    return process


def test_nothing_that_takes_time_is_imported_before_signals_are_handled() -> None:
    code = "import sys, modelopt_convert.run.signals as s; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"typer", "click", "pathlib", "pydantic", "torch", "modelopt_convert.cli"}
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"mopt": "modelopt_convert.__main__:main"}


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("command", ["build-nvfp4", *CONVERSIONS])
@pytest.mark.parametrize("seed", range(8 if LONG else 2))
def test_a_signal_at_a_random_time(
    exports: Path, tmp_path: Path, number: signal.Signals, seed: int, command: str
) -> None:
    chance = random.Random(f"{number} {seed} {command}")
    out, report = tmp_path / "out", tmp_path / "report.json"
    places = {"nvfp4": exports / "nvfp4", "base": exports / "base", "out": out}
    process = started(*words_of(command, places), "--report-json", report)
    # Half of them in the first 0.3 seconds, in which nothing but imports happens.
    time.sleep(chance.uniform(0, 0.3) if seed % 2 else chance.uniform(0, 1.0))
    process.send_signal(number)
    _, stderr = (text.decode() for text in process.communicate(timeout=60))
    assert process.returncode in (CODES[number], 0), stderr
    assert "Traceback" not in stderr and "KeyboardInterrupt" not in stderr
    assert [path for path in tmp_path.iterdir() if path not in (out, report)] == []
    if process.returncode:
        assert stderr.count("error: ") == 1 and "[interrupted]" in stderr
    told = json.loads(report.read_text()) if report.exists() else None
    if told is not None:
        assert told["exit_code"] == process.returncode
        assert told["output"]["published"] is out.exists()
    assert told is not None or not out.exists()


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_stopped_while_nobody_reads_stdout(
    exports: Path, tmp_path: Path, number: signal.Signals, flags: list[str]
) -> None:
    """OUT is new by then: report file, code and line say so."""
    out, report = tmp_path / "out", tmp_path / "report.json"
    read, write = os.pipe()
    os.set_blocking(write, False)
    while True:  # as full as a pipe can be
        try:
            os.write(write, b"x" * 4096)
        except BlockingIOError:
            break
    os.set_blocking(write, True)
    inputs = ["--preset", "flux1-dev", "--export", exports / "nvfp4", "--base", exports / "base"]
    process = started("build-nvfp4", *inputs, "--output", out, "--report-json", report, *flags, stdout=write)
    os.close(write)
    try:
        before = time.monotonic() + 60
        while not report.exists() and process.poll() is None and time.monotonic() < before:
            time.sleep(0.01)
        time.sleep(0.3)
        assert json.loads(report.read_text())["status"] == "ok"
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(read)
    assert process.returncode == CODES[number], stderr
    told = json.loads(report.read_text())
    assert (told["status"], told["exit_code"], told["output"]["published"]) == ("interrupted", CODES[number], True)
    lines = stderr.decode().splitlines()
    assert f"error: stopped by signal {int(number)} [interrupted]" in lines
    assert f"hint: {out} is in place, new and whole" in lines
    assert tree(out) and [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_second_signal_ends_at_once(exports: Path) -> None:
    """Also where the first one was taken for an error by somebody in between."""
    code = (
        "import time, modelopt_convert.commands.inspect as i; from modelopt_convert.__main__ import main\n"
        "def wait(self, progress):\n"
        "    while True:\n"
        "        try:\n            print('ready', flush=True)\n            time.sleep(60)\n"
        "        except BaseException:\n            pass\n"
        "i.InspectCommand.run = wait; main()"
    )
    command = [sys.executable, "-c", code, "inspect", str(exports / "base")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None and process.stderr.readline().startswith("interrupted: cleaning up")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", CODES)
def test_a_signal_while_mopt_is_imported(exports: Path, number: signal.Signals) -> None:
    code = (
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == 'modelopt_convert.cli': os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Finder())"
    )
    ended = held(code, exports / "base")
    assert (ended.returncode, ended.stdout) == (CODES[number], "")
    assert ended.stderr == f"error: stopped by signal {int(number)} [interrupted]\n"


def held(code: str, source: Path) -> "subprocess.CompletedProcess[str]":
    """``mopt inspect`` in a process in which some code ran before."""
    code = f"import os, signal\n{code}\nfrom modelopt_convert.__main__ import main; main()"
    command = [sys.executable, "-c", code, "inspect", str(source), "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_signal_while_the_report_is_made_stops_the_print(exports: Path) -> None:
    code = (
        "import modelopt_convert.commands.inspect as i; made = i.InspectCommand.report\n"
        "def report(self, error=None):\n"
        "    if error is None: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return made(self, error)\n"
        "i.InspectCommand.report = report"
    )
    ended = held(code, exports / "base")
    assert (ended.returncode, ended.stdout) == (143, "") and "Traceback" not in ended.stderr
    assert "error: stopped by signal 15 [interrupted]" in ended.stderr.splitlines()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 0), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_of_signals_that_are_ignored_only_a_hangup_stays_so(exports: Path, number: signal.Signals, code: int) -> None:
    """nohup ignores SIGHUP because the run is to go on; a shell ignores SIGINT for whatever it starts with an &."""
    ended = held(
        f"signal.signal({int(number)}, signal.SIG_IGN)\n"
        "import modelopt_convert.commands.inspect as i; run = i.InspectCommand.run\n"
        f"i.InspectCommand.run = lambda *words: os.kill(os.getpid(), {int(number)}) or run(*words)",
        exports / "base",
    )
    assert (ended.returncode, "[interrupted]" in ended.stderr) == (code, code != 0), ended.stderr


def test_after_the_last_word_no_signal_counts(exports: Path) -> None:
    code = "import atexit; atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))"
    ended = held(code, exports / "base")
    assert (ended.returncode, ended.stderr) == (0, "") and json.loads(ended.stdout)["status"] == "ok"


@pytest.mark.parametrize("number", CODES)
def test_a_library_that_keeps_an_interruption_to_itself_is_no_bug_of_mopt(number: signal.Signals) -> None:
    """As torch does while it imports numpy: what follows then is numpy half imported."""
    with pytest.raises(Interrupted) as caught, Signals() as signals, signals.acting():
        with contextlib.suppress(Interrupted):
            os.kill(os.getpid(), number)
            time.sleep(1)
        raise AttributeError("module 'numpy' has no attribute 'matrix'")
    assert caught.value.signum == number
    with pytest.raises(AttributeError), Signals() as signals, signals.acting():
        raise AttributeError("a bug")


@pytest.mark.parametrize("number", CODES)
def test_a_library_that_keeps_an_interruption_and_goes_on_does_not_keep_it(number: signal.Signals) -> None:
    """As a driver that is asked for kernels, or a client that takes anything for its server's failure."""
    done: list[str] = []
    with pytest.raises(Interrupted) as caught, Signals() as signals, signals.acting():
        with contextlib.suppress(Interrupted):
            os.kill(os.getpid(), number)
            time.sleep(1)
        done.append("went on")
    assert caught.value.signum == number and done == ["went on"]
    with Signals() as signals:
        with pytest.raises(Interrupted), signals.acting(), contextlib.suppress(Interrupted):
            os.kill(os.getpid(), number)
            time.sleep(1)
        with signals.acting():  # told once
            signals.insist()
