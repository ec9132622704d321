"""What ModelOpt's quantizer made once, kept as bytes: our arithmetic makes and reads the same, without ModelOpt."""

import json
from typing import Any

import pytest
import torch
from figures import note
from root import ROOT
from support import same_bits

from modelopt_convert.formats.fp8.codes import dequantize_fp8, quantize_fp8
from modelopt_convert.formats.nvfp4.codes import dequantize_nvfp4, quantize_nvfp4, shared_global_scale
from modelopt_convert.formats.tensor_bytes import from_bytes


def golden(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "tests" / "formats" / "goldens" / f"{name}.json").read_text())


NVFP4, FP8 = golden("nvfp4"), golden("fp8")
ROWS, COLUMNS = NVFP4["shape"]


def tensor(case: dict[str, str], key: str, dtype: str, *shape: int) -> torch.Tensor:
    return from_bytes(bytes.fromhex(case[key]), dtype, shape)


def label(case: dict[str, str]) -> str:
    return f"{case['dtype']} {case['name']}"


@pytest.mark.parametrize("case", NVFP4["cases"], ids=label)
def test_nvfp4(case: dict[str, str]) -> None:
    weight = tensor(case, "weight", case["dtype"], ROWS, COLUMNS)
    global_scale = tensor(case, "global_scale", "F32")
    packed = tensor(case, "packed", "U8", ROWS, COLUMNS // 2)
    scale = tensor(case, "scale", "F8_E4M3", ROWS, COLUMNS // 16)
    assert same_bits(shared_global_scale([weight]), global_scale)
    ours = quantize_nvfp4(weight, global_scale)
    assert same_bits(ours[0], packed) and same_bits(ours[1], scale)
    error = (dequantize_nvfp4(packed, scale, global_scale) - weight.float()).norm() / weight.float().norm()
    assert error < 0.15
    note(2, tensors_compared=3, bytes_equal=True, format="nvfp4")


@pytest.mark.parametrize("case", FP8["cases"], ids=label)
def test_fp8(case: dict[str, str]) -> None:
    weight = tensor(case, "weight", case["dtype"], ROWS, COLUMNS)
    scale, codes = tensor(case, "scale", "F32"), tensor(case, "codes", "F8_E4M3", ROWS, COLUMNS)
    assert same_bits(quantize_fp8(weight, scale), codes)
    assert (dequantize_fp8(codes, scale) - weight.float()).norm() / weight.float().norm() < 0.05
    note(2, tensors_compared=1, bytes_equal=True, format="fp8")


def test_they_say_who_made_them_and_are_small() -> None:
    for name, found in (("nvfp4", NVFP4), ("fp8", FP8)):
        assert found["versions"].keys() == {"nvidia-modelopt", "torch"}
        assert len(found["cases"]) == 12
        assert (ROOT / "tests" / "formats" / "goldens" / f"{name}.json").stat().st_size < 20_000
