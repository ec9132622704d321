"""Faults to plant between a right checkpoint and a right kernel, for verify_gpu.py. Each is one that was really made.

A fault changes the weight that a backend prepares, or what its gemm is told; the judge keeps the true weight.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modelopt_convert.formats.nvfp4.codes import swap_nibbles
from modelopt_convert.formats.nvfp4.scales import swizzle_128x4
from modelopt_convert.verification.gemm.fp8 import Fp8Weight
from modelopt_convert.verification.gemm.nvfp4 import Nvfp4Weight
from modelopt_convert.verification.gemm.operands import Weight

Damage = Callable[[Any, Any], Weight]  # of a weight, given another module's of the same shape


@dataclass(frozen=True)
class Fault:
    """What is done to the weight, and to alpha."""

    damage: Damage = lambda weight, other: weight
    alpha: Callable[[float], float] = lambda alpha: alpha
    keeps_bias: bool = True


class Faulty:
    """A backend with a fault in its preparation."""

    def __init__(self, backend: Any, fault: Fault, other: Weight) -> None:
        self._backend, self._fault, self._other = backend, fault, other
        self.name, self.kind, self.formats = backend.name, backend.kind, backend.formats
        self.unavailable = backend.unavailable

    def prepare(self, weight: Weight, *, poison: bool) -> Any:
        damaged = self._fault.damage(weight, self._other)
        bias = weight.bias if self._fault.keeps_bias else None
        return self._backend.prepare(replace(damaged, bias=bias), poison=poison)

    def gemm(self, prepared: Any, activations: Any, alpha: float, out: Tensor | None) -> Tensor:
        return self._backend.gemm(prepared, activations, self._fault.alpha(alpha), out)


def _codes(edit: Callable[[Tensor], None]) -> Damage:
    """Of the packed bytes of NVFP4 or the codes of FP8."""

    def damage(weight: Weight, other: Weight) -> Weight:
        del other
        if isinstance(weight, Nvfp4Weight):
            raw = weight.packed.clone()
            edit(raw)
            return replace(weight, packed=raw)
        raw = weight.codes.view(torch.uint8).clone()
        edit(raw)
        return replace(weight, codes=raw.view(torch.float8_e4m3fn))

    return damage


def _scales(edit: Callable[[Tensor], Tensor | None]) -> Damage:
    """Of the bytes of block scales; the edit is in place, or returns new ones."""

    def damage(weight: Nvfp4Weight, other: Weight) -> Weight:
        del other
        raw = weight.scale.view(torch.uint8).clone()
        changed = edit(raw)
        return replace(weight, scale=(raw if changed is None else changed).view(torch.float8_e4m3fn))

    return damage


def _zero(*index: Any) -> Callable[[Tensor], None]:
    def edit(raw: Tensor) -> None:
        raw[index] = 0

    return edit


def _flip(bit: int) -> Callable[[Tensor], None]:
    def edit(raw: Tensor) -> None:
        raw[77, 5] ^= bit

    return edit


_EVERY = slice(None)
_ANY = {
    # Of the checkpoint: the identity probe, which asks for codes and block scales alone, passes an alpha of 1.
    "global scale 5% off": Fault(alpha=lambda alpha: alpha if alpha == 1.0 else alpha * 1.05),
    "alpha forgotten": Fault(alpha=lambda alpha: 1.0),
    "bias forgotten": Fault(keeps_bias=False),
    "tail rows zero (last 64)": Fault(_codes(_zero(slice(-64, None)))),
}
NVFP4: dict[str, Fault] = {
    "nibbles swapped": Fault(lambda weight, other: replace(weight, packed=swap_nibbles(weight.packed))),
    "scales swizzled, read as row-major": Fault(
        _scales(lambda raw: swizzle_128x4(raw)[: raw.shape[0], : raw.shape[1]])
    ),
    "scale rows off by one": Fault(_scales(lambda raw: raw.roll(1, 0))),
    "last block of K dropped (16)": Fault(_codes(_zero(_EVERY, slice(-8, None)))),
    "last two values of K dropped": Fault(_codes(_zero(_EVERY, -1))),
    "one scale row zero": Fault(_scales(_zero(77))),
    **_ANY,
    "another module's scales": Fault(lambda weight, other: replace(weight, scale=other.scale)),
    "one scale bit flipped": Fault(_scales(_flip(0x01))),
    "one code sign flipped": Fault(_codes(_flip(0x08))),
}
FP8: dict[str, Fault] = {
    "columns swapped in pairs": Fault(
        lambda weight, other: replace(
            weight,
            codes=weight.codes.view(torch.uint8).unflatten(1, (-1, 2)).flip(2).flatten(1).view(weight.codes.dtype),
        )
    ),
    "last 16 values of K dropped": Fault(_codes(_zero(_EVERY, slice(-16, None)))),
    "last two values of K dropped": Fault(_codes(_zero(_EVERY, slice(-2, None)))),
    "one row zero": Fault(_codes(_zero(77))),
    **_ANY,
    "another module's codes": Fault(lambda weight, other: replace(weight, codes=other.codes)),
    "one code bit flipped": Fault(_codes(_flip(0x01))),
    "one code sign flipped": Fault(_codes(_flip(0x80))),
}


def faults(weight: Weight) -> dict[str, Fault]:
    """Those of the weight's format."""
    return FP8 if isinstance(weight, Fp8Weight) else NVFP4
