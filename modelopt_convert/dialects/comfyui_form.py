"""ComfyUI's files, read and written: a marker a module, codes high first, scales in the 128x4 order. Pure, no torch.

Sources: ComfyUI 0.33.0, ``comfy/ops.py`` and ``comfy/quant_ops.py``; comfy-kitchen, ``TensorCoreNVFP4Layout``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelopt_convert.checkpoint.header import METADATA, TensorInfo
from modelopt_convert.checkpoint.recipe import NibblesSwapped, RowMajor, Tiled, made, padded_rows, recipe_of, rows_of
from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.dialects.form import (
    Algorithm,
    Canonical,
    Naming,
    Quantized,
    ReadBytes,
    Written,
    constant,
    grouped,
    scalar,
    wrong,
)
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.formats.nvfp4.shapes import padded_shape, round_up
from modelopt_convert.run.errors import InputError

_MARKER = "comfy_quant"
_FORMATS: Mapping[str, Algorithm] = {"nvfp4": "nvfp4", "float8_e4m3fn": "fp8", "mxfp8": "mxfp8"}
_WORDS = {algorithm: word for word, algorithm in _FORMATS.items()}
_MARKER_BYTES = 4096  # far more than a marker has
_PAD = 16  # rows of packed codes
_HINT = "get the file again from its publisher"


@dataclass(frozen=True, slots=True)
class _ComfyUI:
    name: str = "comfyui"
    naming: Naming = "comfyui"

    def read(self, headers: Headers, read: ReadBytes, true_rows: Mapping[str, int], where: str) -> Canonical:
        tensors: dict[str, TensorInfo] = {}
        modules: dict[str, Quantized] = {}
        fates: dict[str, str] = {}
        layers = headers.layers()
        for module, roles in grouped(headers.tensors.values()).items():
            said = _said(roles.get(_MARKER), layers.get(module), read, where)
            if _MARKER in roles:
                fates[roles[_MARKER].name] = f"marker: says {said}"
            plain = {role: info for role, info in roles.items() if role != _MARKER}
            if said is None:
                tensors |= {info.name: info for info in plain.values()}
                continue
            found, quantized = _module(module, plain, said, read, true_rows.get(module), where)
            tensors |= {info.name: info for info in found}
            modules[module] = quantized
        return Canonical(tensors, modules, fates, headers.config)

    def write(self, described: Canonical, read: ReadBytes) -> Written:
        tensors: dict[str, TensorInfo] = {}
        layers: dict[str, dict[str, str]] = {}
        for module, roles in grouped(described.tensors.values()).items():
            quantized = described.modules.get(module)
            if quantized is None:
                tensors |= {info.name: info for info in roles.values()}
                continue
            entry = {"format": _WORDS[quantized.algorithm]}
            layers[module] = entry
            marker = json.dumps(entry).encode()
            written = _laid(quantized, roles)
            file = roles["weight"].file
            written[_MARKER] = constant(f"{module}.{_MARKER}", "U8", (len(marker),), marker, file)
            tensors |= {info.name: info for info in written.values()}
        # SGLang reads the tensors, ComfyUI either.
        said = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})} if layers else {}
        return Written(tensors, {**METADATA, **said}, None)


FORM = _ComfyUI()


def _said(marker: TensorInfo | None, layer: object, read: ReadBytes, where: str) -> Algorithm | None:
    """What a module's marker, or else the header, says of the module's format."""
    word: Any = layer.get("format") if isinstance(layer, dict) else None
    if marker is not None:
        try:
            word = json.loads(read(marker, 0, min(marker.num_bytes, _MARKER_BYTES)))["format"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise wrong(where, marker, 'JSON such as {"format": "nvfp4"}', code="dialect.marker", hint=_HINT) from error
    if word is None:
        return None
    if word not in _FORMATS:
        what = marker.name if marker is not None else "_quantization_metadata"
        raise InputError(
            f"{where}: {what!r}: expected a format of {', '.join(_FORMATS)}, found {str(word)[:40]!r}",
            code="dialect.format",
            path=where,
            hint="mopt does not convert this format",
        )
    return _FORMATS[word]


def _module(
    module: str,
    roles: Mapping[str, TensorInfo],
    said: Algorithm,
    read: ReadBytes,
    true_rows: int | None,
    where: str,
) -> tuple[list[TensorInfo], Quantized]:
    weight = roles.get("weight")
    if weight is None or weight.dtype != ("U8" if said == "nvfp4" else "F8_E4M3") or len(weight.shape) != 2:
        info = weight or next(iter(roles.values()))
        expected = "U8 [N, K/2]" if said == "nvfp4" else "F8_E4M3 [N, K]"
        raise wrong(
            where, info, f"{expected}, as the marker says {_WORDS[said]}", code="dialect.contradiction", hint=_HINT
        )
    rest = {role: info for role, info in roles.items() if role not in ("weight", "weight_scale")}
    scale = roles.get("weight_scale")
    if said == "fp8":
        if scale is None or scale.shape not in ((), (1,)):
            raise wrong(where, scale or weight, "one weight_scale", code="dialect.shape", hint=_HINT)
        rest["weight"], rest["weight_scale"] = weight, scalar(scale, f"{module}.weight_scale", read)
        quantized = Quantized(said, *weight.shape)
    else:
        raise_if = scale is None or len(scale.shape) != 2
        if raise_if or said == "mxfp8":
            raise wrong(where, scale or weight, "block scales", code="dialect.shape", hint=_HINT)
        assert scale is not None
        columns = weight.shape[1] * 2
        rows = _rows(module, weight, scale, roles.get("bias"), true_rows, columns, read, where)
        if scale.shape != padded_shape(rows, columns // BLOCK_SIZE) or columns % BLOCK_SIZE:
            raise wrong(
                where, scale, f"{list(padded_shape(rows, columns // BLOCK_SIZE))}", code="dialect.shape", hint=_HINT
            )
        codes = rows_of(weight, weight.name, 0, rows)
        rest["weight"] = made(weight.name, "U8", codes.shape, NibblesSwapped(recipe_of(codes)), weight.file)
        order = RowMajor(recipe_of(scale), rows, columns // BLOCK_SIZE)
        rest["weight_scale"] = made(scale.name, "F8_E4M3", (rows, columns // BLOCK_SIZE), order, scale.file)
        quantized = Quantized(said, rows, columns)
    for role in ("weight_scale_2", "input_scale"):
        if role in rest:
            rest[role] = scalar(rest[role], f"{module}.{role}", read)
    return list(rest.values()), quantized


def _rows(
    module: str,
    weight: TensorInfo,
    scale: TensorInfo,
    bias: TensorInfo | None,
    true_rows: int | None,
    columns: int,
    read: ReadBytes,
    where: str,
) -> int:
    """N: rows of codes are padded to 16, and nothing in the file says how many there were but the bias."""
    known = true_rows if true_rows is not None else bias.shape[0] if bias is not None and len(bias.shape) == 1 else None
    stored = weight.shape[0]
    if known is not None:
        if round_up(known, _PAD) != stored and known != stored:
            raise wrong(where, weight, f"{round_up(known, _PAD)} rows", code="dialect.shape", hint=_HINT)
        return known
    last = made(
        scale.name,
        "U8",
        (stored, columns // BLOCK_SIZE),
        RowMajor(recipe_of(scale), stored, columns // BLOCK_SIZE),
        scale.file,
    )
    width = columns // BLOCK_SIZE
    if not any(read(last, (stored - 1) * width, width)):
        raise wrong(
            where,
            weight,
            "rows that are not padding, or a bias that says how many there are",
            code="dialect.padded",
            hint="give --base, whose shapes tell",
        )
    return stored


def _laid(quantized: Quantized, roles: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    found = dict(roles)
    if quantized.algorithm == "nvfp4":
        weight, scale = roles["weight"], roles["weight_scale"]
        swapped = made(weight.name, "U8", weight.shape, NibblesSwapped(recipe_of(weight)), weight.file)
        found["weight"] = padded_rows(swapped, weight.name, _PAD)
        tiled = Tiled(recipe_of(scale), *scale.shape)
        found["weight_scale"] = made(scale.name, "F8_E4M3", padded_shape(*scale.shape), tiled, scale.file)
    return found
