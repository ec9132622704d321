"""The command line: its frozen surface, its streams, its exit codes, and what it does not import."""

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from root import ROOT
from support import Tensors, build, copy, edit, load, run_mopt, tree
from typer.main import get_command
from typer.testing import CliRunner

from modelopt_convert import api
from modelopt_convert.cli import app
from modelopt_convert.commands.flags import Request
from modelopt_convert.commands.requests import (
    BuildNvfp4Request,
    ConvertFp8Request,
    InspectRequest,
    SwapNibblesRequest,
    UnswizzleScalesRequest,
)
from modelopt_convert.engines.sglang import VERSION
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.report.inspect import InspectReport
from modelopt_convert.report.report import Report
from modelopt_convert.run.errors import UsageError

MAIN = "from modelopt_convert.cli import main; main()"

# Every flag is a promise; a new one is a decision that somebody should see in this list.
_WRITING = {
    "--download",
    "--workers",
    "--executor",
    "--overwrite",
    "--overwrite-foreign",
    "--dry-run",
    "-n",
    "--verbose",
    "-v",
    "--max-error",
    "--accept-near",
}
_CHOOSING = {"--variant", "--config"}
_TELLING = {"--json", "--report-json", "--quiet", "-q", "--no-color"}
FLAGS = {
    "advise": {
        "base", "--pipeline", "--prompts", "--output", "--budget", "--effective-bits", "--psnr", "--preset", "--format",
        "--calibration", *_CHOOSING, "--score", "--scored", "--points", "--steps", "--size", "--frames", "--seeds",
        "--device", "--offload", "--svg", "--report", "--verbose", "-v", *_TELLING,
    },
    "build-nvfp4": {
        "--preset", "--export", "--base", "--calibration", *_CHOOSING,
        "--output", "--keep-bf16", "--max-shard-size", "--component",
        "--pipeline-output", "--to", "--inexact",
        "--engine", "--allow-known-broken", "--verify", "--push-to", "--base-model", "--proof", "--device", "--weights",
        *_WRITING, *_TELLING,
    },
    "calibrate": {
        "base", "--pipeline", "--prompts", "--output", *_CHOOSING, "--steps", "--size", "--frames", "--seeds",
        "--gptq", "--headroom", "--device", "--offload", "--share", "--overwrite", "--verbose", "-v", *_TELLING,
    },
    "compare": {
        "checkpoint", "others", "--base", *_CHOOSING, "--pipeline", "--prompts", "--inputs", "--seeds", "--steps",
        "--size", "--frames", "--device", "--offload", "--rule", "--require", "--download", "--report", "--verbose",
        "-v", *_TELLING,
    },
    "convert": {
        "source", "output", "--to", "--from", "--base", "--variant", "--config", "--inexact", "--max-shard-size",
        *(_WRITING - {"--executor"}), *_TELLING,
    },
    "convert-fp8": {
        "--preset", "--export", "--base", "--calibration", *_CHOOSING, "--checkpoint",
        "--output", "--keep-bf16", "--max-shard-size",
        "--component", "--pipeline-output", "--to", "--inexact",
        "--engine", "--allow-known-broken", "--verify", "--push-to", "--base-model", "--proof", *_WRITING, *_TELLING,
    },
    "verify": {
        "checkpoint", "--base", "--calibration", *_CHOOSING, "--backend", "--device", "--sample", "--require",
        "--self-test", "--prewarm", "--max-error", "--accept-near", "--report", "--workers", "--download", "--verbose",
        "-v", *_TELLING,
    },
    "inspect": {
        "source", "--base", *_CHOOSING, "--all", "--engine", "--engines", "--max-error", "--download", "--verbose",
        "-v", *_TELLING,
    },
    "swap-nibbles": {"source", "output", "--base", "--variant", "--force-names", *_WRITING, *_TELLING},
    "unswizzle-scales": {"source", "output", "--base", "--variant", "--reverse", "--force-names", *_WRITING, *_TELLING},
    "push": {
        "checkpoint", "repo_id", "--create-pr", "--private", "--revision", "--message", "--engine",
        "--allow-known-broken", "--dry-run", "-n", *_TELLING,
    },
    "presets": {"name", "base", *_CHOOSING, "--json"},
    "doctor": {"path", "--json", "--no-color"},
    "demo": {"folder", "--json", "--quiet", "-q", "--no-color"},
    "explain": {"code", "--json"},
}  # fmt: skip


def mopt(*arguments: str | Path, code: str = MAIN, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run mopt in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_flags_are_frozen() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    found = {
        name: {opt for parameter in command.params for opt in parameter.opts} for name, command in commands.items()
    }
    assert found == FLAGS


@pytest.mark.parametrize(
    ("kind", "algorithm"),
    [
        (BuildNvfp4Request, "nvfp4"),
        (SwapNibblesRequest, "nvfp4"),
        (UnswizzleScalesRequest, "nvfp4"),
        (InspectRequest, "nvfp4"),
        (ConvertFp8Request, "fp8"),
    ],
)
def test_the_limit_of_errors_is_the_formats_own(kind: type[Request[Report]], algorithm: str) -> None:
    (found,) = (one.default for one in fields(kind) if one.name == "max_error")
    assert found == FORMATS[algorithm].max_error


def test_the_view_of_an_engine_is_of_one_version() -> None:
    assert InspectRequest("x", engine=VERSION).engine == VERSION
    name, _, version = VERSION.partition("@")
    with pytest.raises(UsageError, match=re.escape(f"known is {name} ({version})")):
        InspectRequest("x", engine=f"{VERSION}.1")


@pytest.mark.parametrize("command", [[], *([name] for name in FLAGS)])
def test_help_shows_examples(command: list[str]) -> None:
    for flag in ("--help", "-h"):
        outcome = run_mopt(*command, flag, json_report=False)
        assert outcome.exit_code == 0 and "Examples:" in outcome.stdout
    if not command:
        assert (
            "..." not in outcome.stdout.partition("Commands:")[2] and max(map(len, outcome.stdout.splitlines())) <= 80
        )
        assert all(word in outcome.stdout for word in ("Exit codes", "build-nvfp4", "push", "presets"))


def test_version() -> None:
    from modelopt_convert import __version__

    for flag in ("--version", "-V"):
        assert run_mopt(flag, json_report=False).stdout == f"mopt {__version__}\n"


def test_help_and_version_are_found_where_other_tools_have_them() -> None:
    assert run_mopt("version", json_report=False).stdout == run_mopt("--version", json_report=False).stdout
    assert run_mopt("help", json_report=False).stdout == run_mopt("--help", json_report=False).stdout
    for command in FLAGS:
        told = run_mopt("help", command, json_report=False)
        assert (told.exit_code, told.stdout) == (0, run_mopt(command, "--help", json_report=False).stdout)
    assert run_mopt("help", "nothing", json_report=False).exit_code == 2


def test_inspect_tells_its_reasons_on_demand(exports: Path) -> None:
    told, more = (run_mopt("inspect", exports / "nvfp4", *flags, json_report=False).stdout for flags in ((), ("-v",)))
    assert told.splitlines()[0] == more.splitlines()[0] and "because" not in told and "F8_E4M3" not in told
    assert "  because config.json: quant_method modelopt" in more and "F8_E4M3" in more
    assert "  undetermined: --base BASE, the model that it was made from, tells\n" in told


def test_a_dry_run_imports_no_torch_and_writes_nothing(exports: Path, tmp_path: Path) -> None:
    code = f"import sys, atexit; atexit.register(lambda: print('torch' in sys.modules)); {MAIN}"
    arguments = ["build-nvfp4", "--export", exports / "nvfp4", "--base", exports / "base", "--output", tmp_path / "out"]
    result = mopt(*arguments, "--dry-run", code=code)
    assert result.returncode == 0 and result.stdout.endswith("False\n")
    assert "would write" in result.stdout and "beyond start-up" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_full_size_flux1_is_planned_from_headers(tmp_path: Path) -> None:
    """24 GB of sparse files; names and shapes from diffusers' own class."""
    from sparse_flux1 import make

    make(tmp_path)
    outcome = build(tmp_path / "export", tmp_path / "base", tmp_path / "out", "--dry-run", "--workers", "2")
    assert outcome.exit_code == 0 and outcome.report is not None
    report = outcome.report
    assert report["status"] == "planned"
    assert sum(rule["replaced"] for rule in report["rules"]) == 19 * 6 + 38 * 2
    # 19 double blocks with 8 attention projections, 38 single blocks with 3 and proj_out, four tensors and a bias each.
    assert report["counts"]["export"]["kept"] == (19 * 8 + 38 * 4) * 5
    # FLUX.1-dev has 11,901,408,320 parameters; a packed one takes 9/16 of a byte, a packed module two more floats.
    elements = 19 * 8 * 3072**2 + 38 * (3 * 3072**2 + 3072 * 15360)
    assert report["output"]["bytes"] == 2 * (11_901_408_320 - elements) + elements * 9 // 16 + 8 * (19 * 8 + 38 * 4)
    assert len(report["output"]["shards"]) == 4
    assert report["peak_working_bytes"] < 64_000_000
    assert not (tmp_path / "out").exists()


def test_presets_lists_and_prints(tmp_path: Path) -> None:
    listed = run_mopt("presets", json_report=False)
    assert listed.exit_code == 0 and "flux1-dev " in listed.stdout
    assert {len(line.split()) for line in listed.stdout.splitlines()} == {2 + len(FORMATS)}
    assert max(map(len, listed.stdout.splitlines())) <= 80
    printed = run_mopt("presets", "flux1-dev", json_report=False)
    assert tomllib.loads(printed.stdout)["name"] == "flux1-dev"  # the recipe is a comment: the output is a preset
    assert "--model flux-dev" in printed.stdout and "--model-dtype BFloat16" in printed.stdout
    mine = tmp_path / "mine.toml"
    mine.write_text(printed.stdout)
    assert run_mopt("presets", mine, json_report=False).exit_code == 0
    unknown = run_mopt("presets", "flux9", json_report=False)
    assert unknown.exit_code == 3 and "preset.unknown" in unknown.stderr and "flux1-dev" in unknown.stderr
    empty = run_mopt("presets", "", json_report=False)
    assert empty.exit_code == 2 and empty.stderr.startswith("Usage: ") and "must not be empty" in empty.stderr


def test_presets_as_json_are_those_of_the_api() -> None:
    listed = run_mopt("presets").report
    assert listed is not None and listed["schema"] == "mopt.presets/1"
    assert [one["name"] for one in listed["presets"]] == [one.preset.name for one in api.presets()]
    (one,) = api.presets("flux1-kontext-dev")
    printed = run_mopt("presets", "flux1-kontext-dev").report
    assert printed is not None
    (found,) = printed["presets"]
    assert (found["fields"], found["sha256"]) == (one.preset.model_dump(mode="json"), one.sha256)
    assert found["formats"] == {kind: rules.status for kind, rules in one.preset.sets().items()}
    unknown = run_mopt("presets", "flux9")
    assert (unknown.exit_code, unknown.error_code) == (3, "preset.unknown") and unknown.stdout.count("\n") == 1


@pytest.mark.parametrize("words", ["build-nvfp4 --no-such-flag", "verify", "inspect", "no-such-command", "--no-such"])
def test_a_usage_error_under_json_is_one_document(words: str) -> None:
    """What stderr says, too; without --json stdout is empty."""
    told, people = run_mopt(*words.split()), run_mopt(*words.split(), json_report=False)
    assert told.exit_code == people.exit_code == 2 and people.stdout == ""
    assert told.stdout.count("\n") == 1 and told.report is not None
    command = words.split()[0]
    model = InspectReport if command == "inspect" else Report
    assert model.model_validate_json(told.stdout).to_json() == told.stdout.strip()
    assert (told.report["status"], told.report["exit_code"], told.error_code) == ("refused", 2, "usage")
    assert f"Error: {told.report['error']['message']}" in told.stderr
    assert "Usage: " in told.stderr and told.report["error"]["hint"].endswith("--help` says what it takes")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mopt build-nvfp4 --preset flux1-dev", ["flux1-dev"]),
        ("mopt build-nvfp4 --preset no", ["none"]),
        ("mopt presets ltx2", ["ltx2"]),
        ("mopt presets ne", ["new"]),
        ("mopt verify --backend tor", ["torch"]),
        ("mopt verify --backend torch,tri", ["torch,triton"]),
        ("mopt build-nvfp4 --engine vllm", ["vllm-omni"]),
        ("mopt inspect --engine sg", ["sglang", VERSION]),
        ("mopt verify --device cu", ["cuda"]),
    ],
)
def test_values_are_completed(line: str, expected: list[str]) -> None:
    """As bash asks for them."""
    words = line.split(" ")
    asked = {"_MOPT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    found = CliRunner().invoke(app, [], env=asked, prog_name="mopt")
    assert (found.exit_code, found.stdout.split()) == (0, expected)


def test_json_is_one_object_whatever_the_outcome(exports: Path, tmp_path: Path) -> None:
    done = build(exports / "nvfp4", exports / "base", tmp_path / "out")
    again = build(exports / "nvfp4", exports / "base", tmp_path / "out")
    planned = build(exports / "nvfp4", exports / "base", tmp_path / "other", "-n")
    bad = build(exports / "fp8", exports / "base", tmp_path / "third")
    for outcome, status, code in ((done, "ok", 0), (again, "refused", 4), (planned, "planned", 0), (bad, "refused", 3)):
        report = json.loads(outcome.stdout)
        assert outcome.stdout.isascii() and outcome.stdout.count("\n") == 1
        assert (report["schema"], report["status"], report["exit_code"]) == ("mopt.report/1", status, code)
        assert outcome.exit_code == code and (report["error"] is None) == (code == 0)
    assert done.report is not None and done.report["output"]["published"] is True


def test_report_json_is_the_same_object(exports: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    outcome = build(exports / "nvfp4", exports / "base", tmp_path / "out", "--report-json", path)
    assert json.loads(path.read_text()) == outcome.report
    inside = build(exports / "nvfp4", exports / "base", tmp_path / "out", "--report-json", tmp_path / "out" / "r.json")
    assert inside.exit_code == 2 and not (tmp_path / "out" / "r.json").exists()


@pytest.mark.parametrize(
    "where", ["export/config.json", "base/x.json", "flux1-dev-nvfp4/r.json", "flux1-dev-nvfp4", "link"]
)
def test_a_report_never_lands_in_an_input_or_in_the_output(
    exports: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where OUT is left to its default, and by way of a link."""
    monkeypatch.chdir(tmp_path)
    copy(exports / "nvfp4", tmp_path / "export"), copy(exports / "base", tmp_path / "base")
    (tmp_path / "link").symlink_to(tmp_path / "export" / "config.json")
    inputs = tree(tmp_path / "export") | tree(tmp_path / "base")
    arguments = ["--preset", "flux1-dev", "--export", "export", "--base", "base", "--report-json", where]
    outcome = run_mopt("build-nvfp4", *arguments)
    assert outcome.exit_code in (2, 5)
    assert tree(tmp_path / "export") | tree(tmp_path / "base") == inputs
    if (tmp_path / "flux1-dev-nvfp4").exists():
        assert not (tmp_path / "flux1-dev-nvfp4" / "r.json").exists()


@pytest.mark.parametrize("name", ["config.json", "hard.json", "link.json", "mine.json", "preset.toml"])
def test_a_report_never_replaces_what_is_not_one(exports: Path, tmp_path: Path, name: str) -> None:
    """Also a hard link of an input, or the preset: exit 4 and the report on stdout, before any work."""
    export = copy(exports / "nvfp4", tmp_path / "export")
    (tmp_path / "hard.json").hardlink_to(export / "config.json")
    (tmp_path / "mine.json").write_text('{"mine": 1}')
    (tmp_path / "link.json").symlink_to("nowhere")
    preset = tmp_path / "preset.toml"
    preset.write_text((ROOT / "presets" / "flux1-dev.toml").read_text())
    where = export / name if name == "config.json" else tmp_path / name
    before = tree(tmp_path)
    words = ("--preset", preset, "--export", export, "--base", exports / "base", "--output", tmp_path / "out")
    outcome = run_mopt("build-nvfp4", *words, "--report-json", where)
    if where.parent == export or where == preset:
        assert outcome.exit_code == 2
    else:
        assert (outcome.exit_code, outcome.error_code) == (4, "report.foreign"), outcome.stderr
        assert outcome.stderr.count("error: ") == 1, outcome.stderr
    assert tree(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["5,5GB", "5.GB", "5 - 6GB", "5", "5GB x", "5gbit", "0GB"])
def test_sizes_are_read_whole_or_refused(exports: Path, tmp_path: Path, size: str) -> None:
    outcome = build(exports / "nvfp4", exports / "base", tmp_path / "out", "-n", "--max-shard-size", size)
    assert outcome.exit_code == 2


def test_people_get_text_without_escapes_and_quiet_gets_nothing(exports: Path, tmp_path: Path) -> None:
    arguments = ["build-nvfp4", "--export", exports / "nvfp4", "--base", exports / "base", "--overwrite"]
    loud = mopt(*arguments, "--output", tmp_path / "out")
    assert loud.returncode == 0 and "\x1b" not in loud.stdout + loud.stderr
    codes = 2 * sum(tensor.numel() for tensor in load(tmp_path / "out").values() if tensor.dtype == torch.uint8)
    # Of those that are written every code; of those that the base replaces, rows.
    assert f"proof: 24 modules reproduced, 100.00% of {codes} codes (max calibration)" in loud.stdout
    assert re.search(
        r"^proof: 16 modules reproduced, 100\.00% of \d+ sampled codes; the base's are written instead$",
        loud.stdout,
        re.M,
    ), loud.stdout
    # The answer comes first: what is known, what stands where, and a command that runs as printed; tables with -v.
    first, second, third, *_ = loud.stdout.splitlines()
    assert first == "proven" and second.startswith(f"wrote {tmp_path / 'out'}: ")
    assert third == f"next: mopt verify {tmp_path / 'out'} --base {exports / 'base'}"
    assert "transformer_blocks.*.ff_context.net.0.proj" not in loud.stdout
    assert "write diffusion_pytorch_model.safetensors" in loud.stderr
    quiet = mopt(*arguments, "--output", tmp_path / "out", "-q")
    assert quiet.returncode == 0 and quiet.stdout == "" and "write diff" not in quiet.stderr
    verbose = mopt(*arguments, "--output", tmp_path / "out", "-v")
    assert "transformer_blocks.1.attn.to_q.weight_scale: copy from export" in verbose.stderr
    assert "transformer_blocks.*.ff_context.net.0.proj" in verbose.stdout
    assert verbose.stdout.splitlines()[:3] == loud.stdout.splitlines()[:3]


def test_what_a_terminal_could_act_on_is_escaped(exports: Path, tmp_path: Path) -> None:
    def poison(tensors: Tensors) -> None:
        tensors["evil\x1b[2J\u202e.pre_quant_scale"] = torch.ones(1)

    outcome = build(edit(exports / "nvfp4", tmp_path / "export", poison), exports / "base", tmp_path / "out")
    assert outcome.exit_code == 3
    assert "\x1b" not in outcome.stderr and "\u202e" not in outcome.stderr and "\\x1b" in outcome.stderr


def test_a_bug_is_exit_70_and_not_a_failed_check(exports: Path, tmp_path: Path) -> None:
    code = "import modelopt_convert.commands.build.command as c; c.plan_mixed = None; " + MAIN
    arguments = ["build-nvfp4", "--export", exports / "nvfp4", "--base", exports / "base", "--output", tmp_path / "out"]
    result = mopt(*arguments, code=code)
    assert result.returncode == 70 and "bug in mopt" in result.stderr and "Traceback" not in result.stderr
    assert "Traceback" in mopt(*arguments, code=code, MOPT_DEBUG="1").stderr
    early = mopt("presets", code="import modelopt_convert.run.text as t; del t.printable; " + MAIN)
    assert early.returncode == 70


def test_a_reader_that_leaves_does_not_change_the_exit_code() -> None:
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([sys.executable, "-c", MAIN, "presets"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("streams", "exit_code"),
    [("2>/dev/full", 0), ("2>&-", 0), (">&-", 0), (">/dev/full", 5), ("2>&1 >/dev/null | head -c1 >/dev/null", 0)],
)
def test_streams_that_cannot_be_written_do_not_pass_for_something_else(
    exports: Path, tmp_path: Path, streams: str, exit_code: int
) -> None:
    """Not for a failed check (1), nor for a bug (70); OUT is in place whatever can be said of it."""
    arguments = f"--export {exports / 'nvfp4'} --base {exports / 'base'} --output {tmp_path / 'out'} --json"
    script = f"set -o pipefail; {sys.executable} -c '{MAIN}' build-nvfp4 {arguments} {streams}"
    assert subprocess.run(["bash", "-c", script], check=False).returncode == exit_code
    assert (tmp_path / "out" / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_preset_is_chosen_and_said(exports: Path, tmp_path: Path) -> None:
    outcome = build(exports / "nvfp4", exports / "base", tmp_path / "out", preset=None)
    assert outcome.exit_code == 0 and outcome.report is not None
    assert outcome.report["preset"]["name"] == "flux1-dev"
    assert "preset.chosen" in {warning["code"] for warning in outcome.report["warnings"]}


def test_the_output_defaults_to_the_presets_name(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run_mopt(
        "build-nvfp4", "--preset", "flux1-dev", "--export", exports / "nvfp4", "--base", exports / "base"
    )
    assert outcome.exit_code == 0 and (tmp_path / "flux1-dev-nvfp4" / "config.json").is_file()


def test_preset_none_keeps_only_what_is_named(exports: Path, tmp_path: Path) -> None:
    outcome = build(
        exports / "nvfp4",
        exports / "base",
        tmp_path / "out",
        "--keep-bf16",
        "transformer_blocks.[:1].**",
        preset="none",
    )
    assert outcome.exit_code == 0 and outcome.report is not None
    (rule,) = outcome.report["rules"]
    assert (rule["kind"], rule["replaced"]) == ("user", 14)
    assert outcome.report["preset"] is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:" not in card
