"""The public functions: what they take, give and raise is what the command line does."""

import errno
import importlib
import inspect as introspection
import json
import pkgutil
import pydoc
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from loopback_hub import LoopbackHub
from root import ROOT
from support import edit, run_mopt, tree
from typer.main import get_command

import modelopt_convert as mopt
from modelopt_convert import api
from modelopt_convert.cli import app
from modelopt_convert.commands.requests import RewriteRequest

FUNCTIONS = {
    "build_nvfp4": mopt.BuildNvfp4Request,
    "advise": mopt.AdviseRequest,
    "compare": mopt.CompareRequest,
    "convert_fp8": mopt.ConvertFp8Request,
    "inspect": mopt.InspectRequest,
    "push": mopt.PushRequest,
    "swap_nibbles": mopt.SwapNibblesRequest,
    "unswizzle_scales": mopt.UnswizzleScalesRequest,
    "verify": mopt.VerifyRequest,
}
RETURNED = {
    "advise": mopt.AdviceReport,
    "compare": mopt.FidelityReport,
    "inspect": mopt.InspectReport,
    "push": mopt.PublishedReport,
    "verify": mopt.VerifiedReport,
}
# Python shows none of them: it refuses to make text of them.
HUGE = (10**5000, -(10**5000))
# What a run took, and what it was called: two runs differ there.
_VARY = {"timings_s", "peak_rss_bytes", "throughput_bytes_per_s", "free_bytes", "peak_working_bytes", "versions"}


def steady(report: dict[str, Any], *places: Path) -> Any:
    """A report without what varies, and with every place called OUT."""
    text = json.dumps({key: value for key, value in report.items() if key not in _VARY})
    for place in places:
        text = text.replace(str(place), "OUT")
    return json.loads(text)


def given(report: Any) -> dict[str, Any]:
    return json.loads(report.to_json())


class Watcher:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.total = self.done = 0
        self.lines: list[str] = []

    def begin(self, what: str, total_bytes: int) -> None:
        self.phases.append(what)
        self.total += total_bytes

    def advance(self, num_bytes: int) -> None:
        self.done += num_bytes

    def announce(self, text: str) -> None:
        self.lines.append(text)

    def detail(self, text: str) -> None:
        self.lines.append(text)


def test_builds_are_those_of_the_command_line(exports: Path, tmp_path: Path) -> None:
    for function, command, name in (
        (mopt.build_nvfp4, "build-nvfp4", "nvfp4"),
        (mopt.convert_fp8, "convert-fp8", "fp8"),
    ):
        ours, theirs = tmp_path / f"{name}-ours", tmp_path / f"{name}-theirs"
        report = function(preset="flux1-dev", export=exports / name, base=str(exports / "base"), output=ours)
        words = ("--preset", "flux1-dev", "--export", exports / name, "--base", exports / "base", "--output", theirs)
        outcome = run_mopt(command, *words)
        assert isinstance(report, mopt.Report) and report.status == "ok" and outcome.report is not None
        assert tree(ours) == tree(theirs) != {}
        assert steady(given(report), ours) == steady(outcome.report, theirs)
        assert report.versions["mopt"] == mopt.__version__


def test_rewrites_are_those_of_the_command_line(exports: Path, tmp_path: Path) -> None:
    source = exports / "nvfp4" / "transformer"
    for function, command, more in (
        (mopt.swap_nibbles, "swap-nibbles", {}),
        (mopt.unswizzle_scales, "unswizzle-scales", {"reverse": True}),
    ):
        ours, theirs = tmp_path / f"{command}-ours", tmp_path / f"{command}-theirs"
        report = function(source, str(ours), **more)
        outcome = run_mopt(command, source, theirs, *(f"--{flag}" for flag in more))
        assert outcome.report is not None and tree(ours) == tree(theirs) != {}
        assert steady(given(report), ours) == steady(outcome.report, theirs)


def test_verify_and_inspect_are_those_of_the_command_line(exports: Path, built: Path, base: Path) -> None:
    for path, more in ((built, {"base": base, "device": "cpu", "sample": "all"}), (built, {"device": "cpu"})):
        report = mopt.verify(path, **more)  # type: ignore[arg-type]
        assert type(report) is mopt.VerifiedReport
        outcome = run_mopt("verify", path, *(word for name, value in more.items() for word in (f"--{name}", value)))
        assert outcome.report is not None and steady(given(report)) == steady(outcome.report)
    found = mopt.inspect(exports / "nvfp4", base=base, all_scales=True)
    outcome = run_mopt("inspect", exports / "nvfp4", "--base", base, "--all")
    assert isinstance(found, mopt.InspectReport) and given(found) == outcome.report
    assert found.layout.basis == "proven"


def test_backends_are_tested_without_a_checkpoint() -> None:
    report = mopt.verify(self_test=True, device="cpu")
    assert report.status == "ok" and report.verify is not None and report.verify.backends


def test_a_page_is_written_whatever_the_verdict(built: Path, base: Path, tmp_path: Path) -> None:
    mopt.verify(built, device="cpu", report=str(tmp_path / "page.html"))
    assert "<html" in (tmp_path / "page.html").read_text()
    wrong = edit(built, tmp_path / "wrong", lambda tensors: tensors["proj_out.bias"].add_(1))
    with pytest.raises(mopt.CheckFailedError):
        mopt.verify(wrong, base=base, device="cpu", report=tmp_path / "wrong.html")
    assert "proj_out" in (tmp_path / "wrong.html").read_text()


def test_inputs_on_the_hub_and_publishing(hub: LoopbackHub, exports: Path, base: Path, tmp_path: Path) -> None:
    hub.seed("black-forest-labs/FLUX.1-dev", base)
    words = {"preset": "flux1-dev", "export": exports / "nvfp4", "base": "hf://black-forest-labs/FLUX.1-dev"}
    planned = mopt.build_nvfp4(**words, output=tmp_path / "out", push_to="alice/flux", dry_run=True)
    assert planned.status == "planned" and planned.pushed is not None and planned.pushed.commit is None
    report = mopt.build_nvfp4(**words, output=tmp_path / "out", push_to="alice/flux")
    assert report.network["base"].repo == "black-forest-labs/FLUX.1-dev" and report.network["base"].fetched_bytes > 0
    assert report.pushed is not None and report.pushed.commit == hub.head("alice/flux")
    again = mopt.push(tmp_path / "out", "alice/flux")
    assert type(again) is mopt.PublishedReport and again.pushed.commit is None
    assert mopt.verify(f"hf://alice/flux@{report.pushed.commit}", device="cpu").status == "ok"


def test_a_failed_push_leaves_the_build_and_says_how_to_go_on(
    hub: LoopbackHub, exports: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelopt_convert.commands.push import command

    def no(*_: object, **__: object) -> None:
        raise mopt.RemoteError("the Hub is away", code="hub.away")

    monkeypatch.setattr(command, "_send", no)
    words = {"preset": "flux1-dev", "export": exports / "nvfp4", "base": base}
    with pytest.raises(mopt.RemoteError) as caught:
        mopt.build_nvfp4(**words, output=tmp_path / "out", push_to="alice/flux")
    assert f"mopt push {tmp_path / 'out'} alice/flux" in str(caught.value.hint)
    assert caught.value.report.output.published is True and caught.value.report.exit_code == 5


def test_errors_carry_the_report_of_the_command_line(exports: Path, built: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    cases: list[tuple[type[mopt.MoptError], Any, list[str | Path]]] = [
        (mopt.InputError, lambda: mopt.inspect(tmp_path / "gone"), ["inspect", tmp_path / "gone"]),
        (
            mopt.OutputRefusedError,
            lambda: mopt.swap_nibbles(exports / "nvfp4", tmp_path / "taken"),
            ["swap-nibbles", exports / "nvfp4", tmp_path / "taken"],
        ),
        (
            mopt.CheckFailedError,
            lambda: mopt.swap_nibbles(exports / "nvfp4", tmp_path / "out", base=base),
            ["swap-nibbles", exports / "nvfp4", tmp_path / "out", "--base", base],
        ),
        (
            mopt.InconclusiveError,
            lambda: mopt.verify(built, device="cpu", require="gpu"),
            ["verify", built, "--device", "cpu", "--require", "gpu"],
        ),
    ]
    for kind, call, words in cases:
        with pytest.raises(kind) as caught:
            call()
        outcome = run_mopt(*words)
        assert steady(given(caught.value.report)) == steady(outcome.report or {})
        assert caught.value.report.error.code == caught.value.code == outcome.error_code
        assert isinstance(caught.value, mopt.MoptError) and int(caught.value.exit_code) == outcome.exit_code
    assert not (tmp_path / "out").exists()


def test_what_nobody_foresaw_is_raised_as_it_is(exports: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelopt_convert.commands.build import command

    monkeypatch.setattr(command, "plan_mixed", None)
    with pytest.raises(TypeError):
        mopt.build_nvfp4(preset="flux1-dev", export=exports / "nvfp4", base=base, output="out", dry_run=True)


# The keywords, the flag as the command line spells it, and the same words for the command line.
USAGE: list[tuple[str, dict[str, Any], str, str]] = [
    ("build_nvfp4", {}, "--base", ""),
    ("build_nvfp4", {"preset": "none", "base": "b"}, "--output", "--preset none --base b"),
    ("build_nvfp4", {"base": "b", "output": "hf://me/it"}, "--output", "--base b --output hf://me/it"),
    ("build_nvfp4", {"base": "hf://it"}, "--base", "--base hf://it"),
    ("build_nvfp4", {"base": "b", "max_shard_size": "5"}, "--max-shard-size", "--base b --max-shard-size 5"),
    ("build_nvfp4", {"base": "b", "max_shard_size": "0GB"}, "--max-shard-size", "--base b --max-shard-size 0GB"),
    (
        "build_nvfp4",
        {"base": "b", "max_shard_size": "1\u212aB"},
        "--max-shard-size",
        "--base b --max-shard-size 1\u212aB",
    ),
    (
        "build_nvfp4",
        {"base": "b", "max_shard_size": "1K\u0131B"},
        "--max-shard-size",
        "--base b --max-shard-size 1K\u0131B",
    ),
    ("build_nvfp4", {"base": "b", "max_error": -1.0}, "--max-error", "--base b --max-error -1"),
    ("build_nvfp4", {"base": "b", "max_error": float("inf")}, "--max-error", "--base b --max-error inf"),
    ("build_nvfp4", {"base": "b", "workers": 65}, "--workers", "--base b --workers 65"),
    ("build_nvfp4", {"base": "b", "verify": "maybe"}, "--verify", "--base b --verify maybe"),
    ("build_nvfp4", {"base": "b", "component": ["vae"]}, "--component", "--base b --component vae"),
    ("build_nvfp4", {"base": "b", "output": ""}, "--output", "--base b --output="),
    ("build_nvfp4", {"base": ""}, "--base", "--base="),
    ("build_nvfp4", {"base": "b", "preset": ""}, "--preset", "--base b --preset="),
    ("convert_fp8", {"base": "b", "checkpoint": "c"}, "--checkpoint", "--base b --checkpoint c"),
    ("swap_nibbles", {"source": "s", "output": ""}, "OUTPUT", "s "),
    ("verify", {}, "CHECKPOINT", ""),
    ("verify", {"checkpoint": "c", "self_test": True}, "CHECKPOINT", "c --self-test"),
    ("verify", {"checkpoint": "c", "backend": "fast"}, "--backend", "c --backend fast"),
    ("verify", {"checkpoint": "c", "backend": "sgl-\u212aernel"}, "--backend", "c --backend sgl-\u212aernel"),
    ("verify", {"checkpoint": "c", "sample": 0}, "--sample", "c --sample 0"),
    ("verify", {"checkpoint": "c", "sample": "\u0663"}, "--sample", "c --sample \u0663"),
    ("verify", {"checkpoint": "c", "require": "luck"}, "--require", "c --require luck"),
    ("inspect", {"source": "s", "engine": "vllm"}, "--engine", "s --engine vllm"),
    ("push", {"checkpoint": "c", "repo_id": "r", "message": " "}, "--message", "c r --message="),
    ("push", {"checkpoint": "c", "repo_id": "r", "message": "\udcff"}, "--message", "c r --message \udcff"),
    ("push", {"checkpoint": "hf://a/b", "repo_id": "r"}, "CHECKPOINT", "hf://a/b r"),
    ("inspect", {"source": "hf://a/b\udcff"}, "SOURCE", "hf://a/b\udcff"),
]


@pytest.mark.parametrize(("name", "named", "flag", "words"), USAGE)
def test_a_request_that_cannot_be_meant_is_a_usage_error(
    name: str, named: dict[str, Any], flag: str, words: str
) -> None:
    with pytest.raises(mopt.UsageError) as caught:
        getattr(mopt, name)(**named)
    assert caught.value.flag == flag and str(caught.value).startswith(f"{flag}: ") and caught.value.report is None
    assert isinstance(caught.value, ValueError) and int(caught.value.exit_code) == 2
    outcome = run_mopt(name.replace("_", "-"), *words.split(" ") if words else ())
    assert outcome.exit_code == 2 and flag in outcome.stderr and outcome.stderr.startswith("Usage: ")


@pytest.mark.parametrize("name", ["keep_bf16", "component"])
def test_one_word_where_a_list_belongs_is_a_usage_error(name: str) -> None:
    """Else it would be a list of letters."""
    with pytest.raises(mopt.UsageError, match="takes a list"):
        mopt.BuildNvfp4Request(base="b", **{name: "transformer"})


@pytest.mark.parametrize(
    ("size", "size_bytes"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5 kB", 1500), ("1gib", 2**30), ("2TiB", 2**41)],
)
def test_sizes(size: str, size_bytes: int) -> None:
    assert mopt.BuildNvfp4Request(base="b", max_shard_size=size).shard_bytes == size_bytes


def test_progress_is_told(exports: Path, base: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    mopt.build_nvfp4(preset="flux1-dev", base=base, output=tmp_path / "out", progress=watcher)
    assert "write diffusion_pytorch_model.safetensors" in watcher.phases
    assert 0 < watcher.done <= watcher.total
    assert watcher.lines[0].startswith("no --export: quantizing")


@pytest.mark.parametrize("raised", [OSError(errno.ENOSPC, "no room"), RuntimeError("stop"), KeyError("bar")])
@pytest.mark.parametrize("told", ["begin", "advance"])
def test_what_a_progress_raises_is_the_callers_and_not_the_disks(
    exports: Path, base: Path, tmp_path: Path, told: str, raised: Exception
) -> None:
    class Failing(Watcher):
        def advance(self, num_bytes: int) -> None:
            if told == "advance":
                raise raised

        def begin(self, what: str, total_bytes: int) -> None:
            if told == "begin" and what.startswith("write"):
                raise raised

    with pytest.raises(type(raised)) as caught:
        mopt.swap_nibbles(exports / "nvfp4" / "transformer", tmp_path / "out", progress=Failing())
    assert caught.value is raised and raised.__cause__ is None
    assert list(tmp_path.glob("out*")) == []


def test_presets_are_given_as_they_are_read(tmp_path: Path) -> None:
    found = mopt.presets()
    assert [one.preset.name for one in found] == sorted(one.preset.name for one in found)
    assert "flux1-dev" in [one.preset.name for one in found]
    (tmp_path / "mine.toml").write_text(mopt.presets("flux1-dev")[0].text)
    (mine,) = mopt.presets(tmp_path / "mine.toml")
    assert isinstance(mine, mopt.LoadedPreset) and mine.preset.name == "flux1-dev"
    with pytest.raises(mopt.InputError) as caught:
        mopt.presets("flux9")
    assert caught.value.code == "preset.unknown" and caught.value.report is None
    for number in range(1500):
        (tmp_path / f"{number}.toml").write_text(f'extends = "./{number + 1}.toml"')
    with pytest.raises(mopt.InputError) as caught:
        mopt.presets(tmp_path / "0.toml")
    assert caught.value.code == "preset.extends"


def test_a_request_is_a_value() -> None:
    one, other = (mopt.VerifyRequest("c", base="b", progress=watcher) for watcher in (None, Watcher()))
    assert one == other and "progress" not in repr(one)
    with pytest.raises(FrozenInstanceError):
        one.base = "c"  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        one.more = 1  # type: ignore[attr-defined]
    listed, told = (mopt.BuildNvfp4Request(base="b", keep_bf16=words) for words in (["a", "b"], ("a", "b")))
    assert listed == told and len({listed, told}) == 1
    with pytest.raises(TypeError, match="abstract"):
        RewriteRequest("source", "output")  # type: ignore[abstract]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_types_are_told_at_run_time(name: str) -> None:
    function = getattr(mopt, name)
    result = RETURNED.get(name, mopt.Report)
    found = get_type_hints(function)
    assert found.pop("return") is result and set(found) == set(introspection.signature(function).parameters)
    assert f"-> 'modelopt_convert.{result.__name__}'" in pydoc.render_doc(function)


@pytest.mark.parametrize("name", sorted({*api.__all__} - {"Progress"}))
def test_no_public_name_has_a_hint_that_cannot_be_read(name: str) -> None:
    assert name != "presets" or get_type_hints(mopt.presets)["return"] == list[mopt.LoadedPreset]
    get_type_hints(getattr(mopt, name))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_keywords_are_the_fields_and_the_flags(name: str) -> None:
    """Every field of a request is a keyword of the function, and has one place on the command line."""
    kind, function = FUNCTIONS[name], getattr(mopt, name)
    keywords = introspection.signature(function).parameters
    taken = introspection.signature(kind).parameters
    assert {one.name: (one.kind, one.default) for one in keywords.values()} == {
        one.name: (one.kind, one.default) for one in taken.values()
    }
    assert {one.name for one in fields(kind)} == set(keywords)
    command = get_command(app).commands[name.replace("_", "-")]  # type: ignore[attr-defined]
    asked = {parameter.name for parameter in command.params}
    assert asked - {"json", "report_json", "quiet", "verbose", "no_color", "help"} == set(keywords) - {"progress"}
    assert function.__name__ == name and all(f"    {keyword}: " in function.__doc__ for keyword in keywords)


def test_no_module_takes_a_public_functions_place() -> None:
    """A module modelopt_convert.verify would replace the function of that name once anything imported it."""
    for found in pkgutil.walk_packages(mopt.__path__, f"{mopt.__name__}."):
        if not found.name.endswith(("__main__", "triton_kernels")):
            importlib.import_module(found.name)
    for name in FUNCTIONS:
        assert callable(getattr(mopt, name)), name
        with pytest.raises((mopt.MoptError, TypeError)):
            getattr(mopt, name)(**({"source": "gone"} if name == "inspect" else {}))
    assert mopt.presets()


def test_importing_imports_nothing_heavy() -> None:
    code = """
import sys
import modelopt_convert
heavy = {"torch", "pydantic", "typer", "numpy", "rich", "huggingface_hub", "safetensors"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
modelopt_convert.build_nvfp4, modelopt_convert.BuildNvfp4Request(base="b"), modelopt_convert.MoptError
assert not heavy & set(sys.modules), heavy & set(sys.modules)
modelopt_convert.presets(), modelopt_convert.Report
assert "torch" not in sys.modules and "typer" not in sys.modules
assert set(modelopt_convert.__all__) <= set(dir(modelopt_convert))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there_and_typed_as_what_it_is() -> None:
    """The imports that type checkers see and the names that programs get are the same."""
    import ast

    tree = ast.parse(Path(str(api.__file__)).read_text())
    imported = {
        alias.name: str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("modelopt_convert.")
        for alias in node.names
    }
    assert {"__version__", *api.__all__} == set(mopt.__all__)
    for name in api.__all__:
        home = importlib.import_module(imported.get(name, api.__name__))
        assert getattr(mopt, name) is getattr(api, name) is getattr(home, name)
    names: dict[str, object] = {}
    exec("from modelopt_convert import *", names)
    assert set(mopt.__all__) <= set(names)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mopt.nothing  # noqa: B018


def test_types_are_seen_from_outside(tmp_path: Path) -> None:
    """A program's own mypy knows the keywords and what comes back."""
    program = tmp_path / "program.py"
    program.write_text(
        "from pathlib import Path\n"
        "import modelopt_convert as mopt\n"
        "reveal_type(mopt.build_nvfp4(base=Path('b'), output='o', component=['transformer']))\n"
        "reveal_type(mopt.inspect('s', max_error=0.1))\n"
        "reveal_type(mopt.perform(mopt.PushRequest('c', 'r')))\n"
        "mopt.verify('c', devise='cpu')\n"
        "mopt.swap_nibbles('s')\n"
        "mopt.verify('c', device='tpu')\n"
        "reveal_type(mopt.verify('c').verify)\n"
        "reveal_type(mopt.push('c', 'r').pushed)\n"
        "reveal_type(mopt.MoptError.report)\n"
        "from modelopt_convert import __all__, __version__\n"
    )
    examples = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE | re.DOTALL)
    for number, example in enumerate(examples):
        (tmp_path / f"example_{number}.py").write_text(example)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", str(tmp_path / "cache")]
    files = [path.name for path in tmp_path.glob("*.py")]
    found = subprocess.run([*command, *files], capture_output=True, text=True, cwd=tmp_path).stdout.splitlines()
    assert len(files) > 1 and [line for line in found if "error:" in line and not line.startswith("program.py")] == []
    expected = [
        (3, "report.report.Report"), (4, "report.inspect.InspectReport"), (5, "report.report.PublishedReport"),
        (6, 'Unexpected keyword argument "devise"'), (7, "Too few arguments"), (8, 'has incompatible type'),
        (9, '"modelopt_convert.report.verify.VerifyReport"'), (10, '"modelopt_convert.report.report.PushedReport"'),
        (11, '"modelopt_convert.run.errors.RunReport | None"'),
    ]  # fmt: skip
    assert len([line for line in found if "error:" in line]) == 3
    for number, words in expected:
        assert any(f"program.py:{number}: " in line and words in line for line in found), (words, found)


def test_python_dash_m_is_mopt() -> None:
    done = subprocess.run([sys.executable, "-m", "modelopt_convert", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"mopt {mopt.__version__}\n"


@pytest.mark.parametrize(
    ("function", "named"),
    [
        ("swap_nibbles", {"source": "here", "output": "there", "overwrite": "no"}),
        ("swap_nibbles", {"source": "here", "output": "there", "workers": 1.5}),
        ("swap_nibbles", {"source": "here", "output": "there", "workers": True}),
        ("swap_nibbles", {"source": "here", "output": b"there"}),
        ("swap_nibbles", {"source": "here", "output": "the\0re"}),
        ("swap_nibbles", {"source": "here", "output": "the\ud800re"}),
        ("swap_nibbles", {"source": Path("he\ud800re"), "output": "there"}),
        ("verify", {"checkpoint": "here", "report": "the\ud800re"}),
        ("build_nvfp4", {"base": "here", "output": "there", "preset": "\ud800"}),
        ("build_nvfp4", {"base": "here", "output": "there", "keep_bf16": ["a", "\udcff"]}),
        ("inspect", {"source": Path("hf://a/b\udcff")}),
        ("push", {"checkpoint": "here", "repo_id": "a/\ud800"}),
        ("presets", {"name": "the\ud800re"}),
        ("presets", {"name": 5}),
        ("presets", {"name": []}),
        ("presets", {"name": ""}),
        ("presets", {"name": "nu\0l"}),
        ("swap_nibbles", {"source": "here", "output": "there", "executor": ["threads"]}),
        ("build_nvfp4", {"base": "here", "output": "there", "verify": None}),
        ("build_nvfp4", {"base": "here", "output": "there", "max_shard_size": 5}),
        ("build_nvfp4", {"base": "here", "output": "there", "keep_bf16": None}),
        ("build_nvfp4", {"base": "here", "output": "there", "keep_bf16": [3]}),
        ("build_nvfp4", {"base": "here", "output": "there", "component": None}),
        ("verify", {"checkpoint": "here", "require": ["gpu"]}),
        ("verify", {"checkpoint": "here", "max_error": "a"}),
        ("verify", {"checkpoint": "here", "report": 3}),
        ("push", {"checkpoint": None, "repo_id": None}),
        ("inspect", {"source": 3}),
        ("inspect", {"source": "here", "progress": 3}),
    ],
)
def test_a_value_of_another_type_is_refused_before_anything_is_read(function: str, named: dict[str, Any]) -> None:
    with pytest.raises(mopt.UsageError):
        getattr(mopt, function)(**named)


@pytest.mark.parametrize(
    ("function", "name"),
    [*(("build_nvfp4", one.name) for one in fields(mopt.BuildNvfp4Request)), ("verify", "sample"), ("presets", "name")],
)
def test_an_integer_that_cannot_be_shown_is_refused_everywhere(function: str, name: str) -> None:
    named = {"build_nvfp4": {"base": "here", "output": "there"}, "verify": {"checkpoint": "here"}, "presets": {}}
    for huge in (*HUGE, [HUGE[0]]):
        with pytest.raises(mopt.UsageError):
            getattr(mopt, function)(**(named[function] | {name: huge}))


def test_a_path_may_have_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(mopt.InputError) as caught:
        mopt.inspect(tmp_path / "none\udcff")
    assert caught.value.code == "input.missing" and caught.value.path == str(tmp_path / "none\udcff")


@pytest.mark.parametrize("other", [None, 3, mopt.SwapNibblesRequest, *HUGE], ids=lambda one: type(one).__name__)
def test_only_requests_are_performed(other: Any) -> None:
    with pytest.raises(TypeError, match="expected a request"):
        mopt.perform(other)
