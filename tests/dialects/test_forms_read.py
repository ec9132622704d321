"""What the forms read beside their own writing: ModelOpt's post-processing; and one line for what is none of theirs."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from described import Files, Module, description, read_back, same
from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt_convert.dialects.form import Written
from modelopt_convert.dialects.scales import check_described
from modelopt_convert.dialects.targets import FORMS
from modelopt_convert.formats.nvfp4.codes import swap_nibbles_
from modelopt_convert.formats.nvfp4.scales import swizzle_128x4
from modelopt_convert.formats.nvfp4.shapes import round_up
from modelopt_convert.run.errors import InputError

E4M3 = torch.float8_e4m3fn


def padded(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Zeros below and beside, in bytes."""
    found = torch.zeros(rows, columns, dtype=torch.uint8)
    found[: tensor.shape[0], : tensor.shape[1]] = tensor.view(torch.uint8)
    return found.view(tensor.dtype)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 150),
    blocks=st.integers(1, 20),
    strategy=st.sampled_from(["none", "row", "row_col"]),
    swizzled=st.booleans(),
    swapped=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_modelopts_post_processing_did_is_undone(
    rows: int, blocks: int, strategy: str, swizzled: bool, swapped: bool, seed: int
) -> None:
    """Rows and columns padded as ``_postprocess_safetensors`` of ModelOpt 0.45 does, by its own rules."""
    files = Files()
    described = description({"x": Module("nvfp4", rows, 16 * blocks, bias=False)}, files, seed)
    written = FORMS["modelopt"].write(described, files.read)
    weight = files.tensor(described.tensors["x.weight"])
    scale = files.tensor(described.tensors["x.weight_scale"])
    if strategy != "none":
        height = round_up(rows, 16)
        across = strategy == "row_col"
        weight = padded(weight, height, round_up(weight.shape[1], 16) if across else weight.shape[1])
        scale = padded(scale, height, round_up(blocks, 16) if across else blocks)
    scale = swizzle_128x4(scale) if swizzled else scale
    weight = swap_nibbles_(weight.clone()) if swapped else weight
    stored = {"x.weight": files.put("stored.weight", weight), "x.weight_scale": files.put("stored.scale", scale)}
    tensors = {name: replace(stored.get(name, info), name=name) for name, info in written.tensors.items()}
    assert written.config is not None
    keys = written.config["quantization_config"] | {"swap_weight_nibbles": swapped}
    keys["checkpoint_weight_scale_layout"] = "swizzled" if swizzled else "linear"
    processed = replace(written, tensors=tensors, config={**written.config, "quantization_config": keys})
    found, others = read_back(FORMS["modelopt"], processed, files, {"x": (rows, 16 * blocks)})
    same(described, files, found, others)


def test_scales_in_another_order_than_is_declared_are_no_guess() -> None:
    files = Files()
    described = description({"x": Module("nvfp4", 40, 48)}, files, 0)
    written = FORMS["modelopt"].write(described, files.read)
    scale = swizzle_128x4(files.tensor(described.tensors["x.weight_scale"]))
    odd = replace(files.put("stored.scale", scale), name="x.weight_scale")
    with pytest.raises(InputError) as caught:
        read_back(FORMS["modelopt"], replace(written, tensors={**written.tensors, odd.name: odd}), files, {})
    assert caught.value.code == "dialect.shape" and "128x4" not in (caught.value.hint or "")


def test_quantizer_state_is_left_out_and_kept() -> None:
    files = Files()
    described = description({"x": Module("fp8", 4, 16)}, files, 0)
    written = FORMS["modelopt"].write(described, files.read)
    amax = files.put("x.input_quantizer._amax", torch.ones(()))
    found, _ = read_back(FORMS["modelopt"], replace(written, tensors={**written.tensors, amax.name: amax}), files, {})
    assert amax.name in found.keep and found.fates[amax.name].startswith("left out") and amax.name not in found.tensors


Change = Callable[[Files, Written], Written]


def tensor(name: str, value: torch.Tensor | None) -> Change:
    def change(files: Files, written: Written) -> Written:
        tensors = {key: info for key, info in written.tensors.items() if key != name}
        return replace(written, tensors=tensors if value is None else {**tensors, name: files.put(name, value)})

    return change


def config(**keys: Any) -> Change:
    def change(files: Files, written: Written) -> Written:
        assert written.config is not None
        said = {**written.config["quantization_config"], **keys}
        return replace(written, config={**written.config, "quantization_config": said})

    return change


def header(name: str, entry: Any) -> Change:
    return lambda files, written: replace(written, metadata={**written.metadata, name: json.dumps(entry)})


def no_names(files: Files, written: Written) -> Written:
    return replace(written, metadata={"format": "pt"})


NVFP4, FP8, MXFP8 = (Module(kind, 8, 64) for kind in ("nvfp4", "fp8", "mxfp8"))
U8, ONES, ONE = torch.ones(8, 32, dtype=torch.uint8), torch.ones(3, 3), torch.ones(1)
ZERO_POINT = torch.zeros(8, 4, dtype=torch.uint8)
E5M2_BLOCKS = {"_type": "MXTensor", "_data": {"block_size": 32, "elem_dtype": "float8_e5m2"}}
REFUSED: list[tuple[str, Module, Change, str]] = [
    ("modelopt", NVFP4, tensor("x.weight_scale", None), "export.missing_weight_scale"),
    ("modelopt", NVFP4, tensor("x.pre_quant_scale", ONE), "dialect.shape"),
    ("modelopt", NVFP4, tensor("x.weight_zero_point", ZERO_POINT), "dialect.role"),
    ("modelopt", FP8, tensor("x.weight_scale", None), "export.missing_weight_scale"),
    ("modelopt", FP8, tensor("x.weight", torch.ones(8, 64).bfloat16()), "dialect.shape"),
    ("modelopt", FP8, tensor("x.weight_scale_2", ONE), "dialect.shape"),
    ("modelopt", FP8, tensor("x.weight_scale", ONES), "dialect.shape"),
    ("modelopt", FP8, tensor("x.weight_scale", torch.ones(7)), "dialect.shape"),
    ("modelopt", MXFP8, tensor("x.weight_scale", U8), "dialect.shape"),
    ("bfl-diffusers", NVFP4, tensor("x.weight_scale", torch.ones(128, 4).to(E4M3)), "dialect.shape"),
    ("bfl-diffusers", NVFP4, tensor("x.weight", None), "dialect.shape"),
    ("bfl-diffusers", FP8, tensor("x.weight", U8), "dialect.shape"),
    ("bfl-diffusers", FP8, tensor("x.svdquant_lora_a", ONES), "dialect.role"),
    ("compressed-tensors", NVFP4, tensor("x.weight_scale", torch.ones(8, 2).to(E4M3)), "dialect.shape"),
    ("compressed-tensors", NVFP4, tensor("x.weight_global_scale", None), "dialect.shape"),
    ("compressed-tensors", NVFP4, tensor("x.weight_global_scale", torch.zeros(1)), "convert.reciprocal"),
    ("compressed-tensors", NVFP4, tensor("x.weight_zero_point", ZERO_POINT), "dialect.role"),
    ("compressed-tensors", FP8, tensor("x.weight_global_scale", ONE), "dialect.shape"),
    ("compressed-tensors", FP8, tensor("x.weight", U8), "dialect.shape"),
    ("compressed-tensors", MXFP8, tensor("x.weight_scale", U8), "dialect.shape"),
    ("compressed-tensors", NVFP4, config(format="pack-quantized"), "dialect.format"),
    ("compressed-tensors", NVFP4, config(quantization_status="frozen"), "dialect.format"),
    ("compressed-tensors", NVFP4, config(config_groups={"g": {"weights": {"symmetric": False}}}), "dialect.format"),
    ("compressed-tensors", NVFP4, tensor("x.weight", U8), "dialect.contradiction"),
    ("compressed-tensors", NVFP4, tensor("x.weight_scale_2", ONE), "dialect.contradiction"),
    ("compressed-tensors", NVFP4, tensor("x.input_scale", ONE), "dialect.contradiction"),
    ("torchao", NVFP4, tensor("x.weight", U8), "dialect.contradiction"),
    ("torchao", FP8, tensor("x.input_scale", ONE), "dialect.contradiction"),
    ("torchao", FP8, tensor("x.weight_zero_point", ZERO_POINT), "dialect.role"),
    ("torchao", NVFP4, no_names, "dialect.unmarked"),
    ("torchao", NVFP4, tensor("y._weight_qdata", U8), "dialect.unmarked"),
    ("torchao", NVFP4, tensor("x._weight_scale", torch.ones(32, 16).to(E4M3)), "dialect.shape"),
    ("torchao", NVFP4, tensor("x._weight_qdata", None), "dialect.shape"),
    ("torchao", NVFP4, tensor("x._weight_per_tensor_scale", None), "dialect.shape"),
    ("torchao", FP8, tensor("x._weight_scale", torch.ones(2, 2)), "dialect.shape"),
    ("torchao", NVFP4, header("x.weight", {"_type": "Int4Tensor", "_data": {}}), "dialect.format"),
    ("torchao", NVFP4, header("x.weight", {"_type": "NVFP4Tensor", "_data": {"block_size": 32}}), "dialect.format"),
    ("torchao", NVFP4, header("x.weight", {"_type": ["NVFP4Tensor"], "_data": []}), "dialect.format"),
    ("torchao", MXFP8, header("x.weight", E5M2_BLOCKS), "dialect.format"),
    ("compressed-tensors", NVFP4, config(format=["pack-quantized"]), "dialect.format"),
    ("compressed-tensors", NVFP4, config(config_groups={"g": {"format": {}}}), "dialect.format"),
    ("bf16", NVFP4, tensor("x.weight", U8), "dialect.contradiction"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "module", "change", "code"), REFUSED)
def test_what_is_not_of_the_dialect_is_refused_in_one_line(
    target: str, module: Module, change: Change, code: str
) -> None:
    files, form = Files(), FORMS[target]
    whole = form.write(description({"x": module}, files, 0), files.read)
    read_back(form, whole, files, {})
    with pytest.raises(InputError) as caught:
        read_back(form, change(files, whole), files, {})
    assert caught.value.code == code
    assert "\n" not in caught.value.message and caught.value.hint


@pytest.mark.parametrize("odd", ["y.input_scale", "y.weight"])
def test_scales_or_codes_of_a_module_that_is_not_quantized(odd: str) -> None:
    files = Files()
    described = description({"x": Module("fp8", 4, 16)}, files, 0)
    check_described(described, "IN")
    info = files.put(odd, torch.ones(4, 16, dtype=torch.uint8))
    with pytest.raises(InputError) as caught:
        check_described(replace(described, tensors={**described.tensors, odd: info}), "IN")
    assert caught.value.code == "dialect.contradiction" and odd in caught.value.message


def test_every_dialect_that_is_recognised_is_read_or_refused() -> None:
    from dialect_files import FILES

    from modelopt_convert.dialects.table import DIALECTS
    from modelopt_convert.dialects.targets import form_of

    read = {one.name for one in DIALECTS if form_of(one) is not None}
    assert FILES.keys() - read == {
        "mxfp4", "lightx2v", "comfyui-int8", "bfl-package", "deepseek-fp8", "nvfp4-unlabelled",
    }  # fmt: skip
