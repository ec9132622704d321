"""Drafts of real models: every transformer class of diffusers, and the presets that come with mopt as judges."""

import json
import random
from functools import cache
from typing import Any

import make_drafts
import pytest
from make_drafts import MARK, PAGE, Headers, Tried, against_shipped, classes, drafted, headers, plans, render, tried
from make_headers import TARGET, expand
from root import LONG

from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.preset.patterns import siblings
from modelopt_convert.preset.preset import load_preset, preset_names

# Every class takes a minute, and is tried with MOPT_TEST_LONG; else these, and some that differ from change to change.
ALWAYS = {"FluxTransformer2DModel", "HiDreamImageTransformer2DModel", "Transformer2DModel", "RFD4ProteinaTransformer"}
SHARE = 4


def shown() -> str:
    """The part of the page that the script makes."""
    return PAGE.read_text(encoding="utf-8").partition(MARK)[2]


def chosen() -> list[str]:
    names = list(classes())
    if LONG:
        return names
    rows = sum(row.startswith("| `") for row in shown().splitlines())
    return sorted(ALWAYS | set(random.Random(rows).sample(names, SHARE)))


@cache
def of_class(name: str) -> Tried:
    return tried(name)


def test_classes_are_drafted_planned_and_on_the_page() -> None:
    """The row of each, with how many modules each format quantizes; none of them is anything but a Linear."""
    rows = [row.split("`")[1] for row in shown().partition("| preset")[0].splitlines() if row.startswith("| `")]
    assert rows == list(classes()), "run scripts/make/make_drafts.py"
    for name in chosen():
        found = of_class(name)
        assert found.others == (), name
        assert found.row() in shown(), f"{name}: run scripts/make/make_drafts.py"


def test_the_figure_is_what_the_rows_say() -> None:
    """At least nine in ten give a draft with which both formats plan."""
    rows = [row.split("|")[1:-1] for row in shown().partition("| preset")[0].splitlines() if row.startswith("| `")]
    planned = [row for row in rows if all(cell.strip() for cell in row[2 : 2 + len(FORMATS)])]
    figure = f"{len(planned)} give a draft with which both formats plan: {len(planned) / len(rows):.0%}."
    assert f"Of the {len(rows)} transformer classes" in shown() and figure in " ".join(shown().split())
    assert len(planned) >= 0.9 * len(rows)
    if LONG:
        assert render([of_class(name) for name in classes()]).endswith(shown())


def real(name: str) -> Headers:
    """The model of a preset that comes with mopt."""
    read = json.loads((TARGET / f"{name}.json").read_text())
    return headers(name, {tensor: shape for tensor, (_, shape) in expand(read["tensors"]).items()}, read["config"])


@cache
def linears_of(name: str) -> frozenset[str]:
    named = real(name).tensors.items()
    return frozenset(module_of(tensor) for tensor, one in named if tensor.endswith(".weight") and len(one.shape) == 2)


def kept(base: Headers, patterns: list[str], linears: frozenset[str]) -> set[str]:
    matcher = make_drafts.PatternMatcher(dict.fromkeys(map(module_of, base.tensors)))
    return linears.intersection(module for pattern in patterns for module in matcher.find(pattern))


@pytest.mark.parametrize("name", preset_names())
def test_nothing_is_quantized_that_the_preset_of_the_class_calls_structural(name: str) -> None:
    base, shipped = real(name), load_preset(name).preset
    draft, linears = drafted(base, shipped), linears_of(name)
    for algorithm, rules in shipped.sets().items():
        mine = draft.rules(algorithm)
        assert kept(base, rules.structural, linears) <= kept(base, [*mine.structural, *mine.quality], linears)
    for plan in plans(base, draft, linears):
        assert plan.packed and linears.issuperset(plan.packed)


# What an engine's code cannot load packed, and no name tells: SGLang's FLUX.1 quantizes no feed-forward, and its
# cross-attention of Wan's image-to-video has one name in all blocks.
UNTOLD = {"transformer_blocks.*.ff.net.", "transformer_blocks.*.ff_context.net.", "blocks.*.attn2.to_"}


@pytest.mark.parametrize("name", preset_names())
def test_the_rules_alone_miss_nothing_that_a_name_tells(name: str) -> None:
    for patterns in against_shipped(name).values():
        assert all(pattern.startswith(tuple(UNTOLD)) for pattern in patterns), patterns
        assert f"| `{name}` |" in shown() or not patterns, "run scripts/make/make_drafts.py"


# In SD 3.5 Medium `attn2` is a second self-attention; a draft of this class takes the groups of its preset.
SELF_ATTENTION = "sd3.5-medium"
SHARED = [one for one in preset_names() if load_preset(one).preset.shared_scale and one != SELF_ATTENTION]


@pytest.mark.parametrize("name", SHARED)
def test_names_tell_which_inputs_are_shared(name: str) -> None:
    """As the presets have them, which follow ModelOpt's exporter."""
    draft, shipped = drafted(real(name)), load_preset(name).preset

    def groups(preset: Any) -> set[tuple[str, ...]]:
        return {group for group in siblings(preset.shared_scale, linears_of(name)) if len(group) > 1}

    assert groups(draft) == groups(shipped) != set()
