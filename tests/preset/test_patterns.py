"""The glob language of presets: what each pattern means, against fnmatch and list slices as oracles."""

import difflib
import fnmatch
import re
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.preset.patterns import PatternMatcher, check_pattern, ignored, nearest, rename, stars
from modelopt_convert.run.errors import InputError

MODULES = [
    "proj_out",
    "time_embed.linear_1",
    *(f"blocks.{block}.{name}" for block in range(5) for name in ("norm", "attn.to_q", "attn.to_out.0", "ff.net.2")),
    *(f"single.{block}.proj" for block in range(12)),
]

# (pattern, name, whether it matches)
TABLE = [
    ("proj_out", "proj_out", True),
    ("proj_out", "blocks.0.proj_out", False),
    ("proj", "proj_out", False),
    ("proj_out", "proj", False),
    ("Proj_out", "proj_out", False),
    ("proj_out", "", False),
    # * stays within a segment and may be empty.
    ("*", "proj_out", True),
    ("*", "", False),
    ("*", "blocks.0", False),
    ("blocks.*.norm", "blocks.3.norm", True),
    ("blocks.*.norm", "blocks.3.4.norm", False),
    ("blocks.*.norm", "blocks.norm", False),
    ("blocks.*", "blocks.0.norm", False),
    ("*_out", "proj_out", True),
    ("*_out", "_out", True),
    ("proj*", "proj", True),
    ("p*o*t", "proj_out", True),
    ("to_*.0", "to_out.0", True),
    ("a*a", "a", False),
    ("a*a*", "a", False),
    ("b*", "ab", False),
    ("a*a", "aa", True),
    ("ab*ba", "aba", False),
    ("*ab*ab", "abab", True),
    ("*ab*ab", "aab", False),
    # ** stands for any number of segments, none included.
    ("**", "", True),
    ("**", "proj_out", True),
    ("**", "blocks.0.attn.to_q", True),
    ("time_embed.**", "time_embed", True),
    ("time_embed.**", "time_embed.a.b.c", True),
    ("time_embed.**", "time_embedding", False),
    ("**.norm", "norm", True),
    ("**.norm", "blocks.0.norm", True),
    ("**.norm", "blocks.0.norm.linear", False),
    ("**.norm", "blocks.0.prenorm", False),
    ("blocks.**.0", "blocks.0", True),
    ("blocks.**.0", "blocks.1.attn.to_out.0", True),
    ("**.attn.**", "blocks.0.attn", True),
    ("**.attn.**", "blocks.0.attn.to_q", True),
    ("**.**", "", True),
    ("*.**", "", False),
    # Block ranges count from the depth under that prefix: 5 blocks, 12 singles.
    ("blocks.[:3].norm", "blocks.0.norm", True),
    ("blocks.[:3].norm", "blocks.2.norm", True),
    ("blocks.[:3].norm", "blocks.3.norm", False),
    ("blocks.[-3:].**", "blocks.1.norm", False),
    ("blocks.[-3:].**", "blocks.2.attn.to_q", True),
    ("blocks.[-3:].**", "blocks.4.norm", True),
    ("blocks.[1:2].norm", "blocks.1.norm", True),
    ("blocks.[1:2].norm", "blocks.0.norm", False),
    ("blocks.[1:2].norm", "blocks.2.norm", False),
    ("blocks.[:-1].norm", "blocks.3.norm", True),
    ("blocks.[:-1].norm", "blocks.4.norm", False),
    ("blocks.[:].norm", "blocks.4.norm", True),
    ("blocks.[3:1].norm", "blocks.2.norm", False),
    ("blocks.[:9].norm", "blocks.4.norm", True),
    ("blocks.[:9].norm", "blocks.5.norm", False),  # no such block
    ("blocks.[:1].norm", "blocks.x.norm", False),
    ("blocks.[:1].norm", "blocks.\u0660.norm", False),  # a digit to int(), not a block
    ("single.[-3:].proj", "single.9.proj", True),
    ("single.[-3:].proj", "single.8.proj", False),
    ("single.[-3:].proj", "single.2.proj", False),
    ("*.[-1:].**", "blocks.4.norm", True),
    ("*.[-1:].**", "single.4.proj", False),
    ("*.[-1:].**", "single.11.proj", True),
    ("blocks.*.attn.to_out.[:1]", "blocks.3.attn.to_out.0", True),
    ("**.[-1:]", "blocks.1.ff.net.2", True),
    ("nowhere.[:1]", "nowhere.0", False),
    # All else is literal.
    ("proj.out", "projXout", False),
    ("proj+", "projj", False),
    ("proj+", "proj+", True),
    ("(proj)", "proj", False),
    ("(proj)", "(proj)", True),
    ("pro?", "proj", False),
    ("pro?", "pro?", True),
    ("^proj$", "proj", False),
    ("a|b", "a", False),
    ("\\d", "1", False),
    ("{a,b}", "a", False),
    ("!a", "b", False),
    ("a\n", "a", False),
    ("a", "a\n", False),
]


@pytest.mark.parametrize(("pattern", "name", "wanted"), TABLE)
def test_matches(pattern: str, name: str, wanted: bool) -> None:
    check_pattern(pattern)
    assert PatternMatcher(MODULES).matches(pattern, name) is wanted


REFUSED = ["", ".", "a..b", ".a", "a.", "a**", "**a", "a.**b", "***", "[01]", "a[0]", "[0]", "[a:b]", "[:3]x", "x[:3]"]
REFUSED += ["[:1][:1]", "[1:2:3]", "[", "]", "a]", "[]", "[-:]", "[:1234567]", "[ :1]", "[+1:]", "[:3]\n", "[1.5:]"]


@pytest.mark.parametrize("pattern", [*REFUSED, "[\u0663:]"])
def test_bad_patterns(pattern: str) -> None:
    for whole in {pattern, f"{pattern}.a", f"a.{pattern}"} - {"a.a"}:
        with pytest.raises(InputError) as caught:
            check_pattern(whole)
        assert caught.value.code == "preset.pattern"
        assert repr(whole) in caught.value.message
        assert caught.value.hint


def test_find_keeps_the_models_order() -> None:
    matcher = PatternMatcher(["b.1", "a.0", "b.0", "a.1"])
    assert matcher.find("*.*") == ["b.1", "a.0", "b.0", "a.1"]
    assert matcher.find("a.**") == ["a.0", "a.1"]


def test_a_pattern_that_matches_nothing_names_the_three_nearest() -> None:
    with pytest.raises(InputError) as caught:
        PatternMatcher(MODULES).find("blocks.*.atn.to_q")
    assert caught.value.code == "preset.no_match"
    assert "'blocks.*.atn.to_q'" in caught.value.message
    assert caught.value.hint is not None
    shown = caught.value.hint.removeprefix("the nearest names are ").split(", ")
    assert shown[0] == "blocks.0.attn.to_q"
    # One of each place in the structure: the other four blocks would say nothing more.
    assert len({re.sub(r"\d+", "*", name) for name in shown}) == len(shown) == 3
    assert set(shown) <= set(MODULES)
    assert nearest("single.*.prj", MODULES, count=1) == ["single.0.proj"]


def oracle(pattern: list[str], name: list[str]) -> bool:
    """The meaning, written down without regard to cost; fnmatch within a segment."""
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(oracle(pattern[1:], name[skipped:]) for skipped in range(len(name) + 1))
    return bool(name) and fnmatch.fnmatchcase(name[0], pattern[0]) and oracle(pattern[1:], name[1:])


SEGMENT = st.text("ab*(+^\\", min_size=1, max_size=5).filter(lambda segment: "**" not in segment)
PART = st.text("ab(+^\\0", min_size=1, max_size=6)


@st.composite
def pattern_and_name(draw: st.DrawFn) -> tuple[str, str]:
    """Half of the names are made from the pattern, or few would match."""
    segments = draw(st.lists(SEGMENT | st.just("**"), min_size=1, max_size=5))
    if draw(st.booleans()):
        return ".".join(segments), ".".join(draw(st.lists(PART, min_size=1, max_size=5)))
    parts: list[str] = []
    for segment in segments:
        if segment == "**":
            parts += draw(st.lists(PART, max_size=2))
        else:
            filled = re.sub(r"\*", lambda _: draw(st.text("ab0", max_size=2)), segment)
            parts.append(filled or "a")
    return ".".join(segments), ".".join(parts)


@settings(deadline=None, max_examples=500)
@given(pattern_and_name())
@example(("a*b.*", "ab.a"))
@example(("a*b.*", "ab.a.a"))
def test_agrees_with_fnmatch_segment_by_segment(case: tuple[str, str]) -> None:
    pattern, name = case
    check_pattern(pattern)
    segments, parts = pattern.split("."), name.split(".") if name else []
    found = PatternMatcher([name]).matches(pattern, name)
    if "**" not in segments:
        same = len(segments) == len(parts)
        assert found is (same and all(map(fnmatch.fnmatchcase, parts, segments)))
    assert found is oracle(segments, parts)


BOUND = st.none() | st.integers(-9, 9)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 7), st.integers(1, 7), BOUND, BOUND)
def test_a_block_range_is_a_slice_of_that_lists_blocks(
    depth: int, other: int, first: int | None, last: int | None
) -> None:
    modules = [f"a.{block}.x" for block in range(depth)] + [f"b.{block}.x" for block in range(other)]
    pattern = f"*.[{'' if first is None else first}:{'' if last is None else last}].x"
    check_pattern(pattern)
    wanted = [f"a.{block}.x" for block in range(depth)[first:last]]
    wanted += [f"b.{block}.x" for block in range(other)[first:last]]
    matcher = PatternMatcher(modules)
    assert [module for module in modules if matcher.matches(pattern, module)] == wanted


def test_depth_is_the_highest_block_wherever_it_stands() -> None:
    matcher = PatternMatcher(["a.0007.x", "a.7.x", "a.2.x"])
    assert matcher.find("a.[-1:].x") == ["a.0007.x", "a.7.x"]
    assert matcher.find("a.[2:3].x") == ["a.2.x"]


def test_hostile_patterns_and_names_end() -> None:
    """Each would keep a backtracking matcher busy for longer than anyone waits."""
    segment = "a" * 4000
    assert not PatternMatcher([segment]).matches("*a*a*a*a*a*a*a*a*b", segment)
    many = ".".join("a" * 400)
    assert not PatternMatcher([many]).matches("**.a." * 30 + "b", many)
    assert PatternMatcher([many]).matches("**.a." * 30 + "**", many)
    # int() of so many digits is an error in Python, and a block number to nobody.
    digits = f"a.{'9' * 5000}"
    assert not PatternMatcher([digits]).matches("a.[:]", digits)


def test_hostile_names_take_memory_in_proportion_to_their_length() -> None:
    """Every dotted prefix of 50 names of 4 KB as text would be 200 MB."""
    names = [".".join([str(number), "17", *["0"] * 2000]) for number in range(50)]
    tracemalloc.start()
    try:
        matcher = PatternMatcher(names)
        assert matcher.find("**.[:1].*") == []
    except InputError as error:
        assert error.code == "preset.no_match"
        assert error.hint is not None and len(error.hint) < 1000
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 5_000_000
    assert matcher.matches("*.[17:].**", names[0])
    assert not matcher.matches("*.[:17].**", names[0])


def test_no_model_has_blocks_deeper_than_32_levels() -> None:
    for level, wanted in ((31, True), (32, False)):
        name = ".".join(["a"] * level + ["0"])
        assert PatternMatcher([name]).matches("**.[:1]", name) is wanted


def test_of_many_long_names_a_few_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """difflib takes time by the product of lengths; those with parts of the pattern come first."""
    compared: list[str] = []
    real = difflib.SequenceMatcher.ratio

    def ratio(matcher: difflib.SequenceMatcher[str]) -> float:
        compared.append(str(matcher.a))
        return real(matcher)

    monkeypatch.setattr(difflib.SequenceMatcher, "ratio", ratio)
    names = ["x" * 4000 + str(number) for number in range(1000)] + [f"junk{number}.a" for number in range(1000)]
    assert nearest("blocks.*.atn.to_q", [*names, *MODULES])[0] == "blocks.0.attn.to_q"
    assert len(set(compared)) <= 200 and max(map(len, compared)) <= 200
    with pytest.raises(InputError) as caught:
        PatternMatcher(["x" * 4000]).find("y")
    assert caught.value.hint == "the nearest names are too long to be shown"


def ignores(entry: object, name: str) -> bool:
    return ignored([entry], [name], path="config.json") == {name}


def test_in_a_configs_ignore_list_the_star_crosses_dots() -> None:
    assert ignores("blocks.*", "blocks.0.attn.to_q")
    assert ignores("*.to_q", "blocks.0.attn.to_q")
    assert ignores("*norm*", "blocks.0.norm.linear")
    assert ignores("**norm***", "blocks.0.norm.linear")
    assert ignores("proj_out", "proj_out")
    assert ignores("*", "")
    assert not ignores("blocks.*", "single.0")
    assert not ignores("proj_out", "blocks.0.proj_out")
    assert not ignores("proj", "proj_out")
    assert not ignores("a*a", "a")
    assert not ignores("a" * 4097 + "*", "a" * 4096)
    assert not ignores(1, "1")


@pytest.mark.parametrize("found", [None, "proj_out", {"proj_out": 1}, 1])
def test_an_ignore_that_is_no_list_covers_nothing(found: object) -> None:
    assert ignored(found, ["proj_out"], path="config.json") == set()


def test_a_long_ignore_list_is_looked_up_and_one_of_too_many_globs_refused() -> None:
    """Each entry against each module would run for hours: both may be a million."""
    names = [f"blocks.{number}" for number in range(50_000)]
    entries = [f"other.{number}" for number in range(300_000)]
    assert ignored([*entries, "blocks.7", "*.49999"], names, path="c") == {"blocks.7", "blocks.49999"}
    for globs in ([f"*{number}" for number in range(1000)], ["*a" * 500]):
        with pytest.raises(InputError) as caught:
            ignored(globs, names, path="c")
        assert caught.value.code == "config.ignore"
        assert caught.value.path == "c" and caught.value.hint
    assert ignored(["*" * 1_000_000], names, path="c") == set(names)


def test_module_of() -> None:
    assert module_of("blocks.0.attn.to_q.weight") == "blocks.0.attn.to_q"
    assert module_of("scale_shift_table") == ""


@pytest.mark.parametrize(
    ("name", "source", "target", "wanted"),
    [
        ("a.0.net.2", "a.*.net.2", "a.*.proj_out", "a.0.proj_out"),
        ("a.0.b.1", "a.*.b.*", "*.b.*.a", "0.b.1.a"),
        ("a.b", "a.b", "c", "c"),
        ("a.b", "*.*", "*.x.*", "a.x.b"),
        ("a.0.net.2", "a.*.net.3", "a.*.x", None),
        ("a.0.net", "a.*.net.2", "a.*.x", None),
        ("a.0.net.2.x", "a.*.net.2", "a.*.x", None),
        ("a.0.1.b", "a.*.b", "*.x", None),
        ("ab", "a*", "b*", None),  # only a whole segment is a wildcard here
        ("axb", "a.b", "c", None),
    ],
)
def test_rename(name: str, source: str, target: str, wanted: str | None) -> None:
    assert rename(name, source, target, {}) == wanted
    if wanted is not None:
        assert rename(wanted, target, source, {}) == name


@pytest.mark.parametrize(
    ("name", "target", "config", "wanted"),
    [
        ("a.0.b", "c.*+depth.d", {"depth": 20}, "c.20.d"),
        ("a.39.b", "c.*+depth.d", {"depth": 20}, "c.59.d"),
        ("a.3.b", "c.*+depth.d", {"depth": 0}, "c.3.d"),
        ("a.3.b", "*+depth", {"depth": 1, "other": 2}, "4"),
        ("a.3.b", "c.*+depth.d", {}, None),
        ("a.3.b", "c.*+depth.d", {"depth": "20"}, None),
        ("a.3.b", "c.*+depth.d", {"depth": 20.0}, None),
        ("a.3.b", "c.*+depth.d", {"depth": True}, None),  # equals 1, and is no number of blocks
        ("a.3.b", "c.*+depth.d", {"depth": None}, None),
        ("a.x.b", "c.*+depth.d", {"depth": 20}, None),  # nothing to add to
        ("a.\u0663.b", "c.*+depth.d", {"depth": 20}, None),
        (f"a.{'9' * 5000}.b", "c.*+depth.d", {"depth": 20}, None),  # no text becomes such an integer
    ],
)
def test_rename_counts_on_by_a_number_of_the_config(
    name: str, target: str, config: dict[str, object], wanted: str | None
) -> None:
    assert rename(name, "a.*.b", target, config) == wanted


def test_rename_counts_each_star_by_its_own_number() -> None:
    assert rename("a.1.b.2", "a.*.b.*", "*.x.*+n", {"n": 5}) == "1.x.7"
    assert rename("a.1.b.2", "a.*.b.*", "*+m.x.*+n", {"m": 10, "n": 5}) == "11.x.7"


def test_stars() -> None:
    assert stars("a.*.b.*+num_layers.c*.*") == [None, "num_layers", None]
    assert stars("a.b*.**") == []
