"""TensorRT-LLM's view: `ignore` has every linear that VisualGen is to have in BF16, by its own names, and no other."""

import json
from pathlib import Path

import pytest
import trtllm_runtime
from kit import build
from safetensors import safe_open
from tiny_models import FAMILIES

from modelopt_convert.engines.tensorrt_llm import other_names


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
@pytest.mark.parametrize("family", ["flux1", "flux2", "wan", "qwen_image"])
def test_ignore_is_of_the_linears_that_are_kept(families: Path, tmp_path: Path, family: str, algorithm: str) -> None:
    checkpoint = build(families, family, algorithm, tmp_path)
    ignore = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["ignore"]
    names: set[str] = set()
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            names |= set(handle.keys())
    modules = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    packed = {name.removesuffix(".weight_scale") for name in names if name.endswith(".weight_scale")}
    seen = set()
    for linear, sources in trtllm_runtime.linears(FAMILIES[family].class_name, modules):
        assert set(sources) <= modules
        [is_packed] = {source in packed for source in sources}
        assert trtllm_runtime.is_excluded(linear, ignore) is not is_packed, linear
        seen |= set(sources)
    assert packed <= seen


def test_names_are_of_what_is_wholly_there() -> None:
    qkv = {"blocks.0.attn1.to_q", "blocks.0.attn1.to_k", "blocks.0.attn1.to_v"}
    assert other_names(qkv) == {"blocks.0.attn1.qkv_proj"}
    assert other_names(qkv - {"blocks.0.attn1.to_k"}) == set()
    assert other_names({"a.attn.add_q_proj", "a.attn.add_k_proj", "a.attn.add_v_proj"}) == {"a.attn.add_qkv_proj"}
    assert other_names({"a.ffn.net.0.proj", "b.ff.net.2", "c.ff.linear_in", "d.ff.linear_out", "proj_out"}) == {
        "a.ffn.up_proj",
        "b.ff.down_proj",
        "c.ff.gate_up_proj",
        "d.ff.down_proj",
    }
    assert other_names({"e.image_embedder.ff.net.2", "blocks.0.attn2.add_k_proj"}) == {
        "e.image_embedder.ff_out",
        "blocks.0.add_k_proj",
    }
