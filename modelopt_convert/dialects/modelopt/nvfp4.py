"""ModelOpt's NVFP4 modules: which tensors belong together, by dtype and shape. Pure, no torch.

Per Linear of shape [N, K] (modelopt/torch/export/quant_utils.py, NVFP4QTensor):

=================  ========  ===========  =====================================================
tensor             dtype     shape        meaning
=================  ========  ===========  =====================================================
``weight``         U8        [N, K/2]     two E2M1 codes a byte, the even column in the low nibble
``weight_scale``   F8_E4M3   [N, K/16]    one scale per block of 16 columns, row-major
``weight_scale_2`` F32       []           amax / (6 * 448)
``input_scale``    F32       []           activation amax / (6 * 448)
=================  ========  ===========  =====================================================

Where config.json declares ``dynamic_input_scale: true``, no module has an ``input_scale``: the engine takes it from the
activations at hand.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.dialects.modelopt.export import (
    SCALE_ROLES,
    SCALE_SHAPES,
    PackedModule,
    group_modules,
    missing_scale,
)
from modelopt_convert.formats.nvfp4.shapes import packed_shapes, scale_shapes
from modelopt_convert.run.errors import InputError

BLOCK_SIZE = 16
_PACKED_DTYPES = frozenset({"U8", "F8_E4M3", "F8_E5M2"})


def declares_dynamic_inputs(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that input scales are taken from the activations."""
    found = config.get("quantization_config")
    return isinstance(found, dict) and found.get("dynamic_input_scale") is True


def find_nvfp4_modules(
    tensors: Mapping[str, TensorInfo],
    true_shapes: Mapping[str, tuple[int, ...]],
    *,
    path: str,
    dynamic_inputs: bool,
) -> dict[str, PackedModule]:
    """Group an export's tensors into packed modules, judged by dtype and shape and not by ``ignore``.

    Args:
        tensors: All of the export.
        true_shapes: Shapes [N, K] of weights by tensor name, as far as a base tells them: what lies beyond is padding.
        path: The export's folder, for messages.
        dynamic_inputs: Whether modules may do without ``input_scale``: all of them, or none.

    Returns:
        Packed modules by name. Unquantized tensors are in none of them.

    Raises:
        InputError: ``export.transformed`` (AWQ, SVDQuant) or ``export.mixed`` (an FP8 weight among them): no module
            that is kept can excuse these.
    """
    due = SCALE_ROLES[:-1] if dynamic_inputs else SCALE_ROLES
    found = {
        module: _nvfp4_module(module, roles, true_shapes.get(f"{module}.weight"), path, due)
        for module, roles in group_modules(tensors, path=path).items()
        if any(role in roles for role in SCALE_ROLES) or ("weight" in roles and roles["weight"].dtype in _PACKED_DTYPES)
    }
    calibrated = [module for module in found.values() if "input_scale" in module.scales]
    if dynamic_inputs and 0 < len(calibrated) < len(found):
        fault = InputError(
            f"{path}: {len(calibrated)} of {len(found)} modules have an input_scale ({calibrated[0].name} first), "
            "though config.json declares dynamic_input_scale",
            code="export.mixed_input_scale",
            path=path,
            hint="all modules have one, or none; build again",
        )
        found |= {module.name: replace(module, fault=fault) for module in calibrated}
    return found


def _nvfp4_module(
    module: str, roles: Mapping[str, TensorInfo], true_shape: tuple[int, ...] | None, path: str, due: tuple[str, ...]
) -> PackedModule:
    anything = next(iter(roles.values()))
    weight = roles.get("weight")
    where = f"{path}/{(weight or anything).file}"
    if weight is None or weight.dtype != "U8" or len(weight.shape) != 2 or 0 in weight.shape:
        found = f"{weight.dtype} {list(weight.shape)}" if weight else "no weight"
        fp8 = weight is not None and weight.dtype.startswith("F8_")
        raise InputError(
            f"{where}: tensor {module + '.weight'!r}: expected U8 [N, K/2] beside its scales, found {found}",
            code="export.mixed" if fp8 else "export.weight",
            path=where,
            hint="this module is not NVFP4; export again with one algorithm for all modules",
        )
    rows, columns = weight.shape[0], weight.shape[1] * 2
    if true_shape is not None and len(true_shape) == 2 and weight.shape in packed_shapes(*true_shape):
        rows, columns = true_shape
    scales = {role: roles[role] for role in SCALE_ROLES if role in roles}
    fault = _scale_fault(module, rows, columns, scales, where, due)
    return PackedModule(module, rows, columns, weight, scales, roles.get("bias"), fault)


def _scale_fault(
    module: str, rows: int, columns: int, scales: Mapping[str, TensorInfo], where: str, due: tuple[str, ...]
) -> InputError | None:
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight_scale": ("F8_E4M3", (rows, columns // BLOCK_SIZE)),
        "weight_scale_2": ("F32", ()),
        "input_scale": ("F32", ()),
    }
    if columns % BLOCK_SIZE:
        return InputError(
            f"{where}: tensor {module + '.weight'!r}: expected K divisible by {BLOCK_SIZE}, found K = {columns}",
            code="export.shape",
            path=where,
            hint="the weight is cut or padded; export again",
        )
    for role, (dtype, shape) in expected.items():
        name = f"{module}.{role}"
        if role not in scales and role not in due:
            continue
        if role not in scales:
            return missing_scale(module, role, f"{dtype} {list(shape)}", where)
        info = scales[role]
        known = set(SCALE_SHAPES)
        if role == "weight_scale":
            known = {one.stored for one in scale_shapes(rows, columns // BLOCK_SIZE)}
        if info.dtype != dtype or info.shape not in known:
            return InputError(
                f"{where}: tensor {name!r}: expected {dtype} {list(shape)}, found {info.dtype} {list(info.shape)}"
                + (" (blocks of 32)" if info.shape == (rows, columns // 32) else ""),
                code="export.shape",
                path=where,
                hint="the export is cut or mixed up; export again",
            )
    return None
