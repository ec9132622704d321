"""``mopt calibrate``."""

import shlex
from typing import TYPE_CHECKING

from modelopt_convert.cli._options import from_request
from modelopt_convert.commands.drawing_requests import CalibrateRequest

if TYPE_CHECKING:
    from modelopt_convert.cli._output import Output
    from modelopt_convert.report.report import Report


def calibrate(request: CalibrateRequest, output: "Output") -> None:
    """Run a pipeline on prompts, and keep what goes into each Linear of its transformer, for input scales.

    \b
    Examples:
      mopt calibrate BASE --pipeline PIPELINE --prompts prompts.txt --output CALIB
      mopt calibrate BASE --pipeline PIPELINE --prompts prompts.txt --output CALIB --share 2/8

    A run that is stopped goes on when it is started again: finished prompts are kept in CALIB.parts. CALIB is for
    --calibration of mopt build-nvfp4 and mopt convert-fp8. Needs diffusers: pip install 'modelopt-convert[fidelity]'.
    """
    from modelopt_convert.cli._output import run, show_cost

    def show(out: "Output", report: "Report") -> None:
        told = report.calibrated
        assert told is not None  # a run that ended well has it
        if told.digest is None:
            out.line(f"{told.runs_done} of {told.runs} runs are done, kept in {told.kept_in}")
        else:
            out.line(f"wrote {told.path}: inputs of {told.modules} Linears in {told.runs} runs")
            weights = ["--weights", "gptq"] if request.gptq else []
            words = shlex.join(["--base", str(request.base), "--calibration", told.path, *weights])
            out.line(f"next: mopt build-nvfp4 {words} --output OUT")
        out.line("")
        if told.half_ratio is not None:
            out.line(f"amax of one half of the runs over that of all, mean of modules: {told.half_ratio:.3f}")
        show_cost(out, report)

    run(output, request, show)


COMMANDS = {"calibrate": from_request(CalibrateRequest, calibrate)}
