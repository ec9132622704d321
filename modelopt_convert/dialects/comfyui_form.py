"""ComfyUI's files, read and written: a marker a module, codes high first, scales in the 128x4 order. Pure, no torch.

Sources: ComfyUI 0.29.0, ``comfy/ops.py`` and ``comfy/quant_ops.py``; comfy-kitchen 0.2.40, ``TensorCoreNVFP4Layout``,
``TensorCoreMXFP8Layout`` and ``TensorCoreFP8Layout``. Black Forest Labs' own files lie alike, without markers.

==========  =======================================  ====================================================
format      weight                                   scales
==========  =======================================  ====================================================
``nvfp4``   U8 [N to 16, K/2], high nibble first     weight_scale F8_E4M3 in the 128x4 order, padded;
                                                     weight_scale_2, input_scale F32 [];
                                                     pre_quant_scale [K], by which inputs are multiplied
``mxfp8``   F8_E4M3 [N to 32, K to 32]               weight_scale U8 in the 128x4 order, padded
``float8``  F8_E4M3 or F8_E5M2 [N, K]                weight_scale, input_scale F32 []; a scale a row
                                                     [N, 1]; none at all: the codes are the values
==========  =======================================  ====================================================
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from modelopt_convert.checkpoint.header import METADATA, TensorInfo
from modelopt_convert.checkpoint.names import inside
from modelopt_convert.checkpoint.recipe import NibblesSwapped, RowMajor, Tiled, made, padded_rows, recipe_of, rows_of
from modelopt_convert.dialects.awq import PRE_QUANT_SCALE, check_carried, check_transforms, is_transformed
from modelopt_convert.dialects.comfyui_markers import (
    AGAIN,
    CAST,
    E8M0,
    MARKER,
    WORDS,
    check_spelling,
    is_dropped,
    is_sentinel,
    modern,
    said_of,
    sentinel_words,
)
from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.dialects.form import (
    E8M0_BLOCK,
    SCALES,
    Algorithm,
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
from modelopt_convert.dialects.resized import widened, with_columns
from modelopt_convert.dialects.scales import fp8_scale, one_scale, one_values
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.formats.nvfp4.shapes import padded_shape, round_up
from modelopt_convert.run.errors import Faults, InputError

_PAD = {"nvfp4": 16, "mxfp8": 32}  # rows, and columns of mxfp8
_NAME_ORDER = "`mopt convert` with --from comfyui reads scales in the 128x4 order, with --from modelopt row by row"
UNSCALED = "read as codes without a scale, which are the values"
_DTYPES: Mapping[Algorithm, str] = {"nvfp4": "U8", "mxfp8": "F8_E4M3", "fp8": "F8_E4M3", "fp8_e5m2": "F8_E5M2"}


@dataclass(frozen=True, slots=True)
class _ComfyUI:
    name: str = "comfyui"
    naming: Naming = "comfyui"

    def read(
        self, headers: Headers, read: ReadBytes, true_shapes: Mapping[str, tuple[int, int]], where: str
    ) -> Canonical:
        check_spelling(headers, where)
        tensors: dict[str, TensorInfo] = {}
        modules: dict[str, Quantized] = {}
        fates: dict[str, str] = {}
        keep: dict[str, TensorInfo] = {}
        layers, marked = headers.layers(), bool(headers.ending(f".{MARKER}"))
        for info in headers.tensors.values():
            if is_sentinel(info.name) or is_dropped(info, read):
                words = "left out: ComfyUI drops an input scale of 1" if not is_sentinel(info.name) else None
                fates[info.name], keep[info.name] = words or sentinel_words(info), info
        rest = [info for name, info in headers.tensors.items() if name not in fates]
        faults = Faults()
        by_module = grouped(rest)
        is_tiled = headers.is_named or any(map(_is_padded, by_module.values()))
        for module, spelled in by_module.items():
            with faults.taken(module):
                roles = modern(spelled, where)
                fates |= {info.name: f"read as {module}.{role}" for role, info in roles.items() if role not in spelled}
                said = said_of(module, roles, layers.get(module), read, where)
                marker = roles.pop(MARKER, None)
                if marker is not None:
                    fates[marker.name] = said.words
                    keep |= {marker.name: marker} if said.more else {}
                algorithm = said.algorithm or _unmarked(roles, marked or bool(layers), is_tiled, where)
                if algorithm is None:
                    _no_factor(roles, where)
                    for info in roles.values():
                        plain = _plain(info, where)
                        keep |= {info.name: info} if plain.dtype != info.dtype else {}
                        tensors[info.name] = plain
                    continue
                found, quantized = _module(module, roles, algorithm, read, true_shapes.get(module), where)
                tensors |= {info.name: info for info in found}
                modules[module] = quantized
                if "weight_scale" not in roles:
                    fates[roles["weight"].name] = UNSCALED
                keep |= {info.name: info for role, info in roles.items() if _is_widened(role, info)}
        faults.refuse()
        _check_scaled_alike(headers, modules, fates, where)
        return Canonical(tensors, modules, fates, headers.config, keep=keep)

    def write(self, described: Canonical, read: ReadBytes) -> Written:
        check_algorithms(described, "a ComfyUI file", WORDS)
        check_carried(described, "a ComfyUI file", (PRE_QUANT_SCALE,))
        tensors: dict[str, TensorInfo] = {}
        layers: dict[str, dict[str, str]] = {}
        for module, roles in grouped(described.tensors.values()).items():
            quantized = described.modules.get(module)
            if quantized is None:
                tensors |= {info.name: info for info in roles.values()}
                continue
            entry = layers[module] = {"format": WORDS[quantized.algorithm]}
            marker = json.dumps(entry).encode()
            written = _laid(quantized, roles)
            written[MARKER] = constant(f"{module}.{MARKER}", "U8", (len(marker),), marker, roles["weight"].file)
            tensors |= {info.name: info for info in written.values()}
        # SGLang reads the marker tensors; ComfyUI reads these or the header.
        said = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})} if layers else {}
        return Written(tensors, {**METADATA, **said}, None)


FORM = _ComfyUI()


def _unmarked(roles: Mapping[str, TensorInfo], marked: bool, is_tiled: bool, where: str) -> Algorithm | None:
    """The format of a module of which the file says nothing.

    Args:
        roles: Its tensors.
        marked: Whether the file marks other modules.
        is_tiled: Whether the user, or the shape of some scales, says that the scales of MXFP8 are in the 128x4 order.
        where: The checkpoint, for messages.

    Raises:
        InputError: ``dialect.unmarked``: packed, in a file that marks other modules, or MXFP8 of which nothing tells
            the order of the scales; ``dialect.contradiction``: scales of a weight that is not quantized.
    """
    weight, scale = roles.get("weight"), roles.get("weight_scale")
    if weight is not None and weight.dtype == "U8" and scale is not None:
        if marked:
            raise wrong(where, weight, "a marker, as other modules have", code="dialect.unmarked", hint=AGAIN)
        return "nvfp4"
    if weight is not None and len(weight.shape) == 2 and weight.dtype in CAST:
        if scale is not None and scale.dtype in E8M0 and len(scale.shape) == 2 and not marked:
            if is_tiled:
                return "mxfp8"
            expected = "a marker that tells the order of MXFP8's scales, as their shape does not"
            raise wrong(where, scale, expected, code="dialect.unmarked", hint=_NAME_ORDER)
        if scale is not None and scale.dtype in (*E8M0, "F8_E4M3"):
            raise wrong(where, scale, "a marker that says of which format it is", code="dialect.unmarked", hint=AGAIN)
        return CAST[weight.dtype]
    lonely = next((info for role, info in roles.items() if role in SCALES), None)
    if lonely is not None:
        raise wrong(where, lonely, "scales of quantized weights alone", code="dialect.contradiction", hint=AGAIN)
    return None


def _is_padded(roles: Mapping[str, TensorInfo]) -> bool:
    """Whether a module is MXFP8 whose scales have the shape that they have in the 128x4 order alone."""
    weight, scale = roles.get("weight"), roles.get("weight_scale")
    if weight is None or scale is None or weight.dtype != "F8_E4M3" or scale.dtype not in E8M0:
        return False
    return len(weight.shape) == 2 and tiled_by_shape(weight.shape, scale.shape) is True


def tiled_by_shape(weight: tuple[int, ...], scale: tuple[int, ...]) -> bool | None:
    """Whether scales of MXFP8 are in the 128x4 order, as far as their shape tells; None where it does not.

    Args:
        weight: The shape of the weight, [N, K].
        scale: That of its scales.
    """
    plain = weight[0], -(-weight[1] // E8M0_BLOCK)
    tiled = padded_shape(*plain)
    return None if plain == tiled or scale not in (plain, tiled) else scale == tiled


def _check_scaled_alike(
    headers: Headers, modules: Mapping[str, Quantized], fates: Mapping[str, str], where: str
) -> None:
    """Refuse FP8 without a scale beside FP8 with one: whether it is a plain cast or lost its scale nothing tells.

    Raises:
        InputError: ``dialect.unscaled``.
    """
    bare = [name for name, fate in fates.items() if fate == UNSCALED]
    scaled = sum(one.algorithm in CAST.values() for one in modules.values()) - len(bare)
    if bare and scaled:
        path = inside(where, headers.tensors[bare[0]].file)
        raise InputError(
            f"{path}: expected a scale beside each FP8 weight, as {scaled} others have, found none",
            code="dialect.unscaled",
            path=path,
            hint=f"a scale was lost, or plain casts were put among scaled weights: {AGAIN}",
        ).at(bare)


def _is_widened(role: str, info: TensorInfo) -> bool:
    """Whether a tensor of a quantized module is described in more bits than it has."""
    return (role in SCALES and info.dtype in ("BF16", "F16")) or (role == "bias" and info.dtype in CAST)


def _plain(info: TensorInfo, where: str) -> TensorInfo:
    """A tensor that is no matrix of codes; what a plain cast left in FP8 has the same values in BF16."""
    if info.dtype in CAST:
        return widened(info, "BF16")
    if info.name.endswith(".weight") and info.dtype in ("U8", "I8"):
        raise wrong(where, info, "scales beside a packed weight", code="dialect.shape", hint=AGAIN)
    return info


def check_said(roles: Mapping[str, TensorInfo], said: Algorithm, where: str) -> TensorInfo:
    """The weight of a module, which has to be in the format that the file says.

    Raises:
        InputError: ``dialect.contradiction``.
    """
    weight = roles.get("weight")
    if weight is None or weight.dtype != _DTYPES[said] or len(weight.shape) != 2 or 0 in weight.shape:
        info = weight or next(iter(roles.values()))
        expected = f"{_DTYPES[said]} {'[N, K/2]' if said == 'nvfp4' else '[N, K]'}, as the file says {WORDS[said]}"
        raise wrong(where, info, expected, code="dialect.contradiction", hint=AGAIN)
    return weight


def _module(
    module: str,
    roles: Mapping[str, TensorInfo],
    said: Algorithm,
    read: ReadBytes,
    true_shape: tuple[int, int] | None,
    where: str,
) -> tuple[list[TensorInfo], Quantized]:
    plain = {role: info for role, info in roles.items() if role != PRE_QUANT_SCALE} if said == "nvfp4" else roles
    check_roles(module, plain, where)
    weight = check_said(roles, said, where)
    rest = {"bias": _plain(roles["bias"], where)} if "bias" in roles else {}
    if said in ("fp8", "fp8_e5m2"):
        _no_second(roles, where)
        rest["weight"] = weight
        scale = roles.get("weight_scale")
        rest["weight_scale"] = (
            one_values(f"{module}.weight_scale", weight)
            if scale is None
            else fp8_scale(scale, f"{module}.weight_scale", weight.shape[0], read, where)
        )
        quantized = Quantized(said, *weight.shape)
    else:
        rest["weight"], rest["weight_scale"], quantized = _blocks(weight, roles, said, true_shape, read, where)
    if said == "nvfp4":
        if "weight_scale_2" not in roles:
            raise wrong(where, weight, "a weight_scale_2 beside it", code="dialect.shape", hint=AGAIN)
        check_transforms(roles, quantized.rows, quantized.columns, where, low_rank=False)
        rest |= {role: info for role, info in roles.items() if role == PRE_QUANT_SCALE}
        rest["weight_scale_2"] = one_scale(roles["weight_scale_2"], f"{module}.weight_scale_2", read, where)
    if "input_scale" in roles and said != "mxfp8":
        rest["input_scale"] = one_scale(roles["input_scale"], f"{module}.input_scale", read, where)
    elif "input_scale" in roles:
        raise wrong(where, roles["input_scale"], "no input_scale beside MXFP8", code="dialect.shape", hint=AGAIN)
    return list(rest.values()), quantized


def _no_factor(roles: Mapping[str, TensorInfo], where: str) -> None:
    if is_transformed(roles):
        odd = next(info for role, info in roles.items() if is_transformed({role: info}))
        expected = "it beside a packed weight alone: engines do not look at it elsewhere"
        raise wrong(where, odd, expected, code="dialect.role", hint=AGAIN)


def _no_second(roles: Mapping[str, TensorInfo], where: str) -> None:
    if "weight_scale_2" in roles:
        raise wrong(where, roles["weight_scale_2"], "one scale of an FP8 weight", code="dialect.shape", hint=AGAIN)


def _blocks(
    weight: TensorInfo,
    roles: Mapping[str, TensorInfo],
    said: Algorithm,
    true_shape: tuple[int, int] | None,
    read: ReadBytes,
    where: str,
) -> tuple[TensorInfo, TensorInfo, Quantized]:
    """Weight and block scales, row-major and without padding."""
    scale, pad, packing = roles.get("weight_scale"), _PAD[said], 2 if said == "nvfp4" else 1
    block, dtypes = (BLOCK_SIZE, ("F8_E4M3", "U8")) if said == "nvfp4" else (E8M0_BLOCK, E8M0)
    stored_rows, stored = weight.shape[0], weight.shape[1] * packing
    if scale is None or scale.dtype not in dtypes or len(scale.shape) != 2 or stored % block:
        raise wrong(where, scale or weight, f"block scales, {' or '.join(dtypes)}", code="dialect.shape", hint=AGAIN)
    columns = stored if true_shape is None else true_shape[1]
    if round_up(columns, pad) != stored:
        raise wrong(where, weight, f"{round_up(columns, pad) // packing} columns", code="dialect.shape", hint=AGAIN)
    rows = _true_rows(weight, roles.get("bias"), true_shape, pad)
    if rows is None:
        _check_last_row(weight, where, read)
        rows = stored_rows
    elif stored_rows not in (rows, round_up(rows, pad)):
        raise wrong(where, weight, f"{round_up(rows, pad)} rows", code="dialect.shape", hint=AGAIN)
    # Tiles of 128 rows have room for the padding of the weight.
    grid = padded_shape(stored_rows, stored // block)
    if scale.shape != grid:
        raise wrong(where, scale, str(list(grid)), code="dialect.shape", hint=AGAIN)
    codes = rows_of(weight, weight.name, 0, rows)
    if said == "nvfp4":
        codes = made(weight.name, "U8", codes.shape, NibblesSwapped(recipe_of(codes)), weight.file)
    codes = with_columns(codes, columns // packing)
    width, dtype = -(-columns // block), "F8_E4M3" if said == "nvfp4" else "U8"
    linear = made(scale.name, dtype, (rows, width), RowMajor(recipe_of(scale), rows, width), scale.file)
    return codes, linear, Quantized(said, rows, columns)


def _true_rows(weight: TensorInfo, bias: TensorInfo | None, true_shape: tuple[int, int] | None, pad: int) -> int | None:
    """N, where something tells it: rows are padded, and the file does not say how many there were but by a bias."""
    if true_shape is not None:
        return true_shape[0]
    return bias.shape[0] if bias is not None and len(bias.shape) == 1 else None


def _check_last_row(weight: TensorInfo, where: str, read: ReadBytes) -> None:
    """Refuse a last row of zeros: it may be padding."""
    rows, width = weight.shape
    if not any(read(weight, (rows - 1) * width, width)):
        raise InputError(
            f"{inside(where, weight.file)}: tensor {weight.name!r}: expected rows that are not padding, or a bias "
            f"that says how many there are, found a last row of zeros of {rows}",
            code="dialect.padded",
            path=inside(where, weight.file),
            hint="give --base, whose shapes tell",
        )


def _laid(quantized: Quantized, roles: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    found, weight, scale = dict(roles), roles["weight"], roles["weight_scale"]
    if quantized.algorithm in _PAD:
        pad = _PAD[quantized.algorithm]
        if quantized.algorithm == "nvfp4":
            weight = made(weight.name, "U8", weight.shape, NibblesSwapped(recipe_of(weight)), weight.file)
        else:
            weight = with_columns(weight, round_up(quantized.columns, pad))
        found["weight"] = padded_rows(weight, weight.name, pad)
        grid = padded_shape(*scale.shape)
        found["weight_scale"] = made(scale.name, scale.dtype, grid, Tiled(recipe_of(scale), *scale.shape), scale.file)
    elif scale.shape:
        found["weight_scale"] = replace(scale, shape=(quantized.rows, 1))
    return found
