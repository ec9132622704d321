"""What ComfyUI's files say of their modules: markers, the header, and the older spellings. Pure, no torch.

Sources: ComfyUI 0.29.0, ``comfy/utils.py`` (``convert_old_quants``) and ``comfy/ops.py`` (``_load_from_state_dict``).
Of several ways to say it ComfyUI takes the marker tensor ``X.comfy_quant``, which it makes out of the header's
``_quantization_metadata`` or, if the header has no such key, out of the tensor ``scaled_fp8`` and ``X.scale_weight``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.dialects.form import Algorithm, ReadBytes, value_of, wrong
from modelopt_convert.run.errors import InputError

MARKER = "comfy_quant"
SENTINEL = "scaled_fp8"
FORMATS: Mapping[str, Algorithm] = {
    "nvfp4": "nvfp4",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8_e5m2",
    "mxfp8": "mxfp8",
}
WORDS: Mapping[Algorithm, str] = {algorithm: word for word, algorithm in FORMATS.items()}
CAST: Mapping[str, Algorithm] = {"F8_E4M3": "fp8", "F8_E5M2": "fp8_e5m2"}
E8M0 = ("U8", "F8_E8M0")
AGAIN = "get the file again from its publisher"
LEGACY: Mapping[str, str] = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
"""ModelOpt's role of a scale by its older spelling."""
_FULL_PRECISION = "full_precision_matrix_mult"
_MARKER_BYTES = 4096  # far more than a marker has
_FLOATS = frozenset({"F32", "BF16", "F16"})


@dataclass(frozen=True, slots=True)
class Said:
    """What a file says of one module.

    Attributes:
        algorithm: Its format; None if it says nothing.
        more: Whether it says more than the format, which a way back needs.
        words: In words.
    """

    algorithm: Algorithm | None
    more: bool
    words: str


NOTHING = Said(None, False, "")
SILENT = "left out: no format in a marker"
"""How the fate of a marker begins that names no format, though its module is quantized."""


def check_spelling(headers: Headers, where: str) -> None:
    """Refuse a file whose older spelling ComfyUI would not see.

    Raises:
        InputError: ``dialect.contradiction``.
    """
    says = any("_quantization_metadata" in entries for entries in headers.metadata.values())
    hidden = next((info for name, info in headers.tensors.items() if name.endswith(".scale_weight")), None)
    if says and hidden is not None:
        raise wrong(
            where,
            hidden,
            "no .scale_weight beside the header's _quantization_metadata, for which ComfyUI does not look at it",
            code="dialect.contradiction",
            hint=AGAIN,
        )


def is_sentinel(name: str) -> bool:
    """Whether a tensor is the one by which older files say that they are scaled FP8."""
    return name == SENTINEL or name.endswith(f".{SENTINEL}")


def sentinel_format(info: TensorInfo) -> tuple[str, str]:
    """The dtype and the format that the sentinel says; ComfyUI takes one of F32 for E4M3."""
    return ("F8_E5M2", "float8_e5m2") if info.dtype == "F8_E5M2" else ("F8_E4M3", "float8_e4m3fn")


def sentinel_words(info: TensorInfo) -> str:
    """What the sentinel says, in words."""
    format_ = sentinel_format(info)[1]
    full = ", in full precision" if info.num_bytes and info.shape == (2,) else ""
    return f"left out: says that modules with .scale_weight are {format_}{full}"


def modern(roles: Mapping[str, TensorInfo], where: str) -> dict[str, TensorInfo]:
    """A module's tensors by ModelOpt's roles, whichever spelling they have.

    Raises:
        InputError: ``dialect.contradiction``: a scale is there in both.
    """
    found: dict[str, TensorInfo] = {}
    for role, info in roles.items():
        name = LEGACY.get(role, role)
        if name != role and name in roles:
            raise wrong(where, info, f"one of {name} and {role}", code="dialect.contradiction", hint=AGAIN)
        found[name] = info
    return found


def is_dropped(info: TensorInfo, read: ReadBytes) -> bool:
    """Whether ComfyUI leaves a tensor out: a ``scale_input`` of 1.0."""
    one = info.name.endswith(".scale_input") and info.dtype in _FLOATS and info.shape in ((), (1,))
    return one and value_of(info, read) == 1.0


def said_of(module: str, roles: Mapping[str, TensorInfo], layer: object, read: ReadBytes, where: str) -> Said:
    """What the marker, or else the header, says of a module.

    Args:
        module: Its name.
        roles: Its tensors.
        layer: The header's entry.
        read: Reads tensors.
        where: The checkpoint, for messages.

    Raises:
        InputError: ``dialect.marker``, ``dialect.format`` or ``dialect.contradiction``.
    """
    marker, weight = roles.get(MARKER), roles.get("weight")
    if marker is None:
        return NOTHING if layer is None else _entry(_layer(module), layer, where)
    raw = read(marker, 0, min(marker.num_bytes, _MARKER_BYTES))
    what = "NUL bytes" if marker.num_bytes else "no bytes"
    entry: Any = {}
    if raw.strip(b"\0 "):
        what = "JSON without it"
        try:
            entry = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise wrong(where, marker, 'JSON such as {"format": "nvfp4"}', code="dialect.marker", hint=AGAIN) from error
    if isinstance(entry, dict) and "format" not in entry:
        if weight is not None and weight.dtype in _FLOATS:
            return Said(None, True, f"left out: a marker ({what}) of a module that is not quantized")
        _check_keys(marker.name, entry, where)
        algorithm = _by_tensors(roles) if layer is None else _entry(_layer(module), layer, where).algorithm
        if algorithm is None:
            expected = "a format, or tensors that are those of NVFP4, FP8 or MXFP8"
            raise wrong(where, marker, expected, code="dialect.marker", hint=AGAIN)
        told = "its tensors" if layer is None else "the header"
        return Said(algorithm, True, f"{SILENT} ({what}), read as {WORDS[algorithm]} by {told}")
    said = _entry(marker.name, entry, where)
    if layer is not None and _entry(_layer(module), layer, where).algorithm != said.algorithm:
        raise wrong(
            where, marker, "the same format as in _quantization_metadata", code="dialect.contradiction", hint=AGAIN
        )
    return said


def _entry(what: str, entry: Any, where: str) -> Said:
    word = entry.get("format") if isinstance(entry, dict) else None
    if not isinstance(word, str):
        raise InputError(
            f"{where}: {what}: expected a format such as nvfp4, found {str(entry)[:40]!r}",
            code="dialect.marker",
            path=where,
            hint=AGAIN,
        )
    if word not in FORMATS:
        raise InputError(
            f"{where}: {what}: expected a format of {', '.join(FORMATS)}, found {word[:40]!r}",
            code="dialect.format",
            path=where,
            hint="mopt does not convert this format",
        )
    _check_keys(what, entry, where)
    full = ", in full precision" if entry.get(_FULL_PRECISION) is True else ""
    return Said(FORMATS[word], entry.keys() != {"format"}, f"read as a marker: {word}{full}")


def _layer(module: str) -> str:
    return f"_quantization_metadata of {module!r}"


def _check_keys(what: str, entry: Mapping[str, Any], where: str) -> None:
    unknown = sorted(entry.keys() - {"format", _FULL_PRECISION})
    if unknown:
        raise InputError(
            f"{where}: {what}: expected format and {_FULL_PRECISION} alone, found {str(unknown[0])[:40]!r} too",
            code="dialect.marker",
            path=where,
            hint="another key may say that the weight lies otherwise; mopt does not guess what it means",
        )


def _by_tensors(roles: Mapping[str, TensorInfo]) -> Algorithm | None:
    """The one format whose tensors a module has, by roles, dtypes and dimensions: ComfyUI has one layout of each."""
    weight, scale = roles.get("weight"), roles.get("weight_scale")
    if weight is None or scale is None or len(weight.shape) != 2:
        return None
    is_grid = len(scale.shape) == 2
    if weight.dtype == "U8" and is_grid and scale.dtype in ("F8_E4M3", "U8") and "weight_scale_2" in roles:
        return "nvfp4"
    if weight.dtype == "F8_E4M3" and is_grid and scale.dtype in E8M0:
        return "mxfp8"
    return CAST.get(weight.dtype) if scale.dtype in _FLOATS else None
