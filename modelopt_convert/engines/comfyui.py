"""ComfyUI's view of a file: which model it detects, which modules it takes for quantized, and how. Pure, no torch.

Its loader was run at 0.33.0 with raw exports of ModelOpt (docs/engines.json) and at 0.29.0 with files of its own. The
same is written, there and in later files, in

- ``comfy/utils.py``, ``convert_old_quants``: a header's ``_quantization_metadata``, or else the legacy ``scaled_fp8``
  tensor, is made into marker tensors;
- ``comfy/ops.py``, ``_load_quantized_module``: a Linear with a marker is quantized as the marker says, one without is
  cast as it lies;
- ``comfy/model_detection.py``: the model, by the names of tensors;
- ``comfy/quant_ops.py``, line 248, and ``comfy/ops.py``, lines 1363 to 1366: of NVFP4 ``pre_quant_scale`` is loaded,
  and a Linear multiplies its inputs by it. That was run at 0.33.0; 0.30.0 has it, and 0.29.0 nothing of the kind;
- comfy-kitchen 0.2.31 and 0.2.40, ``tensor/fp8.py``: an FP8 product names no scale but one a tensor, and torch raises
  where there are more (run on a CPU); ``backends/cuda``, ``dequantize_per_tensor_fp8`` asserts one scale.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from modelopt_convert.checkpoint.header import TensorInfo, json_object
from modelopt_convert.engines.outcome import HALVED, UNSCALED, Outcome, Reading, coded, counted
from modelopt_convert.formats.layout import Layout

VERSION = "comfyui@0.33.0"
FACTOR = ".pre_quant_scale"
HEADER = "_quantization_metadata"
SENTINEL = "scaled_fp8"
LAYOUT = Layout("high", "128x4")
_UTILS, _OPS, _DETECTION = "comfy/utils.py", "comfy/ops.py", "comfy/model_detection.py"
_PREFIXES = ("model.diffusion_model.", "")
_SCALES = (".weight_scale", ".scale_weight", ".weight_scale_inv")
# ``QUANT_ALGOS`` in comfy/quant_ops.py: the dtype that a format's codes have, and the scales without which it raises.
_FORMATS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "nvfp4": ("U8", ("weight_scale", "weight_scale_2")),
    "float8_e4m3fn": ("F8_E4M3", ("weight_scale",)),
    "float8_e5m2": ("F8_E5M2", ("weight_scale",)),
    "mxfp8": ("F8_E4M3", ("weight_scale",)),
    "int8_tensorwise": ("I8", ("weight_scale",)),
}
# ``detect_unet_config``: tensors by which it knows a model.
_NATIVE: tuple[tuple[str, ...], ...] = (
    ("double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight"),
    ("double_blocks.0.img_attn.norm.key_norm.weight", "img_in.weight"),
    ("txt_in.individual_token_refiner.blocks.0.norm1.weight",),
    ("head.modulation",),
    ("adaln_single.emb.timestep_embedder.linear_1.bias",),
    ("cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight"),
    ("txt_norm.weight", "img_in.weight"),
    ("joint_blocks.0.context_block.attn.qkv.weight",),
)
_UNJUDGED = "which model it detects from these names was not judged"
# FLUX.1 under diffusers' names, which it translates: weights and biases, and nothing else.
_TRANSLATED = ("x_embedder.bias", "context_embedder.bias", "single_transformer_blocks.0.proj_mlp.bias")
# Under diffusers' names of these it finds no model, quantized or not; docs/engines.json has what it raises.
_UNDETECTED: Mapping[str, str] = {
    "double_stream_modulation_img.linear.weight": "FLUX.2",
    "condition_embedder.time_embedder.linear_1.bias": "Wan",
    "context_embedder.token_refiner.refiner_blocks.0.norm1.weight": "HunyuanVideo",
    "audio_time_embed.linear.weight": "LTX-2",
}


@dataclass(frozen=True, slots=True)
class _Marks:
    """The formats that modules are marked with, and what becomes of the file's ways of saying so.

    Attributes:
        formats: By module; a marker without a format is None.
        notes: What is said of them.
        renamed: Whether legacy names of scales are made into the present ones.
        fault: Why ComfyUI raises before it looks at a module, or None.
    """

    formats: Mapping[str, str | None]
    notes: tuple[str, ...] = ()
    renamed: bool = False
    fault: str | None = None


def read(
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, Mapping[str, str]],
    markers: Mapping[str, Mapping[str, Any]],
    ones: Collection[str] = (),
) -> Reading:
    """What ComfyUI makes of a file, or of the files of a folder as one.

    Args:
        tensors: All tensors.
        metadata: Header metadata by file.
        markers: What the ``comfy_quant`` tensors say, by module.
        ones: The legacy ``scale_input`` tensors whose value is 1.0.
    """
    marks = _marks(tensors, metadata, markers, ones)
    if marks.fault is not None:
        return Reading(engine=VERSION, outcome="refuses", how=marks.fault, source=_UTILS, shown="read")
    undetected = next((model for name, model in _UNDETECTED.items() if name in tensors), None)
    if undetected is not None:
        how = f"does not know diffusers' names of {undetected}, quantized or not"
        return Reading(engine=VERSION, outcome="refuses", how=how, source=_DETECTION, shown="run")
    translated, notes = all(name in tensors for name in _TRANSLATED), [*marks.notes]
    notes += [words] if (words := factors(tensors)) is not None else []
    if translated and marks.formats:
        notes.append("it translates diffusers' names of FLUX.1, which loses scales and markers")
    found = _modules(tensors, _Marks({} if translated else marks.formats, tuple(notes), marks.renamed))
    return found if translated or _is_native(tensors) else replace(found, depends=_UNJUDGED)


def factors(tensors: Collection[str]) -> str | None:
    """What ComfyUI makes of factors of inputs; None if a file has none."""
    count = sum(name.endswith(FACTOR) for name in tensors)
    words = "inputs of {} modules are multiplied by pre_quant_scale from 0.30.0 on; older releases leave it out, unsaid"
    return words.format(count) if count else None


def row_scales(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """FP8 modules with a scale for each row: ComfyUI loads them, and raises when it multiplies by them."""
    modules = [name.removesuffix(".weight") for name, one in tensors.items() if one.dtype in ("F8_E4M3", "F8_E5M2")]
    scales = {name: tensors.get(f"{name}.weight_scale") for name in modules}
    return [name for name, one in scales.items() if one is not None and one.dtype == "F32" and one.num_bytes > 4]


def _is_native(tensors: Collection[str]) -> bool:
    return any(all(f"{prefix}{name}" in tensors for name in names) for prefix in _PREFIXES for names in _NATIVE)


def _marks(
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, Mapping[str, str]],
    markers: Mapping[str, Mapping[str, Any]],
    ones: Collection[str],
) -> _Marks:
    formats = {module: _format(one) for module, one in markers.items()}
    sentinel = next((f"{prefix}{SENTINEL}" for prefix in _PREFIXES if f"{prefix}{SENTINEL}" in tensors), None)
    headers = [entries[HEADER] for entries in metadata.values() if HEADER in entries]
    if headers:
        hidden = (f"the header's {HEADER} hides the legacy {SENTINEL} tensor",) if sentinel else ()
        for text in headers:
            layers = json_object(text).get("layers")
            if not isinstance(layers, dict):
                return _Marks({}, fault=f"raises KeyError: 'layers', for the header's {HEADER} is a flat config")
            formats |= {module: _format(one) for module, one in layers.items()}
        return _Marks(formats, hidden)
    if sentinel is None:
        return _Marks(formats)
    scaled = {name.removesuffix(".scale_weight") for name in tensors if name.endswith(".scale_weight")}
    notes: tuple[str, ...] = ()
    if tensors[sentinel].shape == (2,):
        notes += ("two elements in the sentinel: it multiplies in full precision",)
    if ones:
        notes += (f"it drops {counted(ones, 'input scale')} of exactly 1.0, so that inputs are scaled dynamically",)
    return _Marks(formats | dict.fromkeys(scaled, "float8_e4m3fn"), notes, renamed=True)


def _format(marker: object) -> str | None:
    found = marker.get("format") if isinstance(marker, Mapping) else None
    return found if isinstance(found, str) else None


def _modules(tensors: Mapping[str, TensorInfo], marks: _Marks) -> Reading:
    """What becomes of each module, once a model is found."""
    raised: dict[str, list[str]] = {}
    taken: dict[str, list[str]] = {}
    formats, strange, by_row, casts = marks.formats, set[str](), row_scales(tensors), 0
    weights = {name: tensors[f"{name}.weight"] for name in formats if f"{name}.weight" in tensors} | coded(tensors)
    for module, weight in weights.items():
        if module not in formats:
            if weight.dtype == "U8":
                raised.setdefault(HALVED, []).append(module)
            elif any(f"{module}{scale}" in tensors for scale in _SCALES):
                taken.setdefault(UNSCALED, []).append(module)
            else:
                casts += 1
            continue
        kind = formats[module]
        if kind is None:
            raised.setdefault("raises ValueError: Unknown quantization format", []).append(module)
        elif kind not in _FORMATS:
            strange.add(kind)
        elif missing := [role for role in _FORMATS[kind][1] if not _has(tensors, module, role, marks)]:
            raised.setdefault(f"raises, for there is no {missing[0]}", []).append(module)
        elif module in by_row:
            raised.setdefault("raises when it multiplies, for there is a scale for each row", []).append(module)
        elif weight.dtype != _FORMATS[kind][0]:
            what = f"{weight.dtype} codes converted as numbers, for the marker says {kind}"
            taken.setdefault(what, []).append(module)
    modules = {what: tuple(sorted(names)) for what, names in {**raised, **taken}.items()}
    used = {kind for module, kind in formats.items() if kind is not None and module in weights}
    # Raw exports of both formats were run; what becomes of markers was read.
    was_run = bool(modules) and not formats and set(modules) <= {HALVED, UNSCALED}
    outcome: Outcome = "refuses" if raised else "misreads" if taken else "reads"
    how = "; ".join(f"{what}: {counted(names)}" for what, names in modules.items())
    if strange and not modules:
        outcome, how = "unknown", f"has markers of formats that were not looked at: {', '.join(sorted(strange))}"
    elif not modules and not used and not casts:
        outcome, how = "unknown", "looks for none of the names under which this file has its codes and scales"
    elif not modules:
        count = sum(module in weights for module in formats)
        how = f"takes {count} modules for {' and '.join(sorted(used))}" if used else ""
        if casts:  # right of a plain cast, and wrong where scales were lost
            outcome, how = "unknown", f"{how}; " if how else ""
            how += f"takes the codes of {casts} modules without scales for their values; no name says that they are"
    return Reading(
        engine=VERSION,
        outcome=outcome,
        how=how,
        source=_OPS,
        shown="run" if was_run else "read",
        layout=LAYOUT if "nvfp4" in used else None,
        modules=modules,
        notes=marks.notes,
    )


def _has(tensors: Mapping[str, TensorInfo], module: str, role: str, marks: _Marks) -> bool:
    """Whether a scale is there, or will be."""
    legacy = marks.renamed and role == "weight_scale" and f"{module}.scale_weight" in tensors
    return legacy or f"{module}.{role}" in tensors
