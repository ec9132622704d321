"""What is known of engines: limits.toml against what their own loaders were seen to do, docs/engines.json."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from conversions import rows
from families import ALL, NOT_RUN
from kit import converted, key, page, recorded
from root import ROOT
from set_up import ENGINES
from tiny_models import FAMILIES

from modelopt_convert.engines.limits import EngineName, Grade, Limit, all_limits, declared, limits
from modelopt_convert.formats.table import FORMATS

ROWS = list(recorded().values())


def facts_of(row: dict[str, Any]) -> list[Limit]:
    family = FAMILIES[row["family"]]
    config = {"_class_name": family.class_name, **family.config}
    return [one for one in limits(config, row["format"]) if one.engine == row["engine"]]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(key(row)))
def test_mopt_says_what_the_loader_did(row: dict[str, Any]) -> None:
    grades = [one.grade for one in facts_of(row)]
    assert grades == ([] if row["outcome"] == "right" else [row["outcome"]])
    assert {one.version for one in facts_of(row)} <= {ENGINES[row["engine"]]["version"]}


def test_every_fact_that_was_shown_by_a_run_is_in_the_record() -> None:
    shown = {fact for row in ROWS for fact in facts_of(row)}
    assert {one for one in all_limits() if one.shown == "run"} == shown


def test_every_engine_family_and_format_was_run() -> None:
    pairs = {(engine, family) for engine in ENGINES for family in ALL} - NOT_RUN.keys()
    assert recorded().keys() == {(*pair, algorithm) for pair in pairs for algorithm in FORMATS}
    assert NOT_RUN.keys() <= {(engine, family) for engine in ENGINES for family in ALL}
    assert all(row["version"] == ENGINES[row["engine"]]["version"] for row in ROWS)


def test_the_page_is_made_of_the_record() -> None:
    assert (ROOT / "docs" / "engines.md").read_text(encoding="utf-8") == page(ROWS, converted().values())


def test_every_conversion_was_loaded_and_is_right() -> None:
    found = converted()
    assert list(found) == rows()
    for row in found.values():
        assert row["outcome"] == "right" and row["off"] == 0 and row["version"] == ENGINES[row["engine"]]["version"]
        assert bool(row["packed"]) is ("takes" in row) is (row["to"] != "bf16")


def test_facts_are_of_known_words() -> None:
    for one in all_limits():
        assert one.engine in get_args(EngineName) and one.grade in get_args(Grade)
        assert set(one.formats) <= set(FORMATS) and one.formats
        assert one.grade == "fails" or one.figure, one
        assert one.words.startswith(f"{one.engine}@{one.version} ") and not one.what.endswith(".")


def test_a_fact_may_depend_on_a_key_of_the_config() -> None:
    wan = {"_class_name": "WanTransformer3DModel"}
    for value, expected in ((None, []), (64, ["fails"])):
        found = limits(wan | {"added_kv_proj_dim": value}, "nvfp4")
        assert [one.grade for one in found if one.engine == "sglang"] == expected
    assert limits(wan, "nvfp4") == limits(wan | {"added_kv_proj_dim": None}, "nvfp4")


def test_a_fact_may_depend_on_a_value_of_the_config() -> None:
    """SGLang has one pipeline for FLUX.1, whose latents have 64 channels."""
    for channels, expected in ((64, []), (128, ["fails"]), (384, ["fails"])):
        found = limits({"_class_name": "FluxTransformer2DModel", "in_channels": channels}, "fp8")
        assert [one.grade for one in found if one.engine == "sglang"] == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "wrong"),
        ({"use_prompt_embeddings": False}, "fails"),
        ({"use_prompt_embeddings": False, "ff_bias": True}, "fails"),
        ({"use_prompt_embeddings": False, "ff_bias": False}, "wrong"),
    ],
)
def test_a_fact_of_some_values_goes_before_that_of_the_class(values: dict[str, bool], expected: str) -> None:
    """SGLang knows the key of LTX-2.5's config.json, which the same value stands under, and not that of LTX-2.3's."""
    found = limits({"_class_name": "LTX2VideoTransformer3DModel"} | values, "fp8")
    assert [one.grade for one in found if one.engine == "sglang"] == [expected]


def test_a_fact_may_depend_on_the_base() -> None:
    """FLUX.1 Kontext has the config.json of FLUX.1 [dev]."""
    flux1 = {"_class_name": "FluxTransformer2DModel", "in_channels": 64}
    kontext = "black-forest-labs/FLUX.1-Kontext-dev"
    for repos, expected in (((), []), (("black-forest-labs/FLUX.1-dev",), []), (("me/other", kontext), ["fails"])):
        assert [one.grade for one in limits(flux1, "nvfp4", repos) if one.engine == "sglang"] == expected


def test_a_fact_of_a_class_goes_before_that_of_all_classes() -> None:
    def comfyui(class_name: str) -> list[str]:
        return [one.grade for one in limits({"_class_name": class_name}, "fp8") if one.engine == "comfyui"]

    assert comfyui("WanTransformer3DModel") == ["fails"]
    assert comfyui("QwenImageTransformer2DModel") == comfyui("Another") == ["wrong"]
    # Another engine's fact of the class takes nothing away.
    assert {one.engine for one in limits({"_class_name": "WanTransformer3DModel"}, "fp8")} > {"diffusers", "comfyui"}


@pytest.mark.parametrize(
    "config", [{}, {"quantization_config": []}, {"quantization_config": {"quant_algo": ["NVFP4"]}}]
)
def test_a_config_that_declares_nothing_of_ours(config: dict[str, Any]) -> None:
    assert declared(config) is None
    assert {one.class_name for one in limits(config, "nvfp4")} == {"*"}


def test_what_is_declared() -> None:
    for name, one in FORMATS.items():
        assert declared({"quantization_config": {"quant_algo": one.quant_algo}}) == name


def test_the_record_is_json_of_one_row_a_line() -> None:
    for name, rows_of in (("engines.json", ROWS), ("converted.json", converted())):
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert len(json.loads(text)) == len(text.splitlines()) - 2 == len(rows_of)
        assert str(Path.home()) not in text


def test_the_readme_counts_what_loads() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for engine, pins in ENGINES.items():
        mine = [row["outcome"] for row in ROWS if row["engine"] == engine]
        right, *others = (mine.count(outcome) for outcome in ("right", "loss", "wrong", "fails"))
        words = " | ".join(map(str, others))
        assert f"| {engine} {pins['version']} | {right} of {len(mine)} | {words} |" in readme


def test_versions_are_those_that_are_installed() -> None:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    for engine, pins in ENGINES.items():
        assert f"{engine}=={pins['version']}" in [*pins["wheels"], *pinned] or "checkout" in pins
        assert all("==" in one for one in (*pins["wheels"], *pins["packages"], *pins["full"]))
