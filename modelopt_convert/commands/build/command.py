"""The straight line of ``build-nvfp4`` and ``convert-fp8``: refuse, open, plan, stage, prove, stream, check, publish.

The only place where a plan meets the disk. torch is imported on the way, not at the top: refusals are fast.
"""

import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from modelopt_convert.checkpoint.components import COMPONENTS, resolve_components
from modelopt_convert.checkpoint.hub.hub_path import PREFIX
from modelopt_convert.checkpoint.location import Location, local_path, parse_location
from modelopt_convert.commands.accounting import note_cost, publish, timed
from modelopt_convert.commands.build.downloads import note_fetch
from modelopt_convert.commands.build.inputs import Opened, open_all
from modelopt_convert.commands.build.measurement import note_uncalibrated, run_measure, uncalibrated_line
from modelopt_convert.commands.build.proof import run_proof
from modelopt_convert.commands.build.structure import check_structure, refuse_misread
from modelopt_convert.commands.record import pipeline_files, small_files
from modelopt_convert.commands.space import build_bytes
from modelopt_convert.dialects.modelopt.amax_file import resolve_checkpoint
from modelopt_convert.formats.format import Algorithm
from modelopt_convert.formats.layout import Layout
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.plan.from_base import plan_quantized, preset_required
from modelopt_convert.plan.from_export import plan_mixed
from modelopt_convert.plan.plan import BuildPlan, Keeps
from modelopt_convert.preset.preset import ChosenPreset, choose_preset, known_broken, load_preset
from modelopt_convert.report.report import ClippedReport, ProofReport, Report, RuleReport
from modelopt_convert.run.errors import CheckFailedError, InputError
from modelopt_convert.run.progress import Progress
from modelopt_convert.run.workers import torch_on_one_thread
from modelopt_convert.stage.directory import StagingDir
from modelopt_convert.stage.output_rules import canonical_output, check_output_allowed
from modelopt_convert.write.executors import ExecutorName, open_executor, refuse_far
from modelopt_convert.write.stream import Streamed, stream

if TYPE_CHECKING:
    from modelopt_convert.write.gpu import Gpu


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """What the user asked of ``build-nvfp4`` or ``convert-fp8``.

    Attributes:
        algorithm: Which of the two.
        export: The ModelOpt export: transformer folder or pipeline folder; None to quantize the base, only for NVFP4.
        base: The unquantized base, likewise; None only for FP8.
        checkpoint: The ``.pt`` with amax values, or its folder; FP8 only.
        components: Which transformers of a pipeline; none for every one that the export quantized.
        output: Where the new checkpoint shall stand; None for ``./<preset>-<algorithm>``.
        preset: Name or path; ``none``; or None to choose by config.json.
        keep_bf16: The user's own patterns.
        max_shard_size: Largest output file, in bytes of tensors.
        max_error: Limit of the relative error where codes are not reproduced.
        overwrite: Consent to replace an existing checkpoint.
        allow_known_broken: Build also what an engine is known not to load right.
        verify: The closing step: ``auto`` with the GPU if there is one, ``cpu`` without, ``off`` not at all.
        dry_run: Plan only.
        download: Fetch files of the Hub whole, into its cache.
        workers: Tensors that are worked on at a time.
        executor: Where shards are written.
        device: Where the base is quantized, if it is.
    """

    algorithm: Algorithm
    export: Location | None
    base: Location | None
    checkpoint: Location | None
    components: tuple[str, ...]
    output: Path | None
    preset: str | None
    keep_bf16: tuple[str, ...]
    max_shard_size: int
    max_error: float
    overwrite: bool
    allow_known_broken: bool
    verify: Literal["auto", "cpu", "off"]
    dry_run: bool
    download: bool
    workers: int
    executor: ExecutorName
    device: Literal["cpu", "cuda"] = "cpu"


def convert(request: BuildRequest, report: Report, progress: Progress) -> None:
    """Build a transformer repo, or several; what happened is in ``report``, also when this raises.

    Raises:
        MoptError: One of its kinds; nothing was published unless a StorageError says so.
    """
    chosen: ChosenPreset | None = None
    if request.export is None:
        if request.preset == "none":
            raise preset_required()
        note_uncalibrated(report)
    if request.preset not in (None, "none"):
        chosen = ChosenPreset(loaded=load_preset(request.preset), also=[])
        _note_preset(report, chosen, request.algorithm)
        request = _with_base(request, chosen, report)
    refuse_far(request.executor, request.export, request.base)
    components = resolve_components(request.export, request.base, request.components)
    found = [path for one in components for path in (one.export, one.base)]
    inputs = tuple(path for path in map(local_path, (request.export, request.base, *found)) if path is not None)
    if request.checkpoint is not None:
        inputs += tuple({resolve_checkpoint(request.checkpoint, one.name or COMPONENTS[0]) for one in components})
    if request.output is not None or chosen is not None:
        output = _output_path(request, chosen, report)
        check_output_allowed(output, inputs, overwrite=request.overwrite)
    with ExitStack() as stack:
        executor = stack.enter_context(open_executor(request.executor))
        parts = open_all(components, request.checkpoint, stack, report)
        if request.preset is None:
            chosen = _choose(parts[0], report, request.algorithm)
            output = _output_path(request, chosen, report)
            check_output_allowed(output, inputs, overwrite=request.overwrite)
        plans: list[BuildPlan] = []
        for part in parts:
            with timed(report, "plan"):
                plans.append(_plan(request, part, chosen))
            _note_plan(report, part, plans[-1], request.workers)
            _refuse_known_broken(request, part, chosen, report)
            refuse_misread(plans[-1], str(part.model.path))
        report.free_bytes = shutil.disk_usage(output.parent).free
        for part, plan in zip(parts, plans, strict=True):
            note_fetch(report, part, plan, whole=request.download)
        if request.export is None:
            progress.announce(uncalibrated_line(request.base, parts, report))
        if request.dry_run:
            report.status = "planned"
            return
        gpu = _open_gpu(report) if request.device == "cuda" else None
        need = build_bytes(parts, plans, chosen, report)
        # Before the proof: that another run holds OUT, or that the disk is full, is said before any tensor is read.
        with StagingDir(output, inputs, overwrite=request.overwrite, need_bytes=need) as stage:
            with torch_on_one_thread():
                proofs = _prove(request, parts, plans, report, progress, gpu)
            manifests: dict[str, bytes] = {}
            for part, plan, proven in zip(parts, plans, proofs, strict=True):
                with timed(report, "stream"), torch_on_one_thread():
                    if part.prefix:
                        stage.add_folder(part.prefix.rstrip("/"))
                    done = stream(
                        stage,
                        plan,
                        part.readers,
                        progress,
                        part.prefix,
                        workers=request.workers,
                        executor=executor,
                        gpu=gpu,
                    )
                _note_clipped(report, part, done)
                files = small_files(part, plan, chosen, report, proven, done.digests)
                manifests[part.prefix.rstrip("/")] = files["mopt.json"]
                for name, data in files.items():
                    stage.write_file(f"{part.prefix}{name}", data)
            if gpu is not None:
                report.peak_gpu_bytes = gpu.peak_bytes()
            if len(parts) > 1:
                for name, data in pipeline_files(manifests, chosen, report).items():
                    stage.write_file(name, data)
            for part in parts:
                for reader in part.readers.values():
                    reader.check_unchanged()
            with timed(report, "check"):
                for part, plan in zip(parts, plans, strict=True):
                    _check(stage.path / part.prefix, plan, report)
            if request.verify != "off":
                from modelopt_convert.commands.closing import verify_stage

                bases = {part.prefix: part.base for part in parts}
                verify_stage(stage.path, bases, request.verify, request.max_error, request.workers, report, progress)
            with timed(report, "publish"):
                publish(stage, report)
    note_cost(report)


def _prove(
    request: BuildRequest,
    parts: list[Opened],
    plans: list[BuildPlan],
    report: Report,
    progress: Progress,
    gpu: "Gpu | None",
) -> list[ProofReport]:
    """Prove, or measure, every transformer; its plan is brought in line with what was found."""
    proofs: list[ProofReport] = []
    for number, part in enumerate(parts):
        if part.export is None:
            plans[number], found = run_measure(
                part, plans[number], request.max_error, request.workers, report, progress, gpu
            )
        else:
            proof, found = run_proof(part, plans[number], request.max_error, request.workers, report, progress)
            plans[number] = _lay_out(report, part, plans[number], proof.layouts())
        proofs.append(found)
    return proofs


def _open_gpu(report: Report) -> "Gpu":
    from modelopt_convert.write.gpu import open_gpu

    with timed(report, "device"):
        gpu = open_gpu()
    report.device = gpu.name()
    return gpu


def _with_base(request: BuildRequest, chosen: ChosenPreset, report: Report) -> BuildRequest:
    """What NVFP4 cannot do without is, unless given, what the preset was made for."""
    if request.algorithm != "nvfp4" or request.base is not None:
        return request
    base = f"{PREFIX}{chosen.loaded.preset.base_repo}"
    report.warn("base.default", f"base {base}, which preset {chosen.loaded.preset.name} names")
    return replace(request, base=parse_location(base, download=request.download and not request.dry_run))


def _output_path(request: BuildRequest, chosen: ChosenPreset | None, report: Report) -> Path:
    output = request.output
    if output is None:
        if chosen is None:
            raise InputError("there is no preset to name the output after", code="output.unnamed", hint="give --output")
        output = Path(f"{chosen.loaded.preset.name}-{request.algorithm}")
    path = canonical_output(output)
    report.output.path = str(path)
    return path


def _choose(part: Opened, report: Report, algorithm: Algorithm) -> ChosenPreset:
    chosen = choose_preset(part.model.config, algorithm)
    _note_preset(report, chosen, algorithm)
    also = f"; {', '.join(chosen.also)} would give the same" if chosen.also else ""
    report.warn("preset.chosen", f"preset {chosen.loaded.preset.name} was chosen by config.json{also}")
    return chosen


def _refuse_known_broken(request: BuildRequest, part: Opened, chosen: ChosenPreset | None, report: Report) -> None:
    """Refuse, without consent, what some engine is known not to load right, whoever wrote the preset."""
    broken = known_broken(part.model.config, request.algorithm)
    if chosen is not None:
        broken |= chosen.loaded.preset.rules(request.algorithm).known_broken
    for engine, why in broken.items():
        if not request.allow_known_broken:
            raise InputError(
                f"{part.model.path}: {engine} cannot use what would be built: {why}",
                code="preset.known_broken",
                path=str(part.model.path),
                hint="--allow-known-broken builds it all the same, for other engines or versions",
            )
        report.warn("preset.known_broken", f"{engine}: {why}")


def _plan(request: BuildRequest, part: Opened, chosen: ChosenPreset | None) -> BuildPlan:
    preset = chosen.loaded.preset if chosen else None
    keeps = Keeps(preset, preset.rules(request.algorithm) if preset else None, request.keep_bf16)
    if part.export is None:
        return plan_quantized(FORMATS[request.algorithm], part.model, keeps, max_shard_size=request.max_shard_size)
    return plan_mixed(
        FORMATS[request.algorithm],
        part.export,
        part.base,
        keeps,
        max_shard_size=request.max_shard_size,
        calibration=part.calibration,
    )


def _check(folder: Path, plan: BuildPlan, report: Report) -> None:
    faults = check_structure(folder, plan)
    report.checks.append({"name": "structure", "status": "fail" if faults else "pass", "failures": faults[:10]})
    if faults:
        raise CheckFailedError(
            f"the finished checkpoint is not the planned one: {faults[0]} ({len(faults)} faults)",
            code="check.structure",
            hint="this is a bug in mopt or a disk that lies; nothing was published",
        )


def _note_preset(report: Report, chosen: ChosenPreset, algorithm: Algorithm) -> None:
    known = algorithm in chosen.loaded.preset.sets()
    report.preset = {
        "name": chosen.loaded.preset.name,
        "path": chosen.loaded.path,
        "sha256": chosen.loaded.sha256,
        "status": chosen.status(algorithm) if known else None,
        "known_limits": chosen.limits(algorithm) if known else [],
        "also": chosen.also,
    }


def _note_plan(report: Report, part: Opened, plan: BuildPlan, workers: int) -> None:
    report.rules += [
        RuleReport(
            component=part.prefix or None,
            kind=rule.kind,
            pattern=rule.pattern,
            matched=rule.matched,
            replaced=rule.replaced,
            bytes=rule.num_bytes,
        )
        for rule in plan.rules
    ]
    _note_fates(report, part, plan)
    report.output.tensors += len(plan.steps)
    report.output.bytes += plan.total_bytes
    report.output.shards += [
        {"file": f"{part.prefix}{shard.file}", "bytes": sum(spec.num_bytes for spec in shard.tensors)}
        for shard in plan.shards
    ]
    report.peak_working_bytes = max(plan.peak_bytes(workers), report.peak_working_bytes or 0)
    report.dequantized += [f"{part.prefix}{name}" for name in plan.dequantized]
    for code, message in plan.warnings:
        report.warn(code, message)


def _note_fates(report: Report, part: Opened, plan: BuildPlan) -> None:
    """The fate of every tensor of every input, under its own name."""
    ledger = {role: dict(fates) for role, fates in plan.ledger.items()}
    if "export" in ledger:
        renamed = {part.original.get(name, name): fate for name, fate in ledger["export"].items()}
        ledger["export"] = renamed | part.left_out
    if part.amax_names:
        ledger["checkpoint"] = {key: _amax_fate(scale, plan) for key, scale in part.amax_names.items()}
    for role, fates in ledger.items():
        report.ledger[f"{part.prefix}{role}"] = fates
        report.counts[f"{part.prefix}{role}"] = dict(sorted(Counter(fates.values()).items()))


def _amax_fate(scale: str, plan: BuildPlan) -> str:
    module, _, role = scale.rpartition(".")
    if module not in plan.modules:
        return "unused: of a module that is not quantized"
    return "compared with the export's scale" if role in plan.modules[module].scales else "used"


def _lay_out(report: Report, part: Opened, plan: BuildPlan, layouts: Mapping[str, Layout]) -> BuildPlan:
    """Bring the plan in line with the layouts found, and say what is found otherwise than ModelOpt writes it."""
    plan = plan.with_layouts(layouts)
    _note_fates(report, part, plan)
    total = len(plan.modules)
    for found, words in (
        (sum(one.nibbles == "high" for one in layouts.values()), "the even column in the high nibble"),
        (sum(one.scales == "128x4" for one in layouts.values()), "the scales in the 128x4 order"),
    ):
        if found:
            report.warn("export.layout", f"{found} of {total} modules have {words}; written in the canonical layout")
    return plan


def _note_clipped(report: Report, part: Opened, done: Streamed) -> None:
    """Say what was cut off: found in full where mopt quantized, in the proof's rows where the export had."""
    for name, one in done.clipped.items():
        report.clipped[f"{part.prefix}{name}"] = ClippedReport(count=one.count, largest=one.largest)
    mine = {name: one for name, one in report.clipped.items() if name.startswith(part.prefix)}
    if mine:
        worst = max(mine, key=lambda name: mine[name].largest)
        report.warn(
            "export.clipped",
            f"{sum(one.count for one in mine.values())} values in {len(mine)} modules lie beyond 448 scales and are "
            f"cut off; the largest, {mine[worst].largest:.6g} scales, is in {worst}",
        )
