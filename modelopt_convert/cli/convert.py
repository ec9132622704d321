"""``mopt convert``."""

import shlex
from functools import partial
from typing import TYPE_CHECKING

from modelopt_convert.cli._options import from_request
from modelopt_convert.commands.requests import ConvertRequest

if TYPE_CHECKING:
    from modelopt_convert.cli._output import Output
    from modelopt_convert.report.report import Report


def convert(request: ConvertRequest, output: "Output") -> None:
    """Convert a checkpoint from one dialect into another, and read the result back.

    \b
    Examples:
      mopt convert comfy.safetensors OUT --to modelopt
      mopt convert EXPORT OUT --to comfyui --base BASE

    What the target cannot hold exactly is refused, unless --inexact says how.
    """
    from modelopt_convert.cli._output import run

    run(output, request, partial(_show, request=request))


def _show(out: "Output", report: "Report", request: ConvertRequest) -> None:
    from modelopt_convert.cli._output import show_cost, show_counts, show_written

    show_written(out, report)
    if report.status != "planned":
        out.line(f"next: mopt inspect {shlex.quote(report.output.path)}")
    out.line("")
    if out.verbose:
        show_counts(out, report)
    for check in report.checks:
        out.line(f"check: {check['name']} {check['status']}")
    show_cost(out, report)


COMMANDS = {"convert": from_request(ConvertRequest, convert)}
