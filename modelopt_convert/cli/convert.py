"""``mopt convert``."""

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from modelopt_convert.cli._options import from_request
from modelopt_convert.commands.requests import ConvertRequest

if TYPE_CHECKING:
    from modelopt_convert.cli._output import Output
    from modelopt_convert.report.convert import ConvertReport, LossyModule
    from modelopt_convert.report.report import Report

_SHOWN = 10


def convert(request: ConvertRequest, output: "Output") -> None:
    """Convert a checkpoint from one dialect into another, and read the result back.

    \b
    Examples:
      mopt convert comfy.safetensors OUT --to modelopt --base BASE
      mopt convert EXPORT OUT --to comfyui --base BASE

    What the target cannot hold exactly is refused, unless --inexact says how.
    """
    from modelopt_convert.cli._output import run

    run(output, request, partial(_show, request=request))


def _show(out: "Output", report: "Report", request: ConvertRequest) -> None:
    from modelopt_convert.cli._output import show_cost, show_counts, show_written

    told = report.convert
    assert told is not None  # a run that ended well has a plan
    show_written(out, report, told.words)
    show_converted(out, told)
    if report.status != "planned":
        out.line(f"next: {_next(report, request)}")
    out.line("")
    if out.verbose:
        for words in told.evidence:
            out.line(f"evidence: {words}")
        show_counts(out, report)
    for check in report.checks:
        out.line(f"check: {check['name']} {check['status']}")
    if told.proof.compared:
        out.line(f"read back: {told.proof.equal} of {told.proof.compared} tensors equal")
    show_cost(out, report)


def show_converted(out: "Output", told: "ConvertReport") -> None:
    """What became of the modules, and what is not as it was."""
    out.line(f"{told.from_} to {told.to}: {_modules(told)}")
    for words in _lost(told, verbose=out.verbose):
        out.line(words)


def _modules(told: "ConvertReport") -> str:
    one = told.modules
    counts = {
        "exact": one.exact,
        "with the scale of the tensor rounded": one.rounded_global,
        "in BF16": one.bf16,
        "with scales brought to one": one.rebased,
        "quantized again": one.requantized,
    }
    found = [f"{count} {words}" for words, count in counts.items() if count]
    return f"{', '.join(found)} of {sum(counts.values())} quantized modules" if found else "no quantized module"


def _lost(told: "ConvertReport", *, verbose: bool) -> list[str]:
    """What is not as it was, some lines of each kind."""
    found = [_cut([f"{one.module}: {_lossy(one)}" for one in told.lossy], verbose)]
    found.append(_cut([f"{one.tensor}: {one.why}" for one in told.changed], verbose))
    found.append(_cut([f"{one.tensor} is left out: {one.why}" for one in told.dropped], verbose))
    found.append(_cut([f"{name}: converting back does not give it" for name in told.not_restorable], verbose))
    return [words for part in found for words in part]


def _lossy(one: "LossyModule") -> str:
    how = {"bf16": "in BF16", "rebased": "scales brought to one", "requantized": "quantized again"}[one.how]
    if one.rel_error is None:
        error = "relative error is measured when it is written"
    else:
        error = f"relative error {one.rel_error:.2g}{' or less' if one.at_most else ''}"
    return f"{how}, {error}; {one.why}"


def _cut(lines: list[str], verbose: bool) -> list[str]:
    if verbose or len(lines) <= _SHOWN:
        return lines
    return [*lines[:_SHOWN], f"and {len(lines) - _SHOWN} more; --verbose lists all"]


def _next(report: "Report", request: ConvertRequest) -> str:
    """A command that runs as printed: SGLang's where it loads OUT and the model is known, else one of mopt's."""
    place = Path(report.output.path)
    if request.to == "comfyui":
        files = " ".join(shlex.quote(str(place / one["file"])) for one in report.output.shards)
        return f"cp {files} ComfyUI/models/diffusion_models/"
    out = shlex.quote(str(place))
    if request.to != "modelopt":
        return f"mopt inspect {out}"
    from modelopt_convert.commands.serving import loads_right, model_of
    from modelopt_convert.engines.limits import DEFAULT
    from modelopt_convert.engines.sglang import load_command

    against = {"preset.structural", "convert.engine_names"} & {one["code"] for one in report.warnings}
    model = model_of(report.inputs, request.base)
    if model is not None and report.engine == DEFAULT and loads_right(report.engines, DEFAULT) and not against:
        return load_command(out, model, [])
    if report.convert is None or not report.convert.verifiable:
        return f"mopt inspect {out}"
    return f"mopt verify {out}" + (f" --base {shlex.quote(str(request.base))}" if request.base is not None else "")


COMMANDS = {"convert": from_request(ConvertRequest, convert)}
