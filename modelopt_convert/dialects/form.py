"""A checkpoint in the middle of a conversion: as ModelOpt would lay it, whatever dialect it came in. Pure, no torch.

A dialect's form reads a checkpoint into that description, and writes the description in the dialect. Both move tensors
by recipes (``checkpoint/recipe.py``): nothing is copied before the result is written.
"""

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.recipe import Constant, made, padded_rows
from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.run.errors import InputError

Algorithm = Literal["nvfp4", "fp8", "mxfp8"]
Naming = Literal["diffusers", "comfyui", "original"]
ReadBytes = Callable[[TensorInfo, int, int], bytes]
"""Bytes of a tensor: the tensor, the first byte, and how many."""
ROW_ROLES = frozenset({"weight", "weight_scale", "bias"})
"""Tensors of a module that have a row for each output feature; ``weight_scale`` only where it is not one scale."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized module of a description.

    Attributes:
        algorithm: How it is quantized.
        rows: N, the number of output features.
        columns: K, the number of input features.
    """

    algorithm: Algorithm
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Canonical:
    """A checkpoint under ModelOpt's roles, in ModelOpt's layout and without padding.

    =======  ======================  =============================  ==============================
    role     nvfp4                   fp8                            mxfp8
    =======  ======================  =============================  ==============================
    weight   U8 [N, K/2], low first  F8_E4M3 [N, K]                 F8_E4M3 [N, K]
    scales   weight_scale F8_E4M3    weight_scale F32 [], or [N] a  weight_scale U8 [N, K/32],
             [N, K/16] row-major,    scale a row                    E8M0, row-major
             weight_scale_2 F32 []
    input    input_scale F32 []      input_scale F32 []             none
    =======  ======================  =============================  ==============================

    Attributes:
        tensors: Every tensor of the model, by name.
        modules: The quantized modules, by name.
        fates: What becomes of each tensor of the checkpoint, by its own name.
        config: config.json of the model, without what it says of quantization.
        quantization: What it said of quantization.
    """

    tensors: Mapping[str, TensorInfo]
    modules: Mapping[str, Quantized]
    fates: Mapping[str, str]
    config: Mapping[str, Any] = field(default_factory=dict)
    quantization: Mapping[str, Any] = field(default_factory=dict)

    def of(self, module: str) -> dict[str, TensorInfo]:
        """The tensors of a module by role."""
        return {name.rpartition(".")[2]: info for name, info in self.tensors.items() if module_of(name) == module}


@dataclass(frozen=True, slots=True)
class Written:
    """A description in a dialect, ready to be written.

    Attributes:
        tensors: Every tensor of the output, by name.
        metadata: The header's.
        config: config.json, or None where the dialect has none.
        changed: What a reader of the output will find of a description's tensor instead of its bytes, by the tensor's
            name: other bytes, or None where the dialect has no place for it; with ``why``.
        why: The reason for each of ``changed``.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None
    changed: Mapping[str, bytes | None] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)


class Form(Protocol):
    """How a dialect is read and written."""

    @property
    def name(self) -> str:
        """As ``--to`` says it."""

    @property
    def naming(self) -> Naming:
        """The naming in which it is written."""

    def read(self, headers: Headers, read: ReadBytes, true_rows: Mapping[str, int], where: str) -> Canonical:
        """Describe a checkpoint in this dialect, under its own names.

        Args:
            headers: Of the checkpoint.
            read: Reads tensors; only what is small is read.
            true_rows: N by module, as far as a base tells it: stored rows may be padded.
            where: The checkpoint, for messages.

        Raises:
            InputError: ``dialect.*``: a marker, dtype or shape that the dialect does not allow.
        """

    def write(self, described: Canonical, read: ReadBytes) -> Written:
        """Put a description into this dialect, under the names that the description has.

        Raises:
            InputError: ``convert.*``: the dialect has no place for an algorithm.
        """


def scalar(info: TensorInfo, name: str, read: ReadBytes) -> TensorInfo:
    """A scale as F32 []: the same bytes, or the same value widened.

    Args:
        info: One element of F32, BF16 or F16.
        name: The name that it gets.
        read: Reads it.
    """
    if info.dtype == "F32":
        return replace(info, name=name, shape=())
    raw = read(info, 0, info.num_bytes)
    (value,) = struct.unpack("<e", raw) if info.dtype == "F16" else struct.unpack("<f", b"\0\0" + raw)
    return constant(name, "F32", (), struct.pack("<f", value), info.file)


def constant(name: str, dtype: str, shape: tuple[int, ...], data: bytes, file: str) -> TensorInfo:
    """A tensor whose bytes are known."""
    return made(name, dtype, shape, Constant(data), file)


def padded(info: TensorInfo, multiple: int) -> TensorInfo:
    """A tensor with rows of zeros below, up to a multiple of rows."""
    return padded_rows(info, info.name, multiple)


def grouped(tensors: Iterable[TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Tensors by module and role."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for info in tensors:
        found.setdefault(module_of(info.name), {})[info.name.rpartition(".")[2]] = info
    return found


def wrong(where: str, info: TensorInfo, expected: str, *, code: str, hint: str) -> InputError:
    """A tensor that a dialect does not allow."""
    return InputError(
        f"{where}/{info.file}: tensor {info.name!r}: expected {expected}, found {info.dtype} {list(info.shape)}",
        code=code,
        path=f"{where}/{info.file}",
        hint=hint,
    )
