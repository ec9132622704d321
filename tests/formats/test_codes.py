"""The pure functions: laws, all bytes exhaustively, and ModelOpt's own quantizer as the oracle."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import same_bits

from modelopt_convert.formats.finite import check_e4m3
from modelopt_convert.formats.nvfp4.codes import (
    decode_e2m1,
    dequantize_nvfp4,
    encode_e2m1,
    pack_e2m1,
    quantize_codes,
    quantize_nvfp4,
    shared_global_scale,
    swap_nibbles,
    swap_nibbles_,
    unpack_e2m1,
)
from modelopt_convert.formats.nvfp4.scales import padded_shape, swizzle_128x4, unswizzle_128x4
from modelopt_convert.formats.nvfp4.stored import all_positive, reorder_scales, repack_rows
from modelopt_convert.formats.tensor_bytes import (
    cast_chunk,
    cast_paths,
    equal_after,
    equal_bytes,
    from_bytes,
    largest_of_chunk,
    to_bytes,
)

ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def modelopt_pack(codes: torch.Tensor) -> torch.Tensor:
    """As the last line of NVFP4QTensor.quantize."""
    return (codes[..., 1::2] << 4) | codes[..., 0::2]


def test_unpack_undoes_modelopts_packing_for_all_bytes() -> None:
    codes = unpack_e2m1(ALL_BYTES.reshape(16, 16))
    assert codes.shape == (16, 32) and int(codes.max()) == 15
    assert torch.equal(modelopt_pack(codes), ALL_BYTES.reshape(16, 16))


def test_swap_is_its_own_inverse_and_swaps() -> None:
    before = ALL_BYTES.clone()
    swapped = swap_nibbles(ALL_BYTES)
    assert torch.equal(swap_nibbles(swapped), before) and torch.equal(ALL_BYTES, before)
    assert torch.equal(unpack_e2m1(swapped[:, None])[:, 0], unpack_e2m1(before[:, None])[:, 1])


@given(st.binary(max_size=80), st.integers(0, 9), st.sampled_from([1, 2]))
def test_swap_is_that_of_each_byte(raw: bytes, skipped: int, step: int) -> None:
    """Also of views that begin or lie oddly in memory, and of sizes that are no whole words."""
    packed = torch.tensor(list(raw), dtype=torch.uint8)[skipped::step]
    swapped = [(byte << 4 & 0xF0) | byte >> 4 for byte in packed.tolist()]
    before = packed.tolist()
    assert (swap_nibbles(packed).tolist(), packed.tolist()) == (swapped, before)
    packed = packed.contiguous()
    assert swap_nibbles_(packed) is packed and packed.tolist() == swapped


@given(st.binary(max_size=40), st.data())
def test_equal_bytes_sees_any_difference(raw: bytes, data: st.DataObject) -> None:
    assert equal_bytes(memoryview(bytearray(raw)), memoryview(bytearray(raw)))
    if raw:
        other = bytearray(raw)
        other[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
        assert not equal_bytes(memoryview(bytearray(raw)), memoryview(other))


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=20))
def test_the_largest_of_a_chunk_is_what_torch_finds(bits: list[int]) -> None:
    values = torch.tensor(bits, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    if bool(values.isfinite().all()):
        assert largest_of_chunk(to_bytes(values), "BF16") == float(values.abs().amax())
    else:
        with pytest.raises(ValueError, match="NaN or infinity"):
            largest_of_chunk(to_bytes(values), "BF16")


@given(st.binary(max_size=20))
def test_all_positive_is_what_torch_says_of_each(raw: bytes) -> None:
    scales = torch.tensor(list(raw), dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert all_positive(scales.view(torch.uint8).numpy()) == bool((scales.float() > 0).all())


@given(st.binary(max_size=20))
def test_nan_is_found_among_codes_as_torch_says_of_each(raw: bytes) -> None:
    broken = int(torch.tensor(list(raw), dtype=torch.uint8).view(torch.float8_e4m3fn).float().isnan().sum())
    if not broken:
        assert check_e4m3(raw) is raw
        return
    with pytest.raises(ValueError, match=f"found {broken} NaN"):
        check_e4m3(raw)


@pytest.mark.parametrize("function", [unpack_e2m1, swap_nibbles])
def test_codes_must_be_bytes(function: object) -> None:
    with pytest.raises(ValueError, match="uint8"):
        function(torch.zeros(4, dtype=torch.int8))  # type: ignore[operator]


def test_codes_are_modelopts_on_every_bf16_value() -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(torch.float32)
    # Around the bounds, where rounding is decided, in float32 steps.
    bounds = torch.tensor([0.25, 0.5, 0.75, 1.0, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    near = torch.stack([torch.nextafter(bounds, bounds * 0), bounds, torch.nextafter(bounds, bounds * 9)]).flatten()
    values = torch.cat([every, near, -near])
    assert torch.equal(encode_e2m1(values), NVFP4QTensor._cast_fp4(values.clone()))


def test_decoded_codes_are_modelopts_values() -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(decode_e2m1(codes), NVFP4QTensor.get_e2m1_values("cpu")[codes.long()].to(torch.float32))


weights = st.tuples(
    st.sampled_from([(1, 16), (3, 32), (17, 48), (128, 16), (129, 64)]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.integers(0, 2**31),
    st.sampled_from([1e-6, 1.0, 1e4]),
)


@settings(max_examples=60, deadline=None)
@given(weights)
def test_quantize_and_dequantize_agree_with_modelopt(
    case: tuple[tuple[int, int], torch.dtype, int, float],
) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    shape, dtype, seed, magnitude = case
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * magnitude).to(dtype)
    weight[0, :16] = 0  # a block of zeros
    oracle, scale, global_scale = NVFP4QTensor.quantize(weight.clone(), 16)
    before = weight.clone()
    codes = quantize_codes(weight, scale, global_scale)
    assert torch.equal(modelopt_pack(codes), oracle._quantized_data)
    assert same_bits(weight, before)
    expected = oracle.dequantize(torch.float32, scale=scale, double_scale=global_scale, block_sizes={-1: 16})
    # Equal as numbers: ModelOpt's table has +0 where the code says -0.
    ours = dequantize_nvfp4(oracle._quantized_data, scale, global_scale)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 13), st.integers(0, 2**31))
def test_unswizzle_undoes_modelopts_swizzle(rows: int, columns: int, seed: int) -> None:
    from modelopt.torch.export.diffusers_utils import swizzle_nvfp4_scales

    scale = torch.randint(0, 127, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    weight = torch.zeros(rows, columns * 8, dtype=torch.uint8)
    tensors = {
        "m.weight": weight,
        "m.weight_scale": scale.view(torch.float8_e4m3fn),
        "m.weight_scale_2": torch.ones(()),
    }
    swizzled = swizzle_nvfp4_scales(dict(tensors))["m.weight_scale"]
    assert tuple(swizzled.shape) == padded_shape(rows, columns)
    back = unswizzle_128x4(swizzled, rows, columns)
    assert same_bits(back, scale.view(torch.float8_e4m3fn)) and back.is_contiguous()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 13), st.integers(0, 2**31))
def test_swizzle_is_comfy_kitchens_and_undone(rows: int, columns: int, seed: int) -> None:
    from comfy_kitchen.float_utils import to_blocked

    raw = torch.randint(0, 127, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    scale = raw.view(torch.float8_e4m3fn)
    before = scale.clone()
    swizzled = swizzle_128x4(scale)
    assert same_bits(scale, before) and tuple(swizzled.shape) == padded_shape(rows, columns)
    assert torch.equal(swizzled.view(torch.uint8).flatten(), to_blocked(raw).flatten())
    assert same_bits(unswizzle_128x4(swizzled, rows, columns), scale)
    assert torch.equal(swizzle_128x4(scale).view(torch.uint8), swizzled.view(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(weights)
def test_quantizer_has_modelopts_bytes(case: tuple[tuple[int, int], torch.dtype, int, float]) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    shape, dtype, seed, magnitude = case
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(shape, generator=generator).pow(3) * magnitude).to(dtype)
    weight[0, :16] = 0 if shape[0] > 1 else weight[0, :16]
    before = weight.clone()
    oracle, scale, global_scale = NVFP4QTensor.quantize(weight.clone(), 16)
    assert same_bits(shared_global_scale([weight]), global_scale)
    packed, ours = quantize_nvfp4(weight, global_scale)
    assert same_bits(packed, oracle._quantized_data) and same_bits(ours, scale)
    assert same_bits(weight, before)
    # A fused group shares the largest scale.
    assert same_bits(shared_global_scale([weight / 2, weight]), global_scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-40, 3e-5, 2.0**-8, 0.01, 1.0, 1e30, math.inf])
def test_values_of_16_bits_are_quantized_as_all_others(dtype: torch.dtype, scale: float) -> None:
    """Every value with its neighbours and with values far apart, ties, zeros of either sign, and over several parts."""
    generator, factor = torch.Generator().manual_seed(0), torch.tensor(scale)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()].view(16, -1)
    size = 256 * (scale if 0 < scale < 1 else 1.0)  # the largest values are within the largest scale
    random = torch.randn(540_000, generator=generator) * size
    ties = torch.randint(-24, 25, (256, 16), generator=generator) * 0.25 * size
    ties[:, 3] = 6 * size
    sparse = random[:4096] * (torch.rand(4096, generator=generator) > 0.5)
    beyond = random[:4096] * 16  # the largest code is cut, at quotients that a sum of bits would take for a sign
    for values in (every, finite, finite.t(), random, ties, sparse, beyond):
        weight = values.to(dtype).reshape(-1, 16)
        packed, scales = quantize_nvfp4(weight, factor)
        others = quantize_nvfp4(weight.float(), factor)
        assert same_bits(packed, others[0]) and same_bits(scales, others[1])
        assert same_bits(packed, pack_e2m1(quantize_codes(weight, scales, factor)))


def test_pack_is_compressed_tensors_pack() -> None:
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

    codes = torch.arange(16, dtype=torch.uint8).repeat(16, 2)
    codes = torch.cat([codes, codes.flip(0, 1)])
    assert torch.equal(pack_e2m1(codes), pack_fp4_to_uint8(decode_e2m1(codes).to(torch.bfloat16)))


def test_shapes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        quantize_nvfp4(torch.zeros(2, 24), torch.tensor(1.0))
    with pytest.raises(ValueError, match="N, K/16"):
        swizzle_128x4(torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="not zero"):
        repack_rows(b"\x01" * 8, 4, 3, 2, swap=False)
    assert bytes(repack_rows(b"\x12\x34\x00" * 2, 3, 2, 2, swap=True)) == b"\x21\x43" * 2
    with pytest.raises(ValueError, match="128x4"):
        reorder_scales(b"\0" * 6, (2, 3), 2, 3, "128x4")


def test_unswizzle_refuses_what_has_another_size() -> None:
    with pytest.raises(ValueError, match="512"):
        unswizzle_128x4(torch.zeros(128, 3, dtype=torch.uint8), 128, 3)


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=64), st.sampled_from(["F16", "F32"]))
def test_cast_chunk_is_torchs_cast(raw: bytes, source: str) -> None:
    raw = raw[: len(raw) // 4 * 4]
    dtype = {"F16": torch.float16, "F32": torch.float32}[source]
    expected = torch.frombuffer(bytearray(raw), dtype=dtype).to(torch.bfloat16) if raw else torch.empty(0)
    assert bytes(cast_chunk(raw, source, "BF16")) == expected.view(torch.uint8).numpy().tobytes()


def test_bytes_round_trip() -> None:
    tensor = torch.randn(3, 5).to(torch.bfloat16)
    assert same_bits(from_bytes(bytes(to_bytes(tensor)), "BF16", (3, 5)), tensor)
    assert from_bytes(b"", "F32", (0, 4)).shape == (0, 4)


def test_equal_after_a_cast_knows_both_ways() -> None:
    base = torch.randn(1000)
    direct, loaded = base.to(torch.float16), base.to(torch.bfloat16).to(torch.float16)
    assert cast_paths("F32", "F16") == [("F16",), ("BF16", "F16")]
    assert equal_after(base, ("F16",), direct) and not equal_after(base, ("F16",), loaded)
    assert equal_after(base, ("BF16", "F16"), loaded)
