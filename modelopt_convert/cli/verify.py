"""``mopt verify``."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from modelopt_convert.cli._options import from_request
from modelopt_convert.commands.requests import VerifyRequest
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.run.errors import ExitCode
from modelopt_convert.run.text import by_kind

if TYPE_CHECKING:
    from modelopt_convert.cli._output import Output
    from modelopt_convert.cli._text import Tone
    from modelopt_convert.report.report import Report
    from modelopt_convert.report.verify import LevelReport


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
    """What is proven, in a word, the verdict, and what failed; tables and every single fault with ``-v``."""
    from modelopt_convert.cli._output import show_cost

    found = report.verify
    if found is None:
        return
    tone: Tone = "good" if found.verdict == "pass" else "bad" if report.exit_code == ExitCode.MISMATCH else "doubt"
    if found.proof:
        out.line(found.proof, tone)
    out.line(f"verdict: {found.verdict}: {found.statement}", tone)
    for level in found.levels:
        for kind, words in (("fail", level.failures), ("warn", level.warnings)):
            for text in words if out.verbose else by_kind(words):
                out.line(f"{kind}: {level.level}: {text}")
    out.line("")
    if out.verbose:
        _show_levels(out, found.levels)
    elif found.levels:
        ended = dict.fromkeys(
            f"{level.level} {level.status}" for level in found.levels
        )  # of several transformers, once
        out.line(f"levels: {', '.join(ended)}")
        for level in found.levels:
            if level.status == "skipped":
                out.line(f"not run: {level.level} {level.title}: {level.reason}")
    ran = not found.levels or any(one.level == "L3" and one.status != "skipped" for one in found.levels)
    if found.backends and (out.verbose or ran):
        out.table(
            ["backend", "kind", "modules", "status", "reason"],
            [[one.name, one.kind, str(one.modules), one.status, one.reason] for one in found.backends],
        )
        out.line("")
    # A module that was not judged has neither verdict nor rule.
    judged = Counter((one.verdict, one.rule) for one in found.modules.values() if one.rule is not None)
    for (verdict, rule), count in sorted(judged.items(), key=str):
        out.line(f"proof: {count} modules {verdict} ({rule})")
    if found.modules:
        out.line(f"native FP{FORMATS[found.algorithm].bits} kernels executed: {found.native_executed} modules")
    show_cost(out, report)


def _show_levels(out: "Output", levels: "list[LevelReport]") -> None:
    out.table(
        ["level", "status", "reason"],
        [[f"{level.level} {level.title}", level.status, level.reason] for level in levels],
    )
    out.line("")


COMMANDS = {"verify": from_request(VerifyRequest, verify)}
