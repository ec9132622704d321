"""Black Forest Labs' ``nvfp4`` and ``fp8r`` files as diffusers reads them, both ways. Pure, no torch.

Source: diffusers 0.42.1, ``quantizers/bfl`` (``BFLQuantizationConfig``, by ``from_single_file`` alone). Names are those
of the model's own repository. Not the layout of the files that Black Forest Labs publish for ComfyUI.

=========  ==================  ========================================================================
scheme     weight              scales
=========  ==================  ========================================================================
``nvfp4``  U8 [N, K/2], low    weight_scale F8_E4M3 [N, K/16] row-major; weight_scale_2, input_scale
           nibble first        F32 [], both required
``fp8r``   F8_E4M3 [N, K]      weight_scale F32 [N]; an input_scale is not looked at
=========  ==================  ========================================================================

A weight with one scale has that scale for each of its rows, and is read as one with one scale again.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from modelopt_convert.checkpoint.header import METADATA, TensorInfo
from modelopt_convert.dialects.awq import check_carried
from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.dialects.form import (
    SCALES,
    Canonical,
    Naming,
    Quantized,
    ReadBytes,
    Written,
    check_algorithms,
    check_roles,
    constant,
    grouped,
    wrong,
)
from modelopt_convert.dialects.scales import fp8_scale, one_scale
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.run.errors import Faults, InputError

_AGAIN = "name the dialect that the file is in with --from, or get it again from its publisher"


@dataclass(frozen=True, slots=True)
class _Bfl:
    name: str = "bfl-diffusers"
    naming: Naming = "original"

    def read(
        self, headers: Headers, read: ReadBytes, true_shapes: Mapping[str, tuple[int, int]], where: str
    ) -> Canonical:
        tensors = dict(headers.tensors)
        modules: dict[str, Quantized] = {}
        faults = Faults()
        for module, roles in grouped(headers.tensors.values()).items():
            with faults.taken(module):
                if roles.keys() & SCALES:
                    check_roles(module, roles, where)
                    found, modules[module] = _module(module, roles, read, where)
                    tensors |= {info.name: info for info in found}
        faults.refuse()
        return Canonical(tensors, modules, {}, headers.config)

    def write(self, described: Canonical, read: ReadBytes) -> Written:
        check_algorithms(described, "a file for BFLQuantizationConfig", ("nvfp4", "fp8"))
        check_carried(described, "a file for BFLQuantizationConfig")
        check_calibrated(described)
        tensors = dict(described.tensors)
        instead: dict[str, TensorInfo] = {}
        why: dict[str, str] = {}
        faults = Faults()
        for module, quantized in described.modules.items():
            with faults.taken(module):
                scale = tensors[f"{module}.weight_scale"]
                if quantized.algorithm == "fp8" and (one := _only(scale, read)) is not None:
                    rows = (quantized.rows,)
                    tensors[scale.name] = constant(scale.name, "F32", rows, one * quantized.rows, scale.file)
                    if scale.shape:
                        instead[scale.name] = constant(scale.name, "F32", (), one, scale.file)
                        why[scale.name] = "all rows have the same scale, which is read as one"
        faults.refuse()
        return Written(tensors, METADATA, None, instead=instead, why=why, keep=frozenset(instead))


FORM = _Bfl()


def check_calibrated(described: Canonical) -> None:
    """Require an input scale of each NVFP4 module, as ``BFLNVFP4Linear`` of diffusers does.

    Raises:
        InputError: ``convert.no_input_scale``.
    """
    faults = Faults()
    for module, quantized in described.modules.items():
        if quantized.algorithm == "nvfp4" and f"{module}.input_scale" not in described.tensors:
            fault = InputError(
                f"module {module!r}: expected an input_scale, which diffusers requires of NVFP4, found none",
                code="convert.no_input_scale",
                hint="--to torchao does without; or calibrate the model and export it again",
            )
            faults.add(module, fault)
    faults.refuse()


def _module(
    module: str, roles: Mapping[str, TensorInfo], read: ReadBytes, where: str
) -> tuple[list[TensorInfo], Quantized]:
    weight, scale = roles.get("weight"), roles.get("weight_scale")
    packed = "weight_scale_2" in roles
    dtype = "U8" if packed else "F8_E4M3"
    if weight is None or scale is None or weight.dtype != dtype or len(weight.shape) != 2:
        info = weight or next(iter(roles.values()))
        raise wrong(where, info, f"{dtype} of two dimensions beside its scales", code="dialect.shape", hint=_AGAIN)
    rows, columns = weight.shape
    found = [one_scale(roles[role], roles[role].name, read, where) for role in ("input_scale",) if role in roles]
    if not packed:
        by_row = fp8_scale(scale, scale.name, rows, read, where)
        one = _only(by_row, read)
        found.append(by_row if one is None else constant(scale.name, "F32", (), one, scale.file))
        return found, Quantized("fp8", rows, columns)
    expected = (rows, columns * 2 // BLOCK_SIZE)
    if scale.dtype != "F8_E4M3" or scale.shape != expected or columns * 2 % BLOCK_SIZE:
        raise wrong(where, scale, f"F8_E4M3 {list(expected)}", code="dialect.shape", hint=_AGAIN)
    found.append(one_scale(roles["weight_scale_2"], roles["weight_scale_2"].name, read, where))
    return found, Quantized("nvfp4", rows, columns * 2)


def _only(scale: TensorInfo, read: ReadBytes) -> bytes | None:
    """The F32 that all elements of a scale are; None if they are several."""
    data = read(scale, 0, scale.num_bytes)
    return data[:4] if data == data[:4] * (len(data) // 4) else None
