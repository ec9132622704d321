"""Scales as a description has them, whatever shape and dtype a dialect gives them. Pure, no torch."""

import math
import struct
from collections.abc import Mapping
from dataclasses import replace

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.dialects.awq import check_transforms, is_transformed
from modelopt_convert.dialects.form import SCALES, Canonical, ReadBytes, constant, grouped, scalar, wrong
from modelopt_convert.dialects.resized import widened
from modelopt_convert.formats.dtypes import DTYPE_BITS, HALF_AND_FLOAT
from modelopt_convert.run.errors import Faults

_AGAIN = "get the file again from its publisher"
_MEMBERS = range(2, 5)  # of a fused module


def one_scale(info: TensorInfo, name: str, read: ReadBytes, where: str) -> TensorInfo:
    """The scale of a whole tensor, F32 [].

    Args:
        info: As it is stored, of one element.
        name: The name that it gets.
        read: Reads it.
        where: The checkpoint, for messages.

    Raises:
        InputError: ``dialect.shape``: it is not one float.
    """
    if info.dtype not in HALF_AND_FLOAT or math.prod(info.shape) != 1:
        raise wrong(where, info, "one scale, F32 []", code="dialect.shape", hint=_AGAIN)
    return scalar(info, name, read)


def fp8_scale(info: TensorInfo, name: str, rows: int, read: ReadBytes, where: str) -> TensorInfo:
    """The scale of an FP8 weight: F32 [], or [N] one a row, or [M] one for each member of a fused module.

    Args:
        info: As it is stored: [], [1], [1, 1], [N], [N, 1] or [M], in F32, BF16 or F16.
        name: The name that it gets.
        rows: N.
        read: Reads it.
        where: The checkpoint, for messages.

    Raises:
        InputError: ``dialect.shape``.
    """
    shape = info.shape[:1] if len(info.shape) == 2 and info.shape[1] == 1 else info.shape
    if info.dtype not in HALF_AND_FLOAT or len(shape) > 1:
        raise wrong(where, info, "one scale or one a row, in F32, BF16 or F16", code="dialect.shape", hint=_AGAIN)
    if math.prod(shape) == 1:
        return scalar(info, name, read)
    if shape != (rows,) and shape[0] not in _MEMBERS:
        raise wrong(where, info, f"one scale, or {rows}, one a row", code="dialect.shape", hint=_AGAIN)
    return replace(widened(info, "F32"), name=name, shape=shape)


def one_values(name: str, weight: TensorInfo) -> TensorInfo:
    """The scale of codes that are the values themselves: 1."""
    return constant(name, "F32", (), struct.pack("<f", 1.0), weight.file)


def check_described(described: Canonical, where: str) -> None:
    """Refuse what no reader of a dialect can mean, whichever it is.

    That is several scales of an FP8 weight that are neither one a row nor one a member of a fused module, scales or
    codes in a module that is not quantized, and tensors of AWQ and SVDQuant that do not fit their weight.

    Args:
        described: Under diffusers' names.
        where: The checkpoint, for messages.

    Raises:
        InputError: ``dialect.shape``, ``dialect.role`` or ``dialect.contradiction``.
    """
    faults = Faults()
    for module, one in described.modules.items():
        if not one.algorithm.startswith("fp8"):
            continue
        scale = described.tensors[f"{module}.weight_scale"]
        if scale.shape not in ((), (one.rows,)):
            expected = f"one scale, or {one.rows}, one a row"
            faults.add(module, wrong(where, scale, expected, code="dialect.shape", hint=_AGAIN))
    for info in described.tensors.values():
        module, _, role = info.name.rpartition(".")
        if module not in described.modules and (role in SCALES or (role == "weight" and DTYPE_BITS[info.dtype] < 16)):
            expected = "it in a quantized module alone, and its module is not quantized"
            faults.add(module, wrong(where, info, expected, code="dialect.contradiction", hint=_AGAIN))
    for module, roles in grouped(described.tensors.values()).items():
        if is_transformed(roles):
            with faults.taken(module):
                check_transforms(roles, *_size(described, module, roles, where), where)
    faults.refuse()


def _size(described: Canonical, module: str, roles: Mapping[str, TensorInfo], where: str) -> tuple[int, int]:
    """[N, K] of a weight that AWQ or SVDQuant has something beside."""
    quantized, weight = described.modules.get(module), roles.get("weight")
    if quantized is not None:
        return quantized.rows, quantized.columns
    if weight is None or weight.dtype not in HALF_AND_FLOAT or len(weight.shape) != 2:
        info = weight or next(iter(roles.values()))
        raise wrong(where, info, "a weight [N, K] in BF16, F16 or F32", code="dialect.shape", hint=_AGAIN)
    return weight.shape
