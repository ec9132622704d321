"""ComfyUI's files: marker tensors, or layers named in a header. Pure, no torch."""

from typing import Any

from modelopt_convert.dialects.dialect import CONVERTED, Dialect, Headers, said_of


def _layers(headers: Headers) -> dict[str, Any]:
    """Layers that a header names and that are there: of a whole checkpoint it names those of text encoders, too."""
    return {name: one for name, one in headers.layers().items() if f"{name}.weight" in headers.tensors}


def _comfyui(headers: Headers) -> list[str]:
    return said_of("are .comfy_quant markers", headers.ending(".comfy_quant")) if headers.packed() else []


def _comfyui_header(headers: Headers) -> list[str]:
    formats = {str(layer.get("format")) for layer in _layers(headers).values() if isinstance(layer, dict)}
    if "nvfp4" not in formats or headers.quantization():
        return []
    return [f"header _quantization_metadata names {len(_layers(headers))} layers, no marker tensors"]


def _comfyui_mxfp8(headers: Headers) -> list[str]:
    scales = [name for name in headers.ending(".weight_scale") if headers.tensors[name].dtype in ("U8", "F8_E8M0")]
    marked = headers.ending(".comfy_quant") or _layers(headers)
    return said_of("are E8M0 scales of FP8 weights", scales) if scales and headers.fp8() and marked else []


def _comfyui_fp8(headers: Headers) -> list[str]:
    if not headers.fp8():
        return []
    markers = headers.ending(".comfy_quant")
    layers = [name for name, layer in _layers(headers).items() if isinstance(layer, dict) and "float8" in str(layer)]
    header = [f"header _quantization_metadata names {len(layers)} float8 layers"] if layers else []
    return said_of("are .comfy_quant markers", markers) + header


def _comfyui_int8(headers: Headers) -> list[str]:
    codes = [name for name in headers.ending(".weight") if headers.tensors[name].dtype == "I8"]
    return said_of("are .comfy_quant markers", headers.ending(".comfy_quant")) if codes else []


def _comfyui_fp8_legacy(headers: Headers) -> list[str]:
    sentinel = [name for name in headers.tensors if name == "scaled_fp8" or name.endswith(".scaled_fp8")]
    return said_of("are scaled_fp8 sentinels or .scale_weight", sentinel or headers.ending(".scale_weight"))


COMFYUI = Dialect("comfyui", _comfyui, lambda _: CONVERTED)
COMFYUI_HEADER = Dialect("comfyui-header", _comfyui_header, lambda _: CONVERTED)
COMFYUI_MXFP8 = Dialect("comfyui-mxfp8", _comfyui_mxfp8)
COMFYUI_FP8 = Dialect("comfyui-fp8", _comfyui_fp8)
COMFYUI_INT8 = Dialect("comfyui-int8", _comfyui_int8)
COMFYUI_FP8_LEGACY = Dialect("comfyui-fp8-legacy", _comfyui_fp8_legacy)
