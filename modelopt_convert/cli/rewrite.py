"""``mopt swap-nibbles`` and ``mopt unswizzle-scales``."""

from typing import TYPE_CHECKING

from modelopt_convert.cli._options import from_request
from modelopt_convert.commands.requests import SwapNibblesRequest, UnswizzleScalesRequest

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

    run(output, request, _show)


def unswizzle_scales(request: UnswizzleScalesRequest, output: "Output") -> None:
    """Bring block scales from the 128x4 (swizzled) order into row-major order, or back.

    \b
    Examples:
      mopt unswizzle-scales post-processed row-major --base FLUX.1-dev
      mopt unswizzle-scales row-major swizzled --reverse

    With --base, exits 1 (already in order) rather than make a right file wrong.
    """
    from modelopt_convert.cli._output import run

    run(output, request, _show)


def _show(out: "Output", report: "Report") -> None:
    from modelopt_convert.cli._output import show_cost, show_written

    show_written(out, report)
    for check in report.checks:
        out.line(f"check: {check['name']} {check['status']}")
    show_cost(out, report)


COMMANDS = {
    "swap-nibbles": from_request(SwapNibblesRequest, swap_nibbles),
    "unswizzle-scales": from_request(UnswizzleScalesRequest, unswizzle_scales),
}
