"""Presets: the ones that come with mopt, what is refused, and which one is chosen."""

import hashlib
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from root import ROOT

from modelopt_convert.formats.format import Algorithm
from modelopt_convert.plan.ignore import spellings
from modelopt_convert.preset.patterns import check_pattern
from modelopt_convert.preset.preset import choose_preset, load_preset, parse_preset, preset_names, preset_of_class
from modelopt_convert.run.errors import InputError

SHIPPED = sorted((ROOT / "presets").glob("*.toml"), key=lambda path: path.stem)
CONFIG = {"_class_name": "XTransformer", "guidance": True, "layers": 3}


def made(name: str = "x", *, replace: dict[str, str] | None = None, more: str = "") -> str:
    """A preset's text; ``replace`` gives lines other values, by key."""
    lines = {
        "schema": "1",
        "name": repr(name),
        "title": '"X"',
        "class_name": '"XTransformer"',
        "base_repo": '"some/x"',
        "repos": '["some/x"]',
        "pipeline_tag": '"text-to-image"',
        "modelopt_model": '"x"',
        "load_flag": '"--transformer-path"',
        "fused": '[["to_q", "to_k"]]',
        "keep_fp32": '["**.scale"]',
        "config": "{ guidance = true }",
        "runtime_names": '{ "a.*.b" = ["c.*", "d.*+layers"] }',
        "nvfp4.status": '"candidate"',
        "nvfp4.source": '"nowhere"',
        "nvfp4.min_gpu": '"SM100"',
        "nvfp4.known_limits": "[]",
        "nvfp4.structural": '["proj_out"]',
        "nvfp4.quality": '["blocks.[:3].**"]',
    }
    lines |= replace or {}
    return "\n".join(f"{key} = {value}" for key, value in lines.items() if value) + f"\n{more}"


def refusal(call: Callable[..., object], *arguments: Any, **named: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        call(*arguments, **named)
    assert caught.value.hint
    return caught.value


def chosen(config: dict[str, Any], algorithm: Algorithm = "nvfp4") -> tuple[str, list[str]]:
    """The name of the preset that is chosen, and those of the others that would do."""
    found = choose_preset(config, algorithm)
    return found.loaded.preset.name, found.also


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where mopt looks for its presets, for the time of a test."""
    presets = tmp_path / "presets"
    presets.mkdir()
    monkeypatch.setattr("modelopt_convert.preset.preset._FOLDERS", (tmp_path / "absent", presets))
    return presets


def test_there_are_presets() -> None:
    assert [path.stem for path in SHIPPED] == preset_names()
    assert "flux1-dev" in preset_names()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_preset_that_comes_with_mopt(path: Path) -> None:
    loaded = load_preset(path.stem)
    assert type(loaded).model_validate(loaded.model_dump()) == loaded
    preset = loaded.preset
    assert preset.name == path.stem
    assert loaded.text == path.read_text()
    assert loaded.sha256 == hashlib.sha256("\0".join([path.read_text(), *loaded.inherited]).encode()).hexdigest()
    assert loaded.inherited == [other.read_text() for other in inherited_by(path)]
    assert preset.title and preset.base_repo in preset.repos and preset.pipeline_tag  # a draft may lack them
    assert preset.sets()
    for rules in preset.sets().values():
        for pattern in [*rules.structural, *rules.quality, *preset.keep_fp32]:
            check_pattern(pattern)
    there = {key: 1 for key, is_there in preset.having.items() if is_there}
    assert preset.fits({"_class_name": preset.class_name, **preset.config, **there})


def inherited_by(path: Path) -> list[Path]:
    """The shipped files that a shipped file extends, nearest first."""
    extended = tomllib.loads(path.read_text()).get("extends")
    return [path.with_name(f"{extended}.toml"), *inherited_by(path.with_name(f"{extended}.toml"))] if extended else []


@pytest.mark.parametrize("name", ["wan2.2-t2v-a14b", "wan2.2-i2v-a14b"])
def test_what_a_build_of_two_transformers_is_said_to_be(name: str) -> None:
    """docs/support.md said of one; test_fp8_hazards.py shows that it is of all."""
    for rules in load_preset(name).preset.sets().values():
        assert "a build is of every transformer that the export quantized" in "; ".join(rules.export_limits)


def test_a_made_preset_is_read() -> None:
    loaded = parse_preset(made(), path="x.toml")
    assert loaded.path == "x.toml"
    assert loaded.preset.fused == [["to_q", "to_k"]]
    assert loaded.preset.rules("nvfp4").quality == ["blocks.[:3].**"]
    assert loaded.preset.sets().keys() == {"nvfp4"}
    assert loaded.preset.runtime_names == {"a.*.b": ["c.*", "d.*+layers"]}
    assert loaded.inherited == []
    error = refusal(loaded.preset.rules, "fp8")
    assert error.code == "preset.algorithm"
    assert "preset x: has no fp8 section" in error.message


@pytest.mark.parametrize(
    ("value", "is_there", "fits"),
    [
        (None, False, True),
        (96, False, False),
        (0, False, False),
        (None, True, False),
        (96, True, True),
        (0, True, True),
    ],
)
def test_a_key_that_must_have_a_value_or_none(value: int | None, is_there: bool, fits: bool) -> None:
    preset = parse_preset(made(replace={"having": f"{{ image = {str(is_there).lower()} }}"}), path="x.toml").preset
    assert preset.fits(CONFIG | {"image": value}) == fits
    assert [key for key, _ in preset.misfits(CONFIG | {"image": value})] == ([] if fits else ["image"])
    assert preset.fits(CONFIG) != is_there
    assert not preset.fits({"_class_name": "YTransformer", "guidance": True, "image": value})


@pytest.mark.parametrize(
    ("found", "fits"),
    [({"guidance": True}, True), ({"guidance": False}, False), ({}, True), ({"guidance": None}, False)],
)
def test_a_key_that_is_left_out_has_its_default(found: dict[str, Any], fits: bool) -> None:
    preset = parse_preset(made(replace={"defaults": "{ guidance = true, layers = 3 }"}), path="x.toml").preset
    assert preset.fits({"_class_name": "XTransformer", **found}) == fits
    assert not parse_preset(made(), path="x.toml").preset.fits({"_class_name": "XTransformer"})


def test_one_name_may_stand_for_all_that_match() -> None:
    preset = parse_preset(made(replace={"runtime_names": '{ "a.*.b" = ["b", "c.*"] }'}), path="x.toml").preset
    assert spellings("a.7.b", preset, {}) == {"a.7.b", "b", "c.7"}


def test_of_a_class_the_preset_of_the_same_parts_is_known() -> None:
    """config.json has another number of channels than any; a cross-attention to an image tells SGLang's names."""
    wan = {"_class_name": "WanTransformer3DModel", "in_channels": 20}
    for value, name in ((None, "wan2.1-t2v-1.3b"), (96, "wan2.1-i2v-14b")):
        found = preset_of_class(wan | {"added_kv_proj_dim": value})
        assert found is not None and found.name == name
    assert preset_of_class({"_class_name": "XTransformer"}) is None


def test_sha256_is_of_the_text() -> None:
    texts = [made(), made(more="# \u00e9\n")]
    digests = [parse_preset(text, path="x").sha256 for text in texts]
    assert digests == [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    assert len(set(digests)) == 2


# (the preset's text, the code, a word of the message)
REFUSED: dict[str, tuple[str, str, str]] = {
    "not TOML": ("name = ", "preset.toml", "not TOML"),
    "not TOML below": (made(more="x\n"), "preset.toml", "line 20"),
    "key twice": (made(more="schema = 1\n"), "preset.toml", "not TOML"),
    "nothing": ("", "preset.field", "schema"),
    "unknown key": (made(more="extra = 1\n"), "preset.field", "extra"),
    "unknown key below": (made(replace={"nvfp4.extra": "1"}), "preset.field", "nvfp4.extra"),
    "unknown algorithm": (made(more="[int4]\nstatus = 'candidate'\n"), "preset.field", "int4"),
    "missing key": (made(replace={"load_flag": ""}), "preset.field", "load_flag"),
    "missing key below": (made(replace={"nvfp4.source": ""}), "preset.field", "nvfp4.source"),
    "other schema": (made(replace={"schema": "2"}), "preset.field", "schema"),
    "schema as text": (made(replace={"schema": '"1"'}), "preset.field", "schema"),
    "number for text": (made(replace={"title": "1"}), "preset.field", "title"),
    "text for list": (made(replace={"keep_fp32": '"a"'}), "preset.field", "keep_fp32"),
    "text for list below": (made(replace={"nvfp4.structural": '"a"'}), "preset.field", "nvfp4.structural"),
    "unknown status": (made(replace={"nvfp4.status": '"fine"'}), "preset.field", "nvfp4.status"),
    "status of old": (made(replace={"nvfp4.status": '"known_broken"'}), "preset.field", "nvfp4.status"),
    "known_broken of old": (made(replace={"nvfp4.known_broken": '{ "e@1" = "x" }'}), "preset.field", "known_broken"),
    "list in config": (made(replace={"config": "{ a = [1] }"}), "preset.field", "config.a"),
    "text for names": (made(replace={"runtime_names": '{ "a" = "b" }'}), "preset.field", "runtime_names"),
    "fewer stars": (made(replace={"runtime_names": '{ "a.*.b.*" = ["c.*"] }'}), "preset.field", "'a.*.b.*' and 'c.*'"),
    "more stars": (
        made(replace={"runtime_names": '{ "a.*" = ["c.*.*"] }'}),
        "preset.field",
        "same number of * segments",
    ),
    "second has more": (made(replace={"runtime_names": '{ "a.*" = ["c.*", "d.*.*"] }'}), "preset.field", "'d.*.*'"),
    "star not a segment": (made(replace={"runtime_names": '{ "a*" = ["c.*"] }'}), "preset.field", "runtime_names"),
    "having a number": (made(replace={"having": "{ image = 1 }"}), "preset.field", "having"),
    "number on disk": (made(replace={"runtime_names": '{ "a.*+n" = ["c.*"] }'}), "preset.field", "'a.*+n' and 'c.*'"),
    "extends a number": ("extends = 1\n", "preset.extends", "found 1"),
    "extends a list": ("extends = ['flux1-dev']\n", "preset.extends", "found ['flux1-dev']"),
    "pattern in structural": (made(replace={"nvfp4.structural": '["a[01]"]'}), "preset.pattern", "'a[01]'"),
    "pattern in quality": (made(replace={"nvfp4.quality": '["a", "b..c"]'}), "preset.pattern", "'b..c'"),
    "pattern in keep_fp32": (made(replace={"keep_fp32": '["a**"]'}), "preset.pattern", "'a**'"),
}
NOT_REFUSED_RIGHT = {
    "schema true": (made(replace={"schema": "true"}), "preset.field", "schema"),
    "5,000 digits": (made(replace={"schema": "1" * 5000}), "preset.toml", "TOML"),
    "100,000 lists": (made(replace={"repos": "[" * 100_000 + "]" * 100_000}), "preset.toml", "TOML"),
}


@pytest.mark.parametrize(
    ("text", "code", "word"),
    [
        *(pytest.param(*row, id=what) for what, row in REFUSED.items()),
        *(pytest.param(*row, id=what) for what, row in NOT_REFUSED_RIGHT.items()),
    ],
)
def test_refused(text: str, code: str, word: str) -> None:
    error = refusal(parse_preset, text, path="mine.toml")
    assert error.code == code
    assert word in error.message
    if code != "preset.pattern":
        assert error.path == "mine.toml"
        assert error.message.startswith("mine.toml: ")


def test_unknown_names_list_the_known_ones(folder: Path) -> None:
    for name in ("one", "two"):
        (folder / f"{name}.toml").write_text(made(name))
    (folder / "notes.txt").write_text("x")
    assert preset_names() == ["one", "two"]
    error = refusal(load_preset, "three")
    assert error.code == "preset.unknown"
    assert "'three'" in error.message
    assert error.hint is not None and "known are one, two;" in error.hint
    assert error.path is None


def test_a_preset_by_path(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(made("mine"))
    (tmp_path / "suffixless").write_text(made("suffixless"))
    (folder / "mine.toml").write_text(made("shipped"))
    monkeypatch.chdir(tmp_path)
    assert load_preset("mine").preset.name == "shipped"
    for name in ("mine.toml", "./mine.toml", str(mine)):
        assert load_preset(name).preset.name == "mine"
        assert load_preset(name).path == name
    assert load_preset("./suffixless").preset.name == "suffixless"


def test_a_path_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin1.toml").write_bytes(b"name = '\xe9'")
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "endless.toml").symlink_to("/dev/zero")
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    for name in ("absent.toml", "latin1.toml", "folder.toml", "pipe.toml", "endless.toml", "loop.toml"):
        error = refusal(load_preset, str(tmp_path / name))
        assert error.code == "preset.unknown"
        assert error.path == str(tmp_path / name)
        assert "cannot be read" in error.message


def test_a_preset_fits_by_class_and_by_every_config_value() -> None:
    preset = parse_preset(made(replace={"config": "{ guidance = true, layers = 3 }"}), path="x").preset
    assert preset.fits(CONFIG | {"more": 1})
    assert not preset.fits(CONFIG | {"_class_name": "YTransformer"})
    assert not preset.fits(CONFIG | {"guidance": False})
    assert not preset.fits(CONFIG | {"layers": 4})
    assert not preset.fits({"_class_name": "XTransformer", "guidance": True})
    assert not preset.fits({})


def test_choose_takes_the_one_that_fits(folder: Path) -> None:
    (folder / "a.toml").write_text(made("a", replace={"config": "{ guidance = false }"}))
    (folder / "b.toml").write_text(made("b"))
    (folder / "c.toml").write_text(made("c", replace={"class_name": '"YTransformer"'}))
    assert chosen(CONFIG) == ("b", [])
    assert chosen(CONFIG | {"guidance": False}) == ("a", [])


def test_choose_none_fits(folder: Path) -> None:
    for name in ("one", "two"):
        (folder / f"{name}.toml").write_text(made(name))
    # The last has the right class and values, and no rules for the algorithm.
    for config, algorithm in [(CONFIG | {"_class_name": "Y"}, "nvfp4"), ({}, "nvfp4"), (CONFIG, "fp8")]:
        error = refusal(choose_preset, config, algorithm)
        assert error.code == "preset.none_fits"
        assert repr(config.get("_class_name")) in error.message
        assert error.hint is not None and "one, two" in error.hint


def test_choose_with_equal_rules_takes_one_and_names_the_others(folder: Path) -> None:
    (folder / "b.toml").write_text(made("b", replace={"title": '"other"', "nvfp4.status": '"validated"'}))
    (folder / "a.toml").write_text(made("a"))
    # Rules for another algorithm are not what is chosen between.
    fp8 = "[fp8]\nstatus = 'candidate'\nsource = ''\nmin_gpu = ''\nknown_limits = []\nstructural = []\nquality = []\n"
    (folder / "c.toml").write_text(made("c", more=fp8))
    (folder / "d.toml").write_text(made("d", replace={"class_name": '"YTransformer"'}))
    assert chosen(CONFIG) == ("a", ["b", "c"])


@pytest.mark.parametrize(
    "difference",
    [
        {"nvfp4.structural": '["proj_out", "x"]'},
        {"nvfp4.quality": "[]"},
        {"keep_fp32": "[]"},
        {"fused": "[]"},
        {"runtime_names": "{}"},
    ],
    ids=lambda difference: next(iter(difference)),
)
def test_choose_with_different_rules_lists_the_candidates(folder: Path, difference: dict[str, str]) -> None:
    (folder / "a.toml").write_text(made("a"))
    (folder / "b.toml").write_text(made("b", replace=difference))
    (folder / "c.toml").write_text(made("c", replace={"class_name": '"YTransformer"'}))
    error = refusal(choose_preset, CONFIG, "nvfp4")
    assert error.code == "preset.ambiguous"
    assert "'XTransformer': a, b" in error.message
    assert (
        error.hint
        == "config.json does not tell them apart: name one, such as --preset a, or the model with --base-model"
    )


def test_choose_takes_the_one_that_says_most(folder: Path) -> None:
    (folder / "a.toml").write_text(made("a", replace={"config": "{}"}))
    (folder / "b.toml").write_text(made("b", replace={"config": "{ guidance = true, layers = 3 }", "fused": "[]"}))
    (folder / "c.toml").write_text(made("c"))
    assert chosen(CONFIG) == ("b", [])
    assert chosen(CONFIG | {"layers": 4}) == ("c", [])
    assert chosen({"_class_name": "XTransformer"}) == ("a", [])


def test_choose_counts_only_those_that_have_the_algorithm(folder: Path) -> None:
    fp8 = "[fp8]\nstatus = 'candidate'\nsource = ''\nmin_gpu = ''\nknown_limits = []\nstructural = []\nquality = []\n"
    (folder / "a.toml").write_text(made("a", replace={"config": "{}"}, more=fp8))
    (folder / "b.toml").write_text(made("b"))
    assert chosen(CONFIG, "fp8") == ("a", [])
    assert chosen(CONFIG) == ("b", [])


def test_extends_merges_tables_key_by_key(folder: Path) -> None:
    (folder / "parent.toml").write_text(made("parent"))
    child = """
extends = "parent"
name = "child"
fused = []
[config]
layers = 3
[runtime_names]
"e" = ["f"]
[nvfp4]
status = "validated"
quality = ["proj_in"]
[fp8]
status = "candidate"
source = "a test"
min_gpu = "SM89"
known_limits = []
structural = []
quality = []
"""
    (folder / "child.toml").write_text(child)
    loaded, parent = load_preset("child"), load_preset("parent").preset
    preset = loaded.preset
    assert (preset.name, preset.fused, preset.keep_fp32) == ("child", [], parent.keep_fp32)
    assert preset.config == {"guidance": True, "layers": 3}
    assert preset.runtime_names == parent.runtime_names | {"e": ["f"]}
    # Lists are replaced whole.
    assert preset.rules("nvfp4") == parent.rules("nvfp4").model_copy(
        update={"status": "validated", "quality": ["proj_in"]}
    )
    assert preset.sets().keys() == {"nvfp4", "fp8"}
    assert loaded.inherited == [made("parent")]
    assert parse_preset(child, path="child.toml").preset == preset


def test_extends_a_chain_whose_texts_are_all_in_the_digest(folder: Path) -> None:
    texts = {
        "c": "extends = 'b'\nname = 'c'\n",
        "b": "extends = 'a'\nname = 'b'\ntitle = 'B'\n",
        "a": made("a"),
    }
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text)
    loaded = load_preset("c")
    assert (loaded.preset.name, loaded.preset.title, loaded.preset.base_repo) == ("c", "B", "some/x")
    assert [loaded.text, *loaded.inherited] == list(texts.values())
    assert loaded.sha256 == hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()
    for name in texts:
        before = load_preset("c").sha256
        (folder / f"{name}.toml").write_text(texts[name] + "# more\n")
        assert load_preset("c").sha256 != before


def test_extends_a_path_beside_the_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "shared.toml").write_text(made("shipped", replace={"title": '"shipped"'}))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "shared.toml").write_text(made("mine", replace={"title": '"mine"'}))
    for extended, title in [("shared.toml", "mine"), ("./shared.toml", "mine"), ("shared", "shipped")]:
        (mine / "x.toml").write_text(f"extends = {extended!r}\nname = 'x'\n")
        monkeypatch.chdir(tmp_path)
        assert load_preset("mine/x.toml").preset.title == title
        assert load_preset(str(mine / "x.toml")).preset.title == title
        monkeypatch.chdir(mine)
        assert load_preset("x.toml").preset.title == title


@pytest.mark.parametrize("length", [1, 2, 3])
def test_extends_in_a_circle(folder: Path, length: int) -> None:
    names = ["a", "b", "c"][:length]
    for name, following in zip(names, names[1:] + names[:1], strict=True):
        (folder / f"{name}.toml").write_text(f"extends = '{following}'\n")
    error = refusal(load_preset, "a")
    assert error.code == "preset.extends"
    assert "extends: expected the name or path of another preset" in error.message


def test_extends_what_is_not_there(folder: Path, tmp_path: Path) -> None:
    (folder / "one.toml").write_text(made("one"))
    mine = tmp_path / "mine.toml"
    for extended in ("absent", "absent.toml", "a\\u0000b.toml"):
        mine.write_text(f'extends = "{extended}"\n')
        error = refusal(load_preset, str(mine))
        assert error.code == "preset.unknown"
        assert error.hint is not None and "known are one;" in error.hint


def test_extends_what_is_faulty_names_the_faulty_file(folder: Path) -> None:
    (folder / "parent.toml").write_text("name = ")
    (folder / "child.toml").write_text("extends = 'parent'\n")
    error = refusal(load_preset, "child")
    assert error.code == "preset.toml"
    assert "parent.toml" in error.message
