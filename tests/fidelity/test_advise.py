"""``mopt advise`` on the trained pipeline: what it writes builds, its figures hold, and wrong inputs get one line."""

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from calibrated import TINY, calibrate
from safetensors import safe_open
from support import Outcome, run_mopt

from modelopt_convert.commands.advise import reaches
from modelopt_convert.fidelity.frontier import Item, best_within
from modelopt_convert.fidelity.sensitivity import Call, check_recorded, moved_by, recorded, spread_over, tensors_of
from modelopt_convert.fidelity.thresholds import Threshold
from modelopt_convert.report.advice import AdviceReport, MeasuredReport
from modelopt_convert.run.errors import InputError

QUICK = ("--steps", "2", "--size", "32", "--scored", "1", "--points", "1", "--device", "cpu")


def advise(folder: Path, *more: str | Path, goal: tuple[str, str] = ("--effective-bits", "6")) -> Outcome:
    prompts = folder / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("a red seven\na blue six\n")
    words = ["advise", TINY, "--pipeline", TINY, "--prompts", prompts, "--output", folder / "mine.toml", *goal]
    return run_mopt(*words, *QUICK, *more)


@pytest.fixture(scope="module")
def advised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with all that one run writes, and its report."""
    folder = tmp_path_factory.mktemp("advised")
    assert calibrate(folder / "calib").exit_code == 0
    more = ["--calibration", folder / "calib", "--svg", folder / "frontier.svg", "--report", folder / "page.html"]
    outcome = advise(folder, *more)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    return folder, outcome.report


def test_the_choice_is_the_best_of_its_own_figures(advised: tuple[Path, dict[str, Any]]) -> None:
    _, report = advised
    units, chosen = report["units"], report["chosen"]
    assert AdviceReport.model_validate(report).native is False and report["activations"] == "static"
    items = [Item(one["name"], one["error_alone"], one["bytes_kept"] - one["bytes_packed"]) for one in units]
    weights = sum(one["bytes_kept"] for one in units) // 2
    room = int(6 * weights / 8) - sum(one["bytes_packed"] for one in units)
    best = best_within(items, room)
    assert best is not None and list(best.keeps) == chosen["keeps"] and 0 < len(chosen["keeps"]) < len(units)
    assert chosen["bits"] <= 6 and report["least_bytes"] <= chosen["bytes"] < report["most_bytes"]
    packed = [one["error_alone"] for one in units if one["name"] not in chosen["keeps"]]
    assert chosen["error_predicted"] == pytest.approx(math.fsum(packed))
    measured = [one["measured"] for one in report["frontier"] if one["measured"]]
    assert measured and chosen["measured"]["psnr"] > measured[0]["psnr"]  # the first point keeps nothing
    assert {one["code"] for one in report["warnings"]} >= {"advise.few_pictures", "preset.chosen"}


def test_units_are_what_engines_join_and_no_structural_module(advised: tuple[Path, dict[str, Any]]) -> None:
    _, report = advised
    members = [name for unit in report["units"] for name in unit["members"]]
    assert len(members) == len(set(members)) == 36 and len(report["units"]) == 20
    assert not set(members) & set(report["structural"])
    joined = next(unit for unit in report["units"] if unit["name"].startswith("transformer_blocks.0.attn.add_k"))
    assert {name.rpartition(".")[2] for name in joined["members"]} == {"add_k_proj", "add_q_proj", "add_v_proj"}


def test_the_preset_builds_what_was_measured_and_is_proven(
    advised: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, report = advised
    words = ["--preset", folder / "mine.toml", "--base", TINY, "--calibration", folder / "calib"]
    built = run_mopt("build-nvfp4", *words, "--output", tmp_path / "out")
    assert built.exit_code == 0 and built.report is not None, built.stderr
    assert built.report["output"]["bytes"] == report["chosen"]["bytes"]
    with safe_open(tmp_path / "out" / "diffusion_pytorch_model.safetensors", "pt") as file:
        packed = {name.removesuffix(".weight_scale_2") for name in file.keys() if name.endswith("_scale_2")}  # noqa: SIM118
    kept = set(report["chosen"]["keeps"])
    assert packed == {name for unit in report["units"] if unit["name"] not in kept for name in unit["members"]}
    proven = run_mopt("verify", tmp_path / "out", "--base", TINY, "--device", "cpu")
    assert proven.exit_code == 0 and proven.report is not None and proven.report["verify"]["proof"] == "proven"


def test_the_plot_and_the_page_are_whole_and_fetch_nothing(advised: tuple[Path, dict[str, Any]]) -> None:
    folder, report = advised
    plot, page = (folder / "frontier.svg").read_text(), (folder / "page.html").read_text()
    root = ElementTree.fromstring(plot)
    dots = [one for one in root.iter() if one.get("class") == "dot"]
    assert len(dots) == len(report["frontier"]) and "http" not in plot.replace("http://www.w3.org/2000/svg", "")
    assert 'class="plot"' in page and "default-src 'none'" in page and page.rstrip().endswith("</html>")


def test_a_preset_that_somebody_edited_is_theirs(advised: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = advised
    (tmp_path / "mine.toml").write_text((folder / "mine.toml").read_text() + "# mine\n")
    refused = advise(tmp_path)
    assert (refused.exit_code, refused.error_code) == (4, "report.foreign")
    assert (tmp_path / "mine.toml").read_text().endswith("# mine\n")


@pytest.mark.parametrize(
    ("goal", "words"),
    [
        (("--budget", "1kB"), "expected a budget of 1,841,808 bytes (4.50 bits a weight; all 20 units packed)"),
        (("--budget", "1GB"), "to less than 2,689,536 (16.00; none), found 1,000,000,000 bytes"),
        (("--effective-bits", "4.4"), "(4.40 bits a weight)"),
    ],
)
def test_a_budget_that_cannot_be_says_what_can(tmp_path: Path, goal: tuple[str, str], words: str) -> None:
    refused = advise(tmp_path, goal=goal)
    assert (refused.exit_code, refused.error_code) == (3, "advise.budget") and words in refused.stderr
    assert not (tmp_path / "mine.toml").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--psnr", "30"), "one of --budget, --effective-bits and --psnr"),
        (("--preset", "none"), "none says nothing"),
        (("--svg", "hf://a/b"), "is on disk"),
        (("--format", "nope"), "nope is none of nvfp4, fp8"),
        (("--output", "noext"), "is a FILE.toml, found noext"),
    ],
    ids=["two goals", "no preset", "far", "format", "output"],
)
def test_what_cannot_be_meant_is_a_usage_error(tmp_path: Path, more: tuple[str, str], words: str) -> None:
    found = advise(tmp_path, *more)
    told = " ".join(found.stderr.replace("'", "").split())
    assert found.exit_code == 2 and words in told


def test_no_prompts_and_a_pipeline_of_another_model_get_one_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n")
    assert advise(tmp_path).error_code == "prompts.none"
    (tmp_path / "prompts.txt").unlink()
    other = tmp_path / "other"
    other.mkdir()
    index = json.loads((TINY / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "SD3Transformer2DModel"]
    (other / "model_index.json").write_text(json.dumps(index))
    refused = advise(tmp_path, "--pipeline", other)
    assert (refused.exit_code, refused.error_code) == (3, "pipeline.other_model") and refused.stderr.count(
        "error:"
    ) == 1


def test_a_psnr_that_nothing_reaches_says_what_is_reached(tmp_path: Path) -> None:
    refused = advise(tmp_path, goal=("--psnr", "500"))
    assert (refused.exit_code, refused.error_code) == (3, "advise.psnr")
    assert "of 2 pictures with all units but one kept" in refused.stderr and "(lower bound" in refused.stderr
    assert "hint: ask for a smaller --psnr, draw more pictures by --seeds" in refused.stderr
    assert "score 20 units: 40 forwards" in refused.stderr  # and no bytes: nothing is read


@pytest.mark.parametrize(
    ("psnr", "lower95", "is_enough"),
    [(31.0, 30.0, True), (31.0, 29.9, False), (99.0, None, False), (None, None, True)],
    ids=["at the bound", "the mean alone", "one picture", "equal pictures"],
)
def test_a_psnr_is_reached_by_the_bound_that_compare_asks_for(
    psnr: float | None, lower95: float | None, is_enough: bool
) -> None:
    found = MeasuredReport(error=0.0, psnr=psnr, std=None, lower95=lower95, n=2)
    assert reaches(found, 30.0) is is_enough
    if psnr is not None:
        assert Threshold("psnr", True, 30.0).holds(lower95) is is_enough


def test_built_in_another_format_it_warns(advised: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Its choice is of NVFP4: FP8 is built with the sets of the preset that it extends."""
    words = ["--preset", advised[0] / "mine.toml", "--base", TINY, "--output", tmp_path / "out", "--dry-run"]
    told = {}
    for command in ("convert-fp8", "build-nvfp4"):
        report = run_mopt(command, *words).report
        assert report is not None and report["exit_code"] == 0
        told[command] = [one["message"] for one in report["warnings"] if one["code"] == "preset.other_format"]
    message = "preset flux1-dev-advised chooses for nvfp4 alone: for fp8 its sets are inherited"
    assert told == {"convert-fp8": [message], "build-nvfp4": []}


class _Model(torch.nn.Module):
    """Gives a mapping with two outputs, and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.never = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, *, scale: dict[str, Any]) -> dict[str, Any]:
        found = {"sample": self.one(x) * scale["by"], "rest": (x.mean(), None, 3)}
        x.zero_()
        return found


def test_calls_are_recorded_as_they_were_and_layers_that_never_ran_are_told() -> None:
    torch.manual_seed(0)
    model, inputs = _Model(), torch.randn(2, 4)
    with recorded(model, ("one", "never")) as found, torch.inference_mode():
        for number in range(5):
            model(inputs.clone() + number, scale={"by": torch.tensor(2.0)})
    calls = spread_over(found.calls, 2)
    assert (
        len(found.calls) == 5 and calls == [found.calls[1], found.calls[3]] and len(tensors_of(calls[0].outputs)) == 2
    )
    assert moved_by(model, calls) == 0.0  # the inputs are those before the model wrote into them
    model.one.weight.data += 1.0
    assert moved_by(model, calls) > 0.1
    with pytest.raises(InputError, match="1 of 2 Linears never ran, so nothing is known of them: never"):
        check_recorded([], [], found.ran, ["one", "never"], "base")
    bad = Call((), {}, torch.device("cpu"), (torch.tensor(float("nan")),))
    with pytest.raises(InputError, match="expected finite pictures"):
        check_recorded([bad], [], {"one"}, ["one"], "base")
