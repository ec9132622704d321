"""vLLM-omni's view as a table: which entries exclude more than they name."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.engines.vllm_omni import begins_one, believe, widened

# Few letters, so that names are often parts of others, within a segment and across dots.
NAMES = st.lists(st.text("ab1", min_size=1, max_size=3), min_size=1, max_size=4).map(".".join)


@settings(max_examples=500, deadline=None)
@given(st.sets(NAMES, max_size=12), st.sets(NAMES, max_size=12))
def test_widened_is_every_part_of_a_name(entries: set[str], names: set[str]) -> None:
    expected = {entry for entry in entries if any(entry in name for name in names)}
    assert widened(entries, names) == expected


@given(st.lists(NAMES), NAMES)
def test_a_beginning_is_found_among_texts_in_order(texts: list[str], start: str) -> None:
    assert begins_one(sorted(texts), start) == any(text.startswith(start) for text in texts)


@pytest.mark.parametrize(
    ("class_name", "parts", "is_taken"),
    [
        ("QwenImageTransformer2DModel", ("add_q_proj", "add_k_proj", "add_v_proj"), False),
        ("Flux2Transformer2DModel", ("add_q_proj", "add_k_proj", "add_v_proj"), True),  # it names no parts
        ("Flux2Transformer2DModel", ("to_q", "to_k", "to_v"), False),  # to_q is a part of the name to_qkv
    ],
)
def test_a_fused_module_is_excluded_by_its_parts_where_the_class_names_them(
    class_name: str, parts: tuple[str, ...], is_taken: bool
) -> None:
    modules = [f"transformer_blocks.0.attn.{part}" for part in parts]
    names = [f"{module}.weight" for module in modules]
    tensors = {name: TensorInfo(name, "BF16", (16, 16), "model.safetensors", 0, 512) for name in names}
    keys = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": modules}
    found = believe(tensors, {"_class_name": class_name, "quantization_config": keys}, "config.json")
    assert found.modules == (set(modules) if is_taken else set())


def test_time_goes_by_the_length_of_both() -> None:
    """A quadratic search of 40,000 by 40,000 names would take minutes."""
    entries = {f"blocks.{number}.norm.linear" for number in range(40_000)}
    names = {f"more_blocks.{number}.attn.to_q" for number in range(40_000)}
    before = time.process_time()
    assert widened(entries, names) == set()
    assert time.process_time() - before < 20
