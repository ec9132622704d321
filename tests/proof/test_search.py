"""Thousands of small tensors, drawn by seed, and the verdict on each: it is the strongest that is true, and no other.

What is true is said by tests/support/truth.py, which tries every reading of the bytes by plain arithmetic. A share of
the draws in every run; with MOPT_TEST_LONG, thousands.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from faults import QUANTIZATION_CONFIG, swap, swizzle, write_transformer
from judge_support import NAME, judged_as_stored
from producers import (
    E4M3,
    FP8_PRODUCERS,
    NVFP4_PRODUCERS,
    VERDICTS,
    Packed,
    PackedFp8,
    dequantized,
    fp8_scale,
    max_calibration,
    pack,
    seeded,
    unpack,
)
from root import LONG
from support import Tensors, build, load, same_bits
from torch import Tensor
from truth import Reading, odd_blocks, truths, truths_fp8, up
from weights import DISTRIBUTIONS, NEARLY_CONSTANT, weight

from modelopt_convert.formats.tensor_bytes import TORCH_DTYPES
from modelopt_convert.proof.judgement import Judgement, format_proof, with_shared_scales
from modelopt_convert.run.errors import InputError

DRAWS = 8000 if LONG else 500
SHARES = 20  # of the draws: each is a test of its own
SIDES = (1, 2, 3, 5, 7, 16, 31, 64, 100, 127, 128, 129, 256, 384, 1000, 2048, 4095, 4096)
MOST_VALUES = 1 << 15
KINDS = [*DISTRIBUTIONS, *NEARLY_CONSTANT, *NEARLY_CONSTANT]
DTYPES = {name: TORCH_DTYPES[name] for name in ("BF16", "F16", "F32")}
ORDERS = ("linear", "128x4", "128x4, flat", "128x4, torchao")
PADDINGS = ("none", "row", "row_col")
# A search changes blocks all over a weight: fewer than this share of them is taken for damage.
FEW = 0.01

Damage = Callable[[Packed, random.Random], Packed]


class Drawn(NamedTuple):
    """A tensor, and how it came to be."""

    words: str
    base: Tensor
    loaded: str
    one: Packed
    stored: Packed
    reading: Reading
    producer: str
    damage: str | None
    may_be_few: bool


# Damage of any size


def _raw(one: Packed, role: str) -> Tensor:
    tensor: Tensor = getattr(one, role)
    return tensor.view(torch.uint8).clone()


def _with(one: Packed, role: str, raw: Tensor) -> Packed:
    return one._replace(**{role: raw.view(getattr(one, role).dtype)})


def _row(raw: Tensor, source: random.Random) -> int:
    return source.randrange(len(raw))


def a_bit(one: Packed, source: random.Random) -> Packed:
    raw = _raw(one, "packed")
    raw.view(-1)[source.randrange(raw.numel())] ^= 1 << source.randrange(8)
    return _with(one, "packed", raw)


def a_scale_bit(one: Packed, source: random.Random) -> Packed:
    raw = _raw(one, "scale")
    raw.view(-1)[source.randrange(raw.numel())] ^= 1 << source.randrange(7)
    return _with(one, "scale", raw)


def a_scale_step(one: Packed, source: random.Random) -> Packed:
    raw = _raw(one, "scale")
    place = source.randrange(raw.numel())
    raw.view(-1)[place] = min(126, max(0, int(raw.view(-1)[place]) + source.choice((-1, 1))))
    return _with(one, "scale", raw)


def all_scales_a_step(one: Packed, source: random.Random) -> Packed:
    raw = _raw(one, "scale").int() + source.choice((-1, 1))
    return _with(one, "scale", raw.clamp(0, 126).to(torch.uint8))


def a_scale_of_zero(one: Packed, source: random.Random) -> Packed:
    raw = _raw(one, "scale")
    raw.view(-1)[source.randrange(raw.numel())] = 0
    return _with(one, "scale", raw)


def a_row_of_zeros(one: Packed, source: random.Random) -> Packed:
    raw = _raw(one, "packed")
    raw[_row(raw, source)] = 0
    return _with(one, "packed", raw)


def a_row_of_garbage(one: Packed, source: random.Random) -> Packed:
    raw = _raw(one, "packed")
    raw[_row(raw, source)] = torch.randint(256, (raw.shape[1],), generator=seeded(source.randrange(1 << 30))).byte()
    return _with(one, "packed", raw)


def all_but_few_rows_of_garbage(one: Packed, source: random.Random) -> Packed:
    raw = _raw(one, "packed")
    noise = torch.randint(256, raw.shape, generator=seeded(source.randrange(1 << 30))).byte()
    kept = torch.linspace(0, len(raw) - 1, 16).round().long()
    noise[kept] = raw[kept]
    return _with(one, "packed", noise)


def the_end_swapped(one: Packed, source: random.Random) -> Packed:
    raw = _raw(one, "packed")
    first = _row(raw, source)
    raw[first:] = swap(raw[first:])
    return _with(one, "packed", raw)


def a_byte_swapped(one: Packed, source: random.Random) -> Packed:
    raw = _raw(one, "packed").view(-1)
    place = source.randrange(len(raw))
    raw[place] = swap(raw[place])
    return _with(one, "packed", raw.view(one.packed.shape))


def a_tile_swizzled(one: Packed, source: random.Random) -> Packed:
    raw = _raw(one, "scale")
    if len(raw) % 128 == 0 and raw.shape[1] % 4 == 0:
        first = source.randrange(len(raw) // 128) * 128
        raw[first : first + 128] = swizzle(raw[first : first + 128])
    return _with(one, "scale", raw)


def two_rows_exchanged(one: Packed, source: random.Random) -> Packed:
    codes, scales = _raw(one, "packed"), _raw(one, "scale")
    left, right = _row(codes, source), _row(codes, source)
    for raw in (codes, scales):
        raw[[left, right]] = raw[[right, left]]
    return _with(_with(one, "packed", codes), "scale", scales)


def two_scales_exchanged(one: Packed, source: random.Random) -> Packed:
    raw = _raw(one, "scale").view(-1)
    left, right = (source.randrange(len(raw)) for _ in range(2))
    raw[[left, right]] = raw[[right, left]]
    return _with(one, "scale", raw.view(one.scale.shape))


def rows_rolled(one: Packed, source: random.Random) -> Packed:
    return _with(one, "packed", _raw(one, "packed").roll(1, 0))


def columns_rolled(one: Packed, source: random.Random) -> Packed:
    return one._replace(packed=pack(unpack(one.packed).roll(1, 1)))


def signs_turned(one: Packed, source: random.Random) -> Packed:
    return _with(one, "packed", _raw(one, "packed") ^ 0x88)


def stretched(one: Packed, source: random.Random) -> Packed:
    return one._replace(global_scale=one.global_scale * source.choice((1.02, 0.98, 1 + 2.0**-23, 2.0, 0.5)))


DAMAGE: dict[str, Damage] = {
    change.__name__: change
    for change in (
        a_bit,
        a_scale_bit,
        a_scale_step,
        all_scales_a_step,
        a_scale_of_zero,
        a_row_of_zeros,
        a_row_of_garbage,
        all_but_few_rows_of_garbage,
        the_end_swapped,
        a_byte_swapped,
        a_tile_swizzled,
        two_rows_exchanged,
        two_scales_exchanged,
        rows_rolled,
        columns_rolled,
        signs_turned,
        stretched,
    )
}


# Draws


def shape(source: random.Random) -> tuple[int, int]:
    """From 1 x 16 to 4096 of either side; half of them such that scales look alike in both orders."""
    while True:
        if source.random() < 0.5:
            rows, columns = 128 * source.randint(1, 32), 64 * source.randint(1, 64)
        else:
            rows, columns = source.choice(SIDES), up(source.choice(SIDES), 16)
        if rows * columns <= MOST_VALUES * (32 if source.random() < 0.002 else 1):
            return rows, columns


def laid(one: Packed, nibbles: str, order: str, padding: str) -> Packed:
    """As its producer stores it: padded, then swizzled."""
    packed, scale = one.packed, one.scale.view(torch.uint8)
    if padding != "none":
        rows = up(len(packed), 16) - len(packed)
        wide = [up(part.shape[1], 16) - part.shape[1] if padding == "row_col" else 0 for part in (packed, scale)]
        packed, scale = (
            torch.nn.functional.pad(part, (0, more, 0, rows)) for part, more in zip((packed, scale), wide, strict=True)
        )
    if order != "linear":
        scale = swizzle(scale)
    if order == "128x4, flat":
        scale = scale.flatten()
    if order == "128x4, torchao":
        scale = scale.reshape(len(scale) // 4, -1)
    return Packed(swap(packed) if nibbles == "high" else packed, scale.view(E4M3), one.global_scale)


def drawn(seed: int) -> Drawn:
    source = random.Random(seed)
    kind, producer = source.choice(KINDS), source.choice([*NVFP4_PRODUCERS])
    rows, columns = shape(source)
    if producer == "GPTQ":
        columns = min(columns, 512)  # it inverts a matrix of this size
    stored, loaded = source.choice([*DTYPES]), source.choice([*DTYPES])
    base = weight(kind, rows, columns, seed, DTYPES[stored])
    if not bool(base.any()) or not bool(base.to(DTYPES[loaded]).any()):
        loaded, base = "BF16", weight(kind, rows, columns, seed)  # the smallest weights are none in F16
    one = NVFP4_PRODUCERS[producer].make(base.to(DTYPES[loaded]))
    damage = source.choice([*DAMAGE]) if source.random() < 0.5 else None
    if damage is not None:
        one = DAMAGE[damage](one, source)
    order = source.choice(ORDERS)
    padding = "none" if "," in order else source.choice(PADDINGS)
    may_be_few = damage is not None or kind in NEARLY_CONSTANT
    reading = Reading(source.choice(("low", "high")), order.partition(",")[0])
    words = (
        f"seed {seed}: {kind} [{rows}, {columns}] in {stored}, loaded in {loaded}, {producer}, {damage}, "
        f"{reading.nibbles} nibble, {order}, padding {padding}"
    )
    return Drawn(
        words, base, loaded, one, laid(one, reading.nibbles, order, padding), reading, producer, damage, may_be_few
    )


def verdict(algorithm: str, judgement: Judgement) -> Judgement:
    """Once its scale is looked at too."""
    return with_shared_scales(format_proof(algorithm), {NAME: judgement})[NAME]


def is_in_few_blocks(one: Drawn, casts: tuple[torch.dtype, ...]) -> bool:
    """Whether nearly all blocks are those of max calibration; the rest is damage then, however well it serves."""
    return any(0 < odd_blocks(one.base.to(cast), one.one) < FEW * one.one.scale.numel() for cast in casts)


def wrong(one: Drawn, folder: Path) -> str | None:
    """What is wrong with the verdict on a tensor; None if nothing is."""
    names = tuple(dict.fromkeys((one.loaded, _stored(one.base), "BF16", "F16")))
    casts = tuple(DTYPES[name] for name in names)
    true = truths(one.base, casts, one.stored)
    best = min((said for said, _ in true.values()), key=VERDICTS.index)
    if one.damage is None and VERDICTS.index(best) > VERDICTS.index(NVFP4_PRODUCERS[one.producer].verdict):
        return f"the oracle says {best} of a right export"
    try:
        found = verdict("nvfp4", judged_as_stored(folder, one.base, one.stored, names))
    except InputError as error:
        return None if best == "near" else f"refused, {error}, where {best} is true"
    said = found.verdict
    if not found.passed and (best == "near" or (one.may_be_few and is_in_few_blocks(one, casts))):
        return None
    if said != best:
        return f"{said}, where {best} is true ({found.counts}, {found.first})"
    assert found.reading is not None
    read = true[Reading(found.reading.nibbles, found.reading.scales)]
    if read[0] != best:
        return f"{said} as {found.reading}, which is {read[0]}"
    if one.damage is None and not torch.equal(read[1], dequantized(one.one)):
        return f"{said} as {found.reading}, which is another weight"
    return None


@pytest.mark.parametrize("share", range(SHARES))
def test_no_verdict_is_wrong(share: int, tmp_path: Path) -> None:
    draws = map(drawn, range(share, DRAWS, SHARES))
    found = [f"{one.words}: {words}" for one in draws if (words := wrong(one, _folder(tmp_path, one.words)))]
    assert found == []


def _folder(folder: Path, words: str) -> Path:
    return folder / words.partition(":")[0]


def _stored(base: Tensor) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == base.dtype)


# FP8


class DrawnFp8(NamedTuple):
    """The same in FP8, which has one layout."""

    words: str
    base: Tensor
    loaded: str
    one: PackedFp8
    producer: str
    damage: str | None


def _fp8_code(one: PackedFp8, source: random.Random) -> PackedFp8:
    raw = one.codes.view(torch.uint8).clone()
    raw.view(-1)[source.randrange(raw.numel())] ^= 1 << source.randrange(8)
    return one._replace(codes=raw.view(E4M3))


def _fp8_row(one: PackedFp8, source: random.Random) -> PackedFp8:
    raw = one.codes.view(torch.uint8).clone()
    raw[_row(raw, source)] = source.choice((0, 0x38))
    return one._replace(codes=raw.view(E4M3))


def _fp8_rows_rolled(one: PackedFp8, source: random.Random) -> PackedFp8:
    return one._replace(codes=one.codes.view(torch.uint8).roll(1, source.randrange(2)).view(E4M3))


def _fp8_stretched(one: PackedFp8, source: random.Random) -> PackedFp8:
    return one._replace(scale=one.scale * source.choice((1.02, 0.98, 1 + 2.0**-23, 2.0)))


def _fp8_signs(one: PackedFp8, source: random.Random) -> PackedFp8:
    return one._replace(codes=(one.codes.view(torch.uint8) ^ 0x80).view(E4M3))


# Producers that divide in one dtype load the model in that dtype.
LOADED = dict.fromkeys(FP8_PRODUCERS, "BF16") | {"quotient in F16": "F16", "quotient in F32": "", "compressed": ""}
FP8_DAMAGE = (_fp8_code, _fp8_row, _fp8_rows_rolled, _fp8_stretched, _fp8_signs)


def drawn_fp8(seed: int) -> DrawnFp8:
    source = random.Random(f"fp8 {seed}")
    kind, producer = source.choice(KINDS), source.choice([*FP8_PRODUCERS])
    rows, columns = shape(source)
    stored, loaded = source.choice([*DTYPES]), LOADED.get(producer) or source.choice([*DTYPES])
    base = weight(kind, rows, columns, seed, DTYPES[stored])
    if not bool(base.any()) or not float(fp8_scale(base.to(DTYPES[loaded])).to(DTYPES[loaded])):
        kind, stored, base = "gaussian", "BF16", weight("gaussian", rows, columns, seed)  # the smallest are none in F16
    one = FP8_PRODUCERS[producer].make(base.to(DTYPES[loaded]))
    damage = source.choice(FP8_DAMAGE) if source.random() < 0.5 else None
    if damage is not None:
        one = damage(one, source)
    name = damage.__name__ if damage is not None else None
    words = f"seed {seed}: {kind} [{rows}, {columns}] in {stored}, loaded in {loaded}, {producer}, {name}"
    return DrawnFp8(words, base, loaded, one, producer, name)


def wrong_fp8(one: DrawnFp8, folder: Path) -> str | None:
    names = tuple(dict.fromkeys((one.loaded, _stored(one.base), "BF16", "F16")))
    true = truths_fp8(one.base, tuple(DTYPES[name] for name in names), one.one)
    is_right = one.damage is None and FP8_PRODUCERS[one.producer].verdict != "near"
    if is_right and FP8_PRODUCERS[one.producer].verdict not in {*true, *(["nearest"] if true else [])}:
        return f"the oracle says {true or 'near'} of a right export"
    try:
        found = verdict("fp8", judged_as_stored(folder, one.base, one.one, names))
    except InputError as error:
        return f"refused, {error}, where {true} is true" if true else None
    # Where the scale cuts values off, how near the rest is decides.
    if found.verdict in true or (not found.passed and not is_right):
        return None
    return f"{found.verdict}, where {true or 'near'} is true ({found.counts}, {found.first})"


@pytest.mark.parametrize("share", range(SHARES))
def test_no_verdict_on_fp8_is_wrong(share: int, tmp_path: Path) -> None:
    draws = map(drawn_fp8, range(share, DRAWS, SHARES))
    found = [f"{one.words}: {words}" for one in draws if (words := wrong_fp8(one, _folder(tmp_path, one.words)))]
    assert found == []


# As a whole


@pytest.mark.parametrize("order", ["linear", "128x4"])
@pytest.mark.parametrize("nibbles", ["low", "high"])
def test_what_sampled_rows_cannot_tell_is_put_in_order(nibbles: str, order: str, tmp_path: Path) -> None:
    """Weights of which one row or one block alone tells the layout, or nothing does: the base's codes are built."""
    base: Tensors = {"norm.weight": torch.ones(8, dtype=torch.bfloat16)}
    export, canonical = dict(base), dict(base)
    for seed, kind in enumerate((*NEARLY_CONSTANT, "sparse", "constant_rows", "zero_rows") * 2):
        module = f"blocks.{seed}.{kind}"
        base[f"{module}.weight"] = weight(kind, 384, 128, seed)
        one = max_calibration(base[f"{module}.weight"])
        for tensors, parts in ((canonical, one), (export, laid(one, nibbles, order, "none"))):
            roles = ("weight", "weight_scale", "weight_scale_2")
            tensors |= {f"{module}.{role}": part.contiguous() for role, part in zip(roles, parts, strict=True)}
            tensors[f"{module}.input_scale"] = torch.tensor(0.01 + 0.001 * seed)
    config = {"_class_name": "SmallTransformer"}
    mine = write_transformer(tmp_path / "export", export, config | {"quantization_config": QUANTIZATION_CONFIG})
    theirs = write_transformer(tmp_path / "base", base, config)
    outcome = build(mine, theirs, tmp_path / "out", preset="none")
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.report is not None and outcome.report["proof"]["words"] == "proven"
    found = load(tmp_path / "out")
    assert [name for name, tensor in canonical.items() if not same_bits(found[name], tensor)] == []
