"""AWQ and SVDQuant: what stands beside a weight that is not the base's, and the weight that it stands for. No torch.

``W = (V + svdquant_lora_b @ svdquant_lora_a) * pre_quant_scale``, by columns, where V is the stored weight, decoded; of
AWQ without the product. A Linear multiplies its input by ``pre_quant_scale`` first, which is the same.

Sources: ModelOpt 0.47.0, ``modelopt/torch/quantization/model_calib.py`` (``awq_lite``, ``svdquant``) and
``export/quant_utils.py``, which names the tensors. SGLang 0.5.23 multiplies the input
(``layers/quantization/comfy_nvfp4.py``, ``apply``) where a ComfyUI file of NVFP4 has the tensor
(``utils/quantization_utils.py``), and nothing else: no low-rank part, and no factor of a weight that is not packed.

===================  ========  ==================================
role                 shape     of
===================  ========  ==================================
``pre_quant_scale``  [K]       AWQ and SVDQuant
``svdquant_lora_a``  [R, K]    SVDQuant
``svdquant_lora_b``  [N, R]    SVDQuant
===================  ========  ==================================

All are BF16, F16 or F32. ModelOpt changes the weights of modules too that it does not pack.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, cast

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.recipe import Extent, Fetch, Recipe, made, recipe_of
from modelopt_convert.dialects.form import Canonical, Quantized, wrong
from modelopt_convert.dialects.modelopt.export import TRANSFORMED
from modelopt_convert.dialects.packed import TRANSFORM_ROLES
from modelopt_convert.formats.dtypes import DTYPE_BITS, HALF_AND_FLOAT
from modelopt_convert.formats.floats import Narrow, bf16_of, values_of, widened_values
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.run.errors import Faults, InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PRE_QUANT_SCALE = "pre_quant_scale"
LOW_RANK = ("svdquant_lora_a", "svdquant_lora_b")
_PIECE = 1 << 14  # values made at a time
_AGAIN = "the export is cut or mixed up; export again"


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix or vector of floats.

    Attributes:
        of: Its bytes.
        dtype: BF16, F16, F32 or F8_E4M3.
    """

    of: Recipe
    dtype: str

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return DTYPE_BITS[self.dtype] // 8

    def values(self, first: int, count: int, fetch: Fetch) -> "NDArray[np.float32]":
        """Some elements, float32 [count]."""
        import numpy as np

        raw = _bytes(self.of, first * self.size, count * self.size, fetch)
        if self.dtype == "F32":
            return raw.view(np.float32)
        return widened_values(raw, cast("Narrow", self.dtype))


@dataclass(frozen=True, slots=True)
class Packed:
    """An NVFP4 weight, as a description has it."""

    codes: Recipe
    scales: Recipe
    scale: Recipe


@dataclass(frozen=True, slots=True)
class Folded:
    """The weight [N, K] that a transformed one stands for.

    The low-rank product is made in float64 and rounded to float32; sum and factor are float32. Rows come in the same
    blocks wherever a read begins, so that the same bytes come, whatever order a library adds in.

    Attributes:
        rows: N.
        columns: K.
        stored: The weight as it is stored.
        factor: ``pre_quant_scale``, or nothing.
        low_rank: ``svdquant_lora_a`` and ``svdquant_lora_b``, or nothing.
        dtype: BF16, rounded once, or F32.
    """

    rows: int
    columns: int
    stored: Packed | Part
    factor: Part | None
    low_rank: tuple[Part, Part] | None
    dtype: Literal["BF16", "F32"]

    @property
    def num_bytes(self) -> int:
        """How many bytes there are."""
        return self.rows * self._row_bytes

    def fill(self, begin: int, target: memoryview, fetch: Fetch) -> None:
        """Fill ``target`` with the bytes from ``begin`` on."""
        import numpy as np

        step, width = self._step, self._row_bytes
        factor = self.factor.values(0, self.columns, fetch) if self.factor is not None else None
        down = None
        if self.low_rank is not None:
            rank = self._rank
            down = self.low_rank[0].values(0, rank * self.columns, fetch).reshape(rank, self.columns).astype(np.float64)
        last = -(-(begin + target.nbytes) // width)
        for first in range(begin // width // step * step, last, step):
            with np.errstate(all="ignore"):
                found = self._values(first, min(first + step, self.rows), factor, down, fetch)
            raw = (bf16_of(found) if self.dtype == "BF16" else found).reshape(-1).view(np.uint8)
            skipped, done = max(0, begin - first * width), max(0, first * width - begin)
            count = min(raw.size - skipped, target.nbytes - done)
            target[done : done + count] = raw[skipped : skipped + count].data

    def extents(self, begin: int, num_bytes: int) -> Iterator[Extent]:
        """What ``fill`` takes of files."""
        step, width = self._step, self._row_bytes
        first = begin // width // step * step
        last = min(-(-(begin + num_bytes) // width // step) * step, self.rows)
        if self.factor is not None:
            yield from self.factor.of.extents(0, self.factor.of.num_bytes)
        if self.low_rank is not None:
            down, up = self.low_rank
            yield from down.of.extents(0, down.of.num_bytes)
            wide = up.of.num_bytes // self.rows
            yield from up.of.extents(first * wide, (last - first) * wide)
        parts = (self.stored.codes, self.stored.scales) if isinstance(self.stored, Packed) else (self.stored.of,)
        for one in parts:
            wide = one.num_bytes // self.rows
            yield from one.extents(first * wide, (last - first) * wide)
        if isinstance(self.stored, Packed):
            yield from self.stored.scale.extents(0, 4)

    @property
    def _row_bytes(self) -> int:
        return self.columns * (2 if self.dtype == "BF16" else 4)

    @property
    def _step(self) -> int:
        return max(1, _PIECE // self.columns)

    @property
    def _rank(self) -> int:
        assert self.low_rank is not None
        down = self.low_rank[0]
        return down.of.num_bytes // (self.columns * down.size)

    def _values(self, first: int, last: int, factor: Any, down: Any, fetch: Fetch) -> "NDArray[np.float32]":
        """float32 [last - first, K]."""
        import numpy as np

        count = last - first
        if isinstance(self.stored, Part):
            found = self.stored.values(first * self.columns, count * self.columns, fetch).reshape(count, -1)
        else:
            wide, blocks = self.columns // 2, self.columns // BLOCK_SIZE
            codes = _bytes(self.stored.codes, first * wide, count * wide, fetch).reshape(-1, BLOCK_SIZE // 2)
            scales = _bytes(self.stored.scales, first * blocks, count * blocks, fetch).reshape(-1, 1)
            table = _pairs(_bytes(self.stored.scale, 0, 4, fetch).tobytes())
            found = np.take(table, scales.astype(np.intp) << 8 | codes).view(np.float32).reshape(count, -1)
        if self.low_rank is not None:
            rank = self._rank
            up = self.low_rank[1].values(first * rank, count * rank, fetch).reshape(count, rank)
            found = found + (up.astype(np.float64) @ down).astype(np.float32)
        whole: NDArray[np.float32] = found if factor is None else found * factor
        return whole


def is_transformed(roles: Mapping[str, TensorInfo]) -> bool:
    """Whether a weight of a description is not the base's."""
    return any(role in TRANSFORM_ROLES for role in roles)


def transformed_modules(described: Canonical) -> list[str]:
    """Modules with a transformed weight."""
    return list(dict.fromkeys(module_of(name) for name in described.tensors if _role(name) in TRANSFORM_ROLES))


def without_transforms(roles: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The other tensors of a module."""
    return {role: info for role, info in roles.items() if role not in TRANSFORM_ROLES}


def folded(
    roles: Mapping[str, TensorInfo], quantized: Quantized | None, dtype: Literal["BF16", "F32"] = "BF16"
) -> TensorInfo:
    """The weight that a module's stored one stands for; without a factor it is only decoded.

    Args:
        roles: Its tensors, as ``check_transforms`` allows them.
        quantized: The module, if it is packed.
        dtype: BF16, rounded once, or F32.
    """
    weight = roles["weight"]
    rows, columns = (quantized.rows, quantized.columns) if quantized is not None else weight.shape
    stored: Packed | Part = Part(recipe_of(weight), weight.dtype)
    if quantized is not None:
        stored = Packed(recipe_of(weight), recipe_of(roles["weight_scale"]), recipe_of(roles["weight_scale_2"]))
    parts = [Part(recipe_of(roles[role]), roles[role].dtype) for role in LOW_RANK if role in roles]
    low_rank = (parts[0], parts[1]) if parts else None
    scale = roles.get(PRE_QUANT_SCALE)
    factor = Part(recipe_of(scale), scale.dtype) if scale is not None else None
    recipe = Folded(rows, columns, stored, factor, low_rank, dtype)
    return made(weight.name, dtype, (rows, columns), recipe, weight.file)


def check_transforms(
    roles: Mapping[str, TensorInfo], rows: int, columns: int, where: str, *, low_rank: bool = True
) -> None:
    """Refuse tensors of AWQ and SVDQuant that do not fit the weight that they stand beside.

    Args:
        roles: Of the module.
        rows: N.
        columns: K.
        where: The checkpoint, for messages.
        low_rank: Whether the dialect has SVDQuant.

    Raises:
        InputError: ``dialect.shape`` or ``dialect.role``.
    """
    found = {role: info for role, info in roles.items() if role in TRANSFORM_ROLES}
    if not found:
        return
    first = next(iter(found.values()))
    down, up = (found.get(role) for role in LOW_RANK)
    odd = next((found[role] for role in ("_" + PRE_QUANT_SCALE, *LOW_RANK * (not low_rank)) if role in found), None)
    if odd is not None:
        raise wrong(where, odd, f"nothing but {PRE_QUANT_SCALE} beside it", code="dialect.role", hint=_AGAIN)
    if PRE_QUANT_SCALE not in found:
        raise wrong(where, first, f"a {PRE_QUANT_SCALE} beside it", code="dialect.shape", hint=_AGAIN)
    if (down is None) != (up is None):
        raise wrong(where, down or up or first, "both low-rank parts or none", code="dialect.shape", hint=_AGAIN)
    rank = down.shape[0] if down is not None and len(down.shape) == 2 else 0
    wanted = {PRE_QUANT_SCALE: (columns,), LOW_RANK[0]: (rank, columns), LOW_RANK[1]: (rows, rank)}
    for role, info in found.items():
        if info.dtype not in HALF_AND_FLOAT or info.shape != wanted[role] or not info.num_bytes:
            expected = f"{list(wanted[role])} in BF16, F16 or F32"
            raise wrong(where, info, expected, code="dialect.shape", hint=_AGAIN)


def check_not_lost(said: Mapping[str, Any], tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Refuse an export that says that its weights are transformed, and does not say how.

    Args:
        said: Its ``quantization_config``.
        tensors: All of it.
        where: The checkpoint, for messages.

    Raises:
        InputError: ``dialect.transform_lost``.
    """
    algorithm = said.get("quant_algo")
    if algorithm in TRANSFORMED and not any(_role(name) in TRANSFORM_ROLES for name in tensors):
        raise InputError(
            f"{where}: quant_algo is {algorithm}, expected {PRE_QUANT_SCALE} tensors, found none: ModelOpt 0.42 to "
            "0.45 left them out, and without them the weights mean nothing",
            code="dialect.transform_lost",
            path=where,
            hint="export again with ModelOpt 0.46 or later, from the checkpoint (.pt) that was saved before the export",
        )


def check_carried(described: Canonical, form: str, carried: tuple[str, ...] = ()) -> None:
    """Refuse transformed weights in a dialect that has no place for what stands beside them.

    Args:
        described: What is to be written.
        form: In words.
        carried: Roles that the dialect has, beside a packed weight.

    Raises:
        InputError: ``convert.no_place``.
    """
    faults = Faults()
    for name in described.tensors:
        role, module = _role(name), module_of(name)
        if role in TRANSFORM_ROLES and (role not in carried or module not in described.modules):
            fault = InputError(
                f"module {module!r}: {form} has no place for {role}, without which the weight means something else",
                code="convert.no_place",
                hint="--to bf16 multiplies it out; --inexact requantize makes plain NVFP4 of that",
            )
            faults.add(module, fault)
    faults.refuse()


def _role(name: str) -> str:
    return name.rpartition(".")[2]


def _bytes(recipe: Recipe, begin: int, count: int, fetch: Fetch) -> "NDArray[np.uint8]":
    import numpy as np

    found = np.empty(count, np.uint8)
    recipe.fill(begin, found.data, fetch)
    return found


@lru_cache(maxsize=4)
def _pairs(factor: bytes) -> "NDArray[np.uint64]":
    """Two float32 values by ``block scale << 8 | byte of two codes``, the low code's first, uint64 [65536]."""
    import numpy as np

    with np.errstate(all="ignore"):
        scales = values_of("F8_E4M3") * np.float32(struct.unpack("<f", factor)[0])
        values = values_of("F4") * scales[:, None]
    codes = np.arange(256)
    both = np.stack((values[:, codes & 15], values[:, codes >> 4]), axis=-1)
    return np.ascontiguousarray(both, np.float32).view(np.uint64).reshape(-1)
