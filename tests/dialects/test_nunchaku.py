"""nunchaku's modules: its own packer as oracle, the engine's formula, any shape and any byte, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from described import TORCH
from hypothesis import given, settings
from hypothesis import strategies as st
from nunchaku_files import (
    E2M1,
    SHIFT,
    Kind,
    Made,
    halves,
    mixed,
    pack_awq,
    pack_codes,
    pack_low_rank,
    pack_micro,
    pack_scales,
    pack_vector,
    w4a4,
    w4a16,
)
from nunchaku_read import DIFFUSERS, PLAIN, SHIFTED, SIX, THREE, described, nvfp4, values
from safetensors.torch import load_file
from support import Tensors

from modelopt_convert.run.errors import InputError

N, K, R = 256, 128, 32


@pytest.fixture(scope="module")
def theirs() -> Tensors:
    """What nunchaku's own tools packed: see the README beside it."""
    return load_file(Path(__file__).parent / "nunchaku" / "packed.safetensors")


def in_turns(rows: torch.Tensor, parts: int) -> torch.Tensor:
    return rows.reshape(parts, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def test_the_files_of_these_tests_are_packed_as_nunchaku_packs(theirs: Tensors) -> None:
    assert same(pack_codes((mixed(N * K, 1) % 16).reshape(N, K)), theirs["int4.qweight"])
    assert same(pack_scales(halves((N, K // 64), 2, 0.25, 2)), theirs["int4.wscales"])
    assert same(pack_micro(micro_scales()), theirs["nvfp4.wscales"])
    for name, vector in (("bias", halves((N,), 3, -1, 1)), ("smooth", halves((K,), 4, 0.5, 2))):
        assert same(pack_vector(vector), theirs[f"vector.{name}"])
    assert same(pack_low_rank(halves((R, K), 5, -1, 1), down=True), theirs["lora.down"])
    assert same(pack_low_rank(halves((N, R), 6, -1, 1), down=False), theirs["lora.up"])
    for parts, rows in ((6, 96), (3, 48)):
        codes = (mixed(rows * K, 13 + parts) % 16).reshape(rows, K)
        assert same(pack_awq(in_turns(codes, parts)), theirs[f"awq{parts}.qweight"])


def micro_scales() -> torch.Tensor:
    exponents, mantissas = (mixed(N * K // 16, 7) % 9).float() - 4, (mixed(N * K // 16, 8) % 8).float()
    return (2.0**exponents * (1 + mantissas / 8)).reshape(N, K // 16).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("kind", ["int4", "nvfp4"])
def test_what_their_packer_made_is_read_as_what_it_was_made_from(theirs: Tensors, kind: str) -> None:
    """Codes, scales, vectors and both low-rank parts, each from its stated input: none of them is ours."""
    codes = (mixed(N * K, 1) % 16).reshape(N, K)
    smooth, by_row = halves((K,), 4, 0.5, 2).double(), halves((N,), 9, 0.5, 1.5).double()
    roles = {"qweight": theirs["int4.qweight"], "wscales": theirs[f"{kind}.wscales"], "bias": theirs["vector.bias"]}
    roles |= {"smooth": theirs["vector.smooth"], "lora_down": theirs["lora.down"], "lora_up": theirs["lora.up"]}
    if kind == "int4":
        exact = ((codes ^ 8) - 8) * halves((N, K // 64), 2, 0.25, 2).double().repeat_interleave(64, 1)
    else:
        roles |= {"wcscales": theirs["vector.wcscales"], "wtscale": torch.tensor([0.375]).bfloat16()}
        exact = E2M1.double()[codes] * micro_scales().double().repeat_interleave(16, 1) * 0.375 * by_row[:, None]
    wanted = exact / smooth + halves((N, R), 6, -1, 1).double() @ halves((R, K), 5, -1, 1).double()
    weight, bias = values(PLAIN, roles)
    assert torch.allclose(weight.double(), wanted, rtol=3e-7, atol=1e-6)
    assert same(bias, halves((N,), 3, -1, 1))


@pytest.mark.parametrize(("name", "module"), [("shifted", SHIFTED), ("float", SHIFTED), ("float", PLAIN)])
def test_their_whole_conversion_gives_back_weight_and_bias(theirs: Tensors, name: str, module: str) -> None:
    """deepcompressor smoothed, took out a low-rank part, quantized, and moved the shift of the inputs into the bias."""
    roles = {full.partition(".")[2]: one for full, one in theirs.items() if full.startswith(f"{name}.")}
    original = halves((128, K), 10, -1, 1)
    weight, bias = values(module, roles)
    assert apart(weight, original) < 0.13
    # A bias is as far off as the weights of a row together, by the shift; with the shift left in, by 2.3.
    assert apart(bias, halves((128,), 3, -1, 1)) < 0.3
    without = {role: one for role, one in roles.items() if not role.startswith("lora")}
    assert apart(values(module, without)[0], original) > apart(weight, original) + 0.003
    unsmoothed = roles | {"smooth": torch.ones_like(roles["smooth"])}
    assert apart(values(module, unsmoothed)[0], original) > 0.3


def test_int4_after_gelu_is_shifted_and_nothing_else_is(theirs: Tensors) -> None:
    roles = {full.partition(".")[2]: one for full, one in theirs.items() if full.startswith("shifted.")}
    assert apart(values(PLAIN, roles)[1], halves((128,), 3, -1, 1)) > 2
    roles = {full.partition(".")[2]: one for full, one in theirs.items() if full.startswith("float.")}
    assert same(values(SHIFTED, roles)[1], values(PLAIN, roles)[1])


@pytest.mark.parametrize(("parts", "rows", "module"), [(6, 96, SIX), (3, 48, THREE)])
def test_their_modulation_gives_back_rows_and_bias(theirs: Tensors, parts: int, rows: int, module: str) -> None:
    roles = {role: theirs[f"awq{parts}.{role}"] for role in ("qweight", "wscales", "wzeros", "bias")}
    codes = (mixed(rows * K, 13 + parts) % 16).reshape(rows, K)
    scales = halves((rows, K // 64), 14 + parts, 0.25, 2).double().repeat_interleave(64, 1)
    weight, bias = values(module, roles)
    zeros = (scales.float() * 7).bfloat16().double()  # the product is stored, rounded
    assert torch.allclose(weight.double(), codes * scales - zeros, rtol=0, atol=1e-6)
    assert (bias.float() - halves((rows,), 15 + parts, -1, 1).float()).abs().max() <= 2**-8  # 1 was added in BF16


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 2).map(lambda n: 128 * n),
    columns=st.integers(1, 3).map(lambda n: 128 * n),
    rank=st.sampled_from([0, 16, 48]),
    kind=st.sampled_from(["int4", "nvfp4"]),
    shifted=st.booleans(),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_w4a4_module_is_what_the_engine_computes_with(
    rows: int, columns: int, rank: int, kind: Kind, shifted: bool, seed: int, data: Any
) -> None:
    smooth = halves((columns,), seed, 0.25, 4)
    original, bias = halves((rows, columns), seed + 1, -1, 1).double(), halves((rows,), seed + 2, -1, 1).double()
    made = w4a4(original, bias, kind, smooth, rank=rank, shifted=shifted)
    _check(SHIFTED if shifted else PLAIN, made, data)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 9).map(lambda n: 24 * n),
    columns=st.integers(1, 5).map(lambda n: 64 * n),
    parts=st.sampled_from([3, 6]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_w4a16_module_is_what_the_engine_computes_with(
    rows: int, columns: int, parts: int, seed: int, data: Any
) -> None:
    made = w4a16(halves((rows, columns), seed, -1, 1), halves((rows,), seed + 1, -1, 1), parts)
    _check(SIX if parts == 6 else THREE, made, data)


def _check(module: str, made: Made, data: Any) -> None:
    """All values, and any stretch of bytes; no bytes but those that were announced are taken."""
    found, files = described({module: made.tensors})
    assert made.bias is not None
    for role, wanted in (("weight", made.weight), ("bias", made.bias)):
        info = found.tensors[f"{DIFFUSERS[module]}.{role}"]
        assert info.shape == wanted.shape
        if role == "weight":
            assert torch.allclose(files.tensor(info).double(), wanted, rtol=1e-6, atol=1e-6)
        else:
            assert near_bf16(files.tensor(info), wanted)
        whole = files.whole(info)
        begin = data.draw(st.integers(0, len(whole) - 1))
        count = data.draw(st.integers(1, min(len(whole) - begin, 40_000)))
        taken = [(one.file, one.start, one.start + one.num_bytes) for one in info.recipe.extents(begin, count)]  # type: ignore[union-attr]

        def fetch(file: str, start: int, target: memoryview, taken: Any = taken) -> None:
            end = start + target.nbytes
            assert any(one == file and first <= start and end <= last for one, first, last in taken), (file, start)
            files.fetch(file, start, target)

        part = bytearray(count)
        info.recipe.fill(begin, memoryview(part), fetch)  # type: ignore[union-attr]
        assert bytes(part) == whole[begin : begin + count]


@pytest.mark.parametrize("kind", ["int4", "nvfp4"])
def test_a_linear_of_what_is_read_does_what_the_engine_does(kind: Kind) -> None:
    """The engine's own order of operations, on inputs after GELU: shift, division, two products, bias."""
    original, bias = halves((128, 256), 1, -1, 1).double(), halves((128,), 2, -1, 1).double()
    smooth, none = halves((256,), 3, 0.5, 2), torch.ones(256).bfloat16()
    made = w4a4(original, bias, kind, smooth, shifted=True)
    inputs = torch.nn.functional.gelu(torch.randn(50, 256, generator=torch.Generator().manual_seed(0)).double())
    roles = dict(made.tensors)
    stored = roles["bias"]
    low_rank = {role: roles.pop(role) for role in ("lora_down", "lora_up")}
    residual = values(PLAIN, roles | {"smooth": pack_vector(none)})[0].double()
    both = values(PLAIN, roles | low_rank | {"smooth": pack_vector(none)})[0].double()
    shift = SHIFT if kind == "int4" else 0.0
    engine = ((inputs + shift) / smooth.double()) @ residual.T + inputs @ (both - residual).T
    engine += values(PLAIN, roles | {"bias": stored})[1].double()
    weight, found = values(SHIFTED, dict(made.tensors))
    result = inputs @ weight.double().T + found.double()
    assert apart(result, engine) < 2e-3  # the bias is BF16
    assert apart(result, inputs @ original.T + bias) < 0.15


def near_bf16(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether values are rounded once; sums that cancel have the error of float32."""
    return torch.allclose(found.double(), wanted, rtol=2**-8, atol=1e-5)


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_the_scale_of_nvfp4_in_any_float(dtype: str) -> None:
    roles = nvfp4() | {"wtscale": torch.tensor([0.5], dtype=TORCH[dtype])}
    assert same(values(PLAIN, roles)[0], values(PLAIN, roles | {"wtscale": torch.tensor(0.5)})[0])
    without = {role: one for role, one in roles.items() if role not in ("wtscale", "wcscales")}
    assert same(values(PLAIN, without)[0], values(PLAIN, without | {"wtscale": torch.ones(1)})[0])


def test_a_rank_of_nothing_is_no_low_rank_part() -> None:
    made = w4a4(halves((128, 256), 1, -1, 1), halves((128,), 2, -1, 1), "int4", halves((256,), 3, 0.5, 2), rank=0)
    empty = {"lora_down": torch.zeros(256, 0).bfloat16(), "lora_up": torch.zeros(128, 0).bfloat16()}
    assert same(values(PLAIN, made.tensors)[0], values(PLAIN, made.tensors | empty)[0])


def test_a_checkpoint_in_f16_means_the_same() -> None:
    made = w4a4(halves((128, 128), 1, -1, 1), halves((128,), 2, -1, 1), "int4", halves((128,), 3, 0.5, 2))
    in_f16 = {role: one.half() if one.dtype == torch.bfloat16 else one for role, one in made.tensors.items()}
    for left, right in zip(values(PLAIN, made.tensors), values(PLAIN, in_f16), strict=True):
        assert torch.allclose(left.float(), right.float(), rtol=1e-3, atol=1e-5)
    assert values(PLAIN, in_f16)[1].dtype == torch.float16


def test_the_output_of_a_single_block_is_of_two_modules() -> None:
    """Attention's columns come first; both biases are added, and the second module's inputs are shifted."""
    block = "single_transformer_blocks.0"
    smooth = halves((256,), 1, 0.5, 2)
    left = w4a4(halves((128, 128), 2, -1, 1), halves((128,), 3, -1, 1), "int4", smooth[:128])
    right = w4a4(halves((128, 256), 4, -1, 1), halves((128,), 5, -1, 1).double(), "int4", smooth, shifted=True)
    found, files = described({f"{block}.out_proj": left.tensors, f"{block}.mlp_fc2": right.tensors})
    weight, bias = (files.tensor(found.tensors[f"{block}.proj_out.{role}"]) for role in ("weight", "bias"))
    assert torch.allclose(weight.double(), torch.cat((left.weight, right.weight), 1), rtol=1e-6, atol=1e-6)
    assert left.bias is not None and right.bias is not None
    assert near_bf16(bias, left.bias + right.bias)
    for alone in ("out_proj", "mlp_fc2"):
        with pytest.raises(InputError) as caught:
            described({f"{block}.{alone}": left.tensors if alone == "out_proj" else right.tensors})
        assert caught.value.code == "naming.partial" and alone in caught.value.message
    other = w4a4(halves((256, 256), 4, -1, 1), halves((256,), 5, -1, 1), "int4", smooth)
    with pytest.raises(InputError) as caught:
        described({f"{block}.out_proj": left.tensors, f"{block}.mlp_fc2": other.tensors})
    assert caught.value.code == "dialect.shape" and "mlp_fc2.qweight" in caught.value.message
    in_f16 = dict(right.tensors) | {"bias": right.tensors["bias"].half()}
    with pytest.raises(InputError) as caught:
        described({f"{block}.out_proj": left.tensors, f"{block}.mlp_fc2": in_f16})
    assert caught.value.code == "dialect.shape" and "mlp_fc2.bias" in caught.value.message
