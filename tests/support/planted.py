"""Faults planted in the stored bytes of one module, at seeded positions over the whole of it.

A fault is drawn again where it changes no value, or where what it makes is as near to the base as what was there: the
other zero, a code on the other side of a tie, a block scale under which every code is still the nearest and the block's
error no larger. So it is where the bytes are refused without a base: NaN, and scales that are zero or negative. What is
left is damage that a base alone shows, and it must be seen.
"""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from faults import swap, swizzle
from producers import E4M3, Packed, block_errors, each, is_nearest, unpack
from support import Tensors
from torch import Tensor

from modelopt_convert.formats.rows import SAMPLED_ROWS, sample_rows

PAGE = 4096
TILE = 128
STRIP = 32
# A module's tensors by role: weight, weight_scale and, for NVFP4, weight_scale_2.
Parts = dict[str, Tensor]
Change = Callable[[Parts, random.Random], Parts]


class Where(NamedTuple):
    """The first value that differs.

    Attributes:
        role: The tensor: weight, weight_scale or weight_scale_2.
        row: None in a scale of the whole tensor.
        column: Of a code; of a block scale, the block within the row.
    """

    role: str
    row: int | None
    column: int | None


class Planted(NamedTuple):
    """A fault: the tensors that it changes, by name, and where it begins."""

    changes: Tensors
    first: Where


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of damage.

    Attributes:
        change: Gives the changed parts of a module.
        rows: The fewest that a module must have.
        columns: What K must be a multiple of.
        at_one_place: Whether one code or one block scale is changed alone.
        takes_another: Whether a part comes from a second module.
    """

    change: Change
    rows: int = 1
    columns: int = 16
    at_one_place: bool = False
    takes_another: bool = False

    def fits(self, weight: Tensor) -> bool:
        """Whether it can be planted in the module of this base weight."""
        return weight.shape[0] >= self.rows and weight.shape[1] % self.columns == 0


def plant(
    fault: Fault, tensors: Mapping[str, Tensor], module: str, base: Tensor, seed: int, other: str | None = None
) -> Planted:
    """Damage one module.

    Args:
        fault: A kind of ``NVFP4_FAULTS`` or ``FP8_FAULTS``.
        tensors: The checkpoint, which is not changed.
        module: The module of that format.
        base: Its base weight [N, K], in the dtype from which it was quantized.
        seed: Other seeds, other places.
        other: A second module, for faults that exchange something between two.
    """
    before = parts_of(tensors, module)
    for attempt in range(1000):
        source = random.Random(f"{seed} {attempt}")
        if fault.takes_another:
            assert other is not None
            role = "weight_scale_2" if "weight_scale_2" in before else "weight_scale"
            mine, theirs = tensors[f"{module}.{role}"], tensors[f"{other}.{role}"]
            changes = {f"{module}.{role}": theirs.clone(), f"{other}.{role}": mine.clone()}
            after = before | {role: theirs}
        else:
            parts = fault.change({role: tensor.clone() for role, tensor in before.items()}, source)
            changes = {f"{module}.{role}": tensor for role, tensor in parts.items()}
            after = before | parts
        if _is_usable(after) and not _is_harmless(base, before, after):
            return Planted(changes, first_difference(before, after))
    raise AssertionError(f"nothing in {module} that this fault would damage")


def parts_of(tensors: Mapping[str, Tensor], module: str) -> Parts:
    roles = ("weight", "weight_scale", "weight_scale_2")
    return {role: tensors[f"{module}.{role}"] for role in roles if f"{module}.{role}" in tensors}


def first_difference(before: Parts, after: Parts) -> Where:
    """The first code, else the first block scale, else the scale of the tensor; the two zeros are one value."""
    left, right = _codes(before["weight"]), _codes(after["weight"])
    differ = {"weight": (left != right) & ~(_is_zero(before["weight"]) & _is_zero(after["weight"]))}
    if before["weight_scale"].ndim == 2:
        differ["weight_scale"] = before["weight_scale"].view(torch.uint8) != after["weight_scale"].view(torch.uint8)
    for role, places in differ.items():
        if bool(places.any()):
            row, column = places.nonzero()[0].tolist()
            return Where(role, row, column)
    return Where("weight_scale_2" if "weight_scale_2" in before else "weight_scale", None, None)


def overwrite(file: Path, changes: Mapping[str, Tensor]) -> None:
    """Put other bytes in the place of some tensors of a safetensors file; its header stays."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        for name, tensor in changes.items():
            start, end = header[name]["data_offsets"]
            raw = raw_bytes(tensor)
            assert len(raw) == end - start, name
            stream.seek(8 + length + start)
            stream.write(raw)


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _codes(weight: Tensor) -> Tensor:
    return unpack(weight) if weight.dtype == torch.uint8 else weight.view(torch.uint8)


def _is_zero(weight: Tensor) -> Tensor:
    return _codes(weight) % (8 if weight.dtype == torch.uint8 else 128) == 0


def _is_usable(parts: Parts) -> bool:
    """Whether nothing is refused for what it is alone: NaN, and scales that are zero or negative."""
    scales, codes = parts["weight_scale"].float(), parts["weight"]
    return bool((scales > 0).all()) and (codes.dtype != E4M3 or not bool(codes.float().isnan().any()))


def _is_harmless(base: Tensor, before: Parts, after: Parts) -> bool:
    if "weight_scale_2" not in before:  # FP8
        same = (_codes(before["weight"]) == _codes(after["weight"])) | (
            _is_zero(before["weight"]) & _is_zero(after["weight"])
        )
        return bool(same.all()) and torch.equal(before["weight_scale"], after["weight_scale"])
    was, now = (
        Packed(one["weight"], one["weight_scale"], one["weight_scale_2"].reshape(())) for one in (before, after)
    )
    changed = each(was.scale.view(torch.uint8) != now.scale.view(torch.uint8)) | (
        unpack(was.packed) != unpack(now.packed)
    )
    if not torch.equal(was.global_scale, now.global_scale):
        changed = torch.ones_like(changed)
    rows = changed.any(1)
    was, now = (Packed(one.packed[rows], one.scale[rows], one.global_scale) for one in (was, now))
    nearest = is_nearest(base[rows], now).unflatten(-1, (-1, 16)).all(-1)
    no_worse = block_errors(base[rows], now) <= block_errors(base[rows], was) * (1 + 1e-9)
    return bool((nearest & no_worse)[changed[rows].unflatten(-1, (-1, 16)).any(-1)].all())


def _random_bytes(shape: tuple[int, ...], like: Tensor, source: random.Random) -> Tensor:
    """Bytes for a weight; of E4M3, none that is NaN, which is refused for what it is."""
    size = torch.Size(shape).numel()
    raw = torch.frombuffer(bytearray(source.randbytes(size)), dtype=torch.uint8).reshape(shape)
    return torch.where(raw % 128 == 127, raw - 1, raw) if like.dtype == E4M3 else raw


def _of_weight(change: Callable[[Tensor, random.Random], None]) -> Change:
    """A fault in the bytes [N, K/2] or [N, K] of the weight alone, changed in place."""

    def changed(parts: Parts, source: random.Random) -> Parts:
        change(parts["weight"].view(torch.uint8), source)
        return {"weight": parts["weight"]}

    return changed


def _of_scales(change: Callable[[Tensor, random.Random], None]) -> Change:
    """A fault in the bytes [N, K/16] of the block scales alone."""

    def changed(parts: Parts, source: random.Random) -> Parts:
        raw = parts["weight_scale"].view(torch.uint8)
        change(raw, source)
        return {"weight_scale": raw.view(E4M3)}

    return changed


def _anywhere(raw: Tensor, source: random.Random) -> tuple[int, int]:
    return source.randrange(raw.shape[0]), source.randrange(raw.shape[1])


def _start(raw: Tensor, rows: int, source: random.Random) -> int:
    return source.randrange(raw.shape[0] - rows + 1)


def _tile(rows: int, source: random.Random) -> int:
    """The first row of a whole tile."""
    return source.randrange(rows // TILE) * TILE


@_of_weight
def one_bit(raw: Tensor, source: random.Random) -> None:
    row, column = _anywhere(raw, source)
    raw[row, column] ^= 1 << source.randrange(8)


@_of_scales
def scale_bit(raw: Tensor, source: random.Random) -> None:
    row, column = _anywhere(raw, source)
    raw[row, column] ^= 1 << source.randrange(7)


@_of_scales
def scale_one_ulp_off(raw: Tensor, source: random.Random) -> None:
    row, column = _anywhere(raw, source)
    raw[row, column] += source.choice((1, -1))


@_of_scales
def scale_doubled(raw: Tensor, source: random.Random) -> None:
    """Or halved."""
    row, column = _anywhere(raw, source)
    exponent = int(raw[row, column]) // 8
    raw[row, column] += source.choice((8, -8)) if 1 < exponent < 15 else 8 if exponent < 15 else -8


@_of_weight
def row_zeroed(raw: Tensor, source: random.Random) -> None:
    raw[_start(raw, 1, source)] = 0


def garbage_rows(rows: int) -> Change:
    """Rows that lie side by side."""

    def changed(parts: Parts, source: random.Random) -> Parts:
        weight = parts["weight"]
        raw = weight.view(torch.uint8)
        first = _start(raw, rows, source)
        raw[first : first + rows] = _random_bytes((rows, raw.shape[1]), weight, source)
        return {"weight": weight}

    return changed


@_of_weight
def page_zeroed(raw: Tensor, source: random.Random) -> None:
    """4 KiB of the file's pages, so that it begins and ends within rows."""
    start = source.randrange(raw.numel() - PAGE + 1)
    raw.view(-1)[start : start + PAGE] = 0


@_of_weight
def strip_swapped(raw: Tensor, source: random.Random) -> None:
    first = _start(raw, STRIP, source)
    raw[first : first + STRIP] = swap(raw[first : first + STRIP])


@_of_weight
def second_half_swapped(raw: Tensor, source: random.Random) -> None:
    raw[len(raw) // 2 :] = swap(raw[len(raw) // 2 :])


@_of_scales
def tile_swizzled(raw: Tensor, source: random.Random) -> None:
    first = _tile(len(raw), source)
    raw[first : first + TILE] = swizzle(raw[first : first + TILE])


def tiles_exchanged(parts: Parts, source: random.Random) -> Parts:
    """Codes and block scales of two tiles: every row is whole, and in a wrong place."""
    left, right = (TILE * tile for tile in source.sample(range(len(parts["weight"]) // TILE), 2))
    changed = {}
    for role, tensor in parts.items():
        if tensor.ndim == 2:
            raw = tensor.view(torch.uint8)
            kept = raw[left : left + TILE].clone()
            raw[left : left + TILE] = raw[right : right + TILE]
            raw[right : right + TILE] = kept
            changed[role] = tensor
    return changed


def unsampled_replaced(parts: Parts, source: random.Random) -> Parts:
    """Random bytes in every row that a look at spread rows leaves out."""
    weight = parts["weight"]
    raw = weight.view(torch.uint8)
    noise = _random_bytes(tuple(raw.shape), weight, source)
    spared = sample_rows(len(raw), SAMPLED_ROWS)
    noise[spared] = raw[spared]
    raw.copy_(noise)
    return {"weight": weight}


def scale_stretched(parts: Parts, source: random.Random) -> Parts:
    """The scale of the whole tensor times 1.02."""
    role = "weight_scale_2" if "weight_scale_2" in parts else "weight_scale"
    return {role: parts[role] * 1.02}


def _none(parts: Parts, source: random.Random) -> Parts:
    raise AssertionError("it takes another module")


FP8_FAULTS = {
    "one bit of the codes": Fault(one_bit, at_one_place=True),
    "row zeroed": Fault(row_zeroed),
    "10 rows of garbage": Fault(garbage_rows(10), rows=10),
    "100 rows of garbage": Fault(garbage_rows(100), rows=100),
    "page zeroed": Fault(page_zeroed, rows=256, columns=32),
    "two tiles exchanged": Fault(tiles_exchanged, rows=2 * TILE),
    "unsampled rows replaced": Fault(unsampled_replaced, rows=2 * SAMPLED_ROWS),
    "scale of the tensor stretched": Fault(scale_stretched),
    "scales of two modules exchanged": Fault(_none, takes_another=True),
}
NVFP4_FAULTS = FP8_FAULTS | {
    "one bit of a block scale": Fault(scale_bit, at_one_place=True),
    "one block scale 1 ulp off": Fault(scale_one_ulp_off, at_one_place=True),
    "one block scale doubled or halved": Fault(scale_doubled, at_one_place=True),
    "32 rows with swapped nibbles": Fault(strip_swapped, rows=STRIP),
    "second half with swapped nibbles": Fault(second_half_swapped, rows=2),
    "one tile of scales swizzled": Fault(tile_swizzled, rows=TILE, columns=64),
}
FAULTS = {"nvfp4": NVFP4_FAULTS, "fp8": FP8_FAULTS}
