"""What a terminal shows: tables that fit, colors with meaning, steps, and something at once."""

import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from support import run_mopt

from modelopt_convert.cli._output import Output, ProgressBar, steps_of
from modelopt_convert.cli._text import painted, table_lines, wrapped
from modelopt_convert.commands.requests import (
    BuildNvfp4Request,
    InspectRequest,
    PushRequest,
    SwapNibblesRequest,
    VerifyRequest,
)
from modelopt_convert.run.text import by_kind

NAMES = [f"transformer_blocks.{'x' * length}.attn" for length in (3, 15, 60)]
ROWS = [[name, "12", "1.5 MB", "kept, since the preset names it and nothing else does"] for name in NAMES]
HEADS = ["module", "count", "bytes", "why"]


@pytest.mark.parametrize("width", [60, 80, 100, None])
def test_a_table_breaks_no_name_and_loses_no_word(width: int | None) -> None:
    lines = table_lines(HEADS, ROWS, width)
    words = " ".join(lines).split()
    assert sorted(words) == sorted(" ".join([*HEADS, *(cell for row in ROWS for cell in row)]).split())
    longest = max(map(len, NAMES))
    assert width is None or all(len(line) <= max(width, longest) for line in lines)
    assert width is not None or len(lines) == 1 + len(ROWS)
    assert not any(line.endswith(" ") for line in lines)


def test_only_a_name_that_leaves_no_room_has_a_line_of_its_own() -> None:
    lines = table_lines(HEADS, ROWS, 80)
    assert [line for line in lines if line in NAMES] == [NAMES[-1]]


@pytest.mark.parametrize("width", [20, 80])
def test_a_line_breaks_at_spaces_and_a_command_nowhere(width: int) -> None:
    text = f"known limit: {NAMES[-1]} is one-of-a-kind, and " + "so on " * 20
    lines = wrapped(text, width)
    assert " ".join(lines).split() == text.split() and len(lines) > 1
    assert all(len(line) <= width or " " not in line.strip() for line in lines)
    assert wrapped(text, None) == [text] and wrapped(f"next: {text}", width) == [f"next: {text}"]


def test_nothing_of_a_result_moves_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """A name from a checkpoint or from the Hub, as a line, in a table and on stderr."""
    evil = "evil\x1b[2J\x07\u202e\rname"
    output = Output(no_color=True)
    output.line(f"wrote {evil}")
    output.table(["name", "count", "why"], [[evil, "1", evil]])
    output.aside(evil)
    told = capsys.readouterr()
    for text in (told.out, told.err):
        assert not set("\x1b\x07\u202e\r") & set(text) and "\\x1b" in text
    assert told.out.count("\\x1b") == 3


@pytest.mark.parametrize(
    ("text", "painting"),
    [
        ("error: no", "\x1b[31m\x1b[1merror\x1b[0m: no"),
        ("warning: perhaps", "\x1b[33m\x1b[1mwarning\x1b[0m: perhaps"),
        ("next: mopt", "\x1b[36m\x1b[1mnext\x1b[0m: mopt"),
        ("wrote out: 3 tensors", "wrote out: 3 tensors"),
        ("error", "error"),
    ],
)
def test_colors_say_what_a_line_is(text: str, painting: str) -> None:
    assert painted(text) == painting


def test_a_verdict_has_the_color_of_what_it_means() -> None:
    assert painted("proven", "good") == "\x1b[32m\x1b[1mproven\x1b[0m"
    assert painted("verdict: pass: proven", "bad").startswith("\x1b[31m\x1b[1mverdict\x1b[0m: pass")


@pytest.mark.parametrize(
    ("flags", "environment", "colored"),
    [
        ((), {}, True),
        (("--no-color",), {}, False),
        ((), {"NO_COLOR": "1"}, False),
        ((), {"NO_COLOR": ""}, True),
        ((), {"TERM": "dumb"}, False),
        ((), {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_colors_can_be_had_off(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], environment: dict[str, str], colored: bool
) -> None:
    """A pipe, which FORCE_COLOR takes for a terminal unless another variable says otherwise."""
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"FORCE_COLOR": "1", **environment}.items():
        monkeypatch.setenv(name, value)
    told = run_mopt("verify", "no-such-folder", *flags, json_report=False)
    assert told.exit_code == 3 and ("\x1b[31m\x1b[1merror\x1b[0m: " in told.stderr) is colored
    assert colored or "\x1b" not in told.stderr


@pytest.mark.parametrize(
    ("request_", "phases"),
    [
        (BuildNvfp4Request(base="b"), {"measure x": "1 of 3", "write a.safetensors": "2 of 3", "read": "3 of 3"}),
        (BuildNvfp4Request(base="b", verify="off"), {"prove": "1 of 2", "copy": "2 of 2"}),
        (
            BuildNvfp4Request(base="b", push_to="o/n"),
            {"decode": "3 of 4", "send x (1 of 2)": "4 of 4", "read": "4 of 4"},
        ),
        (SwapNibblesRequest("a", "b"), {"write a": "1 of 2", "decode": "2 of 2"}),
        (VerifyRequest("a"), {"read": "1 of 3", "decode": "2 of 3", "multiply": "3 of 3"}),
        (PushRequest("a", "o/n"), {"read": "1 of 2", "compare with what is there": "2 of 2"}),
    ],
)
def test_a_phase_is_a_step_of_the_whole(request_: BuildNvfp4Request, phases: dict[str, str]) -> None:
    bar = ProgressBar(Output(), steps_of(request_))
    assert {what: bar._described(what).partition(":")[0] for what in phases} == {
        what: f"step {step}" for what, step in phases.items()
    }


def test_time_left_is_that_of_all_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three that are equal, and a smaller last one, after which the bar is full."""
    monkeypatch.setattr("modelopt_convert.cli._output.is_terminal", lambda _stream: True)
    monkeypatch.setenv("TERM", "xterm")
    bar = ProgressBar(Output(), steps_of(BuildNvfp4Request(base="b")))
    assert bar._bar is not None
    bar.begin("prove", 70)
    bar.advance(70)
    seen = []
    for number, size in enumerate((100, 100, 40), 1):
        bar.begin(f"write transformer/diffusion_pytorch_model-{number:05}-of-00003.safetensors", size)
        (task,) = bar._bar.tasks
        seen.append((task.completed, task.total))
        bar.advance(size)
    assert seen == [(0, 300), (100, 300), (200, 240)] and task.finished
    assert task.description == "step 2 of 3: write transformer/00003-of-00003"
    bar.begin("read", 240)
    assert [(one.completed, one.total) for one in bar._bar.tasks] == [(0, 240)]


def test_a_phase_of_no_known_step_is_told_as_it_is() -> None:
    bar = ProgressBar(Output(), steps_of(InspectRequest("a")))
    assert bar._described("write diffusion_pytorch_model-00001-of-00004.safetensors") == "write 00001-of-00004"


@pytest.mark.parametrize(("flags", "shown"), [((), True), (("-q",), False)])
def test_something_is_on_the_screen_before_anything_is_imported(
    tmp_path: Path, flags: tuple[str, ...], shown: bool
) -> None:
    """The first thing that a terminal gets, unless it is to be quiet; then that line is gone."""
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "modelopt_convert", "verify", str(tmp_path / "none"), *flags]
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=theirs, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    said = b""
    with os.fdopen(ours, "rb", buffering=0) as screen, suppress(OSError):  # which is how a terminal ends
        while more := screen.read(1000):
            said += more
    assert done.returncode == 3 and said.startswith(b"mopt: starting\r\x1b[2K") is shown
    assert shown or (b"no such folder" in said and b"starting" not in said)


def test_faults_are_told_by_kind() -> None:
    shapes = [f"a.{number}.weight: expected [160, {number}] in the base, found U8 [160, 80]" for number in range(5)]
    assert by_kind(["alone", *shapes, "b: another", "a line: alone"]) == [
        "alone",
        "5 places: expected [160, 0] in the base, found U8 [160, 80], for the first: "
        "a.0.weight, a.1.weight, a.2.weight and 2 more",
        "b: another",
        "a line: alone",
    ]
    assert by_kind(["x: same", "y: same"]) == ["2 places: same: x, y"] and by_kind([]) == []
