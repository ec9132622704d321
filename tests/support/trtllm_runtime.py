"""How TensorRT-LLM 1.3.0's VisualGen asks `ignore` about a linear: under which name, and by which rule.

Written from its tensorrt_llm/models/modeling_utils.py (``is_module_excluded_from_quantization``, without regular
expressions) and, by hand, from tensorrt_llm/_torch/visual_gen/models/*/transformer_*.py: which linears a block has,
and which modules of a checkpoint each is loaded from.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

_JOINT = {
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.to_out.0": ("attn.to_out.0",),
    "attn.to_add_out": ("attn.to_add_out",),
}
_QKV = {"attn.qkv_proj": ("attn.to_q", "attn.to_k", "attn.to_v")}
_MODULATED = {"norm1.linear": ("norm1.linear",), "norm1_context.linear": ("norm1_context.linear",)}
_FEED_FORWARD = {"up_proj": "net.0.proj", "down_proj": "net.2"}
_GATED = {"gate_up_proj": "linear_in", "down_proj": "linear_out"}


def _under(parents: Sequence[str], names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    return {f"{one}.{name}": (f"{one}.{source}",) for one in parents for name, source in names.items()}


def _same(*names: str) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in names}


_SEPARATE = _same(*(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")))
# Of each kind of block in each class: the linears, and the modules on disk that they are loaded from.
BLOCKS: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "FluxTransformer2DModel": {
        "transformer_blocks": _QKV | _JOINT | _MODULATED | _under(("ff", "ff_context"), _FEED_FORWARD),
        "single_transformer_blocks": _QKV | _same("norm.linear", "proj_mlp", "proj_out"),
    },
    "Flux2Transformer2DModel": {
        "transformer_blocks": _QKV | _JOINT | _under(("ff", "ff_context"), _GATED),
        "single_transformer_blocks": {
            "attn.to_qkv_mlp_proj.proj": ("attn.to_qkv_mlp_proj",),
            "attn.to_out.proj": ("attn.to_out",),
        },
    },
    "WanTransformer3DModel": {
        "blocks": {"attn1.qkv_proj": ("attn1.to_q", "attn1.to_k", "attn1.to_v")}
        | _same("attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
        | _under(("ffn",), _FEED_FORWARD),
    },
    "QwenImageTransformer2DModel": {
        "transformer_blocks": _SEPARATE
        | _same("attn.to_out.0", "attn.to_add_out", "img_mod.1", "txt_mod.1")
        | _under(("img_mlp", "txt_mlp"), _FEED_FORWARD),
    },
}
# Outside of blocks, of all classes; the linears of time and text embedders are torch's, and never quantized.
OUTSIDE = (
    "x_embedder", "context_embedder", "proj_out", "norm_out.linear", "img_in", "txt_in", "condition_embedder.time_proj",
    "double_stream_modulation_img.linear", "double_stream_modulation_txt.linear", "single_stream_modulation.linear",
)  # fmt: skip


def linears(class_name: str, modules: Collection[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The linears that it makes of a checkpoint, and the modules on disk that each is loaded from."""
    for name in OUTSIDE:
        if name in modules:
            yield name, (name,)
    kinds = BLOCKS[class_name]
    blocks = {tuple(module.split(".")[:2]) for module in modules if re.match(r"\w*blocks\.\d+\.", module)}
    for kind, number in sorted(blocks):
        for linear, sources in kinds[kind].items():
            yield f"{kind}.{number}.{linear}", tuple(f"{kind}.{number}.{source}" for source in sources)


def is_excluded(name: str, exclude_modules: Sequence[str]) -> bool:
    parts = name.split(".")
    asked = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return any(
        fnmatchcase(one, entry) or (entry.endswith(".*") and fnmatchcase(one, entry[:-2]))
        for one in asked
        for entry in exclude_modules
    )
