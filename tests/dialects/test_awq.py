"""AWQ and SVDQuant: the weight that a transformed one stands for, by ModelOpt's own forward pass and comfy-kitchen."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from described import TORCH, Files, Module, description, read_back, same
from hypothesis import given, settings
from hypothesis import strategies as st
from support import load

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.checkpoint.recipe import recipe_of
from modelopt_convert.dialects.awq import folded, transformed_modules
from modelopt_convert.dialects.form import Canonical
from modelopt_convert.dialects.source import describe
from modelopt_convert.dialects.targets import FORMS
from modelopt_convert.formats.nvfp4.scales import swizzle_128x4
from modelopt_convert.run.errors import InputError

DTYPES = st.sampled_from(["BF16", "F16", "F32"])
FUSED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def transformed(
    files: Files, rows: int = 24, columns: int = 64, rank: int = 0, seed: int = 0, dtype: str = "BF16"
) -> Canonical:
    """Module x packed and module plain not, each with a factor, and with a low-rank part if there is a rank."""
    described = description({"x": Module("nvfp4", rows, columns, bias=False)}, files, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    added: dict[str, TensorInfo] = {}
    for name, height, width in (("x", rows, columns), ("plain", 5, 16)):
        found = {"pre_quant_scale": torch.rand(width, generator=generator) + 0.5}
        if rank:
            found["svdquant_lora_a"] = torch.randn(rank, width, generator=generator)
            found["svdquant_lora_b"] = torch.randn(height, rank, generator=generator)
        for role, tensor in found.items():
            info = files.put(f"{name}.{role}", tensor.to(TORCH[dtype]))
            added[info.name] = info
    return replace(described, tensors={**described.tensors, **added})


def by_kitchen(files: Files, described: Canonical, name: str) -> torch.Tensor:
    """float64 [N, K]: codes and scales decoded by comfy-kitchen, the rest as ModelOpt has it, in torch."""
    from comfy_kitchen import dequantize_nvfp4

    roles = described.of(name)
    weight = files.tensor(roles["weight"])
    if weight.dtype == torch.uint8:
        scales = swizzle_128x4(files.tensor(roles["weight_scale"]))
        swapped = (weight << 4) | (weight >> 4)
        weight = dequantize_nvfp4(swapped, files.tensor(roles["weight_scale_2"]), scales, torch.float32)
    found = weight.double()
    if "svdquant_lora_a" in roles:
        up, down = (files.tensor(roles[f"svdquant_lora_{one}"]).double() for one in "ba")
        found = found + up @ down
    return found * files.tensor(roles["pre_quant_scale"]).double()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5).map(lambda n: 16 * n),
    blocks=st.integers(1, 12),
    rank=st.sampled_from([0, 1, 8]),
    seed=st.integers(0, 99),
    dtype=DTYPES,
    data=st.data(),
)
def test_the_weight_that_is_meant_comes_from_any_byte_on(
    rows: int, blocks: int, rank: int, seed: int, dtype: str, data: Any
) -> None:
    files = Files()
    described = transformed(files, rows, 16 * blocks, rank, seed, dtype)
    for name in ("x", "plain"):
        wide = folded(described.of(name), described.modules.get(name), "F32")
        narrow = folded(described.of(name), described.modules.get(name))
        meant, scale = by_kitchen(files, described, name), files.tensor(wide).abs().max()
        assert torch.allclose(files.tensor(wide).double(), meant, rtol=2e-6, atol=2e-6 * float(scale))
        assert torch.equal(files.tensor(wide).bfloat16(), files.tensor(narrow))  # rounded once
        whole = files.whole(narrow)
        begin = data.draw(st.integers(0, len(whole)))
        count = data.draw(st.integers(0, len(whole) - begin))
        assert files.read(narrow, begin, count) == whole[begin : begin + count]


def test_what_is_read_of_files_is_told_before() -> None:
    files = Files()
    described = transformed(files, 64, 4096, 4)
    one = folded(described.of("x"), described.modules["x"])
    told = {(part.file, at) for part in recipe_of(one).extents(8192 * 9, 8192 * 3) for at in _bytes(part)}
    taken: set[tuple[str, int]] = set()

    def fetch(file: str, start: int, target: memoryview) -> None:
        taken.update((file, at) for at in range(start, start + target.nbytes))
        files.fetch(file, start, target)

    recipe_of(one).fill(8192 * 9, memoryview(bytearray(8192 * 3)), fetch)
    assert taken == told
    assert len([1 for file, _ in taken if file == "x.weight"]) < 64 * 2048 / 4


def _bytes(part: Any) -> range:
    return range(part.start, part.start + part.num_bytes)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_comfyui_files_keep_the_factor_of_packed_modules(dtype: str) -> None:
    files = Files()
    described = transformed(files, dtype=dtype)
    kept = {name: info for name, info in described.tensors.items() if name != "plain.pre_quant_scale"}
    described = replace(described, tensors=kept)
    written = FORMS["comfyui"].write(described, files.read)
    found, others = read_back(FORMS["comfyui"], written, files, {"x": (24, 64)})
    same(described, files, found, others)


def test_bf16_is_the_product() -> None:
    files = Files()
    described = transformed(files, rank=3)
    found, others = read_back(FORMS["bf16"], FORMS["bf16"].write(described, files.read), files, {})
    assert not found.modules and set(found.tensors) == {"norm.weight", "plain.weight", "x.weight"}
    for name in ("x", "plain"):
        wide = folded(described.of(name), described.modules.get(name), "F32")
        assert torch.equal(others.tensor(found.tensors[f"{name}.weight"]), files.tensor(wide).bfloat16())


@pytest.mark.parametrize("target", ["modelopt", "bfl-diffusers", "compressed-tensors", "torchao", "comfyui"])
@pytest.mark.parametrize("rank", [0, 4])
def test_no_dialect_drops_what_it_has_no_place_for(target: str, rank: int) -> None:
    files = Files()
    with pytest.raises(InputError) as caught:
        FORMS[target].write(transformed(files, rank=rank), files.read)
    assert caught.value.code == "convert.no_place" and "bf16" in (caught.value.hint or "")


Change = Callable[[Files, dict[str, TensorInfo]], None]


def put(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Change:
    def change(files: Files, tensors: dict[str, TensorInfo]) -> None:
        tensors[name] = replace(files.put(f"other.{name}", torch.ones(shape).to(dtype)), name=name)

    return change


def cut(*names: str) -> Change:
    def change(files: Files, tensors: dict[str, TensorInfo]) -> None:
        for name in names:
            del tensors[name]

    return change


REFUSED: list[tuple[Change, str]] = [
    (put("x.pre_quant_scale", 63), "dialect.shape"),
    (put("x.pre_quant_scale", 64, dtype=torch.uint8), "dialect.shape"),
    (put("x.svdquant_lora_a", 3, 64), "dialect.shape"),
    (put("x.svdquant_lora_a", 64), "dialect.shape"),
    (put("x.svdquant_lora_b", 23, 4), "dialect.shape"),
    (put("plain.pre_quant_scale", 64), "dialect.shape"),
    (put("norm.pre_quant_scale", 7), "dialect.shape"),
    (cut("x.svdquant_lora_a"), "dialect.shape"),
    (cut("x.pre_quant_scale"), "dialect.shape"),
    (put("x._pre_quant_scale", 64), "dialect.role"),
]


@pytest.mark.parametrize(("change", "code"), REFUSED)
def test_what_does_not_fit_its_weight_is_refused(change: Change, code: str) -> None:
    files = Files()
    described = transformed(files, rank=4)
    plain = description({"x": Module("nvfp4", 24, 64, bias=False)}, files, 0)
    tensors = dict(described.tensors)
    written = replace(FORMS["modelopt"].write(plain, files.read), tensors=tensors)
    read_back(FORMS["modelopt"], written, files, {})
    change(files, tensors)
    with pytest.raises(InputError) as caught:
        read_back(FORMS["modelopt"], written, files, {})
    assert caught.value.code == code and "\n" not in caught.value.message and caught.value.hint


def test_comfyui_has_no_factor_of_plain_weights() -> None:
    files = Files()
    described = transformed(files)
    plain = description({"x": Module("nvfp4", 24, 64, bias=False)}, files, 0)
    written = FORMS["comfyui"].write(plain, files.read)
    odd = {name: described.tensors[name] for name in ("plain.pre_quant_scale",)}
    with pytest.raises(InputError) as caught:
        read_back(FORMS["comfyui"], replace(written, tensors={**written.tensors, **odd}), files, {"x": (24, 64)})
    assert caught.value.code == "dialect.role"


@pytest.mark.parametrize("algorithm", ["NVFP4_AWQ", "NVFP4_SVD"])
def test_an_export_that_lost_its_factors_is_no_plain_one(algorithm: str) -> None:
    """ModelOpt 0.42 to 0.45 left them out."""
    files = Files()
    written = FORMS["modelopt"].write(description({"x": Module("nvfp4", 24, 64)}, files, 0), files.read)
    assert written.config is not None
    said = {**written.config["quantization_config"], "quant_algo": algorithm}
    with pytest.raises(InputError) as caught:
        read_back(FORMS["modelopt"], replace(written, config={"quantization_config": said}), files, {})
    assert caught.value.code == "dialect.transform_lost" and ".pt" in (caught.value.hint or "")


@pytest.mark.parametrize("variant", ["nvfp4_awq", "nvfp4_svd"])
def test_modelopts_own_forward_pass_multiplies_by_the_same_weight(transformed_exports: Path, variant: str) -> None:
    """But where its export gives q, k and v one factor, and quantizes them again: those are the base's, quantized."""
    multiplied = load(transformed_exports / variant)
    base = load(transformed_exports / "base" / "transformer")
    with CheckpointReader(transformed_exports / variant / "transformer") as reader:
        described = describe(reader, None, {}).described
        names = transformed_modules(described)
        assert len(names) == len(multiplied) == 50 and len(described.modules) == 40
        for name in names:
            roles = described.of(name)
            info = folded(roles, described.modules.get(name), "F32")
            found = torch.frombuffer(bytearray(reader.read_of(info, 0, info.num_bytes)), dtype=torch.float32)
            found, wanted = found.reshape(info.shape), base[f"{name}.weight"].float()
            if not name.endswith(FUSED):
                assert _apart(found, multiplied[f"{name}.weight"].float()) < 0.006, name
            factor = roles["pre_quant_scale"]
            raw = bytearray(reader.read_of(factor, 0, factor.num_bytes))
            divisor = torch.frombuffer(raw, dtype=torch.bfloat16).float()
            limit = 0.11 if name in described.modules else 0.005
            assert _apart(found / divisor, wanted / divisor) < limit, name


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
