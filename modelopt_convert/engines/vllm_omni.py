"""vLLM-omni's view of a checkpoint: which Linears it takes for packed, which it fuses, which scales it drops. No torch.

Written from vllm 0.30.0 and vllm-omni 0.30.0:

- ``ModelOptQuantConfigBase.is_layer_excluded`` in vllm, ``model_executor/layers/quantization/modelopt.py``: a module is
  excluded if an entry of ``ignore`` is its name, is a part of its name, or is a pattern that fits the whole name. One
  that is fused is excluded too if the names of all its parts are entries, where the class has a
  ``packed_modules_mapping``.
- ``ModelOptFp8CheckpointAdapter`` in vllm-omni's ``diffusion/model_loader/checkpoint_adapters/modelopt.py``: it decodes
  FP8 weights whose target is plain, and drops scales whose names it cannot translate.
- ``diffusion/models/*``, a class each: where ``quant_config`` is passed on, and ``stacked_params_mapping``.
"""

import re
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.engines.belief import Belief
from modelopt_convert.engines.outcome import (
    HALVED,
    Outcome,
    Reading,
    Shown,
    coded,
    counted,
    quant_keys,
)
from modelopt_convert.formats.layout import CANONICAL
from modelopt_convert.preset.patterns import ignored

VERSION = "vllm-omni@0.30.0"
_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


@dataclass(frozen=True, slots=True)
class _Class:
    """How one class of transformers is made.

    Attributes:
        where: Its file in ``diffusion/models``.
        quantized: The Linears to which it hands the quantization, by disk name.
        fused: Parts of one module, by the last segment of their parent and the module's own.
        mapped: Whether it has a ``packed_modules_mapping``.
        renamed: What its names have in place of disk names; the adapter does not know these.
        out: Its name for ``to_out.0``, which the adapter does know.
    """

    where: str
    quantized: str
    fused: Mapping[tuple[str, str], tuple[str, ...]]
    mapped: bool = True
    renamed: tuple[tuple[str, str], ...] = ()
    out: str = "to_out.0"


_ATTENTION = r"attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
_JOINT = {("attn", "to_qkv"): _QKV, ("attn", "add_kv_proj"): _ADDED}
_CLASSES: Mapping[str, _Class] = {
    # Its double blocks get ``safe_quant_config``, which is None for ModelOpt.
    "FluxTransformer2DModel": _Class(
        "flux/flux_transformer.py", r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)", _JOINT
    ),
    "Flux2Transformer2DModel": _Class(
        "flux2/flux2_transformer.py",
        rf"transformer_blocks\.\d+\.({_ATTENTION}|ff(_context)?\.linear_(in|out))"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)",
        _JOINT,
        mapped=False,
    ),
    "QwenImageTransformer2DModel": _Class(
        "qwen_image/qwen_image_transformer.py",
        rf"transformer_blocks\.\d+\.({_ATTENTION}|(img|txt)_mlp\.net\.(0\.proj|2))",
        _JOINT,
    ),
    "WanTransformer3DModel": _Class(
        "wan2_2/wan2_2_transformer.py",
        r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|attn2\.add_[kv]_proj|ffn\.net\.(0\.proj|2))",
        {("attn1", "to_qkv"): _QKV},
        mapped=False,
        renamed=((".ffn.net.0.", ".ffn.net_0."), (".ffn.net.2", ".ffn.net_2")),
        out="to_out",
    ),
    "LTX2VideoTransformer3DModel": _Class(
        "ltx2/ltx2_transformer.py",
        r"transformer_blocks\.\d+\.((audio_)?attn[12]|audio_to_video_attn|video_to_audio_attn)\.(to_[qkv]|to_out\.0)"
        r"|transformer_blocks\.\d+\.(audio_)?ff\.net\.(0\.proj|2)",
        {("attn1", "to_qkv"): _QKV},
    ),
}


def believe(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], path: str) -> Belief:
    """What vLLM-omni 0.30.0 believes: of tensors and of config.json.

    Args:
        tensors: All tensors of the checkpoint.
        config: config.json, with a ``quantization_config`` of ModelOpt.
        path: Where it lies, for the message.

    Raises:
        InputError: ``config.ignore``.
    """
    keys = config["quantization_config"]
    made = _CLASSES.get(str(config.get("_class_name")))
    linears = sorted(
        name.removesuffix(".weight")
        for name, one in tensors.items()
        if name.endswith(".weight") and len(one.shape) == 2
    )
    asked = [name for name in linears if made is not None and re.fullmatch(made.quantized, name)]
    groups: dict[str, list[str]] = {}
    for name in asked:
        groups.setdefault(_named(made, name), []).append(name)
    entries = keys.get("ignore")
    left = excluded(entries, groups, made, path=path)
    taken = {group: members for group, members in groups.items() if group not in left}
    packed = frozenset(name for members in taken.values() for name in members)
    size = keys.get("group_size", 16)
    nvfp4 = keys.get("quant_algo") == "NVFP4"
    return Belief(
        engine=VERSION,
        quantized=True,
        layout=CANONICAL,
        group_size=size if nvfp4 and isinstance(size, int) else None,
        modules=packed,
        input_scales="stored" if all(f"{name}.input_scale" in tensors for name in packed) else "unset",
        because=(f"diffusion/models/{made.where}, and `ignore` of config.json",) if made else (),
        refuses=_refusal(keys) if made else f"{VERSION} has no class {config.get('_class_name')}",
        fused=tuple(tuple(members) for members in taken.values() if len(members) > 1),
        unset=frozenset(name for name in packed if made and any(old in f"{name}." for old, _ in made.renamed)),
        decodes=not nvfp4,
    )


def _refusal(keys: Mapping[str, Any]) -> str | None:
    """``_build_single`` in ``quantization/factory.py`` hands all keys beside the method ``fp8`` to ``Fp8Config``."""
    if keys.get("quant_method") != "fp8":
        return None
    return f"{VERSION} raises TypeError: Cannot instantiate Fp8Config, for quant_method fp8 with keys of ModelOpt"


def _named(made: _Class | None, name: str) -> str:
    """vLLM-omni's name of a Linear, by which it asks for quantization; one for all parts of a fused module."""
    if made is None:
        return name
    parent, _, leaf = name.rpartition(".")
    for (last, fused), members in made.fused.items():
        if leaf in members and parent.rpartition(".")[2] == last:
            return f"{parent}.{fused}"
    for old, new in made.renamed:
        name = name.replace(old, new)
    return name.replace("to_out.0", made.out)


def _parts(group: str) -> tuple[str, ...]:
    """The names of a fused module's parts, as a ``packed_modules_mapping`` has them; none of another module."""
    parent, _, leaf = group.rpartition(".")
    return tuple(f"{parent}.{part}" for part in {"to_qkv": _QKV, "add_kv_proj": _ADDED}.get(leaf, ()))


def excluded(entries: object, names: Collection[str], made: _Class | None, *, path: str) -> set[str]:
    """The modules that are left unquantized.

    Raises:
        InputError: ``config.ignore``.
    """
    listed = {entry for entry in entries if isinstance(entry, str)} if isinstance(entries, list) else set()
    parts = [f"*{entry}*" for entry in widened({entry for entry in listed if "*" not in entry}, names)]
    found = ignored([*listed, *parts], names, path=path)
    if made is not None and made.mapped:
        found |= {name for name in names if (members := _parts(name)) and listed.issuperset(members)}
    return found


def widened(entries: Collection[str], names: Collection[str]) -> set[str]:
    """The entries without ``*`` that are a part of some name: vLLM excludes that module too.

    It takes time by the length of both, however many there are.
    """
    firsts = {entry.partition(".")[0] for entry in entries}
    words = {word for name in names for word in name.split(".")}
    # Where an entry may begin within a word: anywhere, if it ends in that word; where it ends with the word otherwise.
    within = sorted({word[at:] for word in words for at in range(len(word))})
    begun = {word: [tail for at in range(len(word)) if (tail := word[at:]) in firsts] for word in words}
    across: list[str] = []
    for name in names:
        segments = name.split(".")
        for number, word in enumerate(segments[:-1]):
            across += (".".join((tail, *segments[number + 1 :])) for tail in begun[word])
    across.sort()
    return {entry for entry in entries if begins_one(across if "." in entry else within, entry)}


def begins_one(texts: Sequence[str], start: str) -> bool:
    """Whether one of the texts, which are in order, begins so."""
    place = bisect_left(texts, start)
    return place < len(texts) and texts[place].startswith(start)


# ``SUPPORTED_QUANTIZATION_METHODS`` in vllm-omni's quantization/factory.py has these; their readers were not looked at.
_OTHERS = frozenset(
    {"fp8", "bitsandbytes", "gguf", "mxfp8", "mxfp4", "svdquant", "inc", "auto-round", "auto_round", "int8"}
)
_FACTORY = "vllm_omni/quantization/factory.py"


def read(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], *, is_file: bool) -> Reading:
    """What vLLM-omni makes of a file that is not declared as ModelOpt's NVFP4 or FP8; of those, ``believe`` says it.

    ``TransformerConfig.from_dict`` in ``diffusion/data.py`` builds the quantization from config.json, and nothing else
    declares it. ``_NATIVE_SINGLE_FILE_MODELS`` in ``diffusion/registry.py`` has the models that may be one file.

    Args:
        tensors: All tensors.
        config: config.json, empty for one file.
        is_file: Whether it is one file.
    """
    if is_file:
        how = "loads repos with a config.json; one file, of Anima alone"
        return _reading("refuses", how, "vllm_omni/diffusion/registry.py", "read")
    keys = quant_keys(config)
    if keys is not None:
        method = keys.get("quant_method", keys.get("method"))
        name = str(method).lower().replace("_", "-")
        if name == "compressed-tensors":  # looked up with an underscore, and vLLM has it with a hyphen
            return _reading(
                "refuses", "raises ValueError: Unknown quantization method: 'compressed_tensors'", _FACTORY, "read"
            )
        if name == "torchao" and "quant_type" in keys:
            return _reading("reads", f"hands {name} to vLLM's own reader, which was not run here", _FACTORY, "inferred")
        if name.startswith("modelopt"):
            return _reading(
                "unknown", f"builds no quantization of quant_algo {keys.get('quant_algo')}", _FACTORY, "read"
            )
        if method in _OTHERS or name == "torchao":
            return _reading("unknown", "has a reader of its own for it, which was not looked at", _FACTORY, "read")
        return _reading("refuses", f"raises ValueError: Unknown quantization method: {method!r}", _FACTORY, "read")
    weights = coded(tensors)
    packed = tuple(sorted(module for module, one in weights.items() if one.dtype == "U8"))
    source = "vllm_omni/diffusion/data.py"
    if packed:
        how = f"finds no declaration: {HALVED}: {counted(packed)}"
        return _reading("refuses", how, source, "inferred", {HALVED: packed})
    return _reading("unknown", "finds no declaration and takes all for plain; not run here", source, "inferred")


def _reading(
    outcome: Outcome, how: str, source: str, shown: Shown, modules: Mapping[str, tuple[str, ...]] | None = None
) -> Reading:
    return Reading(engine=VERSION, outcome=outcome, how=how, source=source, shown=shown, modules=modules or {})
