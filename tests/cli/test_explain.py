"""``mopt explain``: every code that the package can give has an entry, and each entry is of a code that it can give."""

import json

import pytest
from error_codes import all_codes
from support import run_mopt

from modelopt_convert.run.codes import explanations


def test_every_code_has_an_entry_and_none_is_stale() -> None:
    found, known = all_codes(), explanations()
    assert len(found) > 200
    assert found - known.keys() == set(), "without an entry in run/codes.toml"
    assert known.keys() - found == set(), "no longer in the source"


def test_codes_of_every_kind_are_seen_in_the_source() -> None:
    """Of a refusal, a helper with a prefix, JSON, a warning, a fault of inspect, a made-up name and a word alone."""
    kinds = {"export.saved", "header.shape", "hub.gated", "output.exists", "index.duplicate_key", "pipeline.too_large"}
    assert kinds | {"config.stale_ignore", "scale.nan", "engine.wrong", "base.lora", "usage"} <= all_codes()


def test_an_entry_is_two_short_texts_that_a_table_can_hold() -> None:
    for one in explanations().values():
        for text in (one.means, one.todo):
            assert 8 <= len(text) <= 200 and text.endswith("."), one
            assert "|" not in text and "\n" not in text and text.count("`") % 2 == 0, one


def test_it_is_told_in_two_lines() -> None:
    outcome = run_mopt("explain", "header.foreign", json_report=False)
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    assert outcome.stdout == (
        "header.foreign: The file's name ends in .safetensors, but its first bytes are those of another kind of file.\n"
        "to do: Do what the hint says, such as `git lfs pull`.\n"
    )


def test_json() -> None:
    outcome = run_mopt("explain", "header.foreign")
    one = explanations()["header.foreign"]
    assert json.loads(outcome.stdout) == {"code": "header.foreign", "means": one.means, "to_do": one.todo}
    assert outcome.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("mismatch", "it is a verdict: docs/proven.md says what each verdict means"),
        ("header.foriegn", "did you mean header.foreign?"),
        ("export.missing-input-scale", "did you mean export.missing_input_scale?"),
        ("zzz", "docs/errors.md lists all"),
        ("", "docs/errors.md lists all"),
    ],
)
def test_an_unknown_code_is_a_usage_error(word: str, meant: str) -> None:
    outcome = run_mopt("explain", word, json_report=False)
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert outcome.stderr.splitlines()[-1] == f"Error: Invalid value for CODE: {word!r} is no code of mopt's; {meant}"


def test_what_a_refusal_prints_can_be_explained() -> None:
    outcome = run_mopt("presets", "zzz", json_report=False)
    code = outcome.stderr.partition("[")[2].partition("]")[0]
    assert run_mopt("explain", code, json_report=False).stdout.startswith("preset.unknown: There is no such preset.")
