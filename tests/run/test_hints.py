"""What hints and the texts of codes name can be run. Hints are judged as they are raised (``support.run_mopt``)."""

import tomllib

import pytest
from hints import is_an_option, not_runnable, options_in
from root import ROOT

CODES = tomllib.loads((ROOT / "modelopt_convert" / "run" / "codes.toml").read_text(encoding="utf-8"))


def test_codes_name_options_that_there_are() -> None:
    texts = [text for one in CODES.values() for text in (one if isinstance(one, list) else [str(one)])]
    named = [option for text in texts for option in options_in(text)]
    assert len(named) > 20 and [option for option in named if not is_an_option(option)] == []


@pytest.mark.parametrize(
    ("command", "hint", "count"),
    [
        ("build-nvfp4", "--inexact bf16 writes these in BF16", 0),
        ("build-nvfp4", "--inexact bf16 writes these in BF16, --inexact rebase brings their scales to one", 1),
        (
            "build-nvfp4",
            "leave --to out; `mopt convert OUT ANOTHER --to comfyui --inexact rebase` brings them to one",
            0,
        ),
        ("convert", "export again, or --keep-bf16 'proj_out'", 1),
        ("convert", "export again with --format fp4, or build with --keep-bf16 'proj_out'", 0),
        ("swap-nibbles", "give another --output", 1),
        ("verify", "`git lfs pull --all`, or give --base", 0),
        ("inspect", "run `mopt swap-nibbles SOURCE OUT --base BASE --engine sglang`", 1),
    ],
)
def test_a_hint_that_cannot_be_run_is_seen(command: str, hint: str, count: int) -> None:
    assert len(not_runnable(command, hint)) == count
