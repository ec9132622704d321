"""Bases that do not fit the export, and exports that were made from another base."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import PACKED, REPLACED, SHARD, refused
from support import Tensors, build, copy, edit, load, run_mopt, same_bits

KEPT = "time_text_embed.text_embedder.linear_1"  # unquantized in the export


def recast(name: str, dtype: torch.dtype) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


@pytest.mark.parametrize("module", [PACKED, REPLACED, KEPT])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64])
def test_a_base_in_another_dtype_is_refused(
    dtype: torch.dtype, module: str, nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    other = edit(base, tmp_path / "base", recast(f"{module}.weight", dtype))
    found = {torch.float8_e4m3fn: "F8_E4M3", torch.float64: "F64"}[dtype]
    names = (SHARD, f"{module}.weight", "expected BF16, F16 or F32", found)
    refused(nvfp4, other, tmp_path, code="base.dtype", names=names, hint="unquantized base")


@pytest.mark.parametrize("module", [PACKED, REPLACED, KEPT])
@pytest.mark.parametrize("shape", [(7, 9), (160,), (160, 16, 5), (1, 160)])
def test_a_base_of_another_shape_is_refused(
    shape: tuple[int, ...], module: str, nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    """Another builder took a 7 x 9 tensor for a weight, and [192, 32] F32 tensors for those of a [960, 160] model."""

    def change(tensors: Tensors) -> None:
        tensors[f"{module}.weight"] = torch.zeros(shape)

    other = edit(base, tmp_path / "base", change)
    names = (SHARD, f"{module}.weight", str(list(shape)))
    refused(nvfp4, other, tmp_path, code="base.shape", names=names, hint="the base that the export was made from")


def test_where_nothing_tells_which_shape_is_wrong_both_files_are_named(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """A bias outside of any block."""
    other = edit(base, tmp_path / "base", lambda tensors: tensors.update({"x_embedder.bias": torch.zeros(3)}))
    names = (f"{nvfp4 / 'transformer'}/{SHARD}", f"{other}/", "'x_embedder.bias'", "found [3]")
    refused(nvfp4, other, tmp_path, code="base.shape", names=names, hint="or export again, if it is the export")


@pytest.mark.parametrize("module", ["x_embedder", "transformer_blocks.1.norm1.linear"])
def test_the_bias_and_the_other_blocks_tell_which_shape_is_wrong(
    module: str, nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    """Of a module outside of blocks, whose bias both have alike, and of one that another block has too."""

    def cut(tensors: Tensors) -> None:
        weight = tensors[f"{module}.weight"]
        tensors[f"{module}.weight"] = weight[: len(weight) // 2].clone()

    export = edit(nvfp4, tmp_path / "export", cut)
    names = (f"{export}/{SHARD}", f"'{module}.weight'")
    refused(export, base, tmp_path, code="export.shape", names=names, hint="export again")
    other = edit(base, tmp_path / "base", cut)
    refused(nvfp4, other, tmp_path, code="base.shape", names=(f"{other}/", f"'{module}.weight'"), hint="give the base")


def test_many_tensors_of_another_shape_are_counted(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    def halve(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name] = tensors[name][:16]

    other = edit(base, tmp_path / "base", halve)
    refused(nvfp4, other, tmp_path, code="base.shape", names=(f"; {len(load(other))} have this fault: ",))


@pytest.mark.parametrize(
    "tensor", [f"{module}.{leaf}" for module in (PACKED, REPLACED, KEPT) for leaf in ("weight", "bias")]
)
def test_a_tensor_missing_from_the_base_is_refused(tensor: str, nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """A weight or a bias: other builders leave the module packed but listed as BF16, or drop its bias."""
    other = edit(base, tmp_path / "base", lambda tensors: tensors.pop(tensor))
    refused(nvfp4, other, tmp_path, code="base.missing_tensor", names=(str(other), tensor), hint="whole")


def test_of_many_missing_tensors_the_same_is_named_each_time(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    def empty(tensors: Tensors) -> None:
        for name in tensors.keys() - {KEPT + ".weight"}:
            del tensors[name]

    other = edit(base, tmp_path / "base", empty)
    first = min(load(base / "transformer").keys() - {KEPT + ".weight"})
    refused(nvfp4, other, tmp_path, code="base.missing_tensor", names=(repr(first), " have this fault: "))


def test_a_base_with_a_tensor_too_many_is_refused(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    extra = "transformer_blocks.2.norm1.linear.weight"
    other = edit(base, tmp_path / "base", lambda tensors: tensors.update({extra: torch.zeros(4)}))
    refused(nvfp4, other, tmp_path, code="export.missing_tensor", names=(SHARD, extra), hint="another base")


def set_config(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update({key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "QwenImageTransformer2DModel"),
        ("_class_name", None),
        ("num_layers", 19),
        ("guidance_embeds", False),
        ("axes_dims_rope", [16, 56, 56]),
    ],
)
def test_a_base_of_another_class_or_config_is_refused(
    key: str, value: Any, nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    other = edit(base, tmp_path / "base", change_config=set_config(key, value))
    refused(nvfp4, other, tmp_path, code="base.config", names=(f"{other}/config.json", key, repr(value)))


def test_who_wrote_the_base_does_not_matter(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """_diffusers_version and _name_or_path say nothing of the model."""
    other = edit(base, tmp_path / "base", change_config=set_config("_diffusers_version", "0.30.0"))
    assert build(nvfp4, other, tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("found", [{"quant_method": "modelopt", "quant_algo": "NVFP4"}, {}])
def test_a_quantized_base_is_refused(found: Any, nvfp4: Path, base: Path, tmp_path: Path) -> None:
    other = edit(base, tmp_path / "base", change_config=set_config("quantization_config", found))
    refused(nvfp4, other, tmp_path, code="base.quantized", names=(f"{other}/config.json",), hint="the original model")


def test_the_export_as_its_own_base_is_refused(nvfp4: Path, tmp_path: Path) -> None:
    refused(nvfp4, nvfp4, tmp_path, code="base.quantized", names=("config.json",))


def test_packed_weights_are_no_base_even_if_no_config_says_so(nvfp4: Path, tmp_path: Path) -> None:
    other = edit(nvfp4, tmp_path / "base", change_config=lambda config: config.pop("quantization_config"))
    refused(nvfp4, other, tmp_path, code="base.shape", names=(SHARD, ".weight"))


def test_a_base_that_is_not_finite_is_refused(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{PACKED}.weight"][0, 0] = float("nan")

    other = edit(base, tmp_path / "base", spoil)
    refused(nvfp4, other, tmp_path, code="base.not_finite", names=(SHARD, f"{PACKED}.weight"))


@pytest.mark.parametrize(
    "tensor",
    ["x_embedder.bias", "x_embedder.weight", "norm_out.linear.weight", "transformer_blocks.0.attn.norm_q.weight"],
)
@pytest.mark.parametrize("in_the_base", [False, True])
def test_unquantized_tensors_that_differ_tell_another_base(
    tensor: str, in_the_base: bool, nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    """A merged LoRA, or AWQ, whose exports up to 0.45 look like plain NVFP4 but for this."""

    def change(tensors: Tensors) -> None:
        changed = tensors[tensor].clone()
        changed.view(-1)[-1] += 1e-2
        assert not torch.equal(changed, tensors[tensor])
        tensors[tensor] = changed

    other = edit(base if in_the_base else nvfp4, tmp_path / "other", change)
    export, other_base = (nvfp4, other) if in_the_base else (other, base)
    in_pipeline, alone = load((base if in_the_base is False else nvfp4) / "transformer")[tensor], load(other)[tensor]
    expected, found = (alone, in_pipeline) if in_the_base else (in_pipeline, alone)
    last = [size - 1 for size in found.shape]
    place = (
        f"{tensor} first at {last}: expected {float(expected.view(-1)[-1]):.9g}, found {float(found.view(-1)[-1]):.9g}"
    )
    names = (SHARD, "1 unquantized tensors", place)
    refused(export, other_base, tmp_path, code="export.other_base", names=names, hint="LoRA")
    outcome = build(export, other_base, tmp_path / "out", "--accept-near")
    assert outcome.exit_code == 0 and outcome.report is not None
    assert [one["code"] for one in outcome.report["warnings"]] == ["export.unquantized_differ"]
    proof = outcome.report["proof"]
    assert (proof["status"], proof["words"]) == ("not proven", "not proven: near")
    assert proof["unquantized_differ"] == [tensor]


def test_many_unquantized_tensors_that_differ_are_counted_and_some_are_named(
    nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    """AWQ's share in a FLUX.1 export: each module left in BF16 is scaled by column."""

    def scale_columns(tensors: Tensors) -> None:
        for tensor in tensors.values():
            if tensor.dtype == torch.bfloat16 and tensor.ndim == 2:
                tensor *= torch.linspace(0.5, 1.5, tensor.shape[1]).to(torch.bfloat16)

    export = edit(nvfp4, tmp_path / "export", scale_columns)
    names = ("10 unquantized tensors", "context_embedder.weight", "norm_out.linear.weight")
    refused(export, base, tmp_path, code="export.other_base", names=names, hint="AWQ")


def test_other_weights_in_packed_modules_alone_tell_another_base(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """All that is not packed is the same, as after training the packed layers from scratch."""
    packed = {name for name, tensor in load(nvfp4 / "transformer").items() if tensor.dtype == torch.uint8}
    generator = torch.Generator().manual_seed(5)

    def replace(tensors: Tensors) -> None:
        for name in packed:
            tensors[name] = torch.randn(tensors[name].shape, generator=generator).to(torch.bfloat16)

    other = edit(base, tmp_path / "base", replace)
    names = (str(nvfp4), "40 of 40 packed weights")
    refused(
        nvfp4, other, tmp_path, code="export.other_base", names=names, hint="the base that the export was made from"
    )


@pytest.mark.parametrize("accepted", [(), ("--accept-near",)])
def test_another_bias_of_a_packed_module_is_refused(
    accepted: tuple[str, ...], nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    export = edit(nvfp4, tmp_path / "export", lambda tensors: tensors[f"{PACKED}.bias"].add_(0.5))
    names = (SHARD, "1 unquantized tensors", f"{PACKED}.bias")
    found = refused(export, base, tmp_path, *accepted, code="export.other_base", names=names, hint="LoRA")
    assert found.report is not None
    assert ("--accept-near" in found.report["error"]["hint"]) is not bool(accepted)


def test_a_bias_of_a_packed_module_may_be_near_where_that_is_accepted(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """Training after quantization changes biases, those next to zero by far more than they are; runtimes load them."""

    def train(tensors: Tensors) -> None:
        bias = tensors[f"{PACKED}.bias"]
        bias += 0.05 * bias.abs().mean() * torch.randn(bias.shape, generator=torch.Generator().manual_seed(0))
        bias[0] = 0.0

    export = edit(nvfp4, tmp_path / "export", train)
    names = (SHARD, "1 unquantized tensors", f"{PACKED}.bias")
    refused(export, base, tmp_path, code="export.other_base", names=names, hint="--accept-near")
    outcome = build(export, base, tmp_path / "out", "--accept-near")
    assert outcome.exit_code == 0 and outcome.report is not None
    assert outcome.report["proof"]["biases_differ"] == [PACKED]
    assert outcome.report["proof"]["words"] == "not proven: near"
    assert [one["code"] for one in outcome.report["warnings"]] == ["export.biases_differ"]
    assert same_bits(load(tmp_path / "out")[f"{PACKED}.bias"], load(export)[f"{PACKED}.bias"])
    words = ("verify", tmp_path / "out", "--base", base)
    assert run_mopt(*words).exit_code == 1 and run_mopt(*words, "--accept-near").exit_code == 0


def test_a_module_that_no_base_tensor_shares_a_name_with_is_refused(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """Where names have a prefix that nobody knows, other builders find nothing to replace and exit 0."""

    def prefix(tensors: Tensors) -> None:
        renamed = {f"some_model.{name}": tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    export = edit(nvfp4, tmp_path / "export", prefix)
    names = (str(base / "transformer"), "some_model.")
    refused(export, base, tmp_path, code="base.naming", names=names, hint="names")


def test_two_transformers_need_two_bases(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """Wan2.2: other builders take the first and leave the second out without a word."""
    pipeline = tmp_path / "pipeline"
    for name in ("transformer", "transformer_2"):
        copy(nvfp4, pipeline / name)
    for other in (base, base / "transformer"):
        refused(pipeline, other, tmp_path, code="input.missing", names=("base", str(other)), hint="--component")
    assert build(pipeline / "transformer_2", base, tmp_path / "out").exit_code == 0


def test_a_base_with_two_transformers_and_an_export_of_neither_name(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    pipeline, export = tmp_path / "pipeline", copy(nvfp4, tmp_path / "export")
    for name in ("transformer", "transformer_2"):
        copy(base, pipeline / name)
    names = ("base", str(pipeline), "transformer and transformer_2")
    refused(export, pipeline, tmp_path, code="input.ambiguous", names=names, hint=str(pipeline / "transformer"))
    assert build(export, pipeline / "transformer_2", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("which", ["export", "base"])
@pytest.mark.parametrize("kind", ["absent", "empty", "file"])
def test_an_input_that_is_no_checkpoint_is_refused(
    kind: str, which: str, nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    nothing = tmp_path / "nothing"
    if kind == "empty":
        nothing.mkdir()
    elif kind == "file":
        nothing.touch()
    export, other = (nothing, base) if which == "export" else (nvfp4, nothing)
    if kind == "file":  # a file may be a checkpoint: this one holds nothing
        refused(export, other, tmp_path, code="header.too_small", names=(str(nothing),), hint="download")
    else:
        refused(export, other, tmp_path, code="input.missing", names=(which, str(nothing)), hint="transformer")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8])
@pytest.mark.parametrize(
    "name", ["transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_q.bias", "proj_out.bias"]
)
def test_integers_are_no_weights(nvfp4: Path, base: Path, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    odd = edit(base, tmp_path / "base", lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    outcome = build(nvfp4, odd, tmp_path / "out")
    assert (outcome.exit_code, outcome.error_code) == (3, "base.dtype") and name in outcome.message
