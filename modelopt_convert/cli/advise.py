"""``mopt advise``."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from modelopt_convert.cli._options import from_request
from modelopt_convert.commands.drawing_requests import AdviseRequest
from modelopt_convert.formats.table import FORMATS

if TYPE_CHECKING:
    from modelopt_convert.cli._output import Output
    from modelopt_convert.report.advice import AdviceReport, PointReport


def advise(request: AdviseRequest, output: "Output") -> None:
    """Find which modules to keep in BF16 for the least error of a model's pictures, and write a preset of it.

    \b
    Examples:
      mopt advise BASE --pipeline PIPELINE --prompts prompts.txt --effective-bits 6 --output mine.toml
      mopt advise BASE --calibration CALIB --pipeline PIPELINE --prompts prompts.txt --psnr 30 --output mine.toml

    Each unit, one Linear or what an engine joins, is packed alone; errors are taken to add up; the best choice within
    the budget is exact, and is then drawn as a whole. --score forward is faster and predicts less well. Modules are
    BF16 or one packed format: no engine is known to load NVFP4 beside FP8.
    """
    from modelopt_convert.cli._output import check_file, run
    from modelopt_convert.stage.written_file import is_same_place

    files = {"--output": request.output, "--svg": request.svg, "--report": request.report}
    for option, place in files.items():
        if place is None:
            continue
        check_file(Path(place), option, *request.reads())
        if output.report_json is not None and is_same_place(Path(place), output.report_json):
            raise typer.BadParameter("must be another file than --report-json", param_hint=option)

    def show(out: "Output", report: "AdviceReport") -> None:
        _show(out, report)
        for option, place in files.items():
            if place is not None and option != "--output":
                out.line(f"{option.removeprefix('--')}: {place}")
        words = ["--preset", _as_path(str(report.output)), "--base", str(request.base)]
        words += ["--calibration", str(request.calibration)] if request.calibration is not None else []
        out.line(f"next: mopt {FORMATS[request.format].command} {shlex.join(words)}")

    run(output, request, show)


def _show(out: "Output", report: "AdviceReport") -> None:
    chosen = report.chosen
    assert chosen is not None  # a run that ended well has it
    kept = set(chosen.keeps)
    out.line(f"wrote {report.output}: {len(report.units) - len(kept)} of {len(report.units)} units packed")
    drawn = [one for one in report.frontier if one.measured is not None and one.keeps != chosen.keeps]
    rows = [["chosen", *_figures(chosen)], *(["frontier", *_figures(one)] for one in drawn)]
    out.table(["choice", "bytes", "bits", "kept", "predicted", "measured", "PSNR dB", "lower 95%"], rows)
    out.line("")
    by_density = sorted(report.units, key=lambda one: -one.error_alone / one.bytes_kept)
    shown = by_density if out.verbose else by_density[:3]
    out.table(
        ["unit", "error alone", "bytes kept", "bytes packed", "is"],
        [
            [one.name, f"{one.error_alone:.3g}", str(one.bytes_kept), str(one.bytes_packed),
             "kept" if one.name in kept else "packed"]
            for one in shown
        ],
    )  # fmt: skip
    out.line("")


def _figures(one: "PointReport") -> list[str]:
    measured = one.measured
    assert measured is not None  # only such are shown
    psnr = "equal" if measured.psnr is None else f"{measured.psnr:.2f}"
    predicted, found = f"{one.error_predicted:.3g}", f"{measured.error:.3g}"
    bound = "-" if measured.lower95 is None else f"{measured.lower95:.2f}"
    return [str(one.bytes), f"{one.bits:.2f}", str(len(one.keeps)), predicted, found, psnr, bound]


def _as_path(preset: str) -> str:
    return preset if "/" in preset or preset.endswith(".toml") else f"./{preset}"


COMMANDS = {"advise": from_request(AdviseRequest, advise)}
