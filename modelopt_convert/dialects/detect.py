"""Which dialect a checkpoint is written in, by names, dtypes, shapes and markers. Pure, no torch.

One table, in the order in which evidence is conclusive; nothing more is built here for the dialects than their names.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.engines.sglang import PACKED_QKV
from modelopt_convert.formats.nvfp4.shapes import round_up

_SHOWN = 2
_PLAIN = frozenset({"BF16", "F16", "F32", "F64", "I64", "BOOL"})


@dataclass(frozen=True, slots=True)
class Dialect:
    """A dialect's name and what gives it away."""

    name: str
    evidence: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Looked:
    """What there is to look at: headers, config, and the names of the files beside them."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Mapping[str, str]]
    config: Mapping[str, Any]
    other_files: tuple[str, ...]

    def ending(self, *suffixes: str) -> list[str]:
        """Tensors whose names end so."""
        return [name for name in self.tensors if name.endswith(suffixes)]

    def quantization(self) -> Mapping[str, Any]:
        """quantization_config of config.json or else, as ModelOpt's post-processing writes it too, of a header."""
        found = self.config.get("quantization_config")
        headers = [_object(entries.get("quantization_config")) for entries in self.metadata.values()]
        return found if isinstance(found, dict) else next((one for one in headers if one), {})

    def layers(self) -> dict[str, Any]:
        """Layers that a ComfyUI-style header names, over all files."""
        found: dict[str, Any] = {}
        for entries in self.metadata.values():
            layers = _object(entries.get("_quantization_metadata")).get("layers")
            found |= layers if isinstance(layers, dict) else {}
        return found

    def packed(self) -> list[str]:
        """Modules with a U8 weight and a block scale of bytes."""
        return [
            name.removesuffix(".weight")
            for name, info in self.tensors.items()
            if name.endswith(".weight") and info.dtype == "U8" and f"{name}_scale" in self.tensors
        ]

    def fp8(self) -> list[str]:
        """Modules with an E4M3 weight."""
        return [
            name.removesuffix(".weight")
            for name, info in self.tensors.items()
            if name.endswith(".weight") and info.dtype == "F8_E4M3"
        ]


def _object(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def detect_dialect(looked: Looked) -> Dialect:
    """The dialect, with the evidence for it; ``unknown`` if there are quantized dtypes and nothing to tell."""
    for name, recognise in DIALECTS:
        if evidence := recognise(looked):
            return Dialect(name, tuple(evidence))
    return Dialect("unknown", ("no known names, markers or config",))


def _names(what: str, names: list[str]) -> list[str]:
    return [f"{len(names)} tensors {what}: {', '.join(names[:_SHOWN])}"] if names else []


def _compressed_tensors(looked: Looked) -> list[str]:
    said = looked.quantization().get("quant_method") == "compressed-tensors"
    return _names("end in .weight_packed", looked.ending(".weight_packed")) + ["config.json says so"] * said


def _mxfp4(looked: Looked) -> list[str]:
    blocks, scales = looked.ending("_blocks"), looked.ending("_scales")
    return _names("end in _blocks", blocks) if blocks and scales else []


def _nunchaku(looked: Looked) -> list[str]:
    return _names("end in .qweight, with .wscales", looked.ending(".qweight")) if looked.ending(".wscales") else []


def _torchao(looked: Looked) -> list[str]:
    return _names("end in _qdata", looked.ending("_qdata")) if looked.ending("_per_tensor_scale", "_scale_e4m3") else []


def _torchao_fp8(looked: Looked) -> list[str]:
    names = [name for name in looked.ending("_weight_qdata") if looked.tensors[name].dtype == "F8_E4M3"]
    return _names("end in _weight_qdata", names)


def _lightx2v(looked: Looked) -> list[str]:
    alpha = looked.ending(".alpha")
    return _names("end in .alpha, with .weight_global_scale", alpha) if looked.ending(".weight_global_scale") else []


def _bfl(looked: Looked) -> list[str]:
    names = [f"{module}.weight" for module in looked.packed() if PACKED_QKV.match(f"{module}.")]
    return _names("have Black Forest Labs' packed-QKV names", names)


def _comfyui(looked: Looked) -> list[str]:
    return _names("are .comfy_quant markers", looked.ending(".comfy_quant")) if looked.packed() else []


def _comfyui_header(looked: Looked) -> list[str]:
    formats = {str(layer.get("format")) for layer in looked.layers().values() if isinstance(layer, dict)}
    if "nvfp4" not in formats or looked.quantization():
        return []
    return [f"header _quantization_metadata names {len(looked.layers())} layers, no marker tensors"]


def _comfyui_mxfp8(looked: Looked) -> list[str]:
    scales = [name for name in looked.ending(".weight_scale") if looked.tensors[name].dtype in ("U8", "F8_E8M0")]
    marked = looked.ending(".comfy_quant") or looked.layers()
    return _names("are E8M0 scales of FP8 weights", scales) if scales and looked.fp8() and marked else []


def _comfyui_fp8(looked: Looked) -> list[str]:
    if not looked.fp8():
        return []
    markers = looked.ending(".comfy_quant")
    layers = [name for name, layer in looked.layers().items() if isinstance(layer, dict) and "float8" in str(layer)]
    header = [f"header _quantization_metadata names {len(layers)} float8 layers"] if layers else []
    return _names("are .comfy_quant markers", markers) + header


def _comfyui_int8(looked: Looked) -> list[str]:
    codes = [name for name in looked.ending(".weight") if looked.tensors[name].dtype == "I8"]
    return _names("are .comfy_quant markers", looked.ending(".comfy_quant")) if codes else []


def _comfyui_fp8_legacy(looked: Looked) -> list[str]:
    sentinel = [name for name in looked.tensors if name == "scaled_fp8" or name.endswith(".scaled_fp8")]
    return _names("are scaled_fp8 sentinels or .scale_weight", sentinel or looked.ending(".scale_weight"))


def _bfl_package(looked: Looked) -> list[str]:
    return ["manifest.json beside hf_quant_config.json"] * (
        {"manifest.json", "hf_quant_config.json"} <= set(looked.other_files)
    )


def _modelopt_llm(looked: Looked) -> list[str]:
    return ["hf_quant_config.json"] * ("hf_quant_config.json" in looked.other_files)


def _modelopt_says(looked: Looked, *algorithms: str) -> list[str]:
    found = looked.quantization()
    algorithm = found.get("quant_algo")
    if found.get("quant_method") != "modelopt" or algorithm not in algorithms:
        return []
    return [f"config.json: quant_method modelopt, quant_algo {algorithm}"]


def _modelopt_postprocessed(looked: Looked) -> list[str]:
    said = _modelopt_says(looked, "NVFP4")
    if not said:
        return []
    header = [entries for entries in looked.metadata.values() if "quantization_config" in entries]
    padded = [module for module in looked.packed() if _is_padded(looked, module)]
    because = ["header carries quantization_config"] * bool(
        (header and looked.layers()) or (header and not _is_flat(header))
    )
    because += [f"{len(padded)} modules have padded scales ({padded[0]} first)"] if padded else []
    return said + because if because else []


def _is_flat(header: list[Mapping[str, str]]) -> bool:
    # SGLang's builder writes the same flat config under both keys; ModelOpt only under quantization_config.
    return any("_quantization_metadata" in entries for entries in header)


def _is_padded(looked: Looked, module: str) -> bool:
    weight, scale = looked.tensors[f"{module}.weight"].shape, looked.tensors[f"{module}.weight_scale"].shape
    if len(weight) != 2 or len(scale) != 2:
        return True
    plain = (weight[0], weight[1] // 8)
    return scale != plain and scale[0] in (weight[0], round_up(weight[0], 128))


def _modelopt(looked: Looked) -> list[str]:
    return _modelopt_says(looked, "NVFP4")


def _modelopt_fp8(looked: Looked) -> list[str]:
    return _modelopt_says(looked, "FP8")


def _modelopt_other(looked: Looked) -> list[str]:
    found = looked.quantization()
    said = found.get("quant_method") == "modelopt"
    return [f"config.json: quant_method modelopt, quant_algo {found.get('quant_algo')}"] * said


def _deepseek_fp8(looked: Looked) -> list[str]:
    return _names("end in .weight_scale_inv", looked.ending(".weight_scale_inv"))


def _nvfp4_unlabelled(looked: Looked) -> list[str]:
    return _names("are U8 weights with block scales, nothing says whose", looked.packed())


def _fp8_unlabelled(looked: Looked) -> list[str]:
    return _names("are E4M3 weights, nothing says whose", looked.fp8())


def _unquantized(looked: Looked) -> list[str]:
    plain = all(info.dtype in _PLAIN for info in looked.tensors.values())
    return ["all tensors are floats of 16 bits or more"] * plain


DIALECTS: tuple[tuple[str, Callable[[Looked], list[str]]], ...] = (
    ("compressed-tensors", _compressed_tensors),
    ("mxfp4", _mxfp4),
    ("nunchaku", _nunchaku),
    ("torchao", _torchao),
    ("torchao-fp8", _torchao_fp8),
    ("lightx2v", _lightx2v),
    ("bfl", _bfl),
    ("comfyui", _comfyui),
    ("comfyui-header", _comfyui_header),
    ("comfyui-mxfp8", _comfyui_mxfp8),
    ("comfyui-fp8", _comfyui_fp8),
    ("comfyui-int8", _comfyui_int8),
    ("comfyui-fp8-legacy", _comfyui_fp8_legacy),
    ("bfl-package", _bfl_package),
    ("modelopt-llm", _modelopt_llm),
    ("modelopt-postprocessed", _modelopt_postprocessed),
    ("modelopt", _modelopt),
    ("modelopt-fp8", _modelopt_fp8),
    ("modelopt-other", _modelopt_other),
    ("deepseek-fp8", _deepseek_fp8),
    ("nvfp4-unlabelled", _nvfp4_unlabelled),
    ("fp8-unlabelled", _fp8_unlabelled),
    ("unquantized", _unquantized),
)
