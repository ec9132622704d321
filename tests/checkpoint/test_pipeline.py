"""A pipeline with two transformers (Wan2.2): built together, checked together, published at once."""

import json
from pathlib import Path

import pytest
import torch
from faults import entries
from support import Outcome, Tensors, config_of, copy, edit, edit_json, load, run_mopt, same_bits, tree

COMMANDS = {"nvfp4": "build-nvfp4", "fp8": "convert-fp8"}
PRESET = "wan2.2-t2v-a14b"
NAMES = ("transformer", "transformer_2")


def pipelines(families: Path, room: Path, algorithm: str) -> tuple[Path, Path]:
    """Export and base with two transformers; the second has another bias."""

    def shift(tensors: Tensors) -> None:
        tensors["proj_out.bias"] = torch.full_like(tensors["proj_out.bias"], 1.5)

    for kind in (algorithm, "base"):
        source = families / "wan" / kind
        copy(source, room / kind / "transformer")
        edit(source, room / kind / "transformer_2", shift)
    return room / algorithm, room / "base"


def make(algorithm: str, export: Path, base: Path, output: Path, *more: str | Path) -> Outcome:
    where = ("--export", export, "--base", base, "--output", output)
    return run_mopt(COMMANDS[algorithm], "--preset", PRESET, *where, *more)


@pytest.mark.parametrize("algorithm", COMMANDS)
def test_both_are_built_each_from_its_own_base(algorithm: str, families: Path, tmp_path: Path) -> None:
    export, base = pipelines(families, tmp_path, algorithm)
    outcome = make(algorithm, export, base, tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    report = outcome.report
    biases = []
    for name in NAMES:
        # Each is what it would have been alone.
        alone = make(algorithm, export / name, base / name, tmp_path / name)
        assert alone.exit_code == 0 and alone.report is not None
        mine, other = load(tmp_path / "out" / name), load(tmp_path / name)
        assert mine.keys() == other.keys() and all(same_bits(mine[key], other[key]) for key in mine)
        assert config_of(tmp_path / "out" / name) == config_of(tmp_path / name)
        assert tree(tmp_path / "out" / name) == tree(tmp_path / name)
        biases.append(mine["proj_out.bias"])
        for role in ("export", "base"):
            assert report["ledger"][f"{name}/{role}"] == alone.report["ledger"][role]
    assert not same_bits(*biases)
    proven = {module.partition("/")[0] for module in report["proof"]["modules"]}
    assert proven == set(NAMES) and report["proof"]["status"] == "pass"
    assert {rule["component"] for rule in report["rules"]} == {f"{name}/" for name in NAMES}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "mopt.json", *NAMES]
    manifest = json.loads((tmp_path / "out" / "mopt.json").read_text())
    assert manifest["components"] == list(NAMES) and manifest["command"] == COMMANDS[algorithm]
    assert [check["name"] for check in report["checks"]] == ["structure", "structure", "verify"]


def test_the_printed_command_names_both(families: Path, tmp_path: Path) -> None:
    export, base = pipelines(families, tmp_path, "fp8")
    where = ("--export", export, "--base", base, "--output", tmp_path / "out", "--base-model", "Wan-AI/Wan2.2")
    outcome = run_mopt("convert-fp8", "--preset", PRESET, *where, json_report=False)
    flags = [f"--transformer-path {tmp_path}/out/transformer", f"--transformer-2-path {tmp_path}/out/transformer_2"]
    line = next(line for line in outcome.stdout.splitlines() if line.startswith("next: "))
    assert all(flag in line for flag in flags)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--transformer-path <this repo>/transformer --transformer-2-path <this repo>/transformer_2" in card


def test_only_what_the_export_quantized_is_built(families: Path, tmp_path: Path) -> None:
    """As the published checkpoints: ``transformer`` quantized, ``transformer_2`` the base's own."""
    export, base = pipelines(families, tmp_path, "fp8")
    copy(base / "transformer_2", tmp_path / "half" / "transformer_2")
    edit_json(tmp_path / "half" / "transformer_2" / "config.json", lambda one: one.update(quantization_config=None))
    copy(export / "transformer", tmp_path / "half" / "transformer")
    assert make("fp8", tmp_path / "half", base, tmp_path / "out").exit_code == 0
    assert make("fp8", export / "transformer", base, tmp_path / "alone").exit_code == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "alone")


@pytest.mark.parametrize("name", NAMES)
def test_one_can_be_picked(name: str, families: Path, tmp_path: Path) -> None:
    export, base = pipelines(families, tmp_path, "fp8")
    assert make("fp8", export, base, tmp_path / "out", "--component", name).exit_code == 0
    wanted = load(base / name)["proj_out.bias"].bfloat16()
    assert same_bits(load(tmp_path / "out")["proj_out.bias"], wanted)


def test_one_that_is_not_there_cannot_be_picked(families: Path, tmp_path: Path) -> None:
    where = families / "wan"
    outcome = make("fp8", where / "fp8", where / "base", tmp_path / "out", "--component", "transformer_2")
    assert outcome.exit_code == 3 and outcome.error_code == "input.missing" and "transformer_2" in outcome.message
    outcome = make("fp8", where / "fp8", where / "base", tmp_path / "out", "--component", "vae")
    assert outcome.exit_code == 2


def test_a_fault_in_the_second_leaves_the_old_output_of_both(families: Path, tmp_path: Path) -> None:
    export, base = pipelines(families, tmp_path, "fp8")
    assert make("fp8", export, base, tmp_path / "out").exit_code == 0

    def damage(tensors: Tensors) -> None:
        weight = tensors["blocks.3.ffn.net.2.weight"].float()
        tensors["blocks.3.ffn.net.2.weight"] = (-weight).to(tensors["blocks.3.ffn.net.2.weight"].dtype)

    edit(export / "transformer_2", tmp_path / "bad" / "transformer_2", damage)
    copy(export / "transformer", tmp_path / "bad" / "transformer")
    before = entries(tmp_path)
    outcome = make("fp8", tmp_path / "bad", base, tmp_path / "out", "--overwrite")
    assert outcome.exit_code == 1 and outcome.error_code == "check.proof"
    assert "transformer_2" in outcome.message and "blocks.3.ffn.net.2" in outcome.message
    assert entries(tmp_path) == before
    assert make("fp8", export, base, tmp_path / "out", "--overwrite").exit_code == 0
    assert entries(tmp_path) == before


def test_a_foreign_file_in_a_component_folder_is_not_overwritten(families: Path, tmp_path: Path) -> None:
    export, base = pipelines(families, tmp_path, "fp8")
    assert make("fp8", export, base, tmp_path / "out").exit_code == 0
    (tmp_path / "out" / "transformer_2" / "notes.txt").write_text("mine")
    outcome = make("fp8", export, base, tmp_path / "out", "--overwrite")
    assert outcome.exit_code == 4 and "notes.txt" in outcome.message
