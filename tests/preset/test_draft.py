"""Drafts of presets over names that nobody foresaw: what is counted, what is matched, and what the text says."""

import random
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from make_drafts import Headers, drafted, headers

from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.plan.from_base import plan_quantized
from modelopt_convert.plan.plan import Keeps
from modelopt_convert.preset.block_lists import BlockLists
from modelopt_convert.preset.draft import Draft, DraftedLine, draft_preset
from modelopt_convert.preset.draft_text import draft_text
from modelopt_convert.preset.one_input import groups_with_one_input
from modelopt_convert.preset.patterns import PatternMatcher, siblings
from modelopt_convert.preset.preset import load_preset, parse_preset
from modelopt_convert.run.errors import InputError

CONFIG = {"_class_name": "MadeUpTransformer2DModel", "depth": 3, "eps": 1e-6, "is_deep": True, "image_dim": None}
WORDS = [
    "blocks", "layers", "attn", "attn2", "cross_attn", "norm1", "norm_q", "x_embedder", "adaLN_modulation", "to_q",
    "to_k", "to_v", "add_q_proj", "add_k_proj", "w1", "w2", "w3", "gate", "experts", "proj", "proj_out", "ff", "net",
    "0", "1", "2", "3", "00", "01", "10",
]  # fmt: skip
HOSTILE = st.text(alphabet="a0*[]:.\"'\\\n\r\t#=\x00\x1b\x7f\u202eé\U0001f600 ", max_size=5)
SHAPES = st.one_of(
    st.tuples(st.sampled_from([16, 32]), st.sampled_from([16, 24, 32])),
    st.lists(st.sampled_from([0, 8, 16]), min_size=1, max_size=3).map(tuple),
)


def trees(*parts: st.SearchStrategy[str], least: int = 1) -> st.SearchStrategy[dict[str, tuple[int, ...]]]:
    """Shapes by tensor, with names of ``least`` parts or more."""
    names = st.lists(st.one_of(*parts), min_size=least, max_size=5).map(".".join)
    roles = st.sampled_from([".weight", ".weight", ".weight", ".bias", ".scale_shift_table", ""])
    tensors = st.tuples(names, roles).map("".join)
    return st.dictionaries(tensors, SHAPES, min_size=1, max_size=40)


def blocks(depth: int, more: dict[str, tuple[int, ...]] | None = None) -> dict[str, tuple[int, ...]]:
    """A model whose laws are not trivial."""
    of_block: dict[str, tuple[int, ...]] = {
        "norm1.linear": (96, 32), "attn.to_q": (32, 32), "attn.to_k": (32, 32), "attn.to_v": (32, 32),
        "cross_attn.to_q": (32, 32), "cross_attn.to_k": (32, 32), "cross_attn.to_v": (32, 32), "norm2": (32,),
        "ff.net.0.proj": (64, 32), "ff.net.2": (32, 64),
    }  # fmt: skip
    found = {f"blocks.{n}.{name}.weight": shape for n in range(depth) for name, shape in of_block.items()}
    outside: dict[str, tuple[int, ...]] = {"x_in.weight": (32, 4), "pos.weight": (9, 32), "proj_out.weight": (4, 32)}
    return found | outside | (more or {})


def of(shapes: dict[str, tuple[int, ...]]) -> Headers:
    return headers("made-up", shapes, CONFIG)


def draft_of(base: Headers) -> Draft | None:
    """None where the draft is refused, which is an answer too."""
    try:
        return draft_preset(base.tensors, base.config, None, "made-up")
    except InputError as error:
        assert error.code == "preset.draft" and error.hint
        return None


def weights(base: Headers, least: int = 2) -> dict[str, tuple[int, ...]]:
    named = base.tensors.items()
    return {module_of(name): one.shape for name, one in named if name.endswith(".weight") and len(one.shape) >= least}


def check(base: Headers) -> bool:
    """The laws; whether there was a draft."""
    draft = draft_of(base)
    if draft is None:
        return False
    preset = parse_preset(draft_text(draft), path="draft").preset
    matcher = PatternMatcher(dict.fromkeys(map(module_of, base.tensors)))
    linears = {name for name, shape in weights(base).items() if len(shape) == 2 and 0 not in shape}
    assert preset.sets().keys() == draft.sets.keys() >= {"fp8"}  # which can hold what NVFP4 can, and more
    assert all((f"# No [{algorithm}]: " in draft_text(draft)) == (algorithm not in draft.sets) for algorithm in FORMATS)
    for algorithm, rules in preset.sets().items():
        one = draft.sets[algorithm]
        assert rules.structural == [line.pattern for line in one.structural]
        assert rules.quality == [line.pattern for line in one.quality]
        kept = {name for pattern in (*rules.structural, *rules.quality) for name in matcher.find(pattern)}
        quantized = linears - kept
        assert quantized
        # Each once: by the first pattern that has it, or by none.
        assert sum(line.linears for line in (*one.structural, *one.quality)) == len(linears & kept)
        assert sum(line.modules for line in (*one.structural, *one.quality)) == len(kept & weights(base).keys())
        assert sum(line.linears for line in one.quantized) == len(quantized)
        assert all(line.modules and line.reason for line in (*one.structural, *one.quality))
        total = sum(base.tensors[f"{name}.weight"].num_bytes for name in weights(base))
        lines = (*one.structural, *one.quality, *one.quantized)
        assert sum(line.num_bytes for line in lines) == total
        assert weights(base).keys() - kept <= linears  # what is no Linear has a pattern
        block = FORMATS[algorithm].block_size
        assert all(not block or weights(base)[name][1] % block == 0 for name in quantized)
        for group in siblings(preset.fused, weights(base, least=1)):
            assert quantized.isdisjoint(group) or quantized.issuperset(group)
    shared = [name for group in siblings(preset.shared_scale or [], linears) if len(group) > 1 for name in group]
    assert len(shared) == len(set(shared))
    for group in siblings(preset.shared_scale or [], linears):
        assert len(group) < 2 or len({weights(base)[name][1] for name in group}) == 1
    return True


@given(trees(st.sampled_from(WORDS), least=2))
@settings(max_examples=40, deadline=None)
def test_every_module_is_accounted_for_once_and_planned(shapes: dict[str, tuple[int, ...]]) -> None:
    base = of(blocks(4) | shapes)
    assert check(base)
    preset = drafted(base)
    draft = draft_of(base)
    assert draft is not None
    plan = plan_quantized(FORMATS["nvfp4"], base, Keeps(preset, preset.rules("nvfp4"), ()), max_shard_size=10**9)
    assert len(plan.packed) == sum(line.linears for line in draft.sets["nvfp4"].quantized)


@given(trees(HOSTILE, st.sampled_from(WORDS)))
@example({"blocks.0.a[1].weight": (16, 16), "blocks.0.a.weight": (16, 8)})
@example({"a.**.norm.weight": (16, 16), "a.b.weight": (16, 16)})
@example({"a..norm.weight": (16, 16), "b.weight": (16, 16)})
@example({"x\ny.weight": (16, 8), "x\ny.0.b.weight": (16, 16)})
@example({'x"\n[fp8]\n.norm.weight': (16, 16), "b.weight": (16, 16)})
@settings(max_examples=150, deadline=None)
def test_no_name_breaks_the_toml_or_matches_more_than_itself(shapes: dict[str, tuple[int, ...]]) -> None:
    assert check(of(blocks(2) | shapes)) or any(
        re.search(r"[][*]|[.][.]|^.blocks.weight$", f".{name}") for name in shapes
    )


@given(st.randoms(use_true_random=False))
@settings(max_examples=10, deadline=None)
def test_the_text_depends_on_nothing_else(order: random.Random) -> None:
    shapes = list((blocks(12) | {"blocks.01.x.weight": (16, 16)}).items())
    mixed = order.sample(shapes, len(shapes))
    first, second = (draft_of(of(dict(one))) for one in (shapes, mixed))
    assert first is not None and second is not None and draft_text(first) == draft_text(second)


def test_a_plain_model_is_drafted_as_one_would_by_hand() -> None:
    base = of(blocks(6))
    assert check(base)
    preset = drafted(base)
    rules = preset.rules("nvfp4")
    assert rules.structural == ["blocks.*.norm1.linear", "pos", "proj_out", "x_in"]
    assert rules.quality == ["blocks.[:1].**", "blocks.[-1:].**"]
    assert preset.shared_scale == [["attn.to_q", "attn.to_k", "attn.to_v"], ["cross_attn.to_k", "cross_attn.to_v"]]
    assert preset.fused == preset.shared_scale
    assert preset.config == {"depth": 3, "eps": 1e-6, "is_deep": True} and preset.having == {"image_dim": False}
    assert rules.status == "candidate" and preset.title is preset.base_repo is preset.license is None
    plan = plan_quantized(FORMATS["nvfp4"], base, Keeps(preset, rules, ()), max_shard_size=10**9)
    assert len(plan.packed) == 4 * 8 and len(plan.shared) == 4 * 2
    text = draft_text(draft_preset(base.tensors, base.config, None, "made-up"))
    assert '  "blocks.*.norm1.linear",  # Linear of a norm: 6 Linears, 36,864 bytes\n' in text
    assert '  "x_in",  # 4 columns are no whole blocks of 16: 1 Linear, 256 bytes\n' in text
    assert '#   "blocks.*.ff.net.2": 4 Linears, 16,384 bytes\n' in text


def test_few_blocks_have_no_first_and_last() -> None:
    assert drafted(of(blocks(3))).rules("nvfp4").quality == []
    assert drafted(of(blocks(4))).rules("nvfp4").quality == ["blocks.[:1].**", "blocks.[-1:].**"]


def test_a_module_that_differs_in_one_block_is_named_by_itself() -> None:
    odd = {"blocks.2.ff.net.2.weight": (32, 24)}
    rules = drafted(of(blocks(4) | odd)).rules("nvfp4")
    assert "blocks.2.ff.net.2" in rules.structural and "blocks.*.ff.net.2" not in rules.structural


def structural(shapes: dict[str, tuple[int, ...]]) -> tuple[DraftedLine, ...]:
    draft = draft_of(of(shapes))
    assert draft is not None and check(of(shapes))
    return draft.sets["nvfp4"].structural


def test_what_engines_join_is_kept_whole() -> None:
    """Also where groups overlap: the queries, keys and values of HunyuanVideo's single blocks go with their MLP."""
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")
    shapes = {f"single_transformer_blocks.{n}.{name}.weight": (32, 32) for n in range(3) for name in names}
    odd = {f"single_transformer_blocks.{n}.proj_mlp.weight": (32, 24) for n in range(3)}
    base, known = of(shapes | odd), load_preset("hunyuanvideo").preset
    assert drafted(base).rules("nvfp4").structural == ["single_transformer_blocks.*.proj_mlp"]
    preset = drafted(base, known)
    assert preset.rules("nvfp4").structural == [f"single_transformer_blocks.*.{one}" for one in sorted(names[:4])]
    assert preset.rules("fp8").structural == []
    lines = draft_preset(base.tensors, base.config, known, "made-up").sets["nvfp4"].structural
    assert [line.reason for line in lines] == [*["joined with proj_mlp"] * 3, "24 columns are no whole blocks of 16"]


def test_other_inputs_make_other_groups() -> None:
    odd = {f"blocks.{n}.attn.to_k.weight": (32, 24) for n in range(3)}
    assert ["attn.to_q", "attn.to_k", "attn.to_v"] not in drafted(of(blocks(3) | odd)).fused
    odd = {f"blocks.{n}.attn.to_k.weight": (32, 32, 1) for n in range(3)}
    (line,) = (
        line for line in structural(blocks(3) | odd) if "attn.to_k" in line.pattern and "cross" not in line.pattern
    )
    assert line.reason == "no Linear: a weight of 3 dimensions" and line.linears == 0 and line.modules == 3


def test_a_router_is_no_linear() -> None:
    experts = {f"blocks.{n}.moe.experts.{m}.w1.weight": (32, 32) for n in range(3) for m in range(4)}
    gates = {f"blocks.{n}.moe.gate.weight": (4, 32) for n in range(3)}
    assert "blocks.*.moe.gate" in drafted(of(blocks(3) | experts | gates)).rules("fp8").structural
    alone = {f"blocks.{n}.mlp.gate.weight": (64, 32) for n in range(3)}
    assert not any("gate" in one for one in drafted(of(blocks(3) | alone)).rules("fp8").structural)


def test_a_preset_of_the_class_adds_what_no_name_tells() -> None:
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out", "ff.net.2")
    lists = ("transformer_blocks", "single_transformer_blocks")
    shapes = {f"{one}.{n}.{name}.weight": (32, 32) for one in lists for n in range(3) for name in names}
    base, known = of(shapes), load_preset("flux1-dev").preset
    assert not drafted(base).rules("nvfp4").structural
    preset = drafted(base, known)
    assert preset.rules("nvfp4").structural == ["transformer_blocks.*.ff.net.2"]
    assert preset.runtime_names == {"transformer_blocks.*.ff.net.2": ["transformer_blocks.*.ff.proj_out"]}
    assert preset.shared_scale == [["to_q", "to_k", "to_v"]]  # the groups of names that the model lacks are left out


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"norm.weight": (16,)}, "found none to quantize among 0 weights"),
        ({"x_embedder.weight": (16, 16)}, "found none to quantize among 1 weights"),
        ({"a[0].norm.weight": (16, 16), "a(0).norm.weight": (16, 16), "a*.b.weight": (16, 16)}, ""),
        ({"[].norm.weight": (16, 16), "b.norm.weight": (16, 16), "c.weight": (16, 16)}, ""),
        ({"[].x.weight": (16, 8), "b.x.weight": (16, 16)}, "no pattern tells it from others"),
        ({f"a{n}.weight": (16, 16) for n in range(1001)}, "take more than 1000 patterns"),
        ({"b.weight": (16, 16)} | {f"a{n}.norm.weight": (16, 16) for n in range(1001)}, "take more than 1000 patterns"),
    ],
)
def test_what_cannot_be_drafted_is_refused(shapes: dict[str, tuple[int, ...]], words: str) -> None:
    base = of(shapes)
    if not words:
        assert check(base)
        return
    with pytest.raises(InputError) as caught:
        draft_preset(base.tensors, base.config, None, "made-up")
    assert caught.value.code == "preset.draft" and words in caught.value.message and "\n" not in caught.value.message


@given(st.dictionaries(HOSTILE, st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | HOSTILE))
@settings(max_examples=60, deadline=None)
def test_any_config_is_written_as_it_is(config: dict[str, object]) -> None:
    base = Headers(Path("made-up"), of(blocks(3)).tensors, CONFIG | config)
    read = tomllib.loads(draft_text(draft_preset(base.tensors, base.config, None, "made-up")))
    for key, value in read["config"].items():
        assert base.config[key] == value and type(base.config[key]) is type(value)
    assert parse_preset(draft_text(draft_preset(base.tensors, base.config, None, "x")), path="x").preset.fits(
        base.config
    )


@pytest.mark.parametrize(
    ("modules", "module", "pattern"),
    [
        (["b.0.x", "b.1.x"], "b.1.x", "b.*.x"),
        (["b.0.x"], "b.0.x", "b.*.x"),
        (["ff.net.0.proj", "ff.net.2"], "ff.net.0.proj", "ff.net.0.proj"),  # a Sequential with an activation
        (["to_out.0"], "to_out.0", "to_out.0"),
        (["heads.0", "heads.1", "heads.2"], "heads.1", "heads.*"),
        (["mlp.0", "mlp.1"], "mlp.1", "mlp.1"),
        (["b.0.net.0.proj", "b.0.net.2", "b.1.net.2"], "b.1.net.2", "b.*.net.2"),
        (["a.[0].x"], "a.[0].x", "a.*0*.x"),
    ],
)
def test_a_number_is_a_star_where_it_counts_blocks(modules: list[str], module: str, pattern: str) -> None:
    assert BlockLists(modules).pattern(module) == pattern


@pytest.mark.parametrize(
    ("tensors", "groups"),
    [
        ("a.to_q a.to_k a.to_v", [("to_q", "to_k", "to_v")]),
        ("attn2.to_q attn2.to_k attn2.to_v", [("to_k", "to_v")]),
        ("a.attn1.to_q a.attn1.to_k a.attn2.to_q a.attn2.to_k a.attn2.to_v", [("attn1.to_q", "attn1.to_k"),
                                                                            ("attn2.to_k", "attn2.to_v")]),
        ("a.to_q", []),
        ("a.0.to_q a.0.to_k a.0.to_v b.attn2.to_q b.attn2.to_k b.attn2.to_v", [("attn2.to_k", "attn2.to_v")]),
    ],
)  # fmt: skip
def test_which_siblings_have_one_input(tensors: str, groups: list[tuple[str, ...]]) -> None:
    linears = of({f"{name}.weight": (16, 16) for name in tensors.split()}).tensors
    by_module = {module_of(name): info for name, info in linears.items()}
    assert groups_with_one_input(by_module, [("to_q", "to_k", "to_v")]) == groups
