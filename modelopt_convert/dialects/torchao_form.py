"""The repos of torchao, as diffusers writes them, both ways. Pure, no torch.

Sources: torchao 0.18.0 (``prototype/safetensors``, ``prototype/mx_formats/nvfp4_tensor.py`` and ``mx_tensor.py``,
``quantization/quantize_/workflows/float8``); diffusers 0.42.1, ``quantizers/torchao``. A quantized weight is several
tensors, and an entry of the header's metadata says of which class:

================  ===========================  =============================================================
class             _weight_qdata                scales
================  ===========================  =============================================================
``NVFP4Tensor``   U8 [N, K/2], low nibble      _weight_scale F8_E4M3 [N, K/16], or in the 128x4 order as
                  first                        [32 * ceil(N/128), 16 * ceil(K/64)]; _weight_per_tensor_scale,
                                               _weight_act_per_tensor_scale F32 []
``Float8Tensor``  F8_E4M3 [N, K]               _weight_scale F32 [1, 1], or [N, 1] a scale a row
``MXTensor``      F8_E4M3 [N, K]               _weight_scale F8_E8M0 [N, K/32], or in the 128x4 order
================  ===========================  =============================================================

The whole metadata is in every file: diffusers puts those of all files together, and takes ``tensor_names`` of the last.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from modelopt_convert.checkpoint.header import METADATA, TensorInfo, json_object
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.recipe import RowMajor, made, recipe_of, renamed
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
    grouped,
    kept_linears,
    wrong,
)
from modelopt_convert.dialects.scales import fp8_scale, one_scale
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.formats.nvfp4.shapes import padded_shape
from modelopt_convert.run.errors import Faults, InputError

_QUANTIZATION = "quantization_config"
_AGAIN = "get the repo again from its publisher"
_CLASSES: Mapping[str, Algorithm] = {"NVFP4Tensor": "nvfp4", "Float8Tensor": "fp8", "MXTensor": "mxfp8"}
_WORDS = {algorithm: word for word, algorithm in _CLASSES.items()}
# Parts of a weight, by the roles of a description.
_PARTS: Mapping[Algorithm, Mapping[str, str]] = {
    "nvfp4": {
        "per_tensor_scale": "weight_scale_2",
        "act_per_tensor_scale": "input_scale",
        "qdata": "weight",
        "scale": "weight_scale",
    },
    "fp8": {"qdata": "weight", "scale": "weight_scale"},
    "mxfp8": {"qdata": "weight", "scale": "weight_scale"},
}
_TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_NO_PLACE = "torchao's Float8Tensor has no place for it: the input is scaled as it comes"


@dataclass(frozen=True, slots=True)
class _TorchAO:
    name: str = "torchao"
    naming: Naming = "diffusers"

    def read(
        self, headers: Headers, read: ReadBytes, true_shapes: Mapping[str, tuple[int, int]], where: str
    ) -> Canonical:
        tensors = dict(headers.tensors)
        modules: dict[str, Quantized] = {}
        fates: dict[str, str] = {}
        by_module = grouped(headers.tensors.values())
        faults = Faults()
        entries = _entries(headers, where)
        for weight, entry in entries.items():
            with faults.taken(module_of(weight)):
                module, role = module_of(weight), weight.rpartition(".")[2]
                algorithm = _algorithm(weight, role, entry, where)
                prefix, parts = f"{module}._weight_", dict[str, TensorInfo]()
                for part, ours in _PARTS[algorithm].items():
                    if (info := tensors.pop(f"{prefix}{part}", None)) is not None:
                        parts[ours], fates[info.name] = info, f"read as {module}.{ours}"
                found, modules[module] = _module(module, algorithm, parts, entry, read, where)
                others = {
                    role: info for role, info in by_module.get(module, {}).items() if not role.startswith("_weight_")
                }
                both = next((info for role, info in sorted(others.items()) if role in SCALES | {"weight"}), None)
                if both is not None:
                    raise wrong(
                        where, both, "the parts of this weight alone", code="dialect.contradiction", hint=_AGAIN
                    )
                check_roles(module, others, where)
                tensors |= {info.name: info for info in found}
        at_fault = {module_of(one) for one in entries} - modules.keys()
        for info in tensors.values():
            module = module_of(info.name)
            if "._weight_" in info.name and module not in at_fault:
                expected = "a part of a weight that the header names"
                faults.add(module, wrong(where, info, expected, code="dialect.unmarked", hint=_AGAIN))
        faults.refuse()
        said = headers.config.get(_QUANTIZATION)
        config = {key: value for key, value in headers.config.items() if key != _QUANTIZATION}
        return Canonical(tensors, modules, fates, config, said if isinstance(said, dict) else {})

    def write(self, described: Canonical, read: ReadBytes) -> Written:
        check_algorithms(described, "torchao", _WORDS)
        check_carried(described, "torchao")
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        changed: dict[str, bytes | None] = {}
        for module, roles in grouped(described.tensors.values()).items():
            quantized = described.modules.get(module)
            for role, info in roles.items():
                if quantized is not None and role in SCALES | {"weight"}:
                    continue
                tensors[info.name], metadata[info.name] = info, json.dumps({"_type": "Tensor"})
            if quantized is None:
                continue
            parts = {part: roles[ours] for part, ours in _PARTS[quantized.algorithm].items() if ours in roles}
            for part, info in parts.items():
                name = f"{module}._weight_{part}"
                tensors[name] = _stored(quantized, part, renamed(info, name))
            if quantized.algorithm != "nvfp4" and "input_scale" in roles:
                changed[roles["input_scale"].name] = None
            metadata[f"{module}.weight"] = json.dumps(_entry(quantized, roles, list(parts)))
        metadata["tensor_names"] = json.dumps(list(metadata))
        config = {**described.config, _QUANTIZATION: _declared(described)} if described.config else None
        why = dict.fromkeys(changed, _NO_PLACE)
        return Written(tensors, {**METADATA, **metadata}, config, changed, why=why, keep=frozenset(changed))


FORM = _TorchAO()


def _entries(headers: Headers, where: str) -> dict[str, Mapping[str, Any]]:
    """The entries of quantized weights, by the weight's name.

    Raises:
        InputError: ``dialect.unmarked``: the header names no tensors.
    """
    found: dict[str, Mapping[str, Any]] = {}
    named = False
    for entries in headers.metadata.values():
        named |= "tensor_names" in entries
        for name, text in entries.items():
            entry = json_object(text)
            if "_type" in entry and entry["_type"] != "Tensor":
                found[name] = entry
    if not named:
        raise InputError(
            f"{where}: expected the header's tensor_names, by which torchao says what its tensors are, found none",
            code="dialect.unmarked",
            path=where,
            hint="save it again with torchao 0.16 or newer",
        )
    return found


def _algorithm(weight: str, role: str, entry: Mapping[str, Any], where: str) -> Algorithm:
    """The format of a class.

    Raises:
        InputError: ``dialect.format``.
    """
    data, kind = entry.get("_data"), entry.get("_type")
    data = data if isinstance(data, dict) else {}
    block = {"NVFP4Tensor": BLOCK_SIZE, "MXTensor": E8M0_BLOCK}.get(str(kind))
    e4m3 = kind != "MXTensor" or json.dumps(data.get("elem_dtype", "")).find("float8_e4m3fn") >= 0
    if str(kind) not in _CLASSES or role != "weight" or (block and data.get("block_size") != block) or not e4m3:
        raise InputError(
            f"{where}: {weight!r}: expected a weight of {', '.join(_CLASSES)} in E4M3 with torchao's blocks, found "
            f"{str(kind)[:40]!r} of {json.dumps(data)[:80]}",
            code="dialect.format",
            path=where,
            hint="mopt does not convert this format",
        )
    return _CLASSES[str(kind)]


def _module(
    module: str,
    algorithm: Algorithm,
    parts: Mapping[str, TensorInfo],
    entry: Mapping[str, Any],
    read: ReadBytes,
    where: str,
) -> tuple[list[TensorInfo], Quantized]:
    """A module's tensors, as a description has them."""
    weight, scale = parts.get("weight"), parts.get("weight_scale")
    dtype = "U8" if algorithm == "nvfp4" else "F8_E4M3"
    if weight is None or scale is None or weight.dtype != dtype or len(weight.shape) != 2:
        what = f"{where}: {module}: expected _weight_qdata {dtype} of two dimensions and a _weight_scale, found"
        found = {role: f"{info.dtype} {list(info.shape)}" for role, info in parts.items()}
        raise InputError(f"{what} {found or 'neither'}", code="dialect.shape", path=where, hint=_AGAIN)
    rows, columns = weight.shape[0], weight.shape[1] * (2 if algorithm == "nvfp4" else 1)
    done = [renamed(weight, f"{module}.weight")]
    if algorithm == "nvfp4" and "weight_scale_2" not in parts:
        raise wrong(where, weight, "a _weight_per_tensor_scale beside it", code="dialect.shape", hint=_AGAIN)
    for role in ("weight_scale_2", "input_scale"):
        if role in parts:
            done.append(one_scale(parts[role], f"{module}.{role}", read, where))
    if algorithm == "fp8":
        done.append(fp8_scale(scale, f"{module}.weight_scale", rows, read, where))
        return done, Quantized(algorithm, rows, columns)
    block, kept = (BLOCK_SIZE, "F8_E4M3") if algorithm == "nvfp4" else (E8M0_BLOCK, "U8")
    width, stored = -(-columns // block), {"F8_E4M3"} if algorithm == "nvfp4" else {"F8_E8M0", "U8"}
    tiled = entry["_data"].get("is_swizzled_scales") is True
    height, across = padded_shape(rows, width)
    expected = (height // 4, across * 4) if tiled else (rows, width)
    if scale.dtype not in stored or scale.shape != expected:
        raise wrong(where, scale, f"{' or '.join(stored)} {list(expected)}", code="dialect.shape", hint=_AGAIN)
    recipe = RowMajor(recipe_of(scale), rows, width) if tiled else recipe_of(scale)
    done.append(made(f"{module}.weight_scale", kept, (rows, width), recipe, scale.file))
    return done, Quantized(algorithm, rows, columns)


def _stored(quantized: Quantized, part: str, info: TensorInfo) -> TensorInfo:
    if part == "scale" and quantized.algorithm == "fp8":
        return replace(info, shape=(quantized.rows if info.shape else 1, 1))
    return replace(info, dtype="F8_E8M0") if part == "scale" and quantized.algorithm == "mxfp8" else info


def _entry(quantized: Quantized, roles: Mapping[str, TensorInfo], parts: list[str]) -> dict[str, Any]:
    """What the header says of a weight."""
    bias = roles.get("bias")
    dtype = _dtype(_TORCH.get(bias.dtype if bias is not None else "BF16", "bfloat16"))
    calibrated = "input_scale" in roles
    data: dict[str, Any]
    inputs: dict[str, Any]
    if quantized.algorithm == "nvfp4":
        inputs = {"block_size": BLOCK_SIZE, "is_swizzled_scales": True, "use_triton_kernel": False}
        data = {
            "is_swizzled_scales": False,
            "use_triton_kernel": False,
            "act_quant_kwargs": _typed("QuantizeTensorToNVFP4Kwargs", {**inputs, "use_dynamic_per_tensor_scale": False})
            if calibrated
            else None,
            "block_size": BLOCK_SIZE,
            "orig_dtype": dtype,
        }
    elif quantized.algorithm == "fp8":
        inputs = {"float8_dtype": _dtype("float8_e4m3fn"), "granularity": _typed("PerTensor", {}), "mm_config": None}
        inputs |= {"hp_value_lb": None, "hp_value_ub": None, "kernel_preference": _AUTO}
        by_row = bool(roles["weight_scale"].shape)
        data = {
            "block_size": [1 if by_row else quantized.rows, quantized.columns],
            "mm_config": None,
            "act_quant_kwargs": _typed("QuantizeTensorToFloat8Kwargs", inputs) if calibrated else None,
            "kernel_preference": _AUTO,
            "dtype": dtype,
        }
    else:
        data = {
            "elem_dtype": _dtype("float8_e4m3fn"),
            "block_size": E8M0_BLOCK,
            "orig_dtype": dtype,
            "kernel_preference": _AUTO,
            "act_quant_kwargs": None,
            "is_swizzled_scales": False,
        }
    return {"_type": _WORDS[quantized.algorithm], "_data": data, "_tensor_data_names": parts}


def _typed(kind: str, data: object) -> dict[str, Any]:
    return {"_type": kind, "_data": data}


def _dtype(name: str) -> dict[str, Any]:
    return _typed("torch.dtype", name)


_AUTO = _typed("KernelPreference", "AUTO")


def _declared(described: Canonical) -> dict[str, Any]:
    """``quantization_config`` for diffusers, which takes the tensors as the header says that they are."""
    algorithms = [one.algorithm for one in described.modules.values()]
    main = max(sorted(set(algorithms)), key=algorithms.count, default="nvfp4")
    calibrated = any(f"{name}.input_scale" in described.tensors for name in described.modules)
    static = {"use_triton_kernel": False, "use_dynamic_per_tensor_scale": False, "step": "convert"}
    kinds: Mapping[tuple[str, bool], dict[str, Any]] = {
        ("nvfp4", True): _config("NVFP4DynamicActivationNVFP4WeightConfig", 1, static),
        ("nvfp4", False): _config("NVFP4WeightOnlyConfig", 1, {"use_dynamic_per_tensor_scale": True}),
        ("fp8", True): _config(
            "Float8DynamicActivationFloat8WeightConfig", 2, {"granularity": _config("PerTensor", 1, {})}
        ),
        ("fp8", False): _config("Float8WeightOnlyConfig", 2, {}),
    }
    mx = _config("MXDynamicActivationMXWeightConfig", 1, {"block_size": E8M0_BLOCK})
    # diffusers looks for these names anywhere in that of a parameter: one that is in a quantized one's is left out.
    kept = [
        name
        for name in kept_linears(described)
        if not any(f"{name}." in f"{other}.weight" for other in described.modules)
    ]
    return {
        "quant_method": "torchao",
        "quant_type": {"default": kinds.get((main, calibrated), mx)},
        "modules_to_not_convert": kept,
    }


def _config(kind: str, version: int, data: object) -> dict[str, Any]:
    return {"_type": kind, "_version": version, "_data": data}
