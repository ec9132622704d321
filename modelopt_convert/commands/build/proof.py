"""What is known of one transformer's weights before they are written: the proof of its export, or the measured base.

torch is imported on the way.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from modelopt_convert.commands.build.inputs import Opened
from modelopt_convert.commands.command import Warned
from modelopt_convert.commands.requests import BuildRequest
from modelopt_convert.formats.format import WEIGHTS_WORDS
from modelopt_convert.formats.layout import Layout
from modelopt_convert.plan.plan import BuildPlan
from modelopt_convert.plan.prediction import grown, num_bytes, proof_readings, step_readings, whole_readings
from modelopt_convert.report.report import ClippedReport, ModuleReport, ProofReport
from modelopt_convert.report.words import (
    CALIBRATED_WORDS,
    MISMATCH_WORDS,
    NEAR_WORDS,
    NO_BASE_WORDS,
    NOT_CALIBRATED_WORDS,
    PROVEN_WORDS,
    QUANTIZED_HERE,
    REFUTED,
    SAMPLED_WORDS,
)
from modelopt_convert.run.errors import CheckFailedError, Faults
from modelopt_convert.run.progress import Progress

if TYPE_CHECKING:
    from modelopt_convert.proof.due import Due
    from modelopt_convert.proof.export import Proof
    from modelopt_convert.proof.judgement import Judgement
    from modelopt_convert.write.gpu import Gpu

_MEASURED = "quantized here from the base: weights by {}, inputs dynamic, not calibrated"
_WITH_INPUTS = "quantized here from the base: weights by {}, input scales of a calibration"


@dataclass(frozen=True, slots=True)
class Proven:
    """What was found of one transformer.

    Attributes:
        plan: The plan, brought in line with what was found.
        report: Verdicts and their counts.
        warned: What the user should know.
        clipped: What a scale was too small for, by module.
        proof: What is known of the export, with the comparisons that are due; None without an export.
    """

    plan: BuildPlan
    report: ProofReport
    warned: list[Warned]
    clipped: Mapping[str, ClippedReport] = field(default_factory=dict)
    proof: "Proof | None" = None

    @property
    def due(self) -> Mapping[str, "Due"]:
        """Modules of which all bytes are to be compared while they are written."""
        return self.proof.due if self.proof is not None else {}


def prove_part(opened: Opened, plan: BuildPlan, request: BuildRequest, progress: Progress, faults: Faults) -> Proven:
    """Prove one transformer, up to the comparisons that are done while it is written.

    Args:
        opened: Its inputs.
        plan: What will be built from them, or as much as has no fault.
        request: What is asked for.
        progress: Told what is read.
        faults: Gets causes of failure that can be named.
    """
    from modelopt_convert.proof.export import prove

    export = opened.export
    assert export is not None  # what is proven
    readings = {role: list(proof_readings(plan, role, one.tensors)) for role, one in opened.readers.items()}
    progress.begin(f"prove {opened.prefix}".rstrip("/ "), sum(map(num_bytes, readings.values())))
    for role, reader in opened.readers.items():
        later = list(step_readings(plan.steps, role, reader.tensors))
        if request.proof == "all":
            later += whole_readings(plan, role, reader.tensors)
        reader.prefetch(grown(readings[role], later))
    proof = prove(
        export,
        opened.base,
        plan,
        opened.calibration,
        faults,
        max_error=request.max_error,
        accept_near=request.accept_near,
        is_whole=request.proof == "all",
        workers=request.worker_count,
        advance=progress.advance,
    )
    return _proven(opened, plan, proof, request, faults)


def conclude_part(
    opened: Opened, proven: Proven, found: Mapping[str, "Judgement"], request: BuildRequest, faults: Faults
) -> Proven:
    """The proof of one transformer once it is written, and so compared; ``faults`` gets causes that can be named."""
    from modelopt_convert.proof.export import concluded

    if not proven.due:
        return proven
    assert proven.proof is not None and opened.export is not None  # something is due
    proof = concluded(proven.proof, found, opened.export, faults)
    return _proven(opened, proven.plan, proof, request, faults)


def compare_rest(opened: Opened, proven: Proven, request: BuildRequest, progress: Progress, faults: Faults) -> Proven:
    """The proof of one transformer that will not be written: what is due is compared all the same."""
    from modelopt_convert.proof.due import due_readings
    from modelopt_convert.proof.export import compared

    if not proven.due:
        return proven
    assert opened.export is not None and opened.base is not None  # something is due
    progress.begin(f"compare {opened.prefix}".rstrip("/ "), 0)
    for role, reader in opened.readers.items():
        reader.prefetch(due_readings(proven.due, role, reader.tensors))
    found = compared(opened.export, opened.base, proven.due, request.worker_count, faults)
    return conclude_part(opened, proven, found, request, faults)


def _proven(opened: Opened, plan: BuildPlan, proof: "Proof", request: BuildRequest, faults: Faults) -> Proven:
    """What is reported of a proof."""
    modules = {name: module_report(one) for name, one in proof.modules.items()}
    if opened.base is not None:
        modules |= {
            name: ModuleReport(verdict="not proven: replaced", reason=why) for name, why in proof.unproven.items()
        }
    else:
        modules |= {name: ModuleReport(verdict=NO_BASE_WORDS) for name in plan.modules}
    written = {name: modules[name] for name in plan.packed if name in modules}
    failing = [name for name, one in modules.items() if one.verdict in REFUTED]
    near = [name for name, one in modules.items() if one.verdict == "near" and not (proof.due and name in written)]
    differ = [*proof.biases_differ, *proof.unquantized_differ]
    words = _in_words(opened, proof, near + differ, written)
    status: Literal["pass", "fail", "not proven"] = "not proven" if words != PROVEN_WORDS else "pass"
    report = ProofReport(
        method=proof.method,
        status="fail" if failing or faults.names or (near and not request.accept_near) else status,
        words=MISMATCH_WORDS if failing or faults.names else words,
        max_error=request.max_error,
        counts=verdict_counts(modules),
        fused_scales_differ=proof.fused_differ,
        biases_differ=proof.biases_differ,
        unquantized_differ=proof.unquantized_differ,
        modules=dict(sorted(modules.items())),
    )
    layouts = proof.layouts() if not proof.due else {}
    clipped = {
        name: ClippedReport(count=one.clipped.count, largest=one.clipped.largest)
        for name, one in proof.modules.items()
        if one.clipped is not None
    }
    warned = [*_warnings(opened, proof, near), *_layout_warnings(layouts, plan)] if not proof.due else []
    return Proven(plan.with_layouts(layouts), report, warned, clipped, proof)


def _in_words(opened: Opened, proof: "Proof", near: Sequence[str], written: Mapping[str, ModuleReport]) -> str:
    """Whether what is written is proven, and if not, why."""
    if opened.base is None:
        return NO_BASE_WORDS
    if near:
        return NEAR_WORDS
    if not all(one.compared == "all" for one in written.values()):
        return "not proven: being compared" if proof.due else SAMPLED_WORDS
    return PROVEN_WORDS


def add_unproven(opened: Opened, report: ProofReport, faults: Faults, *, accept_near: bool) -> None:
    """Add what failed, ``check.proof``, but for modules of which a cause is known."""
    told = faults.names
    modules = {name: one for name, one in report.modules.items() if name not in told}
    kinds = (
        (
            REFUTED,
            "are not the base's",
            "the export is damaged, was changed after quantization, or was made from another base; export again. "
            "Nothing was published",
        ),
        (
            () if accept_near else ("near",),
            "are near the base, and not what quantizing it gives",
            "a merged LoRA shows in the modules it was trained for, GPTQ and QAT in all; give the base that was "
            "quantized, or --accept-near to build what is not proven. Nothing was published",
        ),
    )
    for verdicts, what, hint in kinds:
        failing = [name for name, one in modules.items() if one.verdict in verdicts]
        if failing:
            failure = CheckFailedError(
                f"{opened.model.path}: {len(failing)} of {len(report.modules)} packed modules {what}: "
                f"{', '.join(failing[:10])}{_figures(report.modules[failing[0]])}",
                code="check.proof",
                path=str(opened.model.path),
                hint=hint,
            )
            faults.add("", failure.at(failing))


def _figures(one: ModuleReport) -> str:
    """What tells the causes apart, for the first module that failed."""
    found = []
    if one.first is not None:
        found.append(one.first)
    found.append(f"{one.codes_equal} of {one.codes} codes equal")
    if one.scales:
        found.append(
            f"{one.scales_equal} of {one.scales} scales equal, {one.blocks_above} blocks above max calibration"
        )
    if one.relative_error is not None:
        found.append(
            f"relative error {one.relative_error:.3f}, gain {one.gain:.3f}, worst row {one.worst_row:.3f}, worst "
            f"column {one.worst_column:.3f}"
        )
    return f" ({'; '.join(found)})"


def measure_part(
    opened: Opened, plan: BuildPlan, request: BuildRequest, progress: Progress, gpu: "Gpu | None"
) -> Proven:
    """Measure the base of one transformer: there is no export whose codes could be proven.

    Raises:
        InputError: ``base.not_finite`` or ``base.all_zero``.
        BackendError: ``device.failed``.
    """
    import torch

    from modelopt_convert.proof.judgement import format_proof
    from modelopt_convert.write.measure import differing_groups, measure, measured_bytes

    base = opened.model
    assert plan.weights is not None  # of a base
    progress.begin(f"measure {opened.prefix}".rstrip("/ "), measured_bytes(base, plan))
    with torch.inference_mode():
        scales = measure(base, plan, request.worker_count, progress.advance, gpu)
    differ = differing_groups(plan, scales)
    report = ProofReport(
        method=(_MEASURED if request.calibration is None else _WITH_INPUTS).format(WEIGHTS_WORDS[plan.weights]),
        status=QUANTIZED_HERE,
        words=NOT_CALIBRATED_WORDS if request.calibration is None else CALIBRATED_WORDS,
        max_error=request.max_error,
        counts={QUANTIZED_HERE: len(scales)},
        fused_scales_differ=differ,
        biases_differ=[],
        modules={name: ModuleReport(verdict=QUANTIZED_HERE) for name in sorted(scales)},
    )
    warned = [
        (
            "build.fused_scales",
            f"{opened.prefix}{group}: global scales differ {ratio:.3f}x, as in ModelOpt's exports; SGLang brings them "
            "to one scale on loading, vLLM-omni misreads them",
        )
        for group, ratio in (differ.items() if format_proof(plan.format.algorithm).is_rebased else ())
    ]
    return Proven(plan.with_scales(scales), report, warned)


def verdict_counts(modules: Mapping[str, ModuleReport]) -> dict[str, int]:
    """How many modules got each verdict; those of which only rows were compared are counted apart."""
    rows = {"sampled rows": " (sampled rows)"}
    return dict(sorted(Counter(one.verdict + rows.get(str(one.compared), "") for one in modules.values()).items()))


def module_report(one: "Judgement") -> ModuleReport:
    """The judgement on one module, as it is reported."""
    near = one.closeness
    return ModuleReport(
        verdict=one.verdict,
        compared="all" if one.is_whole else "sampled rows",
        **dataclasses.asdict(one.counts),
        scale_factor=one.factor if one.factor != 1.0 else None,
        group_scale_factor=one.group_factor if one.group_factor != 1.0 else None,
        cast=one.cast,
        first=one.first,
        relative_error=near and near.relative_error,
        gain=near and near.gain,
        worst_row=near and near.worst_row,
        worst_column=near and near.worst_column,
        reading=one.reading.in_words() or None if one.reading else None,
        rule=one.rule,
    )


def _warnings(opened: Opened, proof: "Proof", near: Sequence[str]) -> Iterator[Warned]:
    prefix = opened.prefix
    if opened.base is None:
        yield "proof.none", "not proven: without --base nothing says that the weights are those of the model"
    for group, ratio in proof.fused_differ.items() if proof.is_rebased else ():
        message = (
            f"{prefix}{group}: global scales differ {ratio:.3f}x; SGLang brings them to one scale on loading, "
            "vLLM-omni misreads them"
        )
        yield "export.fused_scales", message
    for words in proof.odd_inputs:
        yield "export.odd_input_scale", f"{prefix}{words}"
    if biases := proof.biases_differ:
        message = f"{prefix}{biases[0]} first: {len(biases)} packed modules keep a bias unlike the base's"
        yield "export.biases_differ", message
    if differ := proof.unquantized_differ:
        message = f"{prefix}{differ[0]} first: {len(differ)} unquantized tensors of the export are not the base's"
        yield "export.unquantized_differ", f"{message}; the base's are written, so that two models may be mixed"
    if coarser := proof.coarser:
        message = f"{prefix}{coarser[0]} first: {len(coarser)} unquantized tensors of the base are the export's, cast"
        yield "base.coarser", f"{message}; the base's are written, with less precision"
    from modelopt_convert.proof.judgement import scale_words

    for words in scale_words(proof.modules, (group.split(", ") for group in proof.fused_differ)):
        yield "proof.scale_factor", f"{prefix}{words}"
    if near:
        yield (
            "proof.near",
            f"not proven: {len(near)} modules are near the base, and not what quantizing it gives ({near[0]} first); "
            "those kept in BF16 get the base's weights, so that two models may be mixed",
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
