"""The page of ``mopt advise``: the frontier, what was chosen and why, drawn from the report. Pure.

What it shows of a checkpoint is escaped.
"""

from collections.abc import Mapping
from typing import Any

from modelopt_convert.fidelity.plot import PLOT_STYLE, plot
from modelopt_convert.stage.written_file import ADVICE_HEAD
from modelopt_convert.verification.page.markup import badge, pairs, section, table, text, value_text
from modelopt_convert.verification.page.shell import whole
from modelopt_convert.verification.page.style import STYLE

_TERMS = {
    "unit": "modules of which all are packed, or none: one Linear, or what an engine joins or has one scale.",
    "packed": "in codes of 4 or 8 bits with scales; what is kept is BF16.",
    "error": "mean squared difference from the base with the unit alone packed, of pictures in 0..1 or of the "
    "transformer's output.",
    "predicted": "the sum of the errors of all packed units. What is measured has all of them packed together.",
    "frontier": "choices that no mixture of others beats.",
    "emulated": "packed modules are computed as an engine does, on another device. No kernel of an engine ran.",
    "PSNR": "peak signal to noise of the pictures against the base's, in decibels; more is better.",
}


def render(report: Mapping[str, Any], *, command: str, date: str) -> str:
    """The page, the same bytes for the same arguments.

    Args:
        report: The report of a run that came to a choice.
        command: What was called.
        date: When.
    """
    chosen, drawn = report["chosen"], report["drawn"]
    kept = set(chosen["keeps"])
    packed = len(report["units"]) - len(kept)
    facts = {
        "preset": report["output"],
        "bytes": f"{chosen['bytes']:,}",
        "bits a weight": f"{chosen['bits']:.2f}",
        "PSNR": _psnr(chosen["measured"]),
        "format": str(report["format"]).upper(),
        "inputs": report["activations"],
    }
    title = f"{packed} of {len(report['units'])} units packed"
    head = (
        f'<header class="verdict pass">\n<p class="soft">mopt advise</p>\n<h1>{text(title)}</h1>\n'
        f"<p>The kept units stay in BF16. Packed ones were emulated: no kernel of an engine ran.</p>\n{pairs(facts)}\n"
        "</header>"
    )
    others = [one for one in report["frontier"] if one["measured"] and one["keeps"] != chosen["keeps"]]
    points = [
        [f"{one['bytes']:,}", f"{one['bits']:.2f}", str(len(one["keeps"])), value_text(one["error_predicted"]),
         value_text(one["measured"]["error"]), text(_psnr(one["measured"]))]
        for one in (*others, chosen)
    ]  # fmt: skip
    units = [
        [text(one["name"]), badge(*(("kept", "part") if one["name"] in kept else ("packed", "other"))),
         value_text(one["error_alone"]), f"{one['bytes_kept']:,}", f"{one['bytes_packed']:,}"]
        for one in sorted(report["units"], key=lambda one: -one["error_alone"] / one["bytes_kept"])
    ]  # fmt: skip
    run = {
        "pipeline": drawn["pipeline"],
        "prompts": drawn["prompts"],
        "seeds": drawn["seeds"],
        "steps": drawn["steps"],
        "size": drawn["size"],
        "judged by": f"{drawn['scored']} {'forwards' if report['score'] == 'forward' else 'pictures'} a unit",
        "device": report["device"],
        "date": date,
    }
    heads = ["bytes", "bits a weight", "kept", "error predicted", "error measured", "PSNR"]
    parts = [
        head,
        section("Frontier", plot(report), "The line is predicted; rings and the dot were drawn."),
        section("What was drawn", table("points", heads, points)),
        section("Units", table("units", ["unit", "", "error alone", "bytes kept", "bytes packed"], units),
                "By error for each byte."),
        section("The run", f"<pre><code>{text(command)}</code></pre>\n{pairs(run, 'run')}"),
        section("Terms", pairs(_TERMS, "terms")),
    ]  # fmt: skip
    return whole(ADVICE_HEAD, f"{title} - mopt advise", STYLE + PLOT_STYLE, parts)


def _psnr(measured: Mapping[str, Any]) -> str:
    return f"equal pictures, n = {measured['n']}" if measured["psnr"] is None else (
        f"{measured['psnr']:.2f} dB, n = {measured['n']}"
    )  # fmt: skip
