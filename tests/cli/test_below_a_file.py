"""An OUT below a file: every command that writes says which file stands there, and proposes nothing that fails."""

import shlex
import subprocess
from pathlib import Path

import pytest
from commands import WORDS, words_of
from root import ROOT
from support import run_mopt

WRITING = sorted(command for command in WORDS if "{out}" in WORDS[command])


@pytest.mark.parametrize("deep", ["out", "a/b/out"])
@pytest.mark.parametrize("command", WRITING)
def test_the_file_is_named(command: str, deep: str, exports: Path, tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.write_text("mine")
    places = {"nvfp4": exports / "nvfp4", "fp8": exports / "fp8", "base": exports / "base", "out": file / "X"}
    places |= {"tiny": ROOT / "tests" / "data" / "tiny_flux1", "prompts": tmp_path / "prompts.txt"}
    places["prompts"].write_text("a red seven\n")
    words = [word.replace(str(file / "X"), str(file / deep)) for word in words_of(command, places)]
    refused = run_mopt(*words)
    assert refused.exit_code == 4 and refused.error_code == "output.no_parent", refused.stderr
    assert f"{file} is a file" in refused.message and "mkdir" not in refused.message
    assert file.read_text() == "mine" and {one.name for one in tmp_path.iterdir()} == {"a file", "prompts.txt"}


def test_a_missing_folder_can_be_made_as_the_hint_says(exports: Path, tmp_path: Path) -> None:
    out = tmp_path / "no such" / "folder" / "out"
    words = ["swap-nibbles", exports / "nvfp4", out]
    refused = run_mopt(*words)
    assert refused.error_code == "output.no_parent" and refused.report is not None, refused.stderr
    subprocess.run(shlex.split(refused.report["error"]["hint"]), check=True)
    assert run_mopt(*words).exit_code == 0
