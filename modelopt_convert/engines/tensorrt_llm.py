"""TensorRT-LLM's view of ``ignore``: the names that its VisualGen asks for. Pure, no torch.

Written from files of the 1.3.0 release candidates, read and not run: ``tensorrt_llm/_torch/visual_gen/models/*/
transformer_*.py`` (``apply_quant_config_exclude_modules`` asks for each of its own linears; ``load_weights`` renames)
and ``visual_gen/modules/attention.py`` (q, k and v of a self-attention are one linear, or three, by the parallelism).
It matches patterns, against the whole name and, since a later candidate, every parent's.
"""

from collections.abc import Collection, Iterable

# Ends of a name on disk, and what stands there at runtime. The first that fits counts.
_RENAMED = {
    ".image_embedder.ff.net.0.proj": ".image_embedder.ff_in",
    ".image_embedder.ff.net.2": ".image_embedder.ff_out",
    ".attn2.add_k_proj": ".add_k_proj",
    ".attn2.add_v_proj": ".add_v_proj",
    ".net.0.proj": ".up_proj",
    ".net.2": ".down_proj",
    ".linear_in": ".gate_up_proj",
    ".linear_out": ".down_proj",
}
_FUSED = {
    ".qkv_proj": (".to_q", ".to_k", ".to_v"),
    ".add_qkv_proj": (".add_q_proj", ".add_k_proj", ".add_v_proj"),
}


def other_names(modules: Collection[str]) -> set[str]:
    """The names, other than those on disk, of linears that are made of these modules and of no others."""
    return {*_renamed(modules), *_fused(modules)}


def _renamed(modules: Iterable[str]) -> Iterable[str]:
    for module in modules:
        end = next((end for end in _RENAMED if module.endswith(end)), None)
        if end is not None:
            yield module.removesuffix(end) + _RENAMED[end]


def _fused(modules: Collection[str]) -> Iterable[str]:
    for fused, (first, *others) in _FUSED.items():
        for module in modules:
            parent = module.removesuffix(first)
            if parent != module and all(parent + other in modules for other in others):
                yield parent + fused
