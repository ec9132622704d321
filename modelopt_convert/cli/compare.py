"""``mopt compare``."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from modelopt_convert.cli._options import from_request
from modelopt_convert.commands.drawing_requests import CompareRequest

if TYPE_CHECKING:
    from modelopt_convert.cli._output import Output
    from modelopt_convert.report.fidelity import AggregateFidelity, CheckpointFidelity, FidelityReport


def compare(request: CompareRequest, output: "Output") -> None:
    """Compare what a checkpoint draws with what its base draws, its quantized modules emulated on any device.

    \b
    Examples:
      mopt compare OUT --base BASE --pipeline PIPELINE --prompts prompts.txt --report pictures.html
      mopt compare OUT OUT2 OUT3 --base BASE --pipeline PIPELINE --prompts prompts.txt --seeds 8
      mopt compare OUT --base BASE --inputs captured.safetensors

    No kernel of an engine takes part: products are the same but for the order of additions. Without a pipeline the
    transformer runs alone, on captured inputs or, for FLUX.1, on random ones.
    Exit codes: 0 done; 1 below what --require asks; 6 fewer than 8 pairs for it; 7 the emulation fails its self-test.
    """
    from modelopt_convert.cli._output import check_file, run
    from modelopt_convert.stage.written_file import is_same_place

    page = Path(request.report) if request.report is not None else None
    check_file(page, "--report", *request.on_disk())
    if page is not None and output.report_json is not None and is_same_place(page, output.report_json):
        raise typer.BadParameter("must be another file than --report-json", param_hint="--report")

    def show(out: "Output", report: "FidelityReport") -> None:
        _show(out, report)
        if page is not None and page.is_file():
            out.line(f"page: {page}")

    run(output, request, show, show_failed=True)


def _show(out: "Output", report: "FidelityReport") -> None:
    drawing = report.drawing
    if not report.checkpoints or drawing is None:
        return
    for one in report.checkpoints:
        emulation = one.emulation
        out.line(f"{one.path}: {emulation.format}, {emulation.rule}, emulated; {len(one.modules)} modules")
        rows = [[name, *_figures(found)] for name, found in one.aggregate.items()]
        out.table(["figure", "mean", "std", "lower 95%", "upper 95%", "pairs"], rows)
        for condition in one.required:
            out.line(f"{condition.condition}: {'holds' if condition.met else 'does not hold'}")
        _show_worst(out, one)
        out.line("")
    out.line(f"{drawing.kind}: {drawing.pairs} pairs; self-test: {len(report.oracles)} checks passed")


def _figures(found: "AggregateFidelity") -> list[str]:
    values = (found.mean, found.std, found.lower95, found.upper95)
    return [*("-" if value is None else f"{value:.5g}" for value in values), str(found.n)]


def _show_worst(out: "Output", one: "CheckpointFidelity") -> None:
    """The modules that lose most; all of them with ``-v``."""
    known = {name: found for name, found in one.modules.items() if found.output_sqnr_db is not None}
    worst = sorted(known, key=lambda name: known[name].output_sqnr_db or 0.0)
    rows = []
    for name in worst if out.verbose else worst[:3]:
        found = known[name]
        values = (found.output_sqnr_db, found.input_sqnr_db, found.weight_sqnr_db)
        rows.append([name, *("-" if value is None else f"{value:.4g}" for value in values), f"{found.clipped:.2%}"])
    out.table(["module", "output dB", "input dB", "weight dB", "clipped"], rows)


COMMANDS = {"compare": from_request(CompareRequest, compare)}
