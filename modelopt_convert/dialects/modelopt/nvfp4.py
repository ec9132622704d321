"""ModelOpt's NVFP4 modules. Pure, no torch.

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

from collections.abc import Iterator, Mapping

from modelopt_convert.checkpoint.header import TensorInfo
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
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE, FORMAT
from modelopt_convert.formats.nvfp4.shapes import packed_shapes, scale_shapes
from modelopt_convert.run.errors import InputError

_PACKED_DTYPES = frozenset({"U8", "F8_E4M3", "F8_E5M2"})


class _Nvfp4Modules:
    def names(self, grouped: Mapping[str, Roles], evidence: Evidence, path: str) -> list[str]:
        return [
            module
            for module, roles in grouped.items()
            if any(role in roles for role in FORMAT.scales)
            or ("weight" in roles and roles["weight"].dtype in _PACKED_DTYPES)
        ]

    def module(self, name: str, roles: Roles, evidence: Evidence, path: str) -> PackedModule:
        weight = roles.get("weight")
        where = inside(path, (weight or next(iter(roles.values()))).file)
        if weight is None or weight.dtype != FORMAT.packed_dtype or len(weight.shape) != 2 or 0 in weight.shape:
            found = f"{weight.dtype} {list(weight.shape)}" if weight else "no weight"
            fp8 = weight is not None and weight.dtype.startswith("F8_")
            raise InputError(
                f"{where}: tensor {name + '.weight'!r}: expected U8 [N, K/2] beside its scales, found {found}",
                code="export.mixed" if fp8 else "export.weight",
                path=where,
                hint="this module is not NVFP4; export again with one algorithm for all modules",
            )
        bias = roles.get("bias")
        rows, columns = _true_shape(weight, bias, evidence.true_shapes.get(weight.name))
        scales = {role: roles[role] for role in FORMAT.scales if role in roles}
        due = FORMAT.scales[:-1] if evidence.dynamic_inputs else FORMAT.scales
        return PackedModule(
            name, rows, columns, weight, scales, bias, one_fault(name, _faults(name, rows, columns, scales, where, due))
        )

    def shape(self, module: PackedModule, role: str, *, is_merged: bool) -> tuple[int, ...]:
        shapes = {"weight": module.columns // 2, "weight_scale": module.columns // BLOCK_SIZE}
        # A loader that joins modules into one cannot join scales of no dimension.
        return (module.rows, shapes[role]) if role in shapes else (1,) if is_merged else ()

    def check_together(self, found: dict[str, PackedModule], evidence: Evidence, path: str) -> None:
        check_calibrated(found, evidence, path)


ENTRY: ModuleFormat = _Nvfp4Modules()


def _true_shape(weight: TensorInfo, bias: TensorInfo | None, base: tuple[int, ...] | None) -> tuple[int, int]:
    """N and K without padding, if a base or else a bias tells them."""
    rows, columns = weight.shape[0], weight.shape[1] * 2
    if base is not None and len(base) == 2 and weight.shape in packed_shapes(*base):
        rows, columns = base
    elif bias is not None and len(bias.shape) == 1 and weight.shape in packed_shapes(bias.shape[0], columns):
        rows = bias.shape[0]
    return rows, columns


def _faults(
    module: str, rows: int, columns: int, scales: Roles, where: str, due: tuple[str, ...]
) -> Iterator[InputError]:
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight_scale": ("F8_E4M3", (rows, columns // BLOCK_SIZE)),
        "weight_scale_2": ("F32", ()),
        "input_scale": ("F32", ()),
    }
    if columns % BLOCK_SIZE:
        yield InputError(
            f"{where}: tensor {module + '.weight'!r}: expected K divisible by {BLOCK_SIZE}, found K = {columns}",
            code="export.shape",
            path=where,
            hint="the weight is cut or padded; export again",
        )
        return  # no shape of the scales follows
    for role, (dtype, shape) in expected.items():
        name = f"{module}.{role}"
        if role not in scales and role not in due:
            continue
        if role not in scales:
            yield missing_scale(module, role, f"{dtype} {list(shape)}", where)
            continue
        info = scales[role]
        known = set(SCALE_SHAPES)
        if role == "weight_scale":
            known = {one.stored for one in scale_shapes(rows, columns // BLOCK_SIZE)}
        if info.dtype != dtype or info.shape not in known:
            yield InputError(
                f"{where}: tensor {name!r}: expected {dtype} {list(shape)}, found {info.dtype} {list(info.shape)}"
                + (" (blocks of 32)" if info.shape == (rows, columns // 32) else ""),
                code="export.shape",
                path=where,
                hint="the export is cut or mixed up; export again",
            )
