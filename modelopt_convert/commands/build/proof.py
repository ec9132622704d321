"""What is known of one transformer's weights before they are written: the proof of its export, or the measured base.

torch is imported on the way.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from modelopt_convert.commands.build.inputs import Opened
from modelopt_convert.commands.command import Warned
from modelopt_convert.formats.layout import Layout
from modelopt_convert.plan.plan import BuildPlan
from modelopt_convert.plan.prediction import num_bytes, proof_readings
from modelopt_convert.report.report import PASSING, QUANTIZED_HERE, ClippedReport, ModuleReport, ProofReport
from modelopt_convert.run.errors import CheckFailedError
from modelopt_convert.run.progress import Progress

if TYPE_CHECKING:
    from modelopt_convert.proof.export import Proof
    from modelopt_convert.proof.judgement import Judgement
    from modelopt_convert.write.gpu import Gpu

_MEASURED = "quantized here from the base: weights by max, inputs dynamic, not calibrated"


@dataclass(frozen=True, slots=True)
class Proven:
    """What was found of one transformer.

    Attributes:
        plan: The plan, brought in line with what was found.
        report: Verdicts and their counts.
        warned: What the user should know.
        clipped: What a scale was too small for, by module, in the sampled rows.
    """

    plan: BuildPlan
    report: ProofReport
    warned: list[Warned]
    clipped: Mapping[str, ClippedReport] = field(default_factory=dict)


def prove_part(opened: Opened, plan: BuildPlan, max_error: float, workers: int, progress: Progress) -> Proven:
    """Prove one transformer; whether it passed is said by its report's status.

    Raises:
        InputError: A cause of failure that can be named.
    """
    from modelopt_convert.proof.export import prove

    export = opened.export
    assert export is not None  # what is proven
    readings = {role: list(proof_readings(plan, role, one.tensors)) for role, one in opened.readers.items()}
    progress.begin(f"prove {opened.prefix}".rstrip("/ "), sum(map(num_bytes, readings.values())))
    for role, reader in opened.readers.items():
        reader.prefetch(readings[role])
    proof = prove(
        export,
        opened.base,
        plan,
        opened.calibration,
        max_error=max_error,
        workers=workers,
        advance=progress.advance,
    )
    modules = {name: module_report(one) for name, one in proof.modules.items()}
    if opened.base is not None:
        modules |= {
            name: ModuleReport(verdict="not proven: replaced", reason=why) for name, why in proof.unproven.items()
        }
    else:
        modules |= {name: ModuleReport(verdict="not proven: no base") for name in plan.modules}
    report = ProofReport(
        method=proof.method,
        status="not proven" if opened.base is None else "pass" if proof.passed else "fail",
        max_error=max_error,
        counts=verdict_counts(modules),
        fused_scales_differ=proof.fused_differ,
        biases_differ=proof.biases_differ,
        modules=dict(sorted(modules.items())),
    )
    layouts = proof.layouts()
    return Proven(
        plan.with_layouts(layouts) if proof.passed else plan,
        report,
        [*_warnings(opened, proof, report), *(_layout_warnings(layouts, plan) if proof.passed else ())],
        {
            name: ClippedReport(count=one.clipped.count, largest=one.clipped.largest)
            for name, one in proof.modules.items()
            if one.clipped is not None
        },
    )


def refuse_unproven(opened: Opened, report: ProofReport) -> None:
    """Refuse what failed.

    Raises:
        CheckFailedError: ``check.proof``.
    """
    if report.status != "fail":
        return
    judged = {name: one for name, one in report.modules.items() if one.relative_error is not None}
    failing = [name for name, one in judged.items() if one.verdict not in PASSING]
    first = report.modules[failing[0]]
    raise CheckFailedError(
        f"{opened.model.path}: {len(failing)} of {len(report.modules)} packed modules are not the base's: "
        f"{', '.join(failing[:10])} (relative error {first.relative_error:.3f}, gain {first.gain:.3f}, "
        f"worst row {first.worst_row:.3f}, worst column {first.worst_column:.3f})",
        code="check.proof",
        path=str(opened.model.path),
        hint="the export is damaged, was changed after quantization, or was made with --compress (which rounds "
        "scales twice); export again. Nothing was written",
    )


def measure_part(
    opened: Opened, plan: BuildPlan, max_error: float, workers: int, progress: Progress, gpu: "Gpu | None"
) -> Proven:
    """Measure the base of one transformer: there is no export whose codes could be proven.

    Raises:
        InputError: ``base.not_finite`` or ``base.all_zero``.
        BackendError: ``device.failed``.
    """
    import torch

    from modelopt_convert.write.measure import differing_groups, measure, measured_bytes

    base = opened.model
    progress.begin(f"measure {opened.prefix}".rstrip("/ "), measured_bytes(base, plan))
    with torch.inference_mode():
        scales = measure(base, plan, workers, progress.advance, gpu)
    differ = differing_groups(plan, scales)
    report = ProofReport(
        method=_MEASURED,
        status=QUANTIZED_HERE,
        max_error=max_error,
        counts={QUANTIZED_HERE: len(scales)},
        fused_scales_differ=differ,
        biases_differ=[],
        modules={name: ModuleReport(verdict=QUANTIZED_HERE) for name in sorted(scales)},
    )
    warned = [
        (
            "build.fused_scales",
            f"{opened.prefix}{group}: global scales differ {ratio:.3f}x, as in ModelOpt's exports; SGLang rebases them "
            "on loading",
        )
        for group, ratio in differ.items()
    ]
    return Proven(plan.with_scales(scales), report, warned)


def verdict_counts(modules: Mapping[str, ModuleReport]) -> dict[str, int]:
    """How many modules got each verdict."""
    return dict(sorted(Counter(one.verdict for one in modules.values()).items()))


def module_report(one: "Judgement") -> ModuleReport:
    """The judgement on one module, as it is reported."""
    near = one.closeness
    return ModuleReport(
        verdict=one.verdict,
        codes=one.codes,
        codes_equal=one.codes_equal,
        relative_error=near.relative_error,
        gain=near.gain,
        worst_row=near.worst_row,
        worst_column=near.worst_column,
        reading=one.reading.in_words() or None if one.reading else None,
        rule=one.rule,
    )


def _warnings(opened: Opened, proof: "Proof", report: ProofReport) -> Iterator[Warned]:
    prefix = opened.prefix
    if opened.base is None:
        yield "proof.none", "not proven: without --base nothing says that the weights are those of the model"
    for group, ratio in proof.fused_differ.items() if proof.is_rebased else ():
        message = f"{prefix}{group}: global scales differ {ratio:.3f}x; SGLang rebases them on loading"
        yield "export.fused_scales", message
    if biases := proof.biases_differ:
        message = f"{prefix}{biases[0]} first: {len(biases)} packed modules keep a bias unlike the base's"
        yield "export.biases_differ", message
    if near := report.counts.get("within limits", 0):
        yield (
            "proof.not_reproduced",
            f"{near} modules are near the base but not quantized from it as it is (QAT, --compress, "
            "a small LoRA); those kept in BF16 get the base's weights",
        )


def _layout_warnings(layouts: Mapping[str, Layout], plan: BuildPlan) -> Iterator[Warned]:
    """What lies otherwise than ModelOpt writes it."""
    for count, words in (
        (sum(one.nibbles == "high" for one in layouts.values()), "the even column in the high nibble"),
        (sum(one.scales == "128x4" for one in layouts.values()), "the scales in the 128x4 order"),
    ):
        if count:
            message = f"{count} of {len(plan.modules)} modules have {words}; written in the canonical layout"
            yield "export.layout", message
