"""SGLang Diffusion's view of a checkpoint: how it infers, merges and defaults. Pure, no torch.

Written from SGLang 0.5.23: ``runtime/utils/quantization_utils.py`` (inference from shards, lookup order of configs),
``runtime/layers/quantization/modelopt_quant.py`` (``from_config`` and its defaults) and
``runtime/loader/transformer_load_utils.py`` (``_merge_modelopt_fp4_configs``).
"""

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from modelopt_convert.checkpoint.header import TensorInfo, json_object
from modelopt_convert.engines.belief import Belief
from modelopt_convert.engines.outcome import quant_keys
from modelopt_convert.formats.layout import CANONICAL, Layout
from modelopt_convert.preset.patterns import ignored

VERSION = "sglang@0.5.23"
GUESSED = frozenset({"nvfp4"})  # formats whose layout is inferred from tensors

# SGLang infers swapped nibbles and swizzled scales, always both, from these names and from marker tensors, and from
# nothing else. No config key overrides that.
PACKED_QKV = re.compile(r"(double_blocks\.\d+\.(img|txt)_attn\.qkv|single_blocks\.\d+\.linear1)\.")
MARKER = ".comfy_quant"
_CONFIG = "config.json"
FLAT_METADATA_KEYS = ("_quantization_metadata", "quantization_config")
# ``ModelOptFp4Config.from_config`` reads the key, and ``ModelOptFp4LinearMethod.apply`` would obey it. But
# ``build_nvfp4_config_from_safetensors_list`` makes another config without the key, and ``_merge_modelopt_fp4_configs``
# goes on with that config.
DYNAMIC_INPUTS = (
    f"{VERSION} loses dynamic_input_scale where packed weights lie in the shards (_merge_modelopt_fp4_configs does not "
    "carry it over) and takes 1.0 for every missing input_scale: blocks of activations whose largest value is below "
    "0.1 lose precision, those above 2688 are clipped"
)

# ``load_model_from_full_model_state_dict`` in ``runtime/loader/fsdp_load.py``; ``ModelOptFp8LinearMethod`` is static.
ONES = (
    f"{VERSION} takes 1.0 for every input_scale that is missing under quant_method modelopt: inputs above 448 are "
    "clipped, those below 0.016 lose precision"
)


def dynamic_words(config: Mapping[str, Any]) -> str | None:
    """What SGLang 0.5.23 makes of ``dynamic_input_scale``, where it does not scale the inputs as they come."""
    if _is_another(config):
        return ONES if (quant_keys(config) or {}).get("quant_method") == "modelopt" else None
    return DYNAMIC_INPUTS


def believe(
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, Mapping[str, str]],
    config: Mapping[str, Any],
    whole: Collection[str] = (),
) -> Belief:
    """What SGLang 0.5.23 believes of a checkpoint.

    Args:
        tensors: The transformer's.
        metadata: Header metadata by file.
        config: config.json.
        whole: The names of all tensors of the files, if there are others: a marker counts wherever it is.
    """
    because: list[str] = []
    names = list(whole or tensors)
    packed_qkv = next((name for name in names if PACKED_QKV.match(name)), None)
    marker = next((name for name in names if name.endswith(MARKER)), None)
    if packed_qkv is not None:
        because.append(f"swapped and swizzled, from the packed-QKV name {packed_qkv}")
    if marker is not None:
        because.append(f"swapped and swizzled, from the marker {marker}")
    refuses = _refusal(config)
    declared = _declared(metadata, config)
    packed = set() if _is_another(config) else _packed_modules(tensors)
    modules = (
        packed
        if _is_another(config)
        else packed
        | {
            # A header may name modules that are not there, or are not the transformer's.
            name
            for name in _layers(metadata)
            if f"{name}.weight" in tensors
        }
    )
    if packed and declared is not None and declared[0] != _CONFIG:
        declared = None  # where modules are packed, the header is never asked
    group_size = _inferred_group_size(tensors, modules)
    if group_size is None and declared is not None:
        group_size = _declared_group_size(declared[1])
    if declared is not None and _declared_group_size(declared[1]) is None:
        refuses = refuses or f"{VERSION} refuses an NVFP4 config without group_size"
    # Names and markers count only if a module is seen as packed, and its group size is known.
    inferred = bool(because) and bool(modules) and group_size is not None
    if not inferred:
        because.clear()
    swap, layout = inferred, "swizzled" if inferred else "linear"
    if declared is not None:
        source, keys = declared
        said = bool(keys.get("swap_weight_nibbles", keys.get("checkpoint_uses_packed_qkv", False)))
        if "swap_weight_nibbles" in keys:
            because.append(f"swap_weight_nibbles {said} in {source}")
        swap = swap or said
        said_layout = str(keys.get("checkpoint_weight_scale_layout", "linear"))
        if "checkpoint_weight_scale_layout" in keys:
            because.append(f"checkpoint_weight_scale_layout {said_layout} in {source}")
        layout = said_layout if layout == "linear" else layout
    if not because:
        because.append("no key, no marker, no packed-QKV name: the defaults, low nibble first and linear")
    return Belief(
        engine=VERSION,
        quantized=bool(modules) or declared is not None,
        layout=Layout("high" if swap else "low", "linear" if layout == "linear" else "128x4"),
        group_size=group_size,
        modules=frozenset(modules),
        input_scales="stored" if all(f"{module}.input_scale" in tensors for module in modules) else "ones",
        because=tuple(because),
        refuses=refuses,
    )


# ``runtime/models/dits/ltx_2.py`` hands its Linears no prefix: no entry of ``ignore`` fits them.
_NAMELESS = frozenset({"LTX2VideoTransformer3DModel"})


def believe_fp8(names: Mapping[str, Collection[str]], config: Mapping[str, Any], path: str) -> Belief:
    """What SGLang 0.5.23 believes of an FP8 checkpoint: of names and config.json alone.

    ``ModelOptQuantConfig.is_layer_excluded`` in ``modelopt_quant.py`` decides by a module's name; under the method
    ``fp8`` ``is_layer_skipped`` in ``srt/layers/quantization/utils.py`` does, by any segments in a row. Every other
    Linear to which the class hands the quantization is FP8, and what is stored for it is cast.

    Args:
        names: The Linears to which the class hands the quantization, by disk name: SGLang's names of each.
        config: config.json.
        path: Where it lies, for the message.

    Raises:
        InputError: ``config.ignore``.
    """
    spelled = {spelling for spellings in names.values() for spelling in spellings}
    found = config.get("quantization_config")
    keys = found if isinstance(found, dict) else {}
    key = "ignored_layers" if keys.get("quant_method") == "fp8" else "ignore"
    nameless = config.get("_class_name") in _NAMELESS
    left: set[str] = set()
    if not nameless and key == "ignore":
        left = ignored(keys.get(key), spelled, path=path)
    elif not nameless:
        layers = [f".{entry}." for entry in keys.get(key) or () if isinstance(entry, str)]
        left = {spelling for spelling in spelled if any(layer in f".{spelling}." for layer in layers)}
    reason = f"`{key}` fits no Linear of this class: they have no names" if nameless else f"`{key}` of config.json"
    is_declared = keys.get("dynamic_input_scale") is True
    return Belief(
        engine=VERSION,
        quantized=True,
        layout=CANONICAL,
        group_size=None,
        modules=frozenset(name for name, spellings in names.items() if not left.intersection(spellings)),
        input_scales="stored" if not is_declared else "dynamic" if key == "ignored_layers" else "ones",
        because=(reason,),
        refuses=_refusal(config),
    )


def header_layers(metadata: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """The layers that ComfyUI-style headers name, and what they say of each."""
    found: dict[str, Any] = {}
    for entries in metadata.values():
        layers = json_object(entries.get("_quantization_metadata")).get("layers")
        found |= layers if isinstance(layers, dict) else {}
    return found


def _is_another(config: Mapping[str, Any]) -> bool:
    """Whether config.json declares something else than NVFP4, so that nothing is inferred from tensors."""
    found = config.get("quantization_config")
    return isinstance(found, dict) and "quant_method" in found and not _says_nvfp4(found)


def _refusal(config: Mapping[str, Any]) -> str | None:
    found = config.get("quantization_config")
    algorithm = (
        found.get("quant_algo") if isinstance(found, dict) and found.get("quant_method") == "modelopt" else "NVFP4"
    )
    return None if algorithm in ("NVFP4", "FP8") else f"{VERSION} refuses quant_algo {algorithm}"


def _packed_modules(tensors: Mapping[str, TensorInfo]) -> set[str]:
    """Modules with a U8 weight and a block scale in the same file: shards are looked at one by one."""
    found: set[str] = set()
    for name, info in tensors.items():
        module = name.removesuffix(".weight_scale")
        if module == name or info.dtype != "F8_E4M3" or len(info.shape) < 2:
            continue
        weight = tensors.get(f"{module}.weight")
        if weight is not None and weight.dtype == "U8" and weight.file == info.file:
            found.add(module)
    return found


def _layers(metadata: Mapping[str, Mapping[str, str]]) -> set[str]:
    """Modules that a ComfyUI header names as nvfp4."""
    layers = header_layers(metadata)
    return {name for name, layer in layers.items() if isinstance(layer, dict) and layer.get("format") == "nvfp4"}


def _declared(
    metadata: Mapping[str, Mapping[str, str]], config: Mapping[str, Any]
) -> tuple[str, Mapping[str, Any]] | None:
    """The first declaration in lookup order: config.json, then the header."""
    found = config.get("quantization_config")
    if isinstance(found, dict) and _says_nvfp4(found):
        return _CONFIG, found
    for entries in metadata.values():
        for key in FLAT_METADATA_KEYS:
            found = json_object(entries.get(key))
            if _says_nvfp4(found):
                return f"header {key}", found
    return None


def _says_nvfp4(found: Mapping[str, Any]) -> bool:
    return found.get("quant_method") in ("modelopt", "modelopt_fp4") and found.get("quant_algo") == "NVFP4"


def _inferred_group_size(tensors: Mapping[str, TensorInfo], modules: set[str]) -> int | None:
    for module in sorted(modules):
        weight, scale = tensors.get(f"{module}.weight"), tensors.get(f"{module}.weight_scale")
        if weight is not None and scale is not None and len(weight.shape) == len(scale.shape) == 2 and scale.shape[1]:
            columns = weight.shape[1] * 2
            if columns % scale.shape[1] == 0:
                return columns // scale.shape[1]
    return None


def _declared_group_size(keys: Mapping[str, Any]) -> int | None:
    size = keys.get("group_size")
    groups = keys.get("config_groups")
    if size is None and isinstance(groups, dict) and groups:
        first = next(iter(groups.values()))
        weights = first.get("weights") if isinstance(first, dict) else None
        size = weights.get("group_size") if isinstance(weights, dict) else None
    return size if isinstance(size, int) else None


def ignored_by(entries: Collection[str], name: str) -> str | None:
    """The ``ignore`` entry by which SGLang would leave a module unquantized, or None.

    The FP8 configs of ``modelopt_quant.py`` and ``modelopt_fp8.py`` match the whole name; the config of
    ``modelopt_fp8.py`` also matches the name's first segment. Entries here are names without wildcards.
    """
    return next((entry for entry in (name, name.partition(".")[0]) if entry in entries), None)


def misread(belief: Belief, nibbles: str, scales: str, *, group_size: int, packed: frozenset[str]) -> list[str]:
    """Where a belief departs from what is known, in words; an unknown answer contradicts nothing."""
    if belief.refuses:
        return [belief.refuses]
    if packed and not belief.quantized:
        return [f"{belief.engine} would not load it as NVFP4, {len(packed)} modules are packed"]
    found: list[str] = []
    read = belief.layout
    if nibbles in ("low", "high") and read.nibbles != nibbles:
        found.append(f"{belief.engine} would read the {read.nibbles} nibble as the even column, it is the {nibbles}")
    if scales in ("linear", "128x4") and read.scales != scales:
        found.append(f"{belief.engine} would read the scales as {read.scales}, they are {scales}")
    if belief.group_size not in (None, group_size):
        found.append(f"{belief.engine} would read groups of {belief.group_size}, they are of {group_size}")
    missed = sorted(packed - belief.modules)
    if missed:
        found.append(f"{belief.engine} would take {len(missed)} packed modules for unquantized ({missed[0]} first)")
    return found


def load_command(prefix: str, base: str, components: Sequence[str], flag: str = "--transformer-path") -> str:
    """SGLang's command that loads the output.

    Args:
        prefix: The path of the output, without the name of a component.
        base: The base model.
        components: Folder names, or none where the output itself is the transformer.
        flag: The flag of SGLang that loads a transformer by itself.
    """
    flags = [f"--{name.replace('_', '-')}-path {prefix}/{name}" for name in components] or [f"{flag} {prefix}"]
    return f"sglang generate --model-path {base} {' '.join(flags)} --prompt '...'"


def pipeline_command(place: str, model: str | None) -> str:
    """SGLang's command that loads a whole pipeline.

    Args:
        place: A folder or a repo.
        model: The repo of the model that it is, or is made from. SGLang takes how to sample from its name, and else
            from that of the folder, which may be like another model's (registry.py, ``_get_config_info``).
    """
    known = f" --model-id {shlex.quote(model.rpartition('/')[2])}" if model is not None else ""
    return f"sglang generate --model-path {shlex.quote(place)}{known} --prompt '...'"
