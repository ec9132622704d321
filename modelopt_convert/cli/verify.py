"""``mopt verify``."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from modelopt_convert.cli._options import SILENT, from_request
from modelopt_convert.commands.requests import VerifyRequest
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.run.errors import ExitCode

if TYPE_CHECKING:
    from modelopt_convert.cli._output import Output
    from modelopt_convert.cli._text import Tone
    from modelopt_convert.report.report import Report

_SHOWN = 10


def verify(request: VerifyRequest, output: "Output") -> None:
    """Verify a checkpoint: container, layout, decoded values and kernels, each level on its own.

    \b
    Examples:
      mopt verify OUT
      mopt verify OUT --base FLUX.1-dev --backend all --report verify.html
      mopt verify --self-test --backend all --json

    Without a base every byte is compared with the record in mopt.json, which proves that nothing changed, and no more.
    Exit codes: 0 passed; 1 wrong; 6 neither base nor record, or what --require names did not run; 7 a backend is broken
    or backends disagree.
    """
    from modelopt_convert.cli._output import check_file, run
    from modelopt_convert.stage.written_file import is_same_place

    page = Path(request.report) if request.report is not None else None
    check_file(page, "--report", *request.on_disk())
    if page is not None and output.report_json is not None and is_same_place(page, output.report_json):
        raise typer.BadParameter("must be another file than --report-json", param_hint="--report")

    def show(out: "Output", report: "Report") -> None:
        _show(out, report)
        if page is not None and page.is_file():
            out.line(f"page: {page}")

    run(output, request, show, show_failed=True)


def _show(out: "Output", report: "Report") -> None:
    """What is proven, in a word, and the verdict; then tables of levels and backends, and what failed."""
    from modelopt_convert.cli._output import show_cost

    found = report.verify
    if found is None:
        return
    tone: Tone = "good" if found.verdict == "pass" else "bad" if report.exit_code == ExitCode.MISMATCH else "doubt"
    if found.proof:
        out.line(found.proof, tone)
    out.line(f"verdict: {found.verdict}: {found.statement}", tone)
    out.line("")
    if found.levels:
        out.table(
            ["level", "status", "reason"],
            [[f"{level.level} {level.title}", level.status, level.reason] for level in found.levels],
        )
        out.line("")
    if found.backends:
        out.table(
            ["backend", "kind", "modules", "status", "reason"],
            [[one.name, one.kind, str(one.modules), one.status, one.reason] for one in found.backends],
        )
        out.line("")
    for level in found.levels:
        for kind, words in (("fail", level.failures), ("warn", level.warnings)):
            for text in words[:_SHOWN]:
                out.line(f"{kind}: {level.level}: {text}")
            if len(words) > _SHOWN:
                out.line(f"{kind}: {level.level}: {len(words) - _SHOWN} more; --json lists all")
    if found.modules:
        out.line(f"native FP{FORMATS[found.algorithm].bits} kernels executed: {found.native_executed} modules")
    show_cost(out, report)


COMMANDS = {"verify": from_request(VerifyRequest, verify, without=SILENT)}
