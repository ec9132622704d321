"""The structure check of a finished stage: every fault that it knows, planted in what a real build wrote."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import PACKED, REPLACED
from safetensors.torch import load_file, save_file
from support import Tensors, build, edit, edit_json, run_mopt

from modelopt_convert.checkpoint.header import TensorSpec
from modelopt_convert.commands.build import command as build_command
from modelopt_convert.commands.build.structure import check_structure
from modelopt_convert.commands.rewrite import command as rewrite
from modelopt_convert.dialects.modelopt.dialect import INDEX_NAME
from modelopt_convert.plan.plan import BuildPlan
from modelopt_convert.run.errors import CheckFailedError, InputError
from modelopt_convert.stage.directory import StagingDir
from modelopt_convert.stage.shard_writer import ShardWriter

Checked = tuple[Path, BuildPlan]
PLAIN = "context_embedder"  # a Linear that is never packed


@pytest.fixture(scope="module")
def checked(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checked]:
    """What was checked in a build of either format, several shards each, and the plan it was checked against."""
    found: dict[str, Checked] = {}
    with pytest.MonkeyPatch.context() as patch:
        for algorithm, command in (("nvfp4", "build-nvfp4"), ("fp8", "convert-fp8")):
            plans: list[BuildPlan] = []

            def note(folder: Path, plan: BuildPlan, plans: list[BuildPlan] = plans) -> list[str]:
                plans.append(plan)
                return check_structure(folder, plan)

            patch.setattr(build_command, "check_structure", note)
            out = tmp_path_factory.mktemp("checked") / algorithm
            words = ["--preset", "flux1-dev", "--export", exports / algorithm, "--base", exports / "base"]
            done = run_mopt(command, *words, "--output", out, "--max-shard-size", "800kB")
            assert done.exit_code == 0, done.stderr
            found[algorithm] = (out, plans[0])
    return found


@pytest.fixture(params=["nvfp4", "fp8"])
def stage(request: pytest.FixtureRequest, checked: dict[str, Checked], tmp_path: Path) -> Checked:
    """A copy to plant faults in."""
    folder, plan = checked[request.param]
    return Path(shutil.copytree(folder, tmp_path / "stage")), plan


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX_NAME).read_text())["weight_map"][name]


def rewrite_shard(path: Path, change: Callable[[Tensors], object], metadata: dict[str, str] | None = None) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata or {"format": "pt"})


def list_in_index(folder: Path, name: str, file: str | None) -> None:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"].pop(name, None)
        if file is not None:
            index["weight_map"][name] = file

    edit_json(folder / INDEX_NAME, change)


def test_what_was_built_has_no_fault(stage: Checked) -> None:
    assert check_structure(*stage) == []


def test_a_tensor_of_another_shape(stage: Checked) -> None:
    folder, plan = stage
    name = f"{PLAIN}.bias"
    rewrite_shard(shard_of(folder, name), lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    [fault] = check_structure(folder, plan)
    assert fault.startswith(f"tensor {name!r}: planned ('BF16', ")


def test_a_tensor_of_another_dtype(stage: Checked) -> None:
    folder, plan = stage
    name = f"{PLAIN}.bias"
    rewrite_shard(shard_of(folder, name), lambda tensors: tensors.update({name: tensors[name].half()}))
    [fault] = check_structure(folder, plan)
    assert "written ('F16', " in fault


def test_a_tensor_that_is_missing(stage: Checked) -> None:
    folder, plan = stage
    name = f"{PLAIN}.bias"
    rewrite_shard(shard_of(folder, name), lambda tensors: tensors.pop(name))
    list_in_index(folder, name, None)
    [fault] = check_structure(folder, plan)
    assert name in fault and fault.endswith("written None")


def test_a_tensor_too_many(stage: Checked) -> None:
    folder, plan = stage
    shard = shard_of(folder, f"{PLAIN}.bias")
    rewrite_shard(shard, lambda tensors: tensors.update({"extra.bias": torch.zeros(2)}))
    list_in_index(folder, "extra.bias", shard.name)
    assert check_structure(folder, plan) == ["tensor 'extra.bias': planned None, written ('F32', (2,))"]


def test_other_header_metadata(stage: Checked) -> None:
    """By keys there some loaders guess the layout."""
    folder, plan = stage
    shard = shard_of(folder, f"{PLAIN}.bias")
    rewrite_shard(shard, lambda _tensors: None, {"format": "pt", "_quantization_metadata": "{}"})
    [fault] = check_structure(folder, plan)
    assert fault.startswith(f"{shard.name}: header metadata ") and "_quantization_metadata" in fault


def test_a_module_with_a_scale_of_the_wrong_shape(stage: Checked) -> None:
    folder, plan = stage
    name = f"{PACKED}.weight_scale"
    rewrite_shard(shard_of(folder, name), lambda tensors: tensors.update({name: torch.ones(3, 5)}))
    faults = check_structure(folder, plan)
    assert [fault for fault in faults if "weight_scale" in fault and not fault.startswith("tensor '")]


def test_a_packed_module_that_is_not_planned(stage: Checked) -> None:
    folder, plan = stage
    fewer = replace(plan, replaced={**plan.replaced, PACKED: "*"})
    assert "the packed modules are not the planned ones" in check_structure(folder, fewer)


def test_a_module_spread_over_files(stage: Checked) -> None:
    """SGLang looks for a weight's scale in the same file."""
    folder, plan = stage
    name = f"{PACKED}.weight_scale"
    home = shard_of(folder, name)
    other = next(path for path in sorted(folder.glob("*.safetensors")) if path != home)
    moved = load_file(home)[name]
    rewrite_shard(home, lambda tensors: tensors.pop(name))
    rewrite_shard(other, lambda tensors: tensors.update({name: moved}))
    list_in_index(folder, name, other.name)
    assert check_structure(folder, plan) == [f"{PACKED} is spread over several files"]


def test_a_fused_group_of_which_one_is_packed(stage: Checked) -> None:
    folder, plan = stage
    mixed = replace(plan, fused=(*plan.fused, (PACKED, REPLACED)))
    replaced = {**plan.replaced, REPLACED: "*"}
    if REPLACED not in plan.replaced:  # FP8 keeps other modules
        mixed = replace(plan, fused=(*plan.fused, (PACKED, PLAIN)))
        replaced = dict(plan.replaced)
    [fault] = check_structure(folder, replace(mixed, replaced=replaced))
    assert re.fullmatch(rf"fused group {PACKED}, \S+ is not whole", fault)


def test_a_packed_module_on_the_ignore_list(stage: Checked) -> None:
    folder, plan = stage
    edit_json(folder / "config.json", lambda config: config["quantization_config"]["ignore"].append(PACKED))
    assert f"`ignore` lists the packed module {PACKED}" in check_structure(folder, plan)


def test_a_linear_that_is_neither_packed_nor_on_the_ignore_list(stage: Checked) -> None:
    folder, plan = stage
    edit_json(folder / "config.json", lambda config: config["quantization_config"]["ignore"].remove(PLAIN))
    assert f"`ignore` does not list {PLAIN}, which is not packed" in check_structure(folder, plan)


def test_another_key_in_the_config(stage: Checked) -> None:
    folder, plan = stage
    for key in plan.format.declared:
        config = json.loads((folder / "config.json").read_text())
        edit_json(folder / "config.json", lambda content, key=key: content["quantization_config"].update({key: "odd"}))
        if key == "group_size":  # no reader takes it
            with pytest.raises(InputError, match="group_size: expected 16, found 'odd'"):
                check_structure(folder, plan)
        else:
            assert f"{key} is 'odd'" in check_structure(folder, plan)
        (folder / "config.json").write_text(json.dumps(config))
    edit_json(folder / "config.json", lambda content: content["quantization_config"].pop("producer"))
    assert check_structure(folder, plan) == ["producer is None"]


def test_another_algorithm_in_the_config(stage: Checked) -> None:
    folder, plan = stage
    edit_json(folder / "config.json", lambda config: config["quantization_config"].update(quant_algo="NVFP4_AWQ"))
    with pytest.raises(InputError) as refused:
        check_structure(folder, plan)
    assert refused.value.code == "export.quant_algo"


def test_a_shard_that_was_cut(stage: Checked) -> None:
    folder, plan = stage
    shard = shard_of(folder, f"{PLAIN}.bias")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckFailedError) as failed:
        check_structure(folder, plan)
    assert failed.value.code == "check.structure" and shard.name in failed.value.message


def one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on every shard has a tensor that nobody planned."""
    original = StagingDir.shard

    def shard(self: StagingDir, name: str, specs: Any, *more: Any) -> ShardWriter:
        writer = original(self, name, [*specs, TensorSpec("extra.bias", "F32", (1,))], *more)
        writer.layout = tuple(spec for spec in writer.layout if spec.name != "extra.bias")
        writer.write("extra.bias", [bytes(4)])
        return writer

    monkeypatch.setattr(StagingDir, "shard", shard)


@pytest.mark.parametrize("command", ["build-nvfp4", "convert-fp8", "swap-nibbles"])
def test_a_checkpoint_at_fault_is_not_published(
    exports: Path, room: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    export = exports / ("fp8" if command == "convert-fp8" else "nvfp4") / "transformer"
    words = ["--preset", "flux1-dev", "--export", export, "--base", exports / "base", "--output", room / "out"]
    if command == "swap-nibbles":
        words = [export, room / "out"]
    one_more(monkeypatch)
    failed = run_mopt(command, *words)
    assert (failed.exit_code, failed.error_code) == (1, "check.structure"), failed.stderr
    assert failed.report is not None and failed.report["output"]["published"] is False
    [told] = [one for one in failed.report["checks"] if one["name"] == "structure"]
    assert told["status"] == "fail"
    assert command == "swap-nibbles" or told["failures"] == ["tensor 'extra.bias': planned None, written ('F32', (1,))"]
    assert list(room.iterdir()) == []


def growing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, folder: Path) -> None:
    """After a call of a function the shard in ``folder`` is longer, though no byte that is read is another."""
    original = getattr(owner, name)

    def call(*values: Any, **named: Any) -> Any:
        done = original(*values, **named)
        [shard] = folder.glob("*.safetensors")
        with shard.open("r+b") as file:
            file.truncate(shard.stat().st_size + 1)
        return done

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("role", ["export", "base"])
def test_an_input_that_changed_meanwhile(
    exports: Path, tmp_path: Path, room: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    """What was read before and after may be of two versions: found before OUT is replaced, not after."""
    inputs = {name: edit(exports / kind, tmp_path / name) for name, kind in (("export", "nvfp4"), ("base", "base"))}
    growing(monkeypatch, build_command, "small_files", inputs[role])
    refused = build(inputs["export"], inputs["base"], room / "out")
    assert (refused.exit_code, refused.error_code) == (3, "input.changed"), refused.stderr
    assert refused.report is not None and refused.report["output"]["published"] is False
    assert list(room.iterdir()) == []


def test_a_source_that_changed_while_it_was_rewritten(
    exports: Path, tmp_path: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = edit(exports / "nvfp4", tmp_path / "source")
    growing(monkeypatch, rewrite, "stream", source)
    refused = run_mopt("swap-nibbles", source, room / "out")
    assert (refused.exit_code, refused.error_code) == (3, "input.changed"), refused.stderr
    assert refused.report is not None and refused.report["output"]["published"] is False
    assert list(room.iterdir()) == []
