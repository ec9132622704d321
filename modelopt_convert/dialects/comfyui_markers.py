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


def sentinel_words(info: TensorInfo) -> str:
    """What the sentinel says; ComfyUI takes one of F32 for E4M3."""
    format_ = "float8_e5m2" if info.dtype == "F8_E5M2" else "float8_e4m3fn"
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
        return NOTHING if layer is None else _entry(f"_quantization_metadata of {module!r}", layer, where)
    raw = read(marker, 0, min(marker.num_bytes, _MARKER_BYTES))
    if not raw.strip(b"\0 ") and weight is not None and weight.dtype in _FLOATS:
        return Said(None, True, "left out: an empty marker of a module that is not quantized")
    try:
        entry = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise wrong(where, marker, 'JSON such as {"format": "nvfp4"}', code="dialect.marker", hint=AGAIN) from error
    if isinstance(entry, dict) and "format" not in entry and weight is not None and weight.dtype in _FLOATS:
        return Said(None, True, "left out: a marker without a format, of a module that is not quantized")
    said = _entry(marker.name, entry, where)
    if layer is not None and _entry(f"_quantization_metadata of {module!r}", layer, where).algorithm != said.algorithm:
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
    unknown = sorted(entry.keys() - {"format", _FULL_PRECISION})
    if unknown:
        raise InputError(
            f"{where}: {what}: expected format and {_FULL_PRECISION} alone, found {str(unknown[0])[:40]!r} too",
            code="dialect.marker",
            path=where,
            hint="another key may say that the weight lies otherwise; mopt does not guess what it means",
        )
    full = ", in full precision" if entry.get(_FULL_PRECISION) is True else ""
    return Said(FORMATS[word], entry.keys() != {"format"}, f"read as a marker: {word}{full}")
