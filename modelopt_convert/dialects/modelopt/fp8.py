"""ModelOpt's FP8 modules. Pure, no torch.

Per Linear of shape [N, K] (modelopt/torch/export/quant_utils.py, ``to_quantized_weight``):

================  ============  ========  ==============================
tensor            dtype         shape     meaning
================  ============  ========  ==============================
``weight``        F8_E4M3       [N, K]    weight / weight_scale
``weight_scale``  F32           []        weight amax / 448
``input_scale``   F32           []        activation amax / 448
================  ============  ========  ==============================

Where config.json declares ``dynamic_input_scale: true``, no module has an ``input_scale``.

Before ModelOpt 0.42 the weight stayed in the model's dtype, and the two amax lay in a ``.pt`` beside the export.
"""

from collections.abc import Iterator, Mapping

from modelopt_convert.checkpoint.names import inside
from modelopt_convert.dialects.packed import (
    SCALE_SHAPES,
    Evidence,
    ModuleFormat,
    PackedModule,
    Roles,
    check_calibrated,
    missing_scale,
    one_fault,
)
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.formats.fp8.format import FORMAT
from modelopt_convert.preset.patterns import ignored
from modelopt_convert.run.errors import InputError

_SECOND_SCALE = "weight_scale_2"
_PACKED_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "U8", "I8"})


class _Fp8Modules:
    def names(self, grouped: Mapping[str, Roles], evidence: Evidence, path: str) -> list[str]:
        if any("weight" in roles and roles["weight"].dtype == FORMAT.packed_dtype for roles in grouped.values()):
            return [
                module
                for module, roles in grouped.items()
                if _has_scale(roles) or ("weight" in roles and roles["weight"].dtype in _PACKED_DTYPES)
            ]
        quantized = [module for module, roles in grouped.items() if _has_scale(roles)]
        if evidence.calibration:
            # Which modules are to be quantized is said nowhere but in ``ignore``: the ``.pt`` holds the amax of all. A
            # module that lacks its amax there is at fault.
            linears = [
                module for module, roles in grouped.items() if "weight" in roles and len(roles["weight"].shape) == 2
            ]
            left = ignored(evidence.ignore, linears, path=inside(path, "config.json"))
            quantized += [module for module in linears if module not in left]
        return quantized

    def module(self, name: str, roles: Roles, evidence: Evidence, path: str) -> PackedModule:
        weight = roles.get("weight")
        calibrated = evidence.calibration.get(name, {})
        where = inside(path, (weight or next(iter(roles.values()))).file)
        allowed = {FORMAT.packed_dtype} | (HALF_AND_FLOAT if evidence.calibration else frozenset())
        if weight is None or weight.dtype not in allowed or len(weight.shape) != 2 or 0 in weight.shape:
            found = f"{weight.dtype} {list(weight.shape)}" if weight else "no weight"
            raise InputError(
                f"{where}: tensor {name + '.weight'!r}: expected F8_E4M3 [N, K] beside its scales, found {found}",
                code="export.mixed" if weight is not None and weight.dtype in _PACKED_DTYPES else "export.weight",
                path=where,
                hint="this module is not FP8; export again with one algorithm for all modules",
            )
        if _SECOND_SCALE in roles:
            raise InputError(
                f"{where}: tensor {f'{name}.{_SECOND_SCALE}'!r}: expected one scale per weight, found a second",
                code="export.mixed",
                path=where,
                hint="this module is not plain FP8; export again with one algorithm for all modules",
            )
        scales = {role: roles[role] for role in FORMAT.scales if role in roles}
        due = FORMAT.scales[:-1] if evidence.dynamic_inputs else FORMAT.scales
        known = {role: calibrated[role].scale for role in FORMAT.scales if role in calibrated and role not in scales}
        return PackedModule(
            name,
            *weight.shape,
            weight,
            scales,
            roles.get("bias"),
            one_fault(name, _faults(name, scales, known, where, due)),
            known,
        )

    def shape(self, module: PackedModule, role: str, *, is_merged: bool) -> tuple[int, ...]:
        # The loader takes one scale per part of a fused module.
        return (module.rows, module.columns) if role == "weight" else (1,)

    def check_together(self, found: dict[str, PackedModule], evidence: Evidence, path: str) -> None:
        check_calibrated(found, evidence, path)


ENTRY: ModuleFormat = _Fp8Modules()


def _has_scale(roles: Roles) -> bool:
    return any(role in roles for role in (*FORMAT.scales, _SECOND_SCALE))


def _faults(
    module: str, scales: Roles, known: Mapping[str, float], where: str, due: tuple[str, ...]
) -> Iterator[InputError]:
    for role in FORMAT.scales:
        if role in known:
            if not 0.0 < known[role] < float("inf"):
                yield InputError(
                    f"{where}: {module}: expected a finite positive {role} in the checkpoint, found {known[role]}",
                    code="export.unusable_scale",
                    path=where,
                    hint="the module was all zero or never calibrated; quantize again, or build with "
                    f"--keep-bf16 '{module}'",
                )
            continue
        if role not in scales and role not in due:
            continue
        if role not in scales:
            yield missing_scale(module, role, "F32 []", where)
            continue
        info = scales[role]
        if info.dtype != "F32" or info.shape not in SCALE_SHAPES:
            yield InputError(
                f"{where}: tensor {info.name!r}: expected F32 [], found {info.dtype} {list(info.shape)}"
                + (" (a scale per row)" if len(info.shape) == 1 else ""),
                code="export.shape",
                path=where,
                hint=("the runtime takes one scale per weight" if info.shape not in SCALE_SHAPES else "scales are F32")
                + "; export again with --format fp8, or see what `mopt convert` makes of it with --to modelopt or "
                "comfyui",
            )
