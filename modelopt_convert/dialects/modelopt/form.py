"""ModelOpt's checkpoints of diffusers models, read and written in a conversion. Pure, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelopt_convert.checkpoint.header import METADATA, TensorInfo
from modelopt_convert.checkpoint.names import module_of, natural_key
from modelopt_convert.checkpoint.recipe import NibblesSwapped, RowMajor, made, recipe_of, rows_of
from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.dialects.form import Canonical, Naming, Quantized, ReadBytes, Written, scalar
from modelopt_convert.dialects.modelopt.dialect import output_config
from modelopt_convert.dialects.packed import (
    Evidence,
    PackedModule,
    declares_dynamic_inputs,
    find_packed,
    format_of,
    is_quantizer_state,
)
from modelopt_convert.formats.layout import declared_layout
from modelopt_convert.formats.nvfp4.shapes import scale_shapes
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.run.errors import InputError

_QUANTIZATION = "quantization_config"


@dataclass(frozen=True, slots=True)
class _ModelOpt:
    name: str = "modelopt"
    naming: Naming = "diffusers"

    def read(self, headers: Headers, read: ReadBytes, true_rows: Mapping[str, int], where: str) -> Canonical:
        target = format_of(headers.tensors)
        true_shapes = {
            f"{name}.weight": (rows, info.shape[1] * 2)
            for name, rows in true_rows.items()
            if (info := headers.tensors.get(f"{name}.weight")) is not None
            and info.dtype == "U8"
            and len(info.shape) == 2
        }
        evidence = Evidence(true_shapes, dynamic_inputs=declares_dynamic_inputs(headers.config))
        found = find_packed(headers.tensors, target, evidence, path=where).or_raise()
        tensors = {name: info for name, info in headers.tensors.items() if not is_quantizer_state(name)}
        fates = {name: "left out: quantizer state" for name in headers.tensors if is_quantizer_state(name)}
        layout = declared_layout(headers.quantization())
        for module in found.values():
            if module.fault is not None:
                raise module.fault
            for info in _canonical(module, layout.nibbles == "high", layout.scales == "128x4", read):
                tensors[info.name] = info
        said = headers.config.get(_QUANTIZATION)
        algorithm: Any = target.algorithm
        return Canonical(
            tensors,
            {one.name: Quantized(algorithm, one.rows, one.columns) for one in found.values()},
            fates,
            {key: value for key, value in headers.config.items() if key != _QUANTIZATION},
            said if isinstance(said, dict) else {},
        )

    def write(self, described: Canonical, read: ReadBytes) -> Written:
        algorithms = {one.algorithm for one in described.modules.values()}
        if len(algorithms) != 1 or not algorithms <= FORMATS.keys():
            raise InputError(
                f"ModelOpt's checkpoints have one of {', '.join(FORMATS)} for all modules, "
                f"found {', '.join(sorted(algorithms)) or 'no quantized module'}",
                code="convert.no_place",
                hint="--to bf16 takes every format, --to comfyui those that ComfyUI reads",
            )
        (algorithm,) = algorithms
        target = FORMATS[algorithm]
        linears = sorted(
            (
                module_of(name)
                for name, info in described.tensors.items()
                if name.endswith(".weight") and len(info.shape) == 2 and module_of(name) not in described.modules
            ),
            key=natural_key,
        )
        calibrated = any(f"{name}.input_scale" in described.tensors for name in described.modules)
        keys = {"quant_method": "modelopt", "quant_algo": target.quant_algo} | (
            {} if calibrated else {"dynamic_input_scale": True}
        )
        config = output_config(described.config, keys, linears, target) if described.config else None
        return Written(described.tensors, METADATA, config)


FORM = _ModelOpt()


def _canonical(module: PackedModule, high: bool, tiled: bool, read: ReadBytes) -> list[TensorInfo]:
    """A module's weight and scales in ModelOpt's own layout, padding cut."""
    found = [
        scalar(info, info.name, read)
        for role, info in module.scales.items()
        if info.dtype == "F32" and info.shape in ((), (1,))
    ]
    weight = module.weight
    if weight.dtype != "U8":
        return [*found, weight]
    codes = rows_of(weight, weight.name, 0, module.rows)
    found.append(made(weight.name, "U8", codes.shape, NibblesSwapped(recipe_of(codes)), weight.file) if high else codes)
    scale, shape = module.scales["weight_scale"], (module.rows, module.columns // 16)
    grid = next(one.grid for one in scale_shapes(*shape) if one.stored == scale.shape and one.swizzled == tiled)
    linear = made(scale.name, "F8_E4M3", grid, RowMajor(recipe_of(scale), *grid), scale.file) if tiled else scale
    return [*found, rows_of(linear, scale.name, 0, module.rows)]
