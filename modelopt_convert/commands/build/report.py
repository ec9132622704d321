"""The report of a build, put together in one place from what its steps returned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from modelopt_convert.checkpoint.calibration import CalibrationFolder
from modelopt_convert.checkpoint.companions import Companions
from modelopt_convert.commands.build.card import Made
from modelopt_convert.commands.build.files import counted, fates_of, rules_of
from modelopt_convert.commands.build.inputs import Opened, base_repo
from modelopt_convert.commands.build.proof import Proven, verdict_counts
from modelopt_convert.commands.build.to import Converted
from modelopt_convert.commands.command import (
    Clock,
    Inputs,
    Warned,
    ending,
    output_report,
    throughput,
    versions,
    warnings_of,
)
from modelopt_convert.commands.requests import BuildRequest
from modelopt_convert.commands.serving import known_limits
from modelopt_convert.engines.sglang import pipeline_command
from modelopt_convert.formats.format import Algorithm
from modelopt_convert.plan.plan import BuildPlan
from modelopt_convert.plan.prediction import peak_bytes
from modelopt_convert.preset.preset import ChosenPreset
from modelopt_convert.report.calibrate import CalibrationReport
from modelopt_convert.report.report import (
    ClippedReport,
    EngineLimitReport,
    ProofReport,
    PushedReport,
    Report,
)
from modelopt_convert.report.verify import VerifyReport
from modelopt_convert.stage.directory import Published

# What is said of engines that read ModelOpt's dialect, and of SGLang among them.
_OF_MODELOPT = frozenset({"build.fused_scales", "engine.fused_scales", "export.fused_scales"})
_OF_SGLANG = frozenset({"engine.dynamic_input_scale", "engine.shared_name", "preset.structural"})


@dataclass(slots=True)
class Steps:
    """What the steps of a build have returned so far.

    Attributes:
        clock: Seconds by phase.
        inputs: As they were opened.
        warned: What the user should know, in the order in which it was found.
        output: Where the checkpoint shall stand.
        chosen: The preset, if there is one.
        companions: What is copied beside them, of a whole pipeline.
        calibration: What input scales are made of, if the base itself is quantized with any.
        parts: The transformers.
        plans: The plan of each, brought in line with what was found since.
        free_bytes: Room beside OUT.
        is_planned: Whether nothing more was asked for than the plan.
        device: The GPU that quantizes the base.
        peak_gpu_bytes: Of its memory.
        proofs: What was found of each transformer.
        clipped: What scales were too small for, by module.
        fused_losses: What engines lose of fused weights, by group and engine.
        checks: Of the closing step.
        verify: By the levels of verify.
        converted: What became of it in another dialect.
        published: How the checkpoint came into place.
        peak_rss_bytes: Of this process, at the end of the work.
        pushed: What stands on the Hub.
    """

    clock: Clock = field(default_factory=Clock)
    inputs: Inputs = field(default_factory=Inputs)
    warned: list[Warned] = field(default_factory=list)
    output: str = ""
    chosen: ChosenPreset | None = None
    companions: Companions | None = None
    calibration: CalibrationFolder | None = None
    parts: list[Opened] = field(default_factory=list)
    plans: list[BuildPlan] = field(default_factory=list)
    free_bytes: int | None = None
    is_planned: bool = False
    device: str | None = None
    peak_gpu_bytes: int | None = None
    proofs: list[Proven] = field(default_factory=list)
    clipped: dict[str, ClippedReport] = field(default_factory=dict)
    fused_losses: dict[str, Mapping[str, float]] = field(default_factory=dict)
    checks: list[dict[str, object]] = field(default_factory=list)
    verify: VerifyReport | None = None
    converted: Converted | None = None
    published: Published | None = None
    peak_rss_bytes: int | None = None
    pushed: PushedReport | None = None


_WEAKEST_FIRST = ("fail", "not proven", "quantized here", "pass")


def build_report(request: BuildRequest, steps: Steps, *, has_export: bool, error: BaseException | None) -> Report:
    """The report, whatever the outcome.

    Args:
        request: What was asked for.
        steps: What is known so far.
        has_export: Whether there is an export.
        error: What ended the run, or None.
    """
    both = list(zip(steps.parts, steps.plans, strict=False))  # a plan may be refused after others were made
    done = steps.converted
    specs = {f"{part.prefix}{shard.file}": shard.tensors for part, plan in both for shard in plan.shards}
    repos = steps.chosen.repos(request.base_model or base_repo(steps.parts)) if steps.chosen is not None else ()
    if done is not None:
        specs = {shard.file: shard.tensors for shard in done.plan.shards}
    ledger = {f"{part.prefix}{role}": fates for part, plan in both for role, fates in fates_of(part, plan).items()}
    beside = steps.companions.files if steps.companions is not None else {}
    copied = {path: file.num_bytes for path, file in beside.items()}
    configs = [plan.config for _, plan in both] or [part.model.config for part in steps.parts]
    engines = known_limits(configs, request.algorithm, repos) if request.to == "modelopt" else []
    return Report(
        command=request.command,
        inputs=steps.inputs.reports(),
        network=steps.inputs.network(),
        preset=_preset(steps.chosen, request.algorithm, exported=has_export),
        output=output_report(steps.output, specs, copied, steps.published, error).model_copy(
            update={"load": _pipeline_command(request, steps)}
        ),
        engine=request.engine,
        engines=engines,
        rules=[rule for part, plan in both for rule in rules_of(part, plan)],
        counts={role: counted(fates) for role, fates in ledger.items()},
        ledger=ledger,
        proof=_proof(steps),
        convert=done.report if done is not None else None,
        calibration=None if has_export else "none" if request.calibration is None else "inputs",
        weights=steps.plans[0].weights if steps.plans else None,
        calibrated=_calibrated(steps),
        clipped=steps.clipped,
        dequantized=[f"{part.prefix}{name}" for part, plan in both for name in plan.dequantized],
        checks=steps.checks,
        verify=steps.verify,
        pushed=steps.pushed,
        free_bytes=steps.free_bytes,
        peak_working_bytes=max((peak_bytes(plan, request.worker_count) for plan in steps.plans), default=None),
        peak_rss_bytes=steps.peak_rss_bytes,
        throughput_bytes_per_s=throughput(steps.clock, steps.plans) if steps.peak_rss_bytes is not None else None,
        device=steps.device,
        peak_gpu_bytes=steps.peak_gpu_bytes,
        timings_s=steps.clock.seconds,
        warnings=warnings_of([*steps.inputs.left_aside(), *_meant(steps.warned, request, engines)]),
        versions=versions(),
        **ending(error, "planned" if steps.is_planned else "ok"),
    )


def _meant(warned: Sequence[Warned], request: BuildRequest, engines: Sequence[EngineLimitReport]) -> list[Warned]:
    """What is said to somebody who builds for an engine: nothing of how others read what is not for them.

    Of a checkpoint that SGLang does not load nothing is said of how it would read it; and where it is known to read it
    wrong, no rule says it of single modules besides.
    """
    left = frozenset[str]() if request.engine == "sglang" else _OF_SGLANG
    left = left if request.to == "modelopt" else _OF_SGLANG | _OF_MODELOPT
    grades = {one.grade for one in engines if one.engine == "sglang"}
    left |= {"engine.shared_name"} if grades & {"fails", "wrong"} else set()
    left |= {"engine.dynamic_input_scale"} if "fails" in grades else set()
    return [one for one in warned if one[0] not in left]


def _calibrated(steps: Steps) -> CalibrationReport | None:
    """What input scales are taken from."""
    found = steps.calibration
    if found is None:
        return None
    amax = {
        f"{part.prefix}{name}": one for part in steps.parts for name, one in found.of(part.component.name).amax.items()
    }
    return CalibrationReport(
        path=str(found.path),
        digest=found.digest,
        headroom=found.said["headroom"],
        prompts=found.said["prompts"]["count"],
        runs=found.said["runs"],
        runs_done=found.said["runs"],
        modules=sum(one is not None for one in amax.values()),
        never_ran=[name for name, one in amax.items() if one is None],
    )


def _pipeline_command(request: BuildRequest, steps: Steps) -> str | None:
    if steps.companions is None:
        return None
    known = request.base_model or base_repo(steps.parts)
    made = Made(request.command, steps.chosen, None, known, None)
    return pipeline_command(steps.output, made.named_by_engine)


def _preset(chosen: ChosenPreset | None, algorithm: Algorithm, *, exported: bool) -> dict[str, object] | None:
    if chosen is None:
        return None
    known = algorithm in chosen.loaded.preset.sets()
    return {
        "name": chosen.loaded.preset.name,
        "path": chosen.loaded.path,
        "sha256": chosen.loaded.sha256,
        "status": chosen.status(algorithm) if known else None,
        "known_limits": chosen.limits(algorithm, exported=exported) if known else [],
        "also": chosen.also,
    }


def _proof(steps: Steps) -> ProofReport | None:
    """The proofs of all transformers as one: names under their prefixes, the weakest status and its words."""
    named = [(part.prefix, one.report) for part, one in zip(steps.parts, steps.proofs, strict=False)]
    if not named:
        return None
    modules = {f"{prefix}{name}": one for prefix, found in named for name, one in found.modules.items()}
    weakest = min((found for _, found in named), key=lambda one: _WEAKEST_FIRST.index(one.status))
    return ProofReport(
        method=weakest.method,
        status=weakest.status,
        words=weakest.words,
        max_error=weakest.max_error,
        counts=verdict_counts(modules),
        fused_scales_differ={
            f"{prefix}{group}": ratio for prefix, found in named for group, ratio in found.fused_scales_differ.items()
        },
        fused_losses={group: dict(one) for group, one in steps.fused_losses.items()},
        biases_differ=[f"{prefix}{name}" for prefix, found in named for name in found.biases_differ],
        unquantized_differ=[f"{prefix}{name}" for prefix, found in named for name in found.unquantized_differ],
        modules=modules,
    )


def clipped_warning(found: Mapping[str, ClippedReport]) -> list[Warned]:
    """What was cut off of one transformer's weights."""
    if not found:
        return []
    worst = max(found, key=lambda name: found[name].largest)
    message = (
        f"{sum(one.count for one in found.values())} values in {len(found)} modules lie beyond 448 scales and are "
        f"cut off; the largest, {found[worst].largest:.6g} scales, is in {worst}"
    )
    return [("export.clipped", message)]
