"""A checkpoint in the middle of a conversion: as ModelOpt would lay it, whatever dialect it came in. Pure, no torch.

A dialect's form reads a checkpoint into that description, and writes the description in the dialect. Both move tensors
by recipes (``checkpoint/recipe.py``): nothing is copied before the result is written.
"""

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.names import inside, module_of, natural_key
from modelopt_convert.checkpoint.recipe import Constant, made
from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.run.errors import Faults, InputError

Algorithm = Literal["nvfp4", "fp8", "mxfp8", "fp8_e5m2", "nunchaku"]
Naming = Literal["diffusers", "comfyui", "original"]
ReadBytes = Callable[[TensorInfo, int, int], bytes]
"""Bytes of a tensor: the tensor, the first byte, and how many."""
E8M0_BLOCK = 32
"""Columns that one scale of MXFP8 is for."""
SCALES = frozenset({"weight_scale", "weight_scale_2", "input_scale"})
_CONVERTED_ROLES = frozenset({"weight", "bias"}) | SCALES
_NO_FORMAT = "mopt does not convert this format"
ROW_ROLES = frozenset({"weight", "weight_scale", "bias", "svdquant_lora_b"})
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
             [N, K/16] row-major,    scale a row                    E8M0, row-major, K/32 rounded
             weight_scale_2 F32 []                                  up
    input    input_scale F32 []      input_scale F32 []             none
    =======  ======================  =============================  ==============================

    ``nunchaku`` is a weight that is decoded already, F32 [N, K] without a scale: see ``dialects/nunchaku.py``.

    Beside an nvfp4 weight, or one that is not packed, AWQ and SVDQuant have tensors of their own: see
    ``dialects/awq.py``.

    ``fp8_e5m2`` is as fp8, with the weight in F8_E5M2. The one scale of a weight of one row is []. Of a fused module
    ``weight_scale`` of fp8 may be [M], one scale for each of its M members, until native names are split.

    Attributes:
        tensors: Every tensor of the model, by name.
        modules: The quantized modules, by name.
        fates: What becomes of each tensor of the checkpoint, by its own name.
        config: config.json of the model, without what it says of quantization.
        quantization: What it said of quantization.
        keep: Tensors of the checkpoint, by its own names, that the dialect's form cannot make again out of this
            description: a way back needs their bytes.
    """

    tensors: Mapping[str, TensorInfo]
    modules: Mapping[str, Quantized]
    fates: Mapping[str, str]
    config: Mapping[str, Any] = field(default_factory=dict)
    quantization: Mapping[str, Any] = field(default_factory=dict)
    keep: Mapping[str, TensorInfo] = field(default_factory=dict)

    def of(self, module: str) -> dict[str, TensorInfo]:
        """The tensors of a module by role."""
        return {name.rpartition(".")[2]: info for name, info in self.tensors.items() if module_of(name) == module}


@dataclass(frozen=True, slots=True)
class Written:
    """A description in a dialect, ready to be written.

    Attributes:
        tensors: Every tensor of the output, by name.
        metadata: The header's.
        config: config.json; None where the dialect has none, or the model's is not known.
        changed: What a reader of the output will find of a description's tensor instead of its bytes, by the tensor's
            name: other bytes of the same dtype and shape, or None where the dialect has no place for it.
        instead: Tensors of another dtype or shape that a reader will find in the place of a description's, by name.
        why: The reason for each of ``changed`` and ``instead``.
        keep: Tensors of the description that the output does not give back, and that are small enough to be kept for
            a way back.
        unpacked: Modules that a reader of the output will find unquantized.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None
    changed: Mapping[str, bytes | None] = field(default_factory=dict)
    instead: Mapping[str, TensorInfo] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)
    keep: frozenset[str] = frozenset()
    unpacked: frozenset[str] = frozenset()

    def expected(self, described: Canonical) -> Canonical:
        """What a reader of the output will find of the description that was written, under its names."""
        tensors = {**described.tensors, **self.instead}
        for name, data in self.changed.items():
            info = tensors.pop(name)
            if data is not None:
                tensors[name] = constant(name, info.dtype, info.shape, data, info.file)
        modules = {name: one for name, one in described.modules.items() if name not in self.unpacked}
        return replace(described, tensors=tensors, modules=modules)


class Form(Protocol):
    """How a dialect is read and written."""

    @property
    def name(self) -> str:
        """As ``--to`` says it."""

    @property
    def naming(self) -> Naming:
        """The naming in which it is written."""

    def read(
        self, headers: Headers, read: ReadBytes, true_shapes: Mapping[str, tuple[int, int]], where: str
    ) -> Canonical:
        """Describe a checkpoint in this dialect, under its own names.

        Args:
            headers: Of the checkpoint.
            read: Reads tensors; only what is small is read.
            true_shapes: [N, K] by module, as far as a base tells them: what is stored may be padded.
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
    return constant(name, "F32", (), struct.pack("<f", value_of(info, read)), info.file)


def value_of(info: TensorInfo, read: ReadBytes) -> float:
    """The value of a tensor of one element in F32, BF16 or F16."""
    raw = read(info, 0, info.num_bytes)
    value: float
    (value,) = struct.unpack("<e", raw) if info.dtype == "F16" else struct.unpack("<f", raw.rjust(4, b"\0"))
    return value


def constant(name: str, dtype: str, shape: tuple[int, ...], data: bytes, file: str) -> TensorInfo:
    """A tensor whose bytes are known."""
    return made(name, dtype, shape, Constant(data), file)


def grouped(tensors: Iterable[TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Tensors by module and role."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for info in tensors:
        found.setdefault(module_of(info.name), {})[info.name.rpartition(".")[2]] = info
    return found


def kept_linears(described: Canonical) -> list[str]:
    """Modules with a weight of two dimensions that are not quantized, in the order of blocks."""
    names = (
        module_of(name)
        for name, info in described.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and module_of(name) not in described.modules
    )
    return sorted(names, key=natural_key)


def check_algorithms(described: Canonical, form: str, allowed: Iterable[str]) -> None:
    """Refuse algorithms that a dialect has no place for.

    Raises:
        InputError: ``convert.no_place``.
    """
    names = tuple(allowed)
    faults = Faults()
    for module, one in described.modules.items():
        if one.algorithm not in names:
            fault = InputError(
                f"module {module!r}: {form} holds {', '.join(names)}, found {one.algorithm}",
                code="convert.no_place",
                hint="--to bf16 takes every format",
            )
            faults.add(module, fault)
    faults.refuse()


def check_roles(module: str, roles: Mapping[str, TensorInfo], where: str) -> None:
    """Refuse tensors beside a quantized weight that give it another meaning, or one that mopt does not know.

    Raises:
        InputError: ``dialect.role``.
    """
    odd = next((info for role, info in sorted(roles.items()) if role not in _CONVERTED_ROLES), None)
    if odd is not None:
        raise InputError(
            f"{inside(where, odd.file)}: tensor {odd.name!r}: expected nothing but weight, bias and scales of "
            f"the quantized module {module!r}, found {odd.dtype} {list(odd.shape)[:4]}",
            code="dialect.role",
            path=inside(where, odd.file),
            hint=_NO_FORMAT,
        )


def wrong(where: str, info: TensorInfo, expected: str, *, code: str, hint: str) -> InputError:
    """A tensor that a dialect does not allow."""
    return InputError(
        f"{inside(where, info.file)}: tensor {info.name!r}: expected {expected}, found {info.dtype} {list(info.shape)}",
        code=code,
        path=inside(where, info.file),
        hint=hint,
    )
