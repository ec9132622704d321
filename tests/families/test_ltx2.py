"""LTX-2 as its own pipeline exports it (X0Model): renamed as diffusers does, and only the transformer of it taken."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import write_transformer
from fp8_support import (
    E4M3,
    checkpoint_of,
    convert,
    fp8_refused,
    ltx_name,
    old_export,
    packed_modules,
    save_checkpoint,
    state_dict,
    x0_export,
)
from safetensors.torch import save_file
from support import Outcome, Tensors, config_of, load, same_bits

from modelopt_convert.families.ltx2 import LTX2

PREFIXES = {False: "velocity_model.", True: "model.diffusion_model."}
PACKED = "velocity_model.transformer_blocks.3.attn1.to_q"


@pytest.fixture(scope="module")
def ltx2(families: Path) -> Path:
    return families / "ltx2"


@pytest.fixture(scope="module", params=[False, True], ids=["X0Model", "merged"])
def run(request: pytest.FixtureRequest, ltx2: Path, tmp_path_factory: pytest.TempPathFactory) -> "Run":
    room = tmp_path_factory.mktemp("x0")
    export = x0_export(ltx2 / "fp8", room / "export", merged=request.param)
    outcome = convert(export, ltx2 / "base", room / "out", "--allow-known-broken", preset="ltx2")
    assert outcome.exit_code == 0, outcome.stderr
    return Run(export, room / "out", PREFIXES[request.param], outcome)


class Run:
    """A finished conversion of an X0Model export."""

    def __init__(self, export: Path, out: Path, prefix: str, outcome: Outcome) -> None:
        assert outcome.report is not None
        self.export, self.out, self.prefix, self.report = export, out, prefix, outcome.report


def diffusers_names(names: list[str]) -> dict[str, str]:
    """What diffusers' single-file loader makes of LTX's names; its prefix is that of whole checkpoints."""
    from diffusers.loaders.single_file_utils import convert_ltx2_transformer_to_diffusers

    found = {}
    for name in names:
        plain = name.removeprefix("velocity_model.").removeprefix("model.diffusion_model.")
        (new,) = convert_ltx2_transformer_to_diffusers({f"model.diffusion_model.{plain}": None}) or (None,)
        if new is not None:
            found[name] = new
    return found


def test_the_names_of_these_tests_are_ltxs(ltx2: Path) -> None:
    """Read back by diffusers they are its own; and some as they are in Lightricks' checkpoint."""
    names = list(load(ltx2 / "base" / "transformer"))
    assert diffusers_names([ltx_name(name) for name in names]) == {ltx_name(name): name for name in names}
    renamed = {ltx_name(name) for name in names}
    assert {
        "patchify_proj.weight",
        "audio_patchify_proj.weight",
        "adaln_single.emb.timestep_embedder.linear_1.weight",
        "audio_adaln_single.linear.bias",
        "av_ca_a2v_gate_adaln_single.linear.weight",
        "transformer_blocks.0.attn1.q_norm.weight",
        "transformer_blocks.0.scale_shift_table_a2v_ca_audio",
        "transformer_blocks.0.audio_ff.net.0.proj.weight",
        "caption_projection.linear_1.weight",
    } <= renamed


def test_every_tensor_gets_the_name_that_diffusers_gives_it(run: Run) -> None:
    names = [name for name in load(run.export) if name.startswith(run.prefix)]
    expected = diffusers_names(names)
    renamed = run.report["inputs"]["export"]["renamed"]
    assert renamed == expected and len(expected) > 600
    written = load(run.out).keys()
    # Calibration state and the scales of what is kept in BF16 are not written; nothing else is missing.
    missing = [new for new in expected.values() if new not in written]
    assert not [name for name in missing if not name.endswith(("_scale", "_amax"))]
    assert written <= set(expected.values())


def test_it_is_what_the_export_in_diffusers_names_gives(run: Run, ltx2: Path, tmp_path: Path) -> None:
    """Bit for bit, config included."""
    assert convert(ltx2 / "fp8", ltx2 / "base", tmp_path / "out", "--allow-known-broken", preset="ltx2").exit_code == 0
    expected, out = load(tmp_path / "out"), load(run.out)
    assert out.keys() == expected.keys()
    assert [name for name in out if not same_bits(out[name], expected[name])] == []
    left, right = config_of(run.out), config_of(tmp_path / "out")
    assert left["quantization_config"] == right["quantization_config"]
    assert left == {key: right[key] for key in left} and right.keys() - left.keys() <= {"_diffusers_version"}


def test_the_output_is_a_diffusers_transformer(run: Run, ltx2: Path) -> None:
    config = config_of(run.out)
    assert config["_class_name"] == "LTX2VideoTransformer3DModel"
    assert not [key for key in config if "export" in key]
    base = config_of(ltx2 / "base" / "transformer")
    assert {key: config[key] for key in base if not key.startswith("_")} == {
        key: value for key, value in base.items() if not key.startswith("_")
    }
    proof = run.report["proof"]
    assert proof["status"] == "pass" and set(proof["counts"]) | {"reproduced (sampled rows)"} == {
        "reproduced",
        "reproduced (sampled rows)",
    }


def test_connectors_and_strangers_are_left_out_and_said(run: Run) -> None:
    names = load(run.export).keys()
    strangers = {name for name in names if "connector" in name or not name.startswith(run.prefix)}
    assert len(strangers) in (4, 8)
    ledger = run.report["ledger"]["export"]
    assert ledger.keys() == names
    assert {name for name, fate in ledger.items() if fate.startswith("left out:")} == strangers
    assert not [name for name in load(run.out) if "connector" in name or "vae" in name or "vocoder" in name]
    assert sum(run.report["counts"]["export"].values()) == len(names)
    assert all("connector" in ledger[name] for name in strangers if "connector" in name)


def test_no_codes_are_left_without_their_scale(run: Run, ltx2: Path) -> None:
    """Other builders drop the scale of a kept module and leave its codes, which then load as weights."""
    out, base = load(run.out), load(ltx2 / "base" / "transformer")
    packed = packed_modules(out)
    assert packed and packed < packed_modules(load(ltx2 / "fp8" / "transformer"))
    for name, tensor in out.items():
        module = name.removesuffix(".weight")
        if tensor.dtype == E4M3:
            assert out[f"{module}.weight_scale"].shape == out[f"{module}.input_scale"].shape == (1,)
        elif tensor.dtype == torch.bfloat16 and name.rpartition(".")[0] not in packed:
            assert same_bits(tensor, base[name]), name


@pytest.mark.parametrize("merged", [False, True])
def test_without_a_base_there_is_no_config(merged: bool, ltx2: Path, tmp_path: Path) -> None:
    """The export's own config.json has no architecture."""
    export = x0_export(ltx2 / "fp8", tmp_path / "export", merged=merged)
    names = (str(export), "X0Model")
    fp8_refused(export, None, tmp_path, code="input.no_config", names=names, hint="--config", preset="ltx2")


def test_an_old_x0_export_takes_its_scales_from_its_own_checkpoint(ltx2: Path, tmp_path: Path) -> None:
    """Whose names are LTX's too."""
    old = old_export(ltx2 / "fp8", tmp_path / "plain" / "transformer")
    export = x0_export(old.parent, tmp_path / "old")
    state = {
        f"velocity_model.{ltx_name(name)}": tensor for name, tensor in state_dict(checkpoint_of(ltx2 / "fp8")).items()
    }
    checkpoint = save_checkpoint(tmp_path / "transformer.pt", state)
    fp8_refused(export, ltx2 / "base", tmp_path, code="export.nothing_quantized", hint="--checkpoint", preset="ltx2")
    outcome = convert(
        export, ltx2 / "base", tmp_path / "out", "--checkpoint", checkpoint, "--allow-known-broken", preset="ltx2"
    )
    assert outcome.exit_code == 0, outcome.stderr
    assert (
        convert(ltx2 / "fp8", ltx2 / "base", tmp_path / "today", "--allow-known-broken", preset="ltx2").exit_code == 0
    )
    out, expected = load(tmp_path / "out"), load(tmp_path / "today")
    assert out.keys() == expected.keys()
    assert [name for name in out if not same_bits(out[name], expected[name])] == []


def rewritten(export: Path, change: Callable[[Tensors], object]) -> Path:
    """The export with other tensors, in place."""
    tensors = load(export)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, export / "model.safetensors")
    return export


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        (lambda tensors: tensors.pop(f"{PACKED}.weight"), "export.weight", "transformer_blocks.3.attn1.to_q"),
        (
            lambda tensors: tensors.pop(f"{PACKED}.bias"),
            "export.missing_tensor",
            "transformer_blocks.3.attn1.to_q.bias",
        ),
        (lambda tensors: tensors.pop(f"{PACKED}.weight_scale"), "export.missing_weight_scale", "attn1.to_q"),
        (
            lambda tensors: tensors.update({"velocity_model.new_gate.weight": torch.ones(4, 4)}),
            "naming.unknown",
            "new_gate.weight",
        ),
        (
            lambda tensors: tensors.update({"model.diffusion_model.patchify_proj.weight": torch.ones(4, 4)}),
            "naming.unknown",
            "patchify_proj.weight",
        ),
        (
            lambda tensors: tensors.update({"velocity_model.proj_in.weight": torch.ones(4, 4)}),
            "naming.unknown",
            "proj_in.weight",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    change: Callable[[Tensors], object], code: str, named: str, ltx2: Path, tmp_path: Path
) -> None:
    export = rewritten(x0_export(ltx2 / "fp8", tmp_path / "export"), change)
    fp8_refused(export, ltx2 / "base", tmp_path, code=code, names=(named,), preset="ltx2")


def test_a_base_of_another_class_is_refused(ltx2: Path, base: Path, tmp_path: Path) -> None:
    export = x0_export(ltx2 / "fp8", tmp_path / "export")
    before = sorted(tmp_path.iterdir())
    outcome = convert(export, base, tmp_path / "out", "--allow-known-broken", preset="ltx2")
    assert outcome.exit_code == 3 and outcome.error_code is not None, outcome.stderr
    assert outcome.error_code in {"preset.wrong_model", "base.config", "base.missing_tensor", "base.naming"}
    assert sorted(tmp_path.iterdir()) == before


def test_the_preset_is_chosen_by_the_bases_class(ltx2: Path, tmp_path: Path) -> None:
    """X0Model says nothing; LTX2VideoTransformer3DModel does."""
    export = x0_export(ltx2 / "fp8", tmp_path / "export")
    outcome = convert(export, ltx2 / "base", tmp_path / "out", "--allow-known-broken", preset=None)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert outcome.report["preset"]["name"] == "ltx2"


def test_the_map_holds_for_names_that_look_like_others(ltx2: Path, tmp_path: Path) -> None:
    """Where a part of a name is a whole one of the map: diffusers replaces parts, and so the names must come out."""
    names = [
        "transformer_blocks.0.audio_attn1.q_norm.weight",
        "transformer_blocks.0.video_to_audio_attn.k_norm.weight",
        "av_ca_video_scale_shift_adaln_single.emb.timestep_embedder.linear_2.bias",
        "audio_patchify_proj.bias",
    ]
    shapes = {name: torch.ones(8, dtype=torch.bfloat16) for name in names}
    export = rewritten(
        x0_export(ltx2 / "fp8", tmp_path / "export"),
        lambda tensors: tensors.update({f"velocity_model.{name}": tensor for name, tensor in shapes.items()}),
    )
    expected = diffusers_names([f"velocity_model.{name}" for name in names])

    assert {f"velocity_model.{name}": LTX2.tensor(name) for name in names} == {
        own: (new,) for own, new in expected.items()
    }

    # Of other shapes than the weights beside them, they are refused under the names that the file has.
    outcome = convert(export, ltx2 / "base", tmp_path / "out", "--allow-known-broken", preset="ltx2")
    assert (outcome.exit_code, outcome.error_code) == (3, "dialect.shape")
    assert any(f"velocity_model.{name}" in outcome.message for name in names), outcome.message


def x0_config(**changes: Any) -> dict[str, Any]:
    return {"_class_name": "X0Model", "_export_format": "safetensors_state_dict"} | changes


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (x0_config(quantization_config={"quant_algo": "NVFP4"}), "export.quant_method"),
    ],
)
def test_an_x0_export_of_another_tool_is_refused(config: dict[str, Any], code: str, ltx2: Path, tmp_path: Path) -> None:
    export = x0_export(ltx2 / "fp8", tmp_path / "export")
    (export / "config.json").write_text(json.dumps(config))
    fp8_refused(export, ltx2 / "base", tmp_path, code=code, names=("config.json",), preset="ltx2")


def test_diffusers_names_under_its_prefix_are_read(ltx2: Path, tmp_path: Path) -> None:
    renamed = {f"velocity_model.{name}": tensor for name, tensor in load(ltx2 / "fp8" / "transformer").items()}
    export = write_transformer(tmp_path / "export", renamed, config_of(ltx2 / "fp8" / "transformer"))
    outcome = convert(export, ltx2 / "base", tmp_path / "out", "--allow-known-broken", preset="ltx2")
    assert outcome.exit_code == 0, outcome.stderr


def test_a_whole_file_without_a_word_on_its_format_is_fp8(ltx2: Path, tmp_path: Path) -> None:
    """E4M3 weights with one scale each have one meaning, whoever wrote them."""
    export = x0_export(ltx2 / "fp8", tmp_path / "export", merged=True)
    outcome = convert(
        export / "model.safetensors", ltx2 / "base", tmp_path / "out", "--allow-known-broken", preset="ltx2"
    )
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert outcome.report["proof"]["status"] == "pass"
