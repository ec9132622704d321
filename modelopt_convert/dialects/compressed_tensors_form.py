"""The repos of compressed-tensors, both ways. Pure, no torch.

Sources: compressed-tensors 0.20.0 (``compressors/nvfp4``, ``naive_quantized``, ``mxfp8``, and
``quantization/quant_args.py``); vLLM 0.33.0, ``compressed_tensors_w4a4_nvfp4.py``.

========================  ==========================  ==========================================================
format                    weight                      scales
========================  ==========================  ==========================================================
``nvfp4-pack-quantized``  weight_packed U8 [N, K/2],  weight_scale F8_E4M3 [N, K/16] row-major;
                          low nibble first            weight_global_scale, input_global_scale F32 [1], reciprocals
``float-quantized``       weight F8_E4M3 [N, K]       weight_scale F32 [1] or [N, 1]; input_scale F32 [1]
``mxfp8-quantized``       weight F8_E4M3 [N, K]       weight_scale U8 [N, K/32], E8M0
========================  ==========================  ==========================================================

13.95 % of all F32, each with a mantissa above the square root of 2, are the reciprocal of no F32: the factor that a
reader of the output works with is then the next F32, which is announced as changed.
"""

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from modelopt_convert.checkpoint.header import METADATA, TensorInfo
from modelopt_convert.checkpoint.names import inside, natural_key
from modelopt_convert.checkpoint.recipe import renamed
from modelopt_convert.dialects.awq import check_carried
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
    kept_linears,
    wrong,
)
from modelopt_convert.dialects.scales import fp8_scale, one_scale
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.run.errors import Faults, InputError

_QUANTIZATION = "quantization_config"
_AGAIN = "get the repo again from its publisher"
_RECIPROCALS: Mapping[str, str] = {"weight_global_scale": "weight_scale_2", "input_global_scale": "input_scale"}
_GLOBALS = {ours: theirs for theirs, ours in _RECIPROCALS.items()}
_FORMATS = {"nvfp4": "nvfp4-pack-quantized", "fp8": "float-quantized", "mxfp8": "mxfp8-quantized"}
_MIXED = "mixed-precision"
_ROUNDED = "a reciprocal is stored, and no F32 has this one as its own: 1 unit in the last place off"


@dataclass(frozen=True, slots=True)
class _CompressedTensors:
    name: str = "compressed-tensors"
    naming: Naming = "diffusers"

    def read(
        self, headers: Headers, read: ReadBytes, true_shapes: Mapping[str, tuple[int, int]], where: str
    ) -> Canonical:
        said = headers.quantization()
        _check_said(said, where)
        tensors: dict[str, TensorInfo] = {}
        modules: dict[str, Quantized] = {}
        fates: dict[str, str] = {}
        keep: dict[str, TensorInfo] = {}
        faults = Faults()
        for module, roles in grouped(headers.tensors.values()).items():
            with faults.taken(module):
                ours = dict(roles)
                _check_both(roles, where)
                if "weight_packed" in roles:
                    ours["weight"] = renamed(ours.pop("weight_packed"), f"{module}.weight")
                    fates[roles["weight_packed"].name] = f"read as {module}.weight"
                for theirs, role in _RECIPROCALS.items():
                    if theirs in roles:
                        ours[role], exact = _reciprocal(ours.pop(theirs), f"{module}.{role}", read, where)
                        fates[roles[theirs].name] = f"read as {module}.{role}, its reciprocal"
                        keep |= {} if exact else {roles[theirs].name: roles[theirs]}
                if ours.keys() & SCALES or "weight_packed" in roles:
                    check_roles(module, ours, where)
                    found, modules[module] = _module(module, ours, "weight_packed" in roles, read, where)
                    ours |= found
                tensors |= {info.name: info for info in ours.values()}
        faults.refuse()
        config = {key: value for key, value in headers.config.items() if key != _QUANTIZATION}
        return Canonical(tensors, modules, fates, config, said, keep)

    def write(self, described: Canonical, read: ReadBytes) -> Written:
        check_algorithms(described, "compressed-tensors", _FORMATS)
        check_carried(described, "compressed-tensors")
        tensors: dict[str, TensorInfo] = {}
        changed: dict[str, bytes | None] = {}
        for module, roles in grouped(described.tensors.values()).items():
            if (quantized := described.modules.get(module)) is None:
                tensors |= {info.name: info for info in roles.values()}
                continue
            for role, info in roles.items():
                one = info
                if quantized.algorithm == "nvfp4" and role == "weight":
                    one = renamed(info, f"{module}.weight_packed")
                elif quantized.algorithm == "nvfp4" and role in _GLOBALS:
                    one, exact = _reciprocal(info, f"{module}.{_GLOBALS[role]}", read, "")
                    one = replace(one, shape=(1,))
                    if not exact:
                        again, _ = _reciprocal(one, info.name, read, "")
                        changed[info.name] = read(again, 0, again.num_bytes)
                elif quantized.algorithm == "fp8" and role in ("weight_scale", "input_scale"):
                    one = replace(info, shape=(quantized.rows, 1) if info.shape else (1,))
                tensors[one.name] = one
        config = {**described.config, _QUANTIZATION: _declared(described)} if described.config else None
        why = dict.fromkeys(changed, _ROUNDED)
        return Written(tensors, METADATA, config, changed, why=why, keep=frozenset(changed))


FORM = _CompressedTensors()


def largest_counts(described: Canonical, groups: Iterable[tuple[str, ...]], read: ReadBytes) -> list[str]:
    """Why vLLM would decode members of what it fuses with a wrong factor, a line for each such group.

    vLLM 0.33.0 takes the maximum of the members' ``weight_global_scale`` for all of them, and warns once. The block
    scales stay as they are.

    Args:
        described: What is to be written.
        groups: Members of what vLLM fuses, by the description's names.
        read: Reads tensors.
    """
    found = []
    for group in groups:
        infos = [described.tensors.get(f"{name}.weight_scale_2") for name in group]
        values = {read(info, 0, 4) for info in infos if info is not None}
        if len(values) > 1:
            found.append(f"{', '.join(group)}: vLLM takes the maximum of {len(values)} global scales for all")
    return found


def _reciprocal(info: TensorInfo, name: str, read: ReadBytes, where: str) -> tuple[TensorInfo, bool]:
    """1 / a scale, F32 []; and whether the reciprocal of that is the scale again.

    Raises:
        InputError: ``dialect.shape``: it is not one float; ``convert.reciprocal``: there is none.
    """
    whole = one_scale(info, name, read, where)
    raw = read(whole, 0, 4)
    turned = _inverse(raw)
    if turned is None:
        raise InputError(
            f"tensor {info.name!r}: expected a scale that has a reciprocal, found {struct.unpack('<f', raw)[0]}",
            code="convert.reciprocal",
            hint="the module was all zero or never calibrated; quantize again",
        )
    return constant(name, "F32", (), turned, info.file), _inverse(turned) == raw


def _inverse(raw: bytes) -> bytes | None:
    """The bits of 1 / a float32, rounded as float32 division rounds; None if it is none.

    A quotient in float64 is rounded twice to no other result: 53 bits are more than twice 24.
    """
    (value,) = struct.unpack("<f", raw)
    if not value or not math.isfinite(value):
        return None
    try:
        return struct.pack("<f", 1.0 / value)
    except OverflowError:
        return None


def _check_said(said: Mapping[str, Any], where: str) -> None:
    """Refuse what the config says of formats that mopt does not convert.

    Raises:
        InputError: ``dialect.format``.
    """
    groups = said.get("config_groups")
    groups = groups if isinstance(groups, dict) else {}
    formats = [said.get("format"), *(group.get("format") for group in groups.values() if isinstance(group, dict))]
    odd = sorted(str(one) for one in formats if one not in (None, _MIXED, *_FORMATS.values()))
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    asymmetric = any(isinstance(one, dict) and one.get("symmetric") is False for one in weights)
    status = said.get("quantization_status", "compressed")
    if odd or asymmetric or status != "compressed":
        found = f"format {odd[0]}" if odd else "symmetric false" if asymmetric else f"quantization_status {status}"
        raise InputError(
            f"{inside(where, 'config.json')}: quantization_config: expected {', '.join(_FORMATS.values())}, "
            f"symmetric and compressed, found {found[:60]}",
            code="dialect.format",
            path=inside(where, "config.json"),
            hint="mopt does not convert this format",
        )


def _check_both(roles: Mapping[str, TensorInfo], where: str) -> None:
    """Refuse a module that has a tensor in its packed form, and another that would be read as the same.

    Raises:
        InputError: ``dialect.contradiction``.
    """
    packed = {"weight_packed": "weight", "weight_global_scale": "weight_scale_2", "input_global_scale": "input_scale"}
    for theirs, ours in packed.items():
        if ours in roles and (theirs in roles or ours == "weight_scale_2"):
            raise wrong(where, roles[ours], f"{theirs} alone", code="dialect.contradiction", hint=_AGAIN)


def _module(
    module: str, roles: Mapping[str, TensorInfo], packed: bool, read: ReadBytes, where: str
) -> tuple[dict[str, TensorInfo], Quantized]:
    """What is other than stored of a quantized module, and the module."""
    weight, scale = roles.get("weight"), roles.get("weight_scale")
    dtype = "U8" if packed else "F8_E4M3"
    if weight is None or scale is None or weight.dtype != dtype or len(weight.shape) != 2:
        info = weight or scale or next(iter(roles.values()))
        raise wrong(where, info, f"{dtype} of two dimensions and a weight_scale", code="dialect.shape", hint=_AGAIN)
    rows, columns = weight.shape
    if packed:
        expected = (rows, columns * 2 // BLOCK_SIZE)
        whole = scale.dtype == "F8_E4M3" and scale.shape == expected and not columns * 2 % BLOCK_SIZE
        if not whole or "weight_scale_2" not in roles:
            raise wrong(
                where, scale, f"F8_E4M3 {list(expected)} and a weight_global_scale", code="dialect.shape", hint=_AGAIN
            )
        return {}, Quantized("nvfp4", rows, columns * 2)
    if "weight_scale_2" in roles:
        raise wrong(where, weight, "no weight_global_scale beside FP8", code="dialect.shape", hint=_AGAIN)
    found = {}
    if "input_scale" in roles:
        found["input_scale"] = one_scale(roles["input_scale"], f"{module}.input_scale", read, where)
    if scale.dtype != "U8":
        found["weight_scale"] = fp8_scale(scale, scale.name, rows, read, where)
        return found, Quantized("fp8", rows, columns)
    if scale.shape != (rows, -(-columns // E8M0_BLOCK)):
        raise wrong(where, scale, f"U8 {[rows, -(-columns // E8M0_BLOCK)]}", code="dialect.shape", hint=_AGAIN)
    return found, Quantized("mxfp8", rows, columns)


def _declared(described: Canonical) -> dict[str, Any]:
    """``quantization_config``: a group for each kind of module."""
    kinds: dict[tuple[Algorithm, bool, bool], list[str]] = {}
    for module, one in described.modules.items():
        by_row = one.algorithm == "fp8" and bool(described.tensors[f"{module}.weight_scale"].shape)
        kind = (one.algorithm, by_row, f"{module}.input_scale" in described.tensors)
        kinds.setdefault(kind, []).append(module)
    formats = {_FORMATS[kind[0]] for kind in kinds}
    groups: dict[str, Any] = {}
    for number, (kind, modules) in enumerate(sorted(kinds.items())):
        algorithm, by_row, calibrated = kind
        targets = ["Linear"] if len(kinds) == 1 else sorted(modules, key=natural_key)
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": _weights(algorithm, by_row),
            "input_activations": _inputs(algorithm, by_row, calibrated),
            "output_activations": None,
            "format": _FORMATS[algorithm],
        }
    return {
        "quant_method": "compressed-tensors",
        "format": next(iter(formats)) if len(formats) == 1 else _MIXED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": kept_linears(described),
    }


def _weights(algorithm: str, by_row: bool) -> dict[str, Any]:
    if algorithm == "fp8":
        found: dict[str, Any] = {"num_bits": 8, "strategy": "channel" if by_row else "tensor"}
    elif algorithm == "mxfp8":
        found = {"num_bits": 8, "strategy": "group", "group_size": E8M0_BLOCK, "scale_dtype": "torch.uint8"}
    else:
        found = {"num_bits": 4, "strategy": "tensor_group", "group_size": BLOCK_SIZE}
    return {**found, "type": "float", "symmetric": True, "dynamic": False}


def _inputs(algorithm: str, by_row: bool, calibrated: bool) -> dict[str, Any] | None:
    """What becomes of activations; None: nothing is said of them, and engines leave them as they are."""
    if calibrated:
        return {**_weights(algorithm, False), "dynamic": "local" if algorithm == "nvfp4" else False}
    if algorithm == "mxfp8":
        return {**_weights(algorithm, False), "dynamic": True}
    return {**_weights(algorithm, False), "strategy": "token", "dynamic": True} if by_row else None
