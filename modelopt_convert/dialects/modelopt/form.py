"""ModelOpt's checkpoints of diffusers models, read and written in a conversion. Pure, no torch.

Source: ModelOpt 0.47.0, ``modelopt/torch/export/quant_utils.py`` and ``unified_export_hf.py``. Where its
post-processing padded, swizzled or swapped, that is undone: see ``formats/nvfp4/shapes.py`` for the shapes.

=============================  ===========  ===================================================
quant_algo                     weight       scales
=============================  ===========  ===================================================
``NVFP4``                      U8           see ``dialects/modelopt/nvfp4.py``
``FP8``                        F8_E4M3      see ``dialects/modelopt/fp8.py``
``FP8_PER_CHANNEL_PER_TOKEN``  F8_E4M3      weight_scale F32 [N]; the input is scaled as it comes
``MXFP8``                      F8_E4M3      weight_scale U8 [N, K/32], E8M0
=============================  ===========  ===================================================
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from modelopt_convert.checkpoint.header import METADATA, TensorInfo
from modelopt_convert.checkpoint.recipe import NibblesSwapped, RowMajor, made, recipe_of, rows_of
from modelopt_convert.dialects.awq import (
    check_carried,
    check_not_lost,
    check_transforms,
    is_transformed,
    without_transforms,
)
from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.dialects.form import (
    E8M0_BLOCK,
    SCALES,
    Canonical,
    Naming,
    Quantized,
    ReadBytes,
    Written,
    check_roles,
    grouped,
    kept_linears,
    wrong,
)
from modelopt_convert.dialects.modelopt.dialect import output_config, split_keys
from modelopt_convert.dialects.packed import (
    Evidence,
    PackedModule,
    add_faults,
    find_packed,
    is_quantizer_state,
    missing_scale,
)
from modelopt_convert.dialects.resized import with_columns
from modelopt_convert.dialects.scales import fp8_scale, one_scale
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.formats.layout import declared_layout
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.formats.nvfp4.shapes import scale_shapes
from modelopt_convert.formats.table import FORMATS, declares_dynamic_inputs, is_modelopts
from modelopt_convert.run.errors import Faults, InputError

_QUANTIZATION = "quantization_config"
_AGAIN = "the export is cut or mixed up; export again"
_ROWS = "FP8_PER_CHANNEL_PER_TOKEN"


@dataclass(frozen=True, slots=True)
class _ModelOpt:
    name: str = "modelopt"
    naming: Naming = "diffusers"

    def read(
        self, headers: Headers, read: ReadBytes, true_shapes: Mapping[str, tuple[int, int]], where: str
    ) -> Canonical:
        tensors = {name: info for name, info in headers.tensors.items() if not is_quantizer_state(name)}
        fates = {name: "left out: quantizer state" for name in headers.tensors if is_quantizer_state(name)}
        keep = {name: headers.tensors[name] for name in fates}
        modules: dict[str, Quantized] = {}
        by_module = grouped(tensors.values())
        check_not_lost(headers.quantization(), tensors, where)
        packed = {
            info.name: info
            for roles in by_module.values()
            if "weight" in roles and roles["weight"].dtype == "U8"
            for info in without_transforms(roles).values()
        }
        evidence = Evidence(
            {f"{name}.weight": shape for name, shape in true_shapes.items()},
            dynamic_inputs=declares_dynamic_inputs(headers.config),
        )
        layout = declared_layout(headers.quantization())
        faults = Faults()
        four_bits = find_packed(packed, FORMATS["nvfp4"], evidence, path=where)
        for name, fault in four_bits.refused.items():
            faults.add(name, fault)
        add_faults(faults, four_bits.modules, where)
        for module in four_bits.modules.values():
            with faults.taken(module.name):
                if module.fault is not None:
                    continue
                check_roles(module.name, without_transforms(by_module[module.name]), where)
                check_transforms(by_module[module.name], module.rows, module.columns, where)
                tensors |= {
                    info.name: info
                    for info in _nvfp4(module, layout.nibbles == "high", layout.scales == "128x4", read, where)
                }
                modules[module.name] = Quantized("nvfp4", module.rows, module.columns)
        for name, roles in by_module.items():
            if name in four_bits.modules or name in four_bits.refused:
                continue
            with faults.taken(name):
                if any(role in SCALES for role in roles):
                    check_roles(name, roles, where)
                    found, modules[name] = _eight_bits(name, roles, read, where)
                    tensors |= {info.name: info for info in found}
                elif is_transformed(roles):
                    check_transforms(roles, *_plain_size(roles, where), where)
        faults.refuse()
        for name in modules:
            keep |= {
                info.name: info
                for role, info in by_module[name].items()
                if role in SCALES and info.dtype in ("BF16", "F16")
            }
        said = headers.config.get(_QUANTIZATION)
        config = {key: value for key, value in headers.config.items() if key != _QUANTIZATION}
        return Canonical(tensors, modules, fates, config, said if isinstance(said, dict) else {}, keep)

    def write(self, described: Canonical, read: ReadBytes) -> Written:
        check_carried(described, "a ModelOpt checkpoint that engines read")
        algorithms = {_quant_algo(name, one, described.tensors) for name, one in described.modules.items()}
        if len(algorithms) != 1 or None in algorithms:
            found = sorted({one.algorithm for one in described.modules.values()})
            raise InputError(
                "ModelOpt's checkpoints have one of NVFP4, FP8, MXFP8 or a scale a row for all modules, found "
                + (f"{len(algorithms)} of them: {', '.join(found)}" if found else "no quantized module"),
                code="convert.no_place",
                hint="--to bf16 takes every format, --to comfyui those that ComfyUI reads"
                if found
                else "`mopt build-nvfp4` and `mopt convert-fp8` quantize such a checkpoint, given as --base",
            )
        (algorithm,) = algorithms
        calibrated = [name for name in described.modules if f"{name}.input_scale" in described.tensors]
        if 0 < len(calibrated) < len(described.modules):
            fault = InputError(
                f"{len(calibrated)} of {len(described.modules)} modules have an input_scale: expected one in each or "
                f"in none, as in ModelOpt's checkpoints; {len(described.modules) - len(calibrated)} have none",
                code="convert.no_input_scale",
                hint="--to comfyui, torchao and bf16 take modules with and without; or calibrate and export again",
            )
            raise fault.at(name for name in described.modules if name not in calibrated)
        target = next((one for one in FORMATS.values() if one.quant_algo == algorithm), None)
        keys: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": algorithm}
        if target is not None and not calibrated:
            keys |= target.dynamic
        said = described.quantization
        if is_modelopts(said) and said.get("quant_algo") == algorithm:
            keys = split_keys(said)[0] | keys
        ignore = kept_linears(described)
        config: dict[str, Any] | None = None
        if described.config and target is not None:
            config = output_config(described.config, keys, ignore, target)
        elif described.config:
            config = {**described.config, _QUANTIZATION: {**keys, "ignore": ignore}}
        return Written(described.tensors, METADATA, config)


FORM = _ModelOpt()


def _quant_algo(module: str, one: Quantized, tensors: Mapping[str, TensorInfo]) -> str | None:
    if one.algorithm == "fp8":
        return _ROWS if tensors[f"{module}.weight_scale"].shape else FORMATS["fp8"].quant_algo
    return {"nvfp4": FORMATS["nvfp4"].quant_algo, "mxfp8": "MXFP8"}.get(one.algorithm)


def _nvfp4(module: PackedModule, high: bool, tiled: bool, read: ReadBytes, where: str) -> Iterator[TensorInfo]:
    """A module's weight and scales in ModelOpt's own layout, padding cut."""
    weight, scale, width = module.weight, module.scales["weight_scale"], module.columns // BLOCK_SIZE
    for role in ("weight_scale_2", "input_scale"):
        if role in module.scales:
            yield one_scale(module.scales[role], f"{module.name}.{role}", read, where)
    codes = with_columns(rows_of(weight, weight.name, 0, module.rows), module.columns // 2)
    yield made(weight.name, "U8", codes.shape, NibblesSwapped(recipe_of(codes)), weight.file) if high else codes
    shapes = (one for one in scale_shapes(module.rows, width) if one.stored == scale.shape and one.swizzled == tiled)
    found = next(shapes, None)
    if found is None:
        order = "in the 128x4 order" if tiled else "row-major, as nothing declares another order"
        raise wrong(where, scale, f"[{module.rows}, {width}] scales {order}", code="dialect.shape", hint=_DECLARE)
    recipe = RowMajor(recipe_of(scale), *found.grid) if tiled else recipe_of(scale)
    grid = made(scale.name, "F8_E4M3", found.grid, recipe, scale.file)
    yield with_columns(rows_of(grid, scale.name, 0, module.rows), width)


_DECLARE = "mopt unswizzle-scales brings them into row-major order, with --base to prove it"


def _plain_size(roles: Mapping[str, TensorInfo], where: str) -> tuple[int, int]:
    weight = roles.get("weight")
    if weight is None or weight.dtype not in HALF_AND_FLOAT or len(weight.shape) != 2:
        info = weight or next(iter(roles.values()))
        raise wrong(where, info, "a weight [N, K] in BF16, F16 or F32", code="dialect.shape", hint=_AGAIN)
    return weight.shape[0], weight.shape[1]


def _eight_bits(
    name: str, roles: Mapping[str, TensorInfo], read: ReadBytes, where: str
) -> tuple[list[TensorInfo], Quantized]:
    """A module of FP8 or MXFP8."""
    weight, scale = roles.get("weight"), roles.get("weight_scale")
    if weight is None or weight.dtype != "F8_E4M3" or len(weight.shape) != 2:
        info = weight or next(iter(roles.values()))
        raise wrong(where, info, "F8_E4M3 [N, K] and a weight_scale beside it", code="dialect.shape", hint=_AGAIN)
    if scale is None:
        raise missing_scale(name, "weight_scale", "the scale of an FP8 weight", where)
    if "weight_scale_2" in roles:
        raise wrong(where, roles["weight_scale_2"], "one scale of FP8", code="dialect.shape", hint=_AGAIN)
    found, (rows, columns) = [weight], weight.shape
    found += [roles["bias"]] if "bias" in roles else []
    if "input_scale" in roles:
        found.append(one_scale(roles["input_scale"], f"{name}.input_scale", read, where))
    if scale.dtype not in ("U8", "F8_E8M0"):
        return [*found, fp8_scale(scale, scale.name, rows, read, where)], Quantized("fp8", rows, columns)
    if scale.shape != (rows, -(-columns // E8M0_BLOCK)):
        expected = f"U8 {[rows, -(-columns // E8M0_BLOCK)]}, a scale for {E8M0_BLOCK} columns"
        raise wrong(where, scale, expected, code="dialect.shape", hint=_AGAIN)
    return [*found, replace(scale, dtype="U8")], Quantized("mxfp8", rows, columns)
