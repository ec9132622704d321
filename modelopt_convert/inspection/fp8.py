"""FP8 modules, and MXFP8 ones, whose weights have the same dtype: what is to be looked at is their scales."""

import math
from collections.abc import Iterator, Mapping

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.comfyui_form import tiled_by_shape
from modelopt_convert.dialects.comfyui_markers import LEGACY
from modelopt_convert.dialects.packed import SCALE_SHAPES, PackedModule
from modelopt_convert.families.table import recognise
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.formats.fp8.format import FORMAT
from modelopt_convert.formats.table import declares_dynamic_inputs
from modelopt_convert.inspection.component import FormatInspection, Seen, Subject, module_layout
from modelopt_convert.inspection.lint import input_scale_faults, odd_input_faults, unusable
from modelopt_convert.report.inspect import LintReport, ModuleLayout

_E8M0 = ("U8", "F8_E8M0")


class _Fp8Inspection:
    def see(self, subject: Subject, found: Mapping[str, PackedModule], coded: Mapping[str, list[int]]) -> Seen:
        tensors = subject.reader.tensors
        blocks = {name for name in coded if _is_e8m0(tensors.get(f"{name}.weight_scale"))}
        modules = {
            name: _mxfp8(subject, shape, tensors[f"{name}.weight_scale"])
            if name in blocks
            else module_layout(FORMAT, shape, None)
            for name, shape in coded.items()
        }
        faults = [fault for name in coded if name not in blocks for fault in _faults(subject.reader, name)]
        faults += input_scale_faults(subject.reader, found)
        return Seen(modules, {}, [*faults, *odd_input_faults(subject.reader, found, FORMAT.tensor_scale)])


ENTRY: FormatInspection = _Fp8Inspection()


def _is_e8m0(scale: TensorInfo | None) -> bool:
    return scale is not None and scale.dtype in _E8M0 and len(scale.shape) == 2


def _mxfp8(subject: Subject, shape: list[int], scale: TensorInfo) -> ModuleLayout:
    """A module with a scale for 32 columns. What marks the file tells their order; where nothing does, padding may."""
    plain = module_layout(FORMAT, shape, None)
    order, basis = subject.scales_of_mxfp8
    is_tiled = tiled_by_shape(tuple(shape), scale.shape) if basis == "none" else None
    if is_tiled is not None:
        order, basis = "128x4" if is_tiled else "linear", "shape"
    return plain.model_copy(
        update={"algorithm": "MXFP8", "scale_layout": order, "scale_basis": basis, "global_scale": "none"}
    )


def _faults(reader: CheckpointReader, module: str) -> Iterator[LintReport]:
    """Missing or unusable scales."""
    for role in FORMAT.scales:
        spellings = (role, *(old for old, new in LEGACY.items() if new == role))
        scale = next((one for name in spellings if (one := reader.tensors.get(f"{module}.{name}")) is not None), None)
        if scale is None and role == "input_scale" and declares_dynamic_inputs(reader.config):
            continue
        if scale is None:
            yield LintReport(code=f"{role}.missing", message=f"FP8 without {role}", module=module)
        elif scale.dtype != "F32" or scale.shape not in SCALE_SHAPES:
            takes = (
                "`mopt convert` reads it"
                if _is_converted(reader, module, role, scale)
                else "`mopt convert` refuses it, too"
            )
            message = f"{role} is {scale.dtype} {list(scale.shape)}: builds take F32 [], {takes}"
            yield LintReport(code="scale.unusable", message=message, module=module)
        else:
            yield from unusable(reader, scale, module, role)


def _is_converted(reader: CheckpointReader, module: str, role: str, scale: TensorInfo) -> bool:
    """Whether a conversion reads a scale: one for the weight, for each row, or for each member of a fused module."""
    rows, count = reader.tensors[f"{module}.weight"].shape[0], math.prod(scale.shape)
    if scale.dtype not in HALF_AND_FLOAT or max(scale.shape, default=1) != count:
        return False
    if count == 1 or role != FORMAT.tensor_scale or count == rows:
        return count == 1 or role == FORMAT.tensor_scale
    found = recognise({name: info.shape for name, info in reader.tensors.items()})
    if found is None or found.spelling == "diffusers":
        return False
    return count == len(found.family.fused(module.removeprefix(found.prefix)))
