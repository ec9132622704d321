"""The ignore list: it covers what is kept under every engine's way of matching, and never what is packed."""

import sglang_runtime
import trtllm_runtime
import vllm_runtime
from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt_convert.checkpoint.header import TensorSpec
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.plan.ignore import ignore_list
from modelopt_convert.plan.plan import Step
from modelopt_convert.preset.patterns import ignored

FP8 = FORMATS["fp8"]
BLOCKS = ("blocks", "single_blocks", "more_single_blocks")
PARTS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.2", "norm.linear", "proj_out")
MODULES = st.sets(
    st.one_of(
        st.tuples(st.sampled_from(BLOCKS), st.integers(0, 12), st.sampled_from(PARTS)).map(
            lambda one: f"{one[0]}.{one[1]}.{one[2]}"
        ),
        st.sampled_from(["proj_out", "norm_out.linear", "x_embedder", "time.linear_1"]),
    ),
    min_size=1,
    max_size=30,
)


def listed(modules: set[str], packed: set[str]) -> list[str]:
    steps = {
        f"{name}.weight": Step(
            TensorSpec(f"{name}.weight", "F8_E4M3" if name in packed else "BF16", (4, 16)), "export", "copy"
        )
        for name in modules
    }
    return ignore_list(steps, FP8, packed, None, {})


@settings(max_examples=300, deadline=None)
@given(MODULES, st.data())
def test_what_is_kept_is_covered_and_what_is_packed_is_not_for_any_engine(
    modules: set[str], data: st.DataObject
) -> None:
    packed = data.draw(st.sets(st.sampled_from(sorted(modules))))
    ignore = listed(modules, packed)
    assert ignored(ignore, modules, path="config.json") == modules - packed
    matchers = (
        sglang_runtime.is_excluded,
        sglang_runtime.is_ignored,
        vllm_runtime.is_excluded,
        trtllm_runtime.is_excluded,
    )
    for module in modules:
        assert {matches(module, ignore) for matches in matchers} == {module not in packed}, module


def test_a_whole_block_is_a_pattern_and_a_part_of_another_name_has_a_star() -> None:
    modules = {"blocks.0.a", "blocks.0.b", "blocks.1.a", "blocks.1.b", "proj_out", "blocks.1.proj_out", "x_embedder"}
    assert listed(modules, {"blocks.1.a", "blocks.1.proj_out"}) == [
        "blocks.0.*",
        "blocks.0.a",
        "blocks.0.b",
        "blocks.1.b",
        "proj_out*",
        "x_embedder",
    ]
    # Of names that no preset knows, an engine finds those of whole blocks.
    assert all(
        matches("blocks.0.renamed", ["blocks.0.*"])
        for matches in (sglang_runtime.is_excluded, vllm_runtime.is_excluded)
    )


def test_names_of_tensorrt_llm_are_listed_but_in_whole_blocks() -> None:
    modules = {
        f"blocks.{number}.{part}" for number in (0, 1) for part in ("attn.to_q", "attn.to_k", "attn.to_v", "ff.net.2")
    }
    ignore = listed(modules, {"blocks.1.ff.net.2"})
    assert {"blocks.0.*", "blocks.1.attn.qkv_proj"} < set(ignore)
    assert not {"blocks.0.attn.qkv_proj", "blocks.0.ff.down_proj", "blocks.1.ff.down_proj"} & set(ignore)
    # A name that is a part of a quantized one's has a star, here too.
    modules = {"blocks.0.ff.net.2", "blocks.0.a", "more_blocks.0.ff.net.2", "more_blocks.0.a"}
    assert "blocks.0.ff.down_proj*" in listed(modules, {"blocks.0.a", "more_blocks.0.ff.net.2"})


def test_where_a_star_would_cover_a_packed_module_the_name_stays_as_it_is() -> None:
    modules = {"proj_out", "proj_out_2", "blocks.0.proj_out"}
    assert listed(modules, modules - {"proj_out"}) == ["proj_out"]


def test_more_whole_blocks_than_any_model_has_are_listed_by_name_alone() -> None:
    modules = {f"blocks.{number}.a" for number in range(257)}
    assert set(listed(modules, set())) == modules
