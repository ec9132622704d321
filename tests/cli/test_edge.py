"""The edge of the process: whatever system, streams and names do, a documented code and one line, for every command."""

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import COMMANDS, FORESEEN, WORDS, errors_in, run_outside, slots, words_of
from hub_support import hub_environment
from loopback_hub import LoopbackHub
from root import ROOT
from support import Outcome, run_mopt

from modelopt_convert.engines.sglang import VERSION
from modelopt_convert.run.errors import ExitCode, StorageError
from modelopt_convert.verification.gemm.names import NAMES

# A user of whom the system knows nothing; the files that are ours are that user's, and modes are heeded even for root.
NOBODY = 'unshare --user --map-user=4242 --map-group=4242 env -u HOME "$@"'
UNREPORTED = ("explain", "presets")  # commands without a run, and so without its report
DRAWING = ("advise", "calibrate", "compare")  # those that run a model
ODD = os.fsdecode(b"o\xff\xc3 d")


@pytest.fixture
def places(exports: Path, built: Path, tmp_path: Path) -> dict[str, Path]:
    """Inputs, and a folder of its own for what is written."""
    (tmp_path / "top").mkdir()
    named = {name: exports / name for name in ("nvfp4", "fp8", "base")}
    preset = ROOT / "presets" / "flux1-dev.toml"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red seven\n")
    named |= {
        "tiny": ROOT / "tests" / "data" / "tiny_flux1",
        "prompts": prompts,
        "mine": tmp_path / "top" / "mine.toml",
    }
    return named | {"built": built, "preset": preset, "out": tmp_path / "top" / "out"}


def told(stderr: str) -> str:
    """The one line that says why; nothing of Python's."""
    assert "Traceback" not in stderr and "bug in mopt" not in stderr, stderr
    (line,) = errors_in(stderr)
    return line


def test_every_command_has_a_row() -> None:
    assert WORDS.keys() == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_working_folder_is_gone(places: dict[str, Path], tmp_path: Path, command: str) -> None:
    """The libraries of mathematics would end the process, with a code of theirs and a stage left."""
    gone = tmp_path / "gone"
    ended = run_outside(words_of(command, places), script=f'mkdir {gone}; cd {gone}; rmdir {gone}; "$@"')
    if command in UNREPORTED:  # they look at nothing else
        assert ended.returncode == 0, ended.stderr
        return
    assert ended.returncode == ExitCode.STORAGE
    assert "[storage.working_folder]" in told(ended.stderr)
    assert list((tmp_path / "top").iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_user_whom_the_system_does_not_know(places: dict[str, Path], tmp_path: Path, command: str) -> None:
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("HF_HOME", "USER", "LOGNAME", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    ended = run_outside(words_of(command, places), script=f"cd {tmp_path}; {NOBODY}", environment=environment)
    if command == "push":
        assert ended.returncode == ExitCode.STORAGE and "[hub.unreachable]" in told(ended.stderr)
    elif command in DRAWING:  # diffusers cannot be imported without a home
        assert ended.returncode == ExitCode.STORAGE and "[storage.home]" in told(ended.stderr)
        assert "set HOME " in ended.stderr
    else:
        assert ended.returncode == 0, ended.stderr
    assert {path.name for path in tmp_path.iterdir() if path.name != "_home"} <= {"top", "prompts.txt"}


def test_a_user_without_a_home_reads_from_a_hub(
    places: dict[str, Path], tmp_path: Path, hub: LoopbackHub, base: Path
) -> None:
    hub.seed("alice/base", base)
    environment = hub_environment(hub)
    for name in ("USER", "LOGNAME", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    own = tmp_path / "own"
    own.mkdir()
    own.chmod(0o777)
    words = ["inspect", "hf://alice/base"]
    ended = run_outside(words, script=f"cd {tmp_path}; {NOBODY}", environment=environment | {"HF_HOME": str(own)})
    assert ended.returncode == 0, ended.stderr
    environment.pop("HF_HOME")
    ended = run_outside(words, script=f"cd {tmp_path}; {NOBODY}", environment=environment)
    assert ended.returncode == ExitCode.STORAGE and "[storage.home]" in told(ended.stderr) and "HF_HOME" in ended.stderr


def test_a_variable_that_a_library_does_not_understand(hub: LoopbackHub) -> None:
    environment = hub_environment(hub) | {"HF_HUB_DOWNLOAD_TIMEOUT": "abc"}
    ended = run_outside(["inspect", "hf://alice/base"], environment=environment)
    assert ended.returncode == ExitCode.STORAGE and "[storage.library]" in told(ended.stderr)
    assert "'abc'" in ended.stderr and "environment variables" in ended.stderr


def shut(path: Path, _spare: Path) -> str:
    """A folder, or a file, that may not be looked at."""
    if path.is_dir():
        for each in [path, *path.rglob("*")]:
            each.chmod(0)
            if each.is_dir():
                break
    path.chmod(0)
    return "Permission denied"


def under_a_shut_folder(path: Path, _spare: Path) -> str:
    path.parent.chmod(0)
    return "Permission denied"


def loop(path: Path, spare: Path) -> str:
    path.rename(spare)
    path.symlink_to(path.name)
    return "Too many levels of symbolic links"


MISHAPS = {"shut": shut, "under a shut folder": under_a_shut_folder, "loop": loop}


@pytest.fixture
def own(places: dict[str, Path], tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Copies of the inputs, each in a folder of its own; what was shut is opened in the end."""
    copies = dict(places)
    for name in ("nvfp4", "fp8", "base", "built", "preset"):
        (tmp_path / name).mkdir()
        copies[name] = tmp_path / name / places[name].name
    yield copies
    for folder in (tmp_path / name for name in ("nvfp4", "fp8", "base", "built", "preset", "top")):
        for path in (folder, *folder.glob("*"), *folder.glob("*/*")):
            if not path.is_symlink():
                path.chmod(stat.S_IRWXU)


@pytest.mark.parametrize("mishap", MISHAPS)
@pytest.mark.parametrize(("command", "slot"), slots())
def test_a_path_that_cannot_be_used_is_named_with_its_cause(
    places: dict[str, Path], own: dict[str, Path], tmp_path: Path, command: str, slot: str, mishap: str
) -> None:
    """An export that may not be read is never "no such folder"."""
    for name in {name for one, name in slots() if one == command} - {"out"}:
        copied = shutil.copytree if places[name].is_dir() else shutil.copy
        copied(places[name], own[name])
    if slot == "out":
        own["out"] = own["out"].parent / "sub" / "out"
        own["out"].parent.mkdir()
    path = own[slot]
    if slot == "out" and mishap != "under a shut folder":
        path = path.parent  # OUT itself is refused by rules of its own
    cause = MISHAPS[mishap](path, tmp_path / "spare")
    ended = run_outside(words_of(command, own), script=NOBODY)
    line = told(ended.stderr)
    assert ended.returncode == (ExitCode.STORAGE if slot == "out" else ExitCode.INPUT), line
    assert cause in line and str(path) in line


@pytest.mark.parametrize(("command", "slot"), slots())
def test_a_name_of_300_characters(places: dict[str, Path], tmp_path: Path, command: str, slot: str) -> None:
    long = tmp_path / ("n" * 300 + ".toml" * (slot == "preset"))
    ended = run_mopt(*words_of(command, places | {slot: long}), json_report=False)
    line = told(ended.stderr)
    assert ended.exit_code == (ExitCode.OUTPUT if slot == "out" else ExitCode.INPUT), line
    assert "nnnnnnnn" in line and ("too long" in line)


def texts(value: Any) -> Iterator[str]:
    """Every text of a report, keys too."""
    match value:
        case str():
            yield value
        case dict():
            for name, one in value.items():
                yield name
                yield from texts(one)
        case list():
            for one in value:
                yield from texts(one)


@pytest.mark.parametrize("command", COMMANDS)
def test_names_that_are_not_utf8(places: dict[str, Path], tmp_path: Path, hub: LoopbackHub, command: str) -> None:
    """Every report, page and line is text; a build that is published never ends as a bug."""
    odd = tmp_path / ODD
    odd.mkdir()
    for name in ("nvfp4", "fp8", "base", "built", "preset"):
        if f"{{{name}}}" in WORDS[command]:
            copied = shutil.copytree if places[name].is_dir() else shutil.copy
            places[name] = Path(copied(places[name], odd / f"{ODD}{name}{places[name].suffix}"))
    kinds = {"people": []} if command in UNREPORTED else {"people": [], "json": ["--json"]}
    for kind, flags in kinds.items():
        more = list(flags)
        if command not in UNREPORTED:
            more += ["--report-json", str(odd / f"{kind}{ODD}.json")]
        if command == "verify":
            more += ["--report", str(odd / f"{kind}{ODD}.html")]
        places["out"], places["mine"] = odd / f"{kind}{ODD}", odd / f"{kind}{ODD}.toml"
        # The preset's path has a blank, as has that of everything else.
        words = [command]
        words += [word.format(**places) for word in WORDS[command].split()]
        ended: Outcome = run_mopt(*words, *more, json_report=False)
        assert ended.exit_code == 0, ended.stderr
        assert (ended.stdout + ended.stderr).encode() and "Traceback" not in ended.stderr
        if command in UNREPORTED:
            continue
        written = (odd / f"{kind}{ODD}.json").read_text(encoding="ascii")
        report = json.loads(written)
        assert [text for text in texts(report) if text.encode("utf-8") is None] == []
        if kind == "json":
            assert json.loads(ended.stdout) == report
        if command == "advise":
            assert report["output"].endswith(f"{kind}o\\udcff\\udcc3 d.toml") and places["mine"].is_file()
        if "{out}" in WORDS[command]:
            assert report["output"]["path"].endswith(f"{kind}o\\udcff\\udcc3 d") and report["output"]["published"]
            assert places["out"].is_dir()
        if command == "verify":
            page = (odd / f"{kind}{ODD}.html").read_text(encoding="utf-8")
            assert "o\\udcff" in page or "built" not in page


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in UNREPORTED])
def test_a_refusal_of_a_name_that_is_not_utf8(tmp_path: Path, places: dict[str, Path], command: str) -> None:
    for slot in [slot for one, slot in slots() if one == command and slot != "out"]:
        ended = run_mopt(*words_of(command, places | {slot: tmp_path / "none\udcff"}), json_report=True)
        assert ended.exit_code == ExitCode.INPUT and "none\\udcff" in told(ended.stderr)
        assert ended.report is not None and "none\\udcff" in ended.report["error"]["path"]


STREAMS = {
    ">/dev/full": (ExitCode.STORAGE, ExitCode.USAGE),
    ">&-": (ExitCode.OK, ExitCode.USAGE),
    "2>/dev/full": (ExitCode.OK, ExitCode.USAGE),
    "2>&-": (ExitCode.OK, ExitCode.USAGE),
    ">/dev/full 2>/dev/full": (ExitCode.STORAGE, ExitCode.USAGE),
    "> >(exec <&-; sleep 0.2)": (ExitCode.OK, ExitCode.USAGE),
    "2> >(exec <&-; sleep 0.2)": (ExitCode.OK, ExitCode.USAGE),
}


_BUSY = (">/dev/full", "2>/dev/full")
STREAM_ROWS = [(None, one) for one in STREAMS] + [(command, one) for command in COMMANDS for one in _BUSY]


@pytest.mark.parametrize(("command", "streams"), STREAM_ROWS)
def test_help_and_usage_errors_to_streams_that_cannot_be_written(command: str | None, streams: str) -> None:
    """Python's own ways would be 1, a failed check, and 120."""
    script = f'sleep 0.05; "$@" {streams}'
    named = [] if command is None else [command]
    for words, expected in zip(([*named, "--help"], [*named, "--no-such-flag"]), STREAMS[streams], strict=True):
        ended = run_outside(words, script=script)
        assert ended.returncode == expected, (words, ended.stderr)
        assert "Traceback" not in ended.stderr and "Exception ignored" not in ended.stderr


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in (*UNREPORTED, "push")])
def test_the_report_file_comes_before_what_cannot_be_printed(
    places: dict[str, Path], tmp_path: Path, command: str
) -> None:
    report = tmp_path / "report.json"
    ended = run_outside([*words_of(command, places), "--report-json", report], script='"$@" >/dev/full')
    assert ended.returncode == ExitCode.STORAGE
    assert "could not be printed: No space left on device (ENOSPC) [storage.no_space]" in told(ended.stderr)
    found = json.loads(report.read_text())
    assert (found["status"], found["exit_code"]) == ("ok", ExitCode.STORAGE)
    if command == "advise":
        assert Path(found["output"]).is_file()
    else:
        assert "output" not in found or found["output"]["published"] is (places["out"].exists())


def test_what_an_encoding_does_not_have_is_escaped(places: dict[str, Path], tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(places["preset"].read_text() + "# \u0142\n", encoding="utf-8")
    ended = run_outside(["presets", mine], environment=os.environ | {"PYTHONIOENCODING": "latin-1"})
    assert ended.returncode == 0 and "# \\u0142\n" in ended.stdout, ended.stderr


LIMITS = [f"ulimit -n {count}" for count in (5, 6, 7, 8, 9, 12)]
LIMITS += [f"ulimit -v {kilobytes}" for kilobytes in (20_000, 40_000, 80_000, 450_000, 520_000, 590_000, 700_000)]
LIMITS += [f"ulimit -d {kilobytes}" for kilobytes in (60_000, 200_000, 250_000)]


@pytest.mark.parametrize("limit", LIMITS)
def test_few_descriptors_and_little_memory(places: dict[str, Path], limit: str) -> None:
    """Without a limit of its own, a library would end the process with 1, as a failed check does."""
    ended = run_outside(words_of("build-nvfp4", places), script=f'{limit}; "$@"')
    assert ended.returncode in FORESEEN, ended.stderr
    assert places["out"].exists() is (ended.returncode == 0)
    if ended.returncode:
        told(ended.stderr)


@pytest.mark.parametrize(
    ("arguments", "flag", "words"),
    [
        (
            "build-nvfp4 --base b --engine vllm_omni",
            "--engine",
            "'vllm_omni' is none of sglang, vllm-omni, tensorrt-llm, diffusers, comfyui; did you mean vllm-omni?",
        ),
        (
            "build-nvfp4 --base b --component transfomer",
            "--component",
            "'transfomer' is none of transformer, transformer_2; did you mean transformer?",
        ),
        (
            "verify x --backend torch,flashinfer-cutlas",
            "--backend",
            f"'flashinfer-cutlas' is none of best, all, {', '.join(NAMES)}; did you mean flashinfer-cutlass?",
        ),
        ("verify x --device gpu", "--device", "'gpu' is none of cuda, cpu"),
        (
            "inspect x --engine sglnag",
            "--engine",
            f"known is sglang ({VERSION.partition('@')[2]}); did you mean sglang?",
        ),
        ("inspect x --engine vllm", "--engine", f"known is sglang ({VERSION.partition('@')[2]})"),
    ],
)
def test_a_misspelt_value_is_told_the_nearest(arguments: str, flag: str, words: str) -> None:
    outcome = run_mopt(*arguments.split(), json_report=False)
    assert outcome.exit_code == 2
    assert outcome.stderr.splitlines()[-1] == f"Error: Invalid value for {flag}: {words}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("build-nvfpp", "--json"), "Did you mean 'build-nvfp4'?"),
        (("versio", "--json"), "Did you mean 'version'?"),
        (("version", "--json"), "No such option: --json"),
        (("help", "build-nvfp4", "--json"), "takes the name of one command"),
    ],
)
def test_what_is_no_command_is_one_object_and_the_hint_is_a_command_that_runs(
    words: tuple[str, ...], said: str
) -> None:
    told = run_mopt(*words, json_report=False)
    report = json.loads(told.stdout)
    assert told.exit_code == report["exit_code"] == 2 and said in report["error"]["message"]
    assert report["error"]["hint"] == "`mopt --help` says what it takes"


def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    exports: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In a folder that takes no new file, both for the report and for the page; nothing is told of the checkpoint."""

    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("modelopt_convert.stage.fsops.create_file", denied)
    for option in ("--report-json", "--report"):
        told = run_mopt("verify", exports / "nvfp4", option, tmp_path / "r", json_report=False)
        assert told.exit_code == 5 and told.stdout == "", told.stdout
        assert told.stderr.splitlines()[0].startswith(f"error: {tmp_path / 'r'}: Permission denied (EACCES)")
        assert "read: " not in told.stderr


def test_a_report_that_fails_after_the_work_is_the_last_that_is_told(
    exports: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("modelopt_convert.stage.fsops.write_all", full)
    told = run_mopt("inspect", exports / "nvfp4", "--report-json", tmp_path / "r.json", json_report=False)
    assert told.exit_code == 5 and told.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'r.json'}: the report")


def test_a_report_that_fails_after_the_work_is_in_the_json_too(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageError("r.json: No space left on device", code="storage.failed", hint="free some space")

    monkeypatch.setattr("modelopt_convert.cli._output.write_report", full)
    outcome = run_mopt("inspect", exports / "base", "--report-json", tmp_path / "r.json")
    assert outcome.report is not None
    error = outcome.report["error"]["code"]
    assert (outcome.exit_code, outcome.report["status"], error) == (5, "error", "storage.failed")
    assert outcome.stderr.count("No space left") == 1
