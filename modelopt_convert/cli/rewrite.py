"""``mopt swap-nibbles`` and ``mopt unswizzle-scales``."""

import shlex
from functools import partial
from typing import TYPE_CHECKING

from modelopt_convert.cli._options import from_request
from modelopt_convert.commands.requests import RewriteRequest, SwapNibblesRequest, UnswizzleScalesRequest

if TYPE_CHECKING:
    from modelopt_convert.cli._output import Output
    from modelopt_convert.report.report import Report


def swap_nibbles(request: SwapNibblesRequest, output: "Output") -> None:
    """Exchange the two codes in every byte of the packed weights.

    \b
    Examples:
      mopt swap-nibbles high-first low-first --base FLUX.1-dev
      mopt swap-nibbles comfy.safetensors low-first

    With --base, exits 1 (already in order) rather than make a right file wrong.
    """
    from modelopt_convert.cli._output import run

    run(output, request, partial(_show, request=request))


def unswizzle_scales(request: UnswizzleScalesRequest, output: "Output") -> None:
    """Bring block scales from the 128x4 (swizzled) order into row-major order, or back.

    \b
    Examples:
      mopt unswizzle-scales post-processed row-major --base FLUX.1-dev
      mopt unswizzle-scales row-major swizzled --reverse

    With --base, exits 1 (already in order) rather than make a right file wrong.
    """
    from modelopt_convert.cli._output import run

    run(output, request, partial(_show, request=request))


def _show(out: "Output", report: "Report", request: RewriteRequest) -> None:
    from modelopt_convert.cli._output import show_cost, show_counts, show_written

    show_written(out, report)
    if report.status != "planned":
        place = shlex.quote(report.output.path)
        proves = request.base is not None
        out.line(
            f"next: mopt {f'verify {place} --base {shlex.quote(str(request.base))}' if proves else f'inspect {place}'}"
        )
    out.line("")
    if out.verbose:
        show_counts(out, report)
    for check in report.checks:
        out.line(f"check: {check['name']} {check['status']}")
    show_cost(out, report)


COMMANDS = {
    "swap-nibbles": from_request(SwapNibblesRequest, swap_nibbles),
    "unswizzle-scales": from_request(UnswizzleScalesRequest, unswizzle_scales),
}
