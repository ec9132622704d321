"""What is imported before it is needed: a help text, a usage error or a refusal must not wait for a library."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MAIN = "from modelopt_convert.cli import main; main()"
WATCHED = f"""
import atexit, sys
atexit.register(lambda: print("MODULES", *sorted(sys.modules), file=sys.stderr))
{MAIN}
"""
# Those of a tenth of a second and more.
HEAVY = {
    "torch", "numpy", "safetensors", "modelopt", "diffusers", "transformers", "rich", "huggingface_hub", "httpx",
    "requests", "yaml",
}  # fmt: skip
MOVED = HEAVY - {"numpy", "huggingface_hub"}  # which cuts the shards
# Typer imports pydantic for any option that it has to convert.
NO_OPTION = HEAVY | {"pydantic"}
BUILD = "build-nvfp4 --export {nvfp4} --base {base}"
ROWS: list[tuple[str, int, set[str]]] = [
    ("--help", 0, NO_OPTION),
    ("--version", 0, NO_OPTION),
    ("build-nvfp4 --help", 0, NO_OPTION),
    ("convert-fp8 -h", 0, NO_OPTION),
    ("verify --help", 0, NO_OPTION),
    ("inspect --help", 0, NO_OPTION),
    ("compare --help", 0, NO_OPTION),
    ("swap-nibbles --help", 0, NO_OPTION),
    ("unswizzle-scales --help", 0, NO_OPTION),
    ("push --help", 0, NO_OPTION),
    ("presets --help", 0, NO_OPTION),
    ("doctor --help", 0, NO_OPTION),
    ("demo --help", 0, NO_OPTION),
    ("demo {base}", 4, HEAVY),
    ("no-such-command", 2, NO_OPTION),
    ("build-nvfp4 --no-such-flag", 2, NO_OPTION),
    ("build-nvfp4 --output", 2, NO_OPTION),
    ("build-nvfp4", 2, HEAVY),
    ("build-nvfp4 --max-shard-size x --base {base} --output {gone}", 2, HEAVY),
    ("swap-nibbles {base}", 2, HEAVY),
    ("verify", 2, HEAVY),
    ("push {base} me/it --message=", 2, HEAVY),
    ("presets", 0, HEAVY),
    ("presets flux1-dev", 0, HEAVY),
    ("presets no-such", 3, HEAVY),
    ("explain header.foreign", 0, HEAVY),
    ("explain header.foreign --json", 0, HEAVY),
    ("explain no-such", 2, HEAVY),
    (f"{BUILD} --preset no-such", 3, HEAVY),
    (f"{BUILD} --output {{damaged}}", 4, HEAVY),
    (f"{BUILD} --output {{base}} --overwrite", 4, HEAVY),
    (f"{BUILD} --output {{gone}}".replace("nvfp4}", "gone}"), 3, HEAVY),
    (f"{BUILD} --output {{gone}}".replace("nvfp4}", "damaged}"), 3, HEAVY),
    (f"{BUILD} --output {{gone}} --keep-bf16 no.such.module", 3, HEAVY),
    ("convert-fp8 --export {damaged} --output {gone}", 3, HEAVY),
    ("inspect {gone}", 3, HEAVY),
    ("inspect {damaged}", 3, HEAVY),
    ("inspect {nvfp4} --base {damaged}", 3, HEAVY),
    ("verify {gone}", 3, HEAVY),
    ("compare {nvfp4}", 2, HEAVY),
    ("compare {nvfp4} --base {gone}", 3, HEAVY),
    ("compare {nvfp4} --base {base} --pipeline x --prompts {gone}", 3, HEAVY),
    ("verify {damaged}", 3, HEAVY),
    ("verify {nvfp4} --base {gone}", 3, HEAVY),
    ("swap-nibbles {damaged} {gone}", 3, HEAVY),
    ("swap-nibbles {nvfp4} {damaged}", 4, HEAVY),
    ("push {gone} me/it", 3, HEAVY),
    ("push {damaged} me/it", 3, HEAVY),
    (f"{BUILD} --output {{gone}} --dry-run --json", 0, HEAVY - {"huggingface_hub"}),  # it cuts the shards
    # A header says all there is to say of weights that are not packed.
    ("inspect {base} --json", 0, HEAVY),
    ("inspect {fp8} --json", 0, HEAVY),
    ("inspect {base}", 0, HEAVY),
    # Bytes are looked at and moved, by numpy.
    ("inspect {nvfp4} --json", 0, MOVED),
    ("inspect {nvfp4} --all --json", 0, MOVED),
    ("swap-nibbles {nvfp4} {out} --overwrite --json", 0, MOVED),
    ("unswizzle-scales {nvfp4} {out} --overwrite --reverse --json", 0, MOVED),
    ("unswizzle-scales {swizzled} {out} --overwrite --json", 0, MOVED),
    # What a record says is compared, and a few rows are decoded by tables.
    ("verify {swizzled} --device cpu --json", 0, MOVED),
    ("verify {fp8_out} --device cpu --json", 0, MOVED),
]


def modules(*arguments: str, **environment: str) -> tuple[int, set[str]]:
    """Exit code of mopt in a process of its own, and what it had imported."""
    command = [sys.executable, "-c", WATCHED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    line = done.stderr.splitlines()[-1].split()
    assert line[0] == "MODULES", done.stderr
    return done.returncode, set(line)


@pytest.fixture(scope="module")
def places(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    damaged = tmp_path_factory.mktemp("startup") / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    header = b'{"proj_out.weight":{"dtype":"BF16"'
    (damaged / "diffusion_pytorch_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    named = {name: exports / name / "transformer" for name in ("nvfp4", "fp8", "base")}
    new = {name: damaged.parent / name for name in ("gone", "out", "swizzled")}
    swap = ("unswizzle-scales", str(named["nvfp4"]), str(new["swizzled"]), "--reverse", "--json")
    assert modules(*swap)[0] == 0
    # By record alone: a record is what a build writes.
    fp8 = damaged.parent / "fp8_out"
    convert = ("convert-fp8", "--preset", "flux1-dev", "--export", str(named["fp8"]), "--base", str(named["base"]))
    assert modules(*convert, "--output", str(fp8), "--verify", "off", "--json")[0] == 0
    return named | new | {"damaged": damaged, "fp8_out": fp8}


@pytest.mark.parametrize(("command", "exit_code", "without"), ROWS, ids=[row[0] for row in ROWS])
def test_nothing_is_imported_before_it_is_needed(
    places: dict[str, Path], command: str, exit_code: int, without: set[str]
) -> None:
    found, imported = modules(*(word.format(**places) for word in command.split()))
    assert found == exit_code
    assert imported & without == set()


def test_packed_weights_are_compared_with_torch(places: dict[str, Path]) -> None:
    """So that the rows above can fail."""
    found, imported = modules("inspect", str(places["nvfp4"]), "--base", str(places["base"]))
    assert found == 0 and {"torch", "pydantic"} <= imported


def test_no_plugin_of_pydantic_runs_in_mopt(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking for them means to read the metadata of every installed package."""
    monkeypatch.delenv("PYDANTIC_DISABLE_PLUGINS", raising=False)  # another test may have run mopt in this process
    installed = tmp_path / "noisy-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: noisy\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[pydantic]\nnoisy = noisy_plugin:plugin\n")
    (tmp_path / "noisy_plugin.py").write_text("class plugin:\n    new_schema_validator = None\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = "from pydantic import BaseModel\nclass A(BaseModel): pass\nimport sys; print('noisy_plugin' in sys.modules)"
    plain = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert "noisy_plugin" in plain.stderr + plain.stdout and plain.stdout != "False\n"
    found, imported = modules("inspect", str(places["base"]), "--json", PYTHONPATH=path)
    assert found == 0 and "pydantic" in imported and "noisy_plugin" not in imported
