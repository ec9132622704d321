"""What SGLang Diffusion makes of a checkpoint that no config.json of ModelOpt's FP8 declares. Pure, no torch.

Read in SGLang 0.5.23, and run. One file, or a folder without a config.json, goes to ``--transformer-weights-path`` and
replaces the weights of a base, whose class names the parameters: ``fsdp_load.py`` skips what the class has no name for,
and raises for a weight that is not there.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from modelopt_convert.checkpoint.header import TensorInfo, json_object
from modelopt_convert.engines.belief import Belief
from modelopt_convert.engines.outcome import FP8_DTYPES, Outcome, Reading, coded, counted, quant_keys
from modelopt_convert.engines.sglang import FLAT_METADATA_KEYS, VERSION, believe, header_layers


class Named(NamedTuple):
    """Whose names a file has.

    Attributes:
        family: The model family.
        is_native: Whether they are the model's own, and not diffusers'.
        prefix: What stands in front of each.
    """

    family: str
    is_native: bool
    prefix: str


# Families of which a small file in the model's own names was loaded, and raised for names, in NVFP4 and in FP8.
_OWN_NAMES = frozenset({"flux1", "wan", "hunyuan_video"})
# Those of which a file was loaded right, in one format at least.
NAMES_RUN = frozenset({"qwen_image", "ltx2"})

# ``QUANTIZATION_METHODS`` in ``runtime/layers/quantization/__init__.py``.
_METHODS = frozenset(
    {
        "auto-round", "fp8", "modelopt", "modelopt_fp8", "modelopt_fp4", "bitsandbytes", "modelslim", "mxfp8", "mxfp4",
        "mxfp4_npu", "convrot_int8",
    }
)  # fmt: skip
_GROUP = 16
_RESOLVING, _LOADING = "runtime/loader/transformer_load_utils.py", "runtime/loader/fsdp_load.py"


def read(
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, Mapping[str, str]],
    config: Mapping[str, Any],
    *,
    is_file: bool,
    named: Named | None = None,
    whole: Collection[str] = (),
) -> Reading:
    """What SGLang 0.5.23 makes of a checkpoint; of FP8 that config.json declares, ``believe_fp8`` says it.

    ``_resolve_quant_config`` in ``transformer_load_utils.py`` asks config.json, for weights that replace others the
    header too, and the tensors for NVFP4. ``load_model_from_full_model_state_dict`` in ``fsdp_load.py`` compares
    shapes.

    Args:
        tensors: The transformer's.
        metadata: Header metadata by file.
        config: config.json, empty for one file.
        is_file: Whether it is one file or a folder without config.json, which goes to ``--transformer-weights-path``.
        named: Whose names the tensors have, if that is known.
        whole: The names of all tensors of the files, if there are others.
    """
    keys, belief = quant_keys(config), believe(tensors, metadata, config, whole)
    method = keys.get("quant_method") if keys is not None else None
    if keys is not None and method not in _METHODS:
        how = f"raises ValueError: Invalid quantization method: {method}"
        return _reading("refuses", how, "runtime/layers/quantization/__init__.py")
    if belief.refuses is not None:
        return _reading("refuses", belief.refuses.removeprefix(VERSION).strip(), "runtime/utils/quantization_utils.py")
    if method is not None and not belief.modules:
        return _reading("unknown", f"has a reader of its own for {method}, which was not looked at", _RESOLVING)
    codes, floats = coded(tensors), _float8(metadata) if is_file and method is None else []
    if is_file and not codes:
        return _reading("unknown", "looks for none of the names under which this file has its codes", _RESOLVING)
    if is_file and named is not None and named.prefix:
        how = f"does not take {named.prefix!r} off the names, and raises for the weights that it misses under its own"
        return _reading("refuses", how, _LOADING)
    packed = _packed(tensors, belief) if belief.modules and not floats else None
    if packed is not None and packed.outcome == "refuses":
        return packed
    if is_file and named is not None and (fault := _names_fault(named, tensors, codes)) is not None:
        return fault
    if floats and belief.modules:
        how = (
            f"takes every Linear for FP8, since its header names FP8 layers ({min(floats)} first), and raises for "
            f"{counted(belief.modules)} in NVFP4"
        )
        return _reading("refuses", how, _RESOLVING)
    if packed is not None:
        return packed
    if not codes:
        return _reading("unknown", "looks for none of the names under which this file has its codes", _RESOLVING)
    if floats:
        how = "takes every Linear for FP8, inputs scaled dynamically: those in BF16 are cast to FP8"
        return _reading("misreads", how, _RESOLVING)
    if is_file:
        how = (
            "raises ValueError: Replacement checkpoint contains quantized tensors but no supported native quantization "
            "declaration"
        )
        return _reading("refuses", how, _RESOLVING)
    if any(one.dtype not in ("F8_E4M3",) for one in codes.values()):
        return _reading("unknown", "finds no declaration; what becomes of the codes was not run", _LOADING)
    how = "finds no declaration: it decodes FP8 to BF16, and raises RuntimeError where it fuses q, k and v"
    return _reading("refuses", how, _LOADING)


def _float8(metadata: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The layers of headers for which ``handle_fp8_metadata_format`` in ``quantization_utils.py`` declares FP8."""
    layers = {
        name: one
        for entries in metadata.values()
        if "format_version" in json_object(entries.get(FLAT_METADATA_KEYS[0]))
        for name, one in header_layers({"": entries}).items()
    }
    return [name for name, one in layers.items() if isinstance(one, dict) and "float8" in str(one.get("format"))]


def _names_fault(named: Named, tensors: Mapping[str, TensorInfo], codes: Mapping[str, TensorInfo]) -> Reading | None:
    """What SGLang raises because of the names, or of how its class makes a module of that name."""
    is_fp8 = all(one.dtype in FP8_DTYPES for one in codes.values())
    if named.is_native and (named.family in _OWN_NAMES or (named.family == "flux2" and is_fp8)):
        how = "raises ValueError (New parameter is not supported): it does not map all of the model's own names"
        return _reading("refuses", how, _LOADING)
    if named.is_native and named.family == "flux2":
        what = "packed, where to_added_qkv is made without quantization"
        packed = [name for name in codes if name.endswith(".txt_attn.qkv")]
        if not packed:
            return None
        how = f"raises AssertionError (Failed to shard/load parameter), {what}: {counted(packed)}"
        return _reading("refuses", how, _LOADING, None, {what: packed})
    if named.family == "ltx2" and any(one.dtype == "U8" for one in codes.values()):
        how = "raises AssertionError (Failed to shard/load parameter): it takes Linears of LTX-2 in BF16 for packed"
        return _reading("refuses", how, _LOADING)
    joined = [
        name
        for name in codes
        if named.family == "qwen_image"
        and is_fp8
        and name.rpartition(".")[2] in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
        and (scale := tensors.get(f"{name}.weight_scale")) is not None
        and not scale.shape
    ]
    if joined:
        what = "scales without a dimension, where it joins those of q, k and v"
        how = f"raises RuntimeError (zero-dimensional tensor cannot be concatenated), {what}: {counted(joined)}"
        return _reading("refuses", how, _LOADING, None, {what: joined})
    return None


def _packed(tensors: Mapping[str, TensorInfo], belief: Belief) -> Reading:
    """Of NVFP4: what is amiss beside the layout."""
    padded: list[str] = []
    unscaled: list[str] = []
    for module in sorted(belief.modules):
        weight, scale = tensors.get(f"{module}.weight"), tensors.get(f"{module}.weight_scale")
        if weight is None or scale is None or len(weight.shape) != 2 or len(scale.shape) != 2:
            continue
        if scale.shape[0] > weight.shape[0] or scale.shape[1] > weight.shape[1] * 2 // _GROUP:
            padded.append(module)
        if f"{module}.weight_scale_2" not in tensors:
            unscaled.append(module)
    if padded:
        what = "scales padded, which its parameters are not"
        how = f"raises AssertionError (Failed to shard/load parameter), {what}: {counted(padded)}"
        return _reading("refuses", how, _LOADING, belief, {what: padded})
    if unscaled:
        what = "no weight_scale_2, taken for 1.0"
        how = f"{what}: {counted(unscaled)}"
        return _reading("misreads", how, "runtime/layers/quantization/modelopt_quant.py", belief, {what: unscaled})
    return _reading("reads", f"takes {len(belief.modules)} modules for nvfp4", _RESOLVING, belief)


def _reading(
    outcome: Outcome,
    how: str,
    source: str,
    belief: Belief | None = None,
    modules: Mapping[str, Sequence[str]] | None = None,
) -> Reading:
    return Reading(
        engine=VERSION,
        outcome=outcome,
        how=how,
        source=source,
        shown="run" if outcome == "refuses" or (belief is None and outcome == "misreads") else "read",
        layout=belief.layout if belief is not None else None,
        modules={what: tuple(names) for what, names in (modules or {}).items()},
    )
