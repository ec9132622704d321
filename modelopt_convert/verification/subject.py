"""A checkpoint's quantized modules, and their operands as the checkpoint declares them.

torch is imported only where operands or a device are asked for.
"""

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.packed import (
    Evidence,
    PackedModule,
    find_packed,
    format_of,
)
from modelopt_convert.formats.format import Format
from modelopt_convert.formats.layout import CANONICAL, Layout, declared_layout
from modelopt_convert.formats.table import FORMATS, declares_dynamic_inputs
from modelopt_convert.run.errors import Faults, InconclusiveError, InputError

if TYPE_CHECKING:
    import torch

    from modelopt_convert.verification.gemm.operands import Weight

_ROWS = 5  # more scales than a fused weight has members


@dataclass(frozen=True, slots=True)
class Subject:
    """What is verified.

    Attributes:
        reader: The opened checkpoint.
        format: Of its modules.
        modules: By name.
        layout: How packed modules are declared to lie.
        refused: Modules that are none of the format, of which nothing is compared.
    """

    reader: CheckpointReader
    format: Format
    modules: Mapping[str, PackedModule]
    layout: Layout
    refused: frozenset[str] = frozenset()

    def operands(self, module: PackedModule, rows: Sequence[int] | None = None) -> "Weight":
        """One module's weight in the canonical layout, read as declared.

        Args:
            module: Which.
            rows: Of these rows only, and without its bias; None for all.

        Raises:
            InputError: A scale that cannot be used.
            ValueError: The stored shape does not allow the declared reading.
        """
        from modelopt_convert.verification.gemm.operands import operand_format

        return operand_format(self.format.algorithm).read(self.reader, module, self.layout, rows)


def find_subject(
    reader: CheckpointReader,
    base: CheckpointReader | None,
    faults: Faults | None = None,
) -> Subject:
    """Make out what is quantized in a checkpoint, by dtype and shape.

    Args:
        reader: The opened checkpoint.
        base: Its opened base, or None.
        faults: Gets what ``find_packed`` refuses of modules, where there are others to be looked at.

    Raises:
        InputError: ``verify.nothing_quantized``, ``dialect.formats``, or what ``find_packed`` refuses.
    """
    path = str(reader.path)
    target = format_of(reader.tensors)
    true_shapes = {name: info.shape for name, info in base.tensors.items()} if base is not None else {}
    evidence = Evidence(true_shapes, dynamic_inputs=declares_dynamic_inputs(reader.config))
    found = find_packed(reader.tensors, target, evidence, path=path)
    refused = frozenset(module_of(name) if name in reader.tensors else name for name in found.refused)
    modules = {name: one for name, one in found.modules.items() if name not in refused}
    if faults is None or not modules:
        modules = found.or_raise()
    else:
        for name, fault in found.refused.items():
            faults.add(name, fault)
    if not modules:
        raise InputError(
            f"{path}: expected {' or '.join(one.quant_algo for one in FORMATS.values())} modules, found none",
            code="verify.nothing_quantized",
            path=path,
            hint="give what build-nvfp4 or convert-fp8 wrote, or a ModelOpt export",
        )
    _refuse_several_scales(target, modules, path)
    declared = reader.config.get("quantization_config")
    keys = declared if isinstance(declared, dict) else {}
    return Subject(reader, target, modules, declared_layout(keys).over(CANONICAL), refused)


def may_have_gpu() -> bool:
    """Whether torch could see a GPU: a driver's library can be loaded, or AMD's driver is there. No torch."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()
    return True


def _refuse_several_scales(target: Format, modules: Mapping[str, PackedModule], path: str) -> None:
    """Refuse once what is in another format with the same dtype: each weight has a scale for each row or block."""
    scales = [one.scales[target.tensor_scale] for one in modules.values() if target.tensor_scale in one.scales]
    if (
        target.block_size is not None
        or len(scales) < len(modules)
        or any(math.prod(one.shape) < _ROWS for one in scales)
    ):
        return
    raise InputError(
        f"{path}: expected one scale for each {target.quant_algo} weight, found several for each of {len(scales)} "
        f"({scales[0].name!r}: {scales[0].dtype} {list(scales[0].shape)})",
        code="dialect.formats",
        path=path,
        hint="there is no proof of this format; mopt convert writes it in another dialect, or as BF16",
    )


def device_of(wanted: str | None) -> "torch.device":
    """The device asked for, or the GPU if there is one.

    Raises:
        InconclusiveError: ``verify.no_gpu``.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise InconclusiveError(
            "--device cuda: torch sees no GPU",
            code="verify.no_gpu",
            hint="install the CUDA build of torch on a machine with a GPU, or leave --device out",
        )
    return torch.device(wanted or ("cuda" if has_gpu else "cpu"))
