"""The page that a run of verify writes, against what the same run prints and reports."""

import re
import shlex
from datetime import UTC, datetime
from html import unescape
from pathlib import Path

import pytest
import torch
from faults import swapped
from support import edit, load, packed_in, run_mopt
from verify_support import PACKED, found

from modelopt_convert import __version__
from modelopt_convert.formats.nvfp4.scales import swizzle_128x4

# Exit code, verdict and proof, how many modules are grey, and what the page says to do next.
CASES = {
    "proven": (0, "pass, proven", 0, "mopt push {0} ORGANIZATION/NAME"),
    "recorded": (0, "pass, unchanged", "all", "mopt verify {0} --base BASE"),
    "sampled": (0, "pass, not proven: sampled", 0, "mopt verify {0} --base {1}"),
    "no base": (6, "inconclusive, not proven: no base", "all", "mopt verify {0} --base BASE"),
    "wrong": (1, "fail, mismatch", 0, "The report names every module; build or export it again."),
}


@pytest.mark.parametrize("case", CASES)
def test_the_page_has_the_words_of_the_text_and_of_the_json(
    case: str, built_nvfp4: Path, exports: Path, base: Path, tmp_path: Path
) -> None:
    exit_code, words, grey, following = CASES[case]
    page = tmp_path / "it's a page.html"
    checkpoint = {"no base": exports / "nvfp4" / "transformer"}.get(case, built_nvfp4)
    if case == "wrong":
        checkpoint = edit(built_nvfp4, tmp_path / "wrong", lambda tensors: swapped(tensors, [PACKED]))
    more = ["--base", str(base)] if case in ("proven", "sampled", "wrong") else []
    more += ["--sample", "4"] if case == "sampled" else []
    command = ["verify", str(checkpoint), *more, "--report", str(page)]
    printed, before = run_mopt(*command, json_report=False), datetime.now(UTC).date()
    outcome = run_mopt(*command)
    text = unescape(page.read_text(encoding="utf-8"))

    report = found(outcome)
    assert (printed.exit_code, outcome.exit_code) == (exit_code, exit_code)
    assert f"{report['verdict']}, {report['proof']}" == words
    assert re.findall(r"<h1><span[^>]*>.</span> (.*)</h1>", text) == [words]
    assert f"<p>{report['statement']}</p>" in text
    assert f"verdict: {report['verdict']}: {report['statement']}\n" in printed.stdout
    assert printed.stdout.startswith(f"{report['proof']}\n")

    colors = re.findall(r'<i class="(\w+)[^"]*" title="', text)
    assert len(colors) == len(report["modules"]) > 0
    assert colors.count("other") == (len(colors) if grey == "all" else grey)
    assert (colors.count("fail") > 0) == (exit_code == 1)

    assert following.format(shlex.quote(str(checkpoint)), base / "transformer") in text
    assert f"<code>mopt {shlex.join(command)}</code>" in text
    for fact in (__version__, before.isoformat(), str(base) if more else "none given"):
        assert fact in text
    assert ("flux1-dev (by mopt.json)" in text) == (checkpoint == built_nvfp4)


@pytest.mark.parametrize("every", [True, False])
def test_a_checkpoint_in_another_order_names_the_command_that_mends_it(
    every: bool, built_nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    """The command runs, and what it writes is proven; where a part alone is in another order no rewrite is named."""
    wrong, page = tmp_path / "wrong", tmp_path / "page.html"
    packed = sorted(packed_in(load(built_nvfp4)))
    edit(built_nvfp4, wrong, lambda tensors: swapped(tensors, packed if every else packed[:1]))
    outcome = run_mopt("verify", wrong, "--base", base, "--report", page)
    assert outcome.exit_code == 1 and outcome.report is not None
    hint, text = outcome.report["error"]["hint"], unescape(page.read_text(encoding="utf-8"))
    assert f"of {len(packed) if every else 1} modules the layout is what fails" in text
    assert text.count("the even column is in the high nibble") <= 3  # one line for all of them
    assert ("mopt swap-nibbles" in hint) == every
    if every:
        words = shlex.split(hint.partition("mopt ")[2])
        again = run_mopt(*words)
        assert again.exit_code == 0, again.stderr
        assert run_mopt("verify", words[2], "--base", base).exit_code == 0


def test_scales_that_cannot_be_read_as_declared_name_the_command_that_mends_them(
    nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    """As ModelOpt's post-processing leaves them, with nothing that declares the order."""
    packed = packed_in(load(nvfp4 / "transformer"))
    scales = [f"{name}.weight_scale" for name in packed]
    assert scales

    def tile(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: swizzle_128x4(tensors[name]) for name in scales})

    wrong = edit(nvfp4, tmp_path / "wrong", tile)
    outcome = run_mopt("verify", wrong, "--base", base)
    assert outcome.exit_code == 1 and outcome.report is not None
    hint = outcome.report["error"]["hint"]
    assert hint.startswith("the scales lie in another order: mopt unswizzle-scales "), hint
    words = shlex.split(hint.partition("mopt ")[2])
    assert run_mopt(*words).exit_code == 0
    assert run_mopt("verify", words[2], "--base", base).exit_code == 0
