"""Every exit code, by commands that end with it: what people, --json and --quiet are told is one and the same."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from faults import PACKED
from figures import note
from support import Outcome, Tensors, edit, run_mopt

from modelopt_convert.commands.build import command as build_command
from modelopt_convert.commands.convert import command as convert_command
from modelopt_convert.run.errors import ExitCode
from modelopt_convert.verification.levels import kernels

Patch = Callable[[pytest.MonkeyPatch], object]


def nothing(_patch: pytest.MonkeyPatch) -> None:
    """As it is."""


def full_disk(patch: pytest.MonkeyPatch) -> None:
    status = SimpleNamespace(f_bavail=0, f_frsize=4096, f_blocks=10**6, f_bfree=0)
    patch.setattr(os, "statvfs", lambda _path: status)


def broken_kernel(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(kernels, "self_test", lambda *_: "returns something else")


def bug(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(build_command, "plan_mixed", None)
    patch.setattr(convert_command, "plan_output", None)


def stopped_by(number: signal.Signals) -> Patch:
    def patched(patch: pytest.MonkeyPatch) -> None:
        for module, step in ((build_command, "plan_mixed"), (convert_command, "plan_output")):
            patch.setattr(module, step, lambda *_words, **_more: os.kill(os.getpid(), number))

    return patched


BUILD = "--preset flux1-dev --export {nvfp4} --base {base} --output {out}"
MOVED, DECODED = "{nvfp4} {out} --to torchao", "{nvfp4} {out} --to bf16"
# Exit code, status and code of the error in the report, the command, and what is done to the process.
ROWS: list[tuple[ExitCode, str, str | None, str, Patch]] = [
    (ExitCode.OK, "ok", None, f"build-nvfp4 {BUILD}", nothing),
    (ExitCode.OK, "planned", None, f"build-nvfp4 {BUILD} --dry-run", nothing),
    (ExitCode.OK, "ok", None, "inspect {nvfp4}", nothing),
    (ExitCode.OK, "ok", None, "swap-nibbles {nvfp4} {out}", nothing),
    (ExitCode.MISMATCH, "mismatch", "check.proof", f"build-nvfp4 {BUILD}".replace("nvfp4}", "damaged}"), nothing),
    (ExitCode.MISMATCH, "mismatch", "check.already_in_order", "swap-nibbles {nvfp4} {out} --base {base}", nothing),
    (ExitCode.MISMATCH, "mismatch", "check.verify", "verify {damaged} --base {base}", nothing),
    (ExitCode.USAGE, "", None, "build-nvfp4 --no-such-flag", nothing),
    (ExitCode.USAGE, "", None, "verify", nothing),
    (ExitCode.INPUT, "refused", "input.missing", f"build-nvfp4 {BUILD}".replace("nvfp4}", "gone}"), nothing),
    (ExitCode.INPUT, "refused", "preset.unknown", f"build-nvfp4 {BUILD}".replace("flux1-dev", "flux9"), nothing),
    (ExitCode.OUTPUT, "refused", "output.is_input", f"build-nvfp4 {BUILD}".replace("out}", "base}"), nothing),
    (ExitCode.OUTPUT, "refused", "output.no_parent", "swap-nibbles {nvfp4} {gone}/out", nothing),
    (ExitCode.STORAGE, "error", "storage.no_space", f"build-nvfp4 {BUILD}", full_disk),
    (ExitCode.STORAGE, "error", "storage.no_space", "swap-nibbles {nvfp4} {out}", full_disk),
    (ExitCode.INCONCLUSIVE, "inconclusive", "verify.required", "verify {nvfp4} --base {base} --require gpu", nothing),
    (ExitCode.BACKEND, "error", "verify.backend", "verify --self-test --device cpu", broken_kernel),
    (ExitCode.INTERNAL, "error", "internal", f"build-nvfp4 {BUILD}", bug),
    (ExitCode.INTERRUPTED, "interrupted", "interrupted", f"build-nvfp4 {BUILD}", stopped_by(signal.SIGINT)),
    (ExitCode.HUNG_UP, "interrupted", "interrupted", f"build-nvfp4 {BUILD}", stopped_by(signal.SIGHUP)),
    (ExitCode.TERMINATED, "interrupted", "interrupted", f"build-nvfp4 {BUILD}", stopped_by(signal.SIGTERM)),
    # One target that moves bytes, and one that decodes.
    (ExitCode.OK, "ok", None, f"convert {MOVED}", nothing),
    (ExitCode.OK, "ok", None, f"convert {DECODED}", nothing),
    (ExitCode.OK, "planned", None, f"convert {MOVED} --dry-run", nothing),
    (ExitCode.OK, "planned", None, f"convert {DECODED} --dry-run", nothing),
    (
        ExitCode.MISMATCH,
        "mismatch",
        "check.proof",
        f"convert {MOVED} --base {{base}}".replace("nvfp4", "damaged"),
        nothing,
    ),
    (ExitCode.USAGE, "", None, "convert {nvfp4} {out}", nothing),
    (ExitCode.INPUT, "refused", "input.missing", f"convert {DECODED}".replace("nvfp4", "gone"), nothing),
    (ExitCode.INPUT, "refused", "convert.inexact", "convert {nvfp4} {out} --to comfyui", nothing),
    (ExitCode.OUTPUT, "refused", "output.is_input", f"convert {MOVED}".replace("out", "nvfp4"), nothing),
    (ExitCode.STORAGE, "error", "storage.no_space", f"convert {MOVED}", full_disk),
    (ExitCode.STORAGE, "error", "storage.no_space", f"convert {DECODED}", full_disk),
    (ExitCode.INTERNAL, "error", "internal", f"convert {DECODED}", bug),
    (ExitCode.INTERRUPTED, "interrupted", "interrupted", f"convert {MOVED}", stopped_by(signal.SIGINT)),
    (ExitCode.HUNG_UP, "interrupted", "interrupted", f"convert {DECODED}", stopped_by(signal.SIGHUP)),
    (ExitCode.TERMINATED, "interrupted", "interrupted", f"convert {MOVED}", stopped_by(signal.SIGTERM)),
]
IDS = [f"{int(row[0])} {row[2] or row[1]} {row[3].split()[0]}" for row in ROWS]
PARTS = ("message", "hint")
MODES: dict[str, list[str]] = {"people": [], "json": ["--json"], "quiet": ["--quiet"]}


def test_every_exit_code_is_in_the_table() -> None:
    assert {row[0] for row in ROWS} == set(ExitCode)


@pytest.mark.parametrize(("exit_code", "status", "code", "command", "patch"), ROWS, ids=IDS)
def test_one_outcome_told_in_three_ways(
    exports: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    exit_code: ExitCode,
    status: str,
    code: str | None,
    command: str,
    patch: Patch,
) -> None:
    damaged = edit(exports / "nvfp4", tmp_path / "damaged", damage)
    told: dict[str, Outcome] = {}
    for mode, flags in MODES.items():
        places = {"nvfp4": exports / "nvfp4" / "transformer", "base": exports / "base", "gone": tmp_path / "gone"}
        names = places | {"damaged": damaged, "out": tmp_path / f"out-{mode}"}
        words = [word.format(**names) for word in command.split()]
        with monkeypatch.context() as patched:
            patch(patched)
            told[mode] = run_mopt(*words, *flags, json_report=False)
    assert {mode: one.exit_code for mode, one in told.items()} == dict.fromkeys(MODES, exit_code), told
    assert told["quiet"].stdout == ""
    for one in told.values():
        assert "Traceback" not in one.stderr and "\x1b" not in one.stdout + one.stderr
    if exit_code is ExitCode.USAGE:
        assert all("Usage: " in one.stderr for one in told.values())
        assert told["people"].stdout == "" and json.loads(told["json"].stdout)["error"]["code"] == "usage"
        return
    report = json.loads(told["json"].stdout)
    assert told["json"].stdout.isascii() and told["json"].stdout.count("\n") == 1
    assert (report["exit_code"], report["status"]) == (exit_code, status)
    assert (report["error"] or {}).get("code") == code
    assert not told["people"].stdout.startswith("{")
    if code is None:
        assert told["people"].stdout and "error: " not in told["people"].stderr
        assert told["quiet"].stderr == "" or "warning: " in told["quiet"].stderr
    else:
        for mode, one in told.items():
            # The three runs have an OUT each.
            message, hint = (str(report["error"][key] or "").replace("out-json", f"out-{mode}") for key in PARTS)
            lines = one.stderr.splitlines()
            assert f"error: {message} [{code}]" in lines
            assert not hint or f"hint: {hint}" in lines
            assert [line for line in lines if line.startswith("error: ")] == [f"error: {message} [{code}]"]
    if "output" in report and report["output"]["path"]:
        published = status == "ok"
        assert report["output"]["published"] is published
        for mode in MODES:
            assert (tmp_path / f"out-{mode}").exists() is published
    assert not list(tmp_path.glob(".*"))
    note(19, outcome=f"{exit_code.name} {code or status}", ways=len(MODES), contradictions=0)


def damage(tensors: Tensors) -> None:
    tensors[f"{PACKED}.weight"][0] = 0
