"""Run the proof of one transformer, put it into the report, and refuse what failed. torch is imported on the way."""

from collections import Counter
from typing import TYPE_CHECKING

from modelopt_convert.commands.accounting import timed
from modelopt_convert.commands.build.inputs import Opened
from modelopt_convert.plan.plan import BuildPlan
from modelopt_convert.plan.readings import proof_readings
from modelopt_convert.report.report import ClippedReport, ModuleReport, ProofReport, Report
from modelopt_convert.run.errors import CheckFailedError
from modelopt_convert.run.progress import Progress

if TYPE_CHECKING:
    from modelopt_convert.proof.export import Proof
    from modelopt_convert.proof.judgement import Judgement


def run_proof(
    opened: Opened, plan: BuildPlan, max_error: float, workers: int, report: Report, progress: Progress
) -> tuple["Proof", ProofReport]:
    """Prove one transformer; the report has it also if it failed.

    Raises:
        CheckFailedError: ``check.proof``.
        InputError: A cause that can be named.
    """
    from modelopt_convert.proof.export import proof_bytes, prove

    export = opened.export
    assert export is not None  # what is proven
    progress.begin(f"prove {opened.prefix}".rstrip("/ "), proof_bytes(plan))
    for role, reader in opened.readers.items():
        reader.prefetch(proof_readings(plan, role, reader.tensors))
    with timed(report, "prove"):
        proof = prove(
            export,
            opened.base,
            plan,
            opened.calibration,
            max_error=max_error,
            workers=workers,
            advance=progress.advance,
        )
    modules = {name: _module_report(one) for name, one in proof.modules.items()}
    if opened.base is not None:
        modules |= {
            name: ModuleReport(verdict="not proven: replaced", reason=why) for name, why in proof.unproven.items()
        }
    else:
        modules |= {name: ModuleReport(verdict="not proven: no base") for name in plan.modules}
    found = ProofReport(
        method=proof.method,
        status="not proven" if opened.base is None else "pass" if proof.passed else "fail",
        max_error=max_error,
        counts=dict(sorted(Counter(one.verdict for one in modules.values()).items())),
        fused_scales_differ=proof.fused_differ,
        biases_differ=proof.biases_differ,
        modules=dict(sorted(modules.items())),
    )
    report.add_proof(found, opened.prefix)
    _warn(opened, plan, proof, found, report)
    if not proof.passed:
        failing = proof.failing()
        first = modules[failing[0]]
        raise CheckFailedError(
            f"{export.path}: {len(failing)} of {len(modules)} packed modules are not the base's: "
            f"{', '.join(failing[:10])} (relative error {first.relative_error:.3f}, gain {first.gain:.3f}, "
            f"worst row {first.worst_row:.3f}, worst column {first.worst_column:.3f})",
            code="check.proof",
            path=str(export.path),
            hint="the export is damaged, was changed after quantization, or was made with --compress (which rounds "
            "scales twice); export again. Nothing was written",
        )
    return proof, found


def _warn(opened: Opened, plan: BuildPlan, proof: "Proof", found: ProofReport, report: Report) -> None:
    prefix = opened.prefix
    if opened.base is None:
        report.warn("proof.none", "not proven: without --base nothing says that the weights are those of the model")
    for group, ratio in proof.fused_differ.items() if proof.is_rebased else ():
        report.warn(
            "export.fused_scales", f"{prefix}{group}: global scales differ {ratio:.3f}x; SGLang rebases them on loading"
        )
    if proof.biases_differ:
        report.warn(
            "export.biases_differ",
            f"{prefix}{proof.biases_differ[0]} first: {len(proof.biases_differ)} packed modules keep a bias unlike the "
            "base's",
        )
    if near := found.counts.get("within limits", 0):
        report.warn(
            "proof.not_reproduced",
            f"{near} modules are near the base but not quantized from it as it is (QAT, --compress, "
            "a small LoRA); those kept in BF16 get the base's weights",
        )
    for name, one in proof.modules.items():
        if one.clipped is not None:
            report.clipped[f"{prefix}{name}"] = ClippedReport(count=one.clipped.count, largest=one.clipped.largest)


def _module_report(one: "Judgement") -> ModuleReport:
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
