"""Measure the base of one transformer that is quantized here, and say in the report what that is worth.

torch is imported on the way.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modelopt_convert.checkpoint.location import Location
from modelopt_convert.commands.accounting import timed
from modelopt_convert.commands.build.downloads import to_fetch_bytes
from modelopt_convert.commands.build.inputs import Opened
from modelopt_convert.engines.sglang import DYNAMIC_INPUTS
from modelopt_convert.plan.plan import BuildPlan
from modelopt_convert.report.report import QUANTIZED_HERE, ModuleReport, ProofReport, Report
from modelopt_convert.run.progress import Progress

if TYPE_CHECKING:
    from modelopt_convert.write.gpu import Gpu

METHOD = "quantized here from the base: weights by max, inputs dynamic, not calibrated"


def run_measure(
    opened: Opened,
    plan: BuildPlan,
    max_error: float,
    workers: int,
    report: Report,
    progress: Progress,
    gpu: "Gpu | None",
) -> tuple[BuildPlan, ProofReport]:
    """The plan with its scales; there is no export whose codes could be proven.

    Raises:
        InputError: ``base.not_finite`` or ``base.all_zero``.
        BackendError: ``device.failed``.
    """
    import torch

    from modelopt_convert.write.measure import differing_groups, measure, measured_bytes

    base = opened.model
    progress.begin(f"measure {opened.prefix}".rstrip("/ "), measured_bytes(base, plan))
    with timed(report, "measure"), torch.inference_mode():
        scales = measure(base, plan, workers, progress.advance, gpu)
    differ = differing_groups(plan, scales)
    found = ProofReport(
        method=METHOD,
        status=QUANTIZED_HERE,
        max_error=max_error,
        counts={QUANTIZED_HERE: len(scales)},
        fused_scales_differ=differ,
        biases_differ=[],
        modules={name: ModuleReport(verdict=QUANTIZED_HERE) for name in sorted(scales)},
    )
    report.add_proof(found, opened.prefix)
    for group, ratio in differ.items():
        report.warn(
            "build.fused_scales",
            f"{opened.prefix}{group}: global scales differ {ratio:.3f}x, as in ModelOpt's exports; SGLang rebases them "
            "on loading",
        )
    return plan.with_scales(scales), found


def uncalibrated_line(base: Location | None, parts: Sequence[Opened], report: Report) -> str:
    """What is said first where the base itself is quantized."""
    num_bytes = to_fetch_bytes(report)
    fetching = "" if num_bytes is None else f", fetching {num_bytes / 1e9:.1f} GB"
    named = parts[0].model.path if len(parts) == 1 else base
    return f"no --export: quantizing {named}, uncalibrated{fetching}"


def note_uncalibrated(report: Report) -> None:
    """Say, also of a dry run, that nothing was calibrated."""
    report.calibration = "none"
    report.warn("build.uncalibrated", "quantized from the base without calibration: weights by max, inputs dynamic")
    report.warn("engine.dynamic_input_scale", DYNAMIC_INPUTS)
