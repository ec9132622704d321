"""``mopt compare`` of any number of checkpoints of one base, which stand side by side."""

import shutil
from pathlib import Path

import pytest
from calibrated import TINY
from support import run_mopt

from modelopt_convert.commands.called import command_line
from modelopt_convert.commands.drawing_requests import CompareRequest
from modelopt_convert.run.errors import UsageError


def test_three_are_in_one_sheet(tiny_nvfp4: Path, tmp_path: Path) -> None:
    """Each with its own figures, in the order in which they were given."""
    outs = [tmp_path / name for name in ("one", "two", "three")]
    for out in outs:
        shutil.copytree(tiny_nvfp4, out)
    (tmp_path / "prompts.txt").write_text("a red seven\n")
    drawn = ("--pipeline", TINY, "--prompts", tmp_path / "prompts.txt", "--seeds", "1", "--steps", "1", "--size", "16")
    page = tmp_path / "page.html"
    outcome = run_mopt("compare", *outs, "--base", TINY, *drawn, "--device", "cpu", "--report", page)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert [one["path"] for one in outcome.report["checkpoints"]] == [str(out) for out in outs]
    assert len({one["aggregate"]["psnr"]["mean"] for one in outcome.report["checkpoints"]}) == 1  # they are alike
    assert {"checkpoint", "other", "other_2"} <= outcome.report["inputs"].keys()
    text = page.read_text()
    assert all(f'<th scope="col">{out.name}' in text for out in outs) and f"mopt compare {outs[0]} {outs[1]}" in text


def test_all_of_them_are_inputs() -> None:
    request = CompareRequest("a", ("b", "c d"), base="e")
    assert request.reads() == [Path("a"), Path("e"), Path("b"), Path("c d")]
    assert command_line(request) == "mopt compare a b 'c d' --base e"
    assert [*CompareRequest("a", ["b"], base="e").checkpoints] == ["a", "b"]


@pytest.mark.parametrize("wrong", ["", "hf://nobody", "a\0b"])
def test_each_is_a_place(wrong: str) -> None:
    with pytest.raises(UsageError, match="OUT2"):
        CompareRequest("a", ("b", wrong), base="e")
