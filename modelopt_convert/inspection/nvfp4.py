"""NVFP4 modules: their layout by the base, by what is declared, by shape, or by a hint; and their scales."""

from collections.abc import Mapping
from dataclasses import replace

from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.formats.layout import ScaleOrder
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE, FORMAT
from modelopt_convert.formats.nvfp4.shapes import scale_shapes
from modelopt_convert.inspection.component import FormatInspection, Seen, Subject, module_layout
from modelopt_convert.inspection.lint import (
    block_scale_faults,
    global_scale,
    input_scale_faults,
    module_faults,
    odd_input_faults,
)
from modelopt_convert.inspection.module_bytes import ModuleBytes
from modelopt_convert.report.inspect import LintReport, ModuleLayout

SAMPLED_MODULES = 8


class _Nvfp4Inspection:
    def see(self, subject: Subject, found: Mapping[str, PackedModule], coded: Mapping[str, list[int]]) -> Seen:
        scales = {name: one.scales["weight_scale"] for name, one in found.items() if "weight_scale" in one.scales}
        packed = {
            name: one for name, one in found.items() if name in scales and scales[name].dtype in ("F8_E4M3", "U8")
        }
        missing = "packed weight without block scales"
        faults = [
            LintReport(code="scale.missing", message=missing, module=name)
            for name, shape in coded.items()
            if name not in packed and len(shape) == 2
        ]
        faults += input_scale_faults(subject.reader, packed)
        faults += odd_input_faults(subject.reader, packed, FORMAT.tensor_scale)
        sampled = set(_spread(list(packed), SAMPLED_MODULES))
        modules: dict[str, ModuleLayout] = {}
        for name, module in packed.items():
            modules[name], found_faults = _look(subject, module, sampled=subject.every_scale or name in sampled)
            faults += found_faults
        return Seen(modules, packed, faults)


ENTRY: FormatInspection = _Nvfp4Inspection()


def orders_by_shape(module: PackedModule) -> set[ScaleOrder]:
    """The orders that the shape of the scales allows."""
    return {
        "128x4" if shape.swizzled else "linear"
        for shape in scale_shapes(module.rows, module.columns // BLOCK_SIZE)
        if shape.stored == module.scales["weight_scale"].shape
    }


def _look(subject: Subject, module: PackedModule, *, sampled: bool) -> tuple[ModuleLayout, list[LintReport]]:
    reader, base, faults = subject.reader, subject.base, list[LintReport]()
    # Without a base, modules that are not sampled are judged by shape and declaration, from headers alone.
    looks = ModuleBytes(reader, module, reader.read(module.scales["weight_scale"].name)) if sampled or base else None
    scale = global_scale(reader, module)
    if looks is not None:
        faults += block_scale_faults(module.name, looks.odd_scales())
    faults += module_faults(reader, module, BLOCK_SIZE)
    shape = (module.rows, module.columns)
    if base is not None and looks is not None and scale is not None:
        info = base.tensors.get(module.weight.name)
        if info is None or info.shape != shape or info.dtype not in HALF_AND_FLOAT:
            message = "the base has no such weight"
            faults.append(LintReport(code="base.no_counterpart", message=message, module=module.name))
        elif 0.0 < scale < float("inf"):
            from modelopt_convert.inspection.against_base import detect

            if (found := detect(looks, base, info, scale, subject.max_error)) is not None:
                return module_layout(FORMAT, shape, found.layout, found.closeness.relative_error), faults
    layout = subject.declared
    orders = orders_by_shape(module)
    if len(orders) == 1:
        layout = replace(layout, scales=next(iter(orders)), scales_by="shape")
    elif layout.scales_by == "none" and looks is not None:
        hint = looks.hint()
        layout = replace(layout, scales=hint, scales_by="hint" if hint != "undetermined" else "none")
    if scale is not None:
        # amax / 2688 is far below one for any trained weight, its reciprocal far above.
        layout = replace(layout, global_scale="multiply" if scale < 1.0 else "divide")
    else:
        layout = replace(layout, global_scale="undetermined")
    return module_layout(FORMAT, shape, layout), faults


def _spread(names: list[str], count: int) -> list[str]:
    if len(names) <= count:
        return names
    return [names[index * len(names) // count] for index in range(count)]
