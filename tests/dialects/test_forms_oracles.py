"""What is written the libraries of each dialect decode to our values, with no difference; and what they write we read.

comfy-kitchen, compressed-tensors, torchao and ModelOpt are the oracles. The arithmetic is each one's own.
"""

import json
from pathlib import Path
from typing import Any

import comfy_kitchen
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from described import Files, Module, description, save, written_out
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.decoded import decoded
from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.dialects.form import Canonical, grouped
from modelopt_convert.dialects.targets import FORMS
from modelopt_convert.formats.nvfp4.codes import dequantize_nvfp4

E4M3 = torch.float8_e4m3fn
MODULES = {
    "b.nvfp4": Module("nvfp4", 40, 96),
    "b.plain": Module("nvfp4", 130, 80, bias=False, calibrated=False, factor=3e-4),
    "b.fp8": Module("fp8", 33, 48),
    "b.rows": Module("fp8", 17, 32, by_row=True, calibrated=False),
    "b.mxfp8": Module("mxfp8", 65, 96),
}


def values(described: Canonical, files: Files) -> dict[str, Tensor]:
    """BF16 [N, K] of every quantized module, as mopt decodes it."""
    roles = grouped(described.tensors.values())
    return {name: files.tensor(decoded(one, roles[name])) for name, one in described.modules.items()}


def equal(left: Tensor, right: Tensor) -> bool:
    """Bit for bit, in BF16."""
    assert left.shape == right.shape
    return torch.equal(left.bfloat16().view(torch.int16), right.bfloat16().view(torch.int16))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 140),
    blocks=st.integers(1, 9),
    factor=st.floats(2.0**-40, 2.0**20, width=32),
    seed=st.integers(0, 99),
)
def test_values_are_those_of_torch(rows: int, blocks: int, factor: float, seed: int) -> None:
    files, shape = Files(), (rows, 16 * blocks)
    modules = {
        "a": Module("nvfp4", *shape, factor=factor),
        "b": Module("fp8", *shape, factor=factor),
        "c": Module("fp8", *shape, by_row=True),
        "d": Module("fp8_e5m2", *shape, factor=factor),
        "e": Module("mxfp8", *shape),
    }
    described = description(modules, files, seed)
    found = values(described, files)
    stored = {name: files.tensor(info) for name, info in described.tensors.items()}
    assert equal(found["a"], dequantize_nvfp4(stored["a.weight"], stored["a.weight_scale"], stored["a.weight_scale_2"]))
    for name in "bd":
        assert equal(found[name], stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"])
    assert equal(found["c"], stored["c.weight"].float() * stored["c.weight_scale"].reshape(-1, 1))
    scale = stored["e.weight_scale"].view(torch.float8_e8m0fnu).float().repeat_interleave(32, 1)[:, : shape[1]]
    assert equal(found["e"], stored["e.weight"].float() * scale)


def test_every_code_and_scale_has_the_value_that_torch_gives_it() -> None:
    """All pairs of block scale and code, NaN and the smallest among them."""
    files = Files()
    every = torch.arange(256, dtype=torch.uint8)
    modules = {"e": Module("mxfp8", 256, 8192), "a": Module("nvfp4", 256, 512)}
    described = description(modules, files, 0)
    tensors = dict(described.tensors)
    tensors["e.weight"] = files.put("e.weight", every.repeat(256, 32).view(E4M3))
    tensors["e.weight_scale"] = files.put("e.weight_scale", every.reshape(-1, 1).repeat(1, 256))
    tensors["a.weight"] = files.put("a.weight", every.repeat(256, 1))
    tensors["a.weight_scale"] = files.put("a.weight_scale", every.reshape(-1, 1).repeat(1, 32).view(E4M3))
    whole = Canonical(tensors, described.modules, {})
    found = values(whole, files)
    scale = every.view(torch.float8_e8m0fnu).float().reshape(-1, 1)
    wanted = {
        "e": every.view(E4M3).float().repeat(256, 32) * scale,
        "a": dequantize_nvfp4(
            *(files.tensor(tensors[f"a.{role}"]) for role in ("weight", "weight_scale", "weight_scale_2"))
        ),
    }
    for name, one in wanted.items():
        both = torch.isnan(one)
        assert torch.equal(both, torch.isnan(found[name]))
        assert equal(found[name].masked_fill(both, 0), one.masked_fill(both, 0))


def test_comfy_kitchen_multiplies_by_no_weight_with_a_scale_for_each_row() -> None:
    """So fused FP8 weights are not joined under a scale for each row, although ComfyUI would load them."""
    from comfy_kitchen.tensor import QuantizedTensor, TensorCoreFP8Layout

    codes, inputs = torch.ones(32, 64).to(E4M3), torch.ones(16, 64).bfloat16()
    quantized = QuantizedTensor.from_float(inputs, "TensorCoreFP8Layout", scale=torch.tensor(1.0))

    def product(scale: Tensor) -> Tensor:
        params = TensorCoreFP8Layout.Params(scale=scale, orig_dtype=torch.bfloat16, orig_shape=(32, 64))
        return torch.nn.functional.linear(quantized, QuantizedTensor(codes, "TensorCoreFP8Layout", params))

    assert torch.equal(product(torch.tensor(2.0)), torch.full((16, 32), 128.0).bfloat16())
    with pytest.raises(ValueError, match="scale_b must have 1 Float element"):
        product(torch.full((32, 1), 2.0))


def test_comfy_kitchen_decodes_the_same_values() -> None:
    files = Files()
    described = description(MODULES, files, 5)
    headers, stored = written_out(FORMS["comfyui"].write(described, files.read), files)
    for name, mine in values(described, files).items():
        one = described.modules[name]
        roles = {
            info.name.rpartition(".")[2]: stored.tensor(info)
            for info in grouped(headers.tensors.values())[name].values()
        }
        said = json.loads(bytes(roles["comfy_quant"].tolist()))["format"]
        if said == "nvfp4":
            theirs = comfy_kitchen.dequantize_nvfp4(
                roles["weight"], roles["weight_scale_2"], roles["weight_scale"], torch.float32
            )
        elif said == "mxfp8":
            theirs = comfy_kitchen.dequantize_mxfp8(
                roles["weight"], roles["weight_scale"].view(torch.float8_e8m0fnu), torch.float32
            )
        else:
            theirs = comfy_kitchen.dequantize_per_tensor_fp8(roles["weight"], roles["weight_scale"], torch.float32)
        assert equal(mine, theirs[: one.rows, : one.columns]), name
        assert not theirs[one.rows :].any() and not theirs[:, one.columns :].any()


def test_comfy_kitchens_own_tensors_are_read() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(48, 96, generator=generator)
    factor = weight.abs().amax() / 2688
    codes, scales = comfy_kitchen.quantize_nvfp4(weight.bfloat16(), factor)
    codes8, scales8 = comfy_kitchen.quantize_mxfp8(weight.bfloat16(), pad_32x=True)
    files = Files()
    tensors = {"a.weight": codes, "a.weight_scale": scales, "a.weight_scale_2": factor}
    tensors |= {"b.weight": codes8, "b.weight_scale": scales8.view(torch.uint8)}
    for name, word in (("a", "nvfp4"), ("b", "mxfp8")):
        tensors[f"{name}.comfy_quant"] = torch.tensor(list(json.dumps({"format": word}).encode()), dtype=torch.uint8)
    infos = {name: files.put(name, tensor) for name, tensor in tensors.items()}
    found = FORMS["comfyui"].read(Headers(infos, {}, {}, ()), files.read, {"a": (48, 96), "b": (48, 96)}, "IN")
    mine = values(found, files)
    assert equal(mine["a"], comfy_kitchen.dequantize_nvfp4(codes, factor, scales, torch.float32))
    assert equal(mine["b"], comfy_kitchen.dequantize_mxfp8(codes8, scales8, torch.float32)[:48])
    assert float((mine["a"] - weight).norm() / weight.norm()) < 0.1 > float((mine["b"] - weight).norm() / weight.norm())


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def schemes(config: Any) -> dict[str, Any]:
    """By compressed-tensors' own reading of its config: the scheme of each target."""
    found = QuantizationConfig.model_validate(config["quantization_config"])
    return {target: group for group in found.config_groups.values() for target in group.targets}


@pytest.mark.parametrize("factor", [2.0**-7, 0.0123, 1.9e-3])
def test_compressed_tensors_decompresses_the_same_values(factor: float) -> None:
    files = Files()
    modules = {name: Module(**{**one.__dict__, "factor": factor}) for name, one in MODULES.items()}
    described = description(modules, files, 6)
    written = FORMS["compressed-tensors"].write(described, files.read)
    headers, stored = written_out(written, files)
    by_target = schemes(headers.config)
    mine = values(described, files)
    tensors = {name: files.tensor(info) for name, info in described.tensors.items()}
    for name, one in described.modules.items():
        scheme = by_target[name]
        roles = {
            info.name.rpartition(".")[2]: stored.tensor(info)
            for info in grouped(headers.tensors.values())[name].values()
        }
        theirs = BaseCompressor.get_value_from_registry(scheme.format).decompress(roles, scheme)["weight"]
        if one.algorithm == "nvfp4":
            # Its order: block scale / reciprocal, times the code.
            whole = dequantize_nvfp4(
                tensors[f"{name}.weight"],
                torch.ones_like(tensors[f"{name}.weight_scale"].float()).to(E4M3),
                torch.tensor(1.0),
            )
            blocks = tensors[f"{name}.weight_scale"].to(torch.bfloat16) / roles["weight_global_scale"]
            wanted = whole.reshape(*blocks.shape, 16) * blocks.unsqueeze(-1)
            assert equal(theirs, wanted.reshape(theirs.shape)), name
            if factor == 2.0**-7:  # where no order rounds, the values are the same
                assert equal(theirs, mine[name]), name
        elif one.algorithm == "mxfp8":
            assert equal(theirs, mine[name]), name
        else:
            scale = roles["weight_scale"].reshape(-1, 1)
            assert equal(theirs, tensors[f"{name}.weight"].to(theirs.dtype) * scale), name
            assert equal(theirs, mine[name]), name


def test_what_compressed_tensors_compresses_is_read() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(24, 64, generator=generator).bfloat16()
    reciprocal = 2688 / weight.abs().amax().float()
    blocks = (weight.float().reshape(24, 4, 16).abs().amax(-1) / 6 * reciprocal).to(E4M3)
    files = Files()
    config = FORMS["compressed-tensors"].write(description({"x": Module("nvfp4", 24, 64)}, files, 0), files.read).config
    assert config is not None
    (scheme,) = schemes(config).values()
    state = {"weight": weight, "weight_scale": blocks.float(), "weight_global_scale": reciprocal.reshape(1)}
    packed = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized").compress(state, scheme)
    infos = {f"x.{role}": files.put(f"x.{role}", tensor) for role, tensor in packed.items()}
    found = FORMS["compressed-tensors"].read(Headers(infos, {}, dict(config), ()), files.read, {}, "IN")
    mine = values(found, files)["x"]
    theirs = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized").decompress(packed, scheme)["weight"]
    assert float((mine.float() - theirs.float()).norm() / theirs.float().norm()) < 0.005
    assert float((mine.float() - weight.float()).norm() / weight.float().norm()) < 0.1


def test_torchao_makes_its_tensors_of_it_and_the_same_file_of_them(tmp_path: Path) -> None:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict

    files = Files()
    described = description(MODULES, files, 7)
    path = save(FORMS["torchao"].write(described, files.read), files, tmp_path / "x.safetensors")
    flat = load_file(path)
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors, left = unflatten_tensor_state_dict(flat, metadata)
    assert not left
    for name, mine in values(described, files).items():
        assert equal(tensors[f"{name}.weight"].dequantize(), mine), name
    again, said = flatten_tensor_state_dict(tensors)
    assert again.keys() == flat.keys()
    for name, tensor in again.items():
        assert tensor.dtype == flat[name].dtype and tensor.shape == flat[name].shape
        assert torch.equal(raw(tensor), raw(flat[name])), name
    assert said.keys() == metadata.keys() - {"format"}
    for name in said.keys() - {"tensor_names"}:
        assert json.loads(said[name]) == json.loads(metadata[name])
    assert set(json.loads(said["tensor_names"])) == set(json.loads(metadata["tensor_names"]))


@pytest.mark.parametrize("swizzled", [False, True])
def test_what_torchao_writes_is_read(swizzled: bool, tmp_path: Path) -> None:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Float8Tensor, PerRow, PerTensor

    weight = torch.randn(80, 96, generator=torch.Generator().manual_seed(3)).bfloat16()
    factor = per_tensor_amax_to_scale(weight.abs().amax())
    made = {
        "a": NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=factor, is_swizzled_scales=swizzled),
        "b": MXTensor.to_mx(weight, E4M3, 32, scaling_mode=ScaleCalculationMode.RCEIL, is_swizzled_scales=swizzled),
        "c": Float8Tensor.from_hp(weight, granularity=PerTensor()),
        "d": Float8Tensor.from_hp(weight, granularity=PerRow()),
    }
    flat, metadata = flatten_tensor_state_dict({f"{name}.weight": one for name, one in made.items()})
    save_file(flat, tmp_path / "x.safetensors", metadata)
    with CheckpointReader(tmp_path / "x.safetensors", need_config=False) as reader:
        headers = Headers(reader.tensors, reader.metadata, {}, ())
        found = FORMS["torchao"].read(headers, reader.read_of, {}, "IN")
        roles = grouped(found.tensors.values())
        for name, one in found.modules.items():
            info = decoded(one, roles[name])
            data = bytearray(reader.read_of(info, 0, info.num_bytes))
            mine = torch.frombuffer(data, dtype=torch.bfloat16).reshape(80, 96)
            assert equal(mine, made[name].dequantize()), name
    assert {name: one.algorithm for name, one in found.modules.items()} == {
        "a": "nvfp4",
        "b": "mxfp8",
        "c": "fp8",
        "d": "fp8",
    }


def test_modelopt_dequantizes_the_same_values() -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    files = Files()
    described = description({"x": Module("nvfp4", 40, 96)}, files, 8)
    roles = {role: files.tensor(info) for role, info in grouped(described.tensors.values())["x"].items()}
    packed = NVFP4QTensor(torch.Size((40, 96)), torch.float32, roles["weight"])
    theirs = packed.dequantize(
        scale=roles["weight_scale"], double_scale=roles["weight_scale_2"], block_sizes={-1: 16}, dtype=torch.float32
    )
    # ModelOpt makes zero of the code of minus zero.
    assert torch.equal(values(described, files)["x"], theirs.bfloat16())
