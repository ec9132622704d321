"""The straight line of ``build-nvfp4`` and ``convert-fp8``: refuse, open, plan, stage, prove, stream, check, publish.

torch is imported on the way, not at the top: refusals are fast.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modelopt_convert.checkpoint.calibration import read_calibration
from modelopt_convert.checkpoint.companions import MODEL_INDEX, folders_of, pipeline_root, places_read
from modelopt_convert.checkpoint.config import locate_config
from modelopt_convert.checkpoint.hub.hub_path import PREFIX
from modelopt_convert.checkpoint.location import Location, local_path, parse_location
from modelopt_convert.checkpoint.pipeline import COMPONENTS, Component, resolve_components
from modelopt_convert.checkpoint.record import RECORD
from modelopt_convert.commands.build.card import Made
from modelopt_convert.commands.build.faults import look_on, refuse_found
from modelopt_convert.commands.build.files import pipeline_files, small_files
from modelopt_convert.commands.build.inputs import Opened, base_repo, open_all, refuse_other_claim, to_fetch
from modelopt_convert.commands.build.proof import Proven, conclude_part, measure_part, prove_part
from modelopt_convert.commands.build.report import Steps, build_report, clipped_warning
from modelopt_convert.commands.build.space import build_bytes
from modelopt_convert.commands.build.structure import check_structure, refuse_misread
from modelopt_convert.commands.build.to import STAGED, Fits, convert_staged, refuse_inexact, room_needed
from modelopt_convert.commands.closing import Closed, opened_stage, refuse_failed, structure_checked, verify_stage
from modelopt_convert.commands.command import (
    Inputs,
    Warned,
    foreign_warnings,
    not_finite_warnings,
    peak_rss_bytes,
    published_warnings,
)
from modelopt_convert.commands.requests import BuildNvfp4Request, BuildRequest, ConvertFp8Request
from modelopt_convert.commands.serving import refuse_broken
from modelopt_convert.dialects.modelopt.amax_file import resolve_checkpoint
from modelopt_convert.engines.sglang import dynamic_words
from modelopt_convert.formats.format import WEIGHTS_WORDS, Algorithm
from modelopt_convert.formats.rows import SAMPLED_ROWS
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.plan.from_base import plan_quantized, preset_required
from modelopt_convert.plan.from_export import plan_mixed
from modelopt_convert.plan.plan import BuildPlan, Keeps
from modelopt_convert.preset.preset import ChosenPreset, LoadedPreset, choose_preset, load_preset
from modelopt_convert.report.report import ClippedReport, Report
from modelopt_convert.run.errors import Faults, InputError, about
from modelopt_convert.run.progress import Progress
from modelopt_convert.run.workers import torch_on_one_thread
from modelopt_convert.stage.directory import StagingDir
from modelopt_convert.stage.file_copy import copy_file
from modelopt_convert.stage.output_rules import canonical_output, check_output_allowed
from modelopt_convert.verification.options import VerifyOptions
from modelopt_convert.write.executors import open_executor, refuse_far
from modelopt_convert.write.stream import Executor, stream

if TYPE_CHECKING:
    from modelopt_convert.write.gpu import Gpu


_OF_VALUES = ("export.not_finite", "base.not_finite")  # what comparing finds in a module, and no other check


class BuildCommand:
    """Build a transformer repo, or several.

    Attributes:
        steps: What the steps have returned so far.
    """

    def __init__(self, request: BuildRequest) -> None:
        """Do nothing yet."""
        self._request = request
        self._export = request.locate("export")
        self._base = request.locate("base")
        self._checkpoint = request.locate("checkpoint") if isinstance(request, ConvertFp8Request) else None
        self._config = request.locate("config")
        has_base = self._base is not None or request.needs_base
        self.steps = Steps(
            inputs=Inputs(self._config, request.variant, variant_of_base=has_base),
            output=str(Path(request.output)) if request.output is not None else "",
        )
        self._foreign: tuple[str, ...] = ()
        # The folder of the stage that the checkpoint is built in: the stage itself, unless it is converted from there.
        self._staged = "" if request.to == "modelopt" else f"{STAGED}/"

    def report(self, error: BaseException | None = None) -> Report:
        """What happened, also after a failure."""
        return build_report(self._request, self.steps, has_export=self._export is not None, error=error)

    def run(self, progress: Progress) -> None:
        """Build.

        Raises:
            MoptError: One of its kinds; nothing was published unless a StorageError says so.
        """
        request, steps = self._request, self.steps
        if self._export is None and request.preset == "none":
            raise preset_required()
        if request.preset not in (None, "none"):
            steps.chosen = ChosenPreset(loaded=load_preset(str(request.preset)), also=[], is_named=True)
            steps.warned += _of_other_format(steps.chosen.loaded, request.algorithm)
            self._take_base(steps.chosen)
        refuse_far(request.executor, self._export, self._base)
        components = resolve_components(self._export, self._base, request.components)
        found = [path for one in components for path in (one.export, one.base)]
        inputs = tuple(path for path in map(local_path, (self._export, self._base, *found)) if path is not None)
        if self._checkpoint is not None:
            inputs += tuple({resolve_checkpoint(self._checkpoint, one.name or COMPONENTS[0]) for one in components})
        if self._config is not None:
            inputs += tuple(filter(None, [local_path(locate_config(self._config))]))
        if request.calibration is not None:
            inputs += (Path(request.calibration),)
        if request.preset_file is not None:
            inputs += (request.preset_file,)
        if request.pipeline_output and self._base is not None:
            inputs += tuple(places_read(self._base))
        if request.output is not None or steps.chosen is not None:
            output = self._output(inputs)
        with ExitStack() as stack:
            executor = stack.enter_context(open_executor(request.executor))
            stack.enter_context(steps.inputs)
            folders = self._folders(components)
            for part, warned in open_all(components, folders, self._checkpoint, steps.inputs, steps.clock):
                steps.parts.append(part)
                steps.warned += warned
            refuse_other_claim(steps.parts, request.base_model)
            known = request.base_model or base_repo(steps.parts)
            if request.calibration is not None:
                steps.calibration = read_calibration(Path(request.calibration))
                self._refuse_other_base()
            if request.preset is None:
                with about(str(steps.parts[0].model.path)):
                    steps.chosen = choose_preset(steps.parts[0].model.config, request.algorithm, known)
                steps.warned += _chosen(steps.chosen)
                output = self._output(inputs)
            faults, plans = Faults(), list[BuildPlan]()
            for part in steps.parts:
                mine = faults.under(part.prefix, where=str(part.model.path))
                with steps.clock.timed("plan"), mine.taken():
                    plans += filter(None, [self._plan(part, mine)])
            if faults:
                with steps.clock.timed("prove"):
                    look_on(steps.parts, plans, request, progress, faults)
            steps.plans += plans
            repos = steps.chosen.repos(known) if steps.chosen is not None else ()
            for part, plan in zip(steps.parts, plans, strict=True):
                path = str(part.model.path)
                steps.warned += plan.warnings
                if request.to == "modelopt":  # what is known of engines is known of this dialect
                    steps.warned += refuse_broken(plan.config, request.algorithm, path, request, repos)
                refuse_misread(plan, path)
            fits = self._fits()
            if self._export is None and steps.calibration is None:
                steps.warned[:0] = _uncalibrated(steps.plans[0])  # the first thing to know, of what can be opened
            steps.free_bytes = shutil.disk_usage(output.parent).free
            for part, plan in zip(steps.parts, steps.plans, strict=True):
                steps.inputs.to_fetch |= to_fetch(part, plan, request)
            if self._export is None:
                progress.announce(self._uncalibrated_line())
            if request.dry_run:
                steps.is_planned = True
                steps.warned += foreign_warnings(self._foreign, "would go")
                return
            gpu = self._open_gpu()
            calibration: Literal["none"] | dict[str, Any] | None = "none" if self._export is None else None
            if steps.calibration is not None:
                calibration = steps.calibration.claim()
            beside = steps.companions.folders if steps.companions is not None else None
            made = Made(
                request.command,
                steps.chosen,
                calibration,
                base_repo(steps.parts),
                request.base_model,
                beside,
                request.to,
            )
            need = build_bytes(steps.parts, steps.plans, made, steps.companions)
            # Before the proof: that another run holds OUT, or that the disk is full, is said before any tensor is read.
            if fits is not None:
                need = room_needed(need, steps.plans[0], fits)
                progress.announce(
                    f"the checkpoint is built beside {output.name} first and then converted to {request.to}: "
                    f"up to {need / 1e9:.1f} GB of disk"
                )
            copies = steps.companions.files if steps.companions is not None else ()
            with StagingDir(output, inputs, **request.consent, need_bytes=need, copies=copies) as stage:
                with torch_on_one_thread():
                    self._prove(progress, gpu)
                self._write(stage, made, executor, progress, gpu)
                steps.inputs.check_unchanged()
                self._refuse_other_base()  # by now all its bytes were read
                self._close(stage, progress)
                if request.to != "modelopt":
                    self._convert(stage, progress)
                with steps.clock.timed("publish"):
                    try:
                        stage.publish()
                    finally:  # also when a signal that was held acts right after the swap
                        steps.published = stage.published
                        steps.warned += published_warnings(stage.published)
        steps.peak_rss_bytes = peak_rss_bytes()

    def _refuse_other_base(self) -> None:
        """Refuse input scales of another model."""
        if (found := self.steps.calibration) is not None:
            for part in self.steps.parts:
                found.of(part.component.name).refuse_other_base(part.model.identity(), str(part.model.path))

    def _take_base(self, chosen: ChosenPreset) -> None:
        """What a build cannot do without is, unless given, what the preset was made for."""
        request, preset = self._request, chosen.loaded.preset
        if request.needs_base and self._base is None:
            if preset.base_repo is None:
                request.refuse("base", f"is required: preset {preset.name} names no repo")
            base = f"{PREFIX}{preset.base_repo}"
            self.steps.warned.append(("base.default", f"base {base}, which preset {preset.name} names"))
            self._base = parse_location(base, download=request.fetches_whole)

    def _output(self, inputs: Sequence[Path]) -> Path:
        request, chosen, output = self._request, self.steps.chosen, self._request.output
        if output is None:
            assert chosen is not None  # without a preset the request requires an output
            names = [chosen.loaded.preset.name, *chosen.also]
            if len(names) > 1:
                message = f"presets {', '.join(names)} fit alike, so there is no one name for the output"
                if not request.dry_run:
                    hint = "give --output, or the model with --base-model"
                    raise InputError(message, code="output.unnamed", hint=hint)
                self.steps.warned.append(
                    ("output.unnamed", f"{message}: give --output, or the model with --base-model")
                )
                return Path.cwd() / names[0]  # of which the disk alone is looked at
            output = f"{names[0]}-{request.algorithm}"
        path = canonical_output(Path(output))
        self.steps.output = str(path)
        standing = check_output_allowed(path, inputs, **request.consent)
        self._foreign = standing.foreign if standing is not None else ()
        return path

    def _folders(self, components: Sequence[Component]) -> list[str]:
        """The folder of each transformer in OUT, empty for OUT itself; of a whole pipeline the rest is opened."""
        if not self._request.pipeline_output:
            return [str(one.name) for one in components] if len(components) > 1 else [""]
        assert self._base is not None  # the request requires it, or the preset names it
        folders = [one.base.name for one in components if one.base is not None]
        companions = self.steps.inputs.open_beside("pipeline", pipeline_root(self._base), folders)
        if companions.left_out:
            message = f"not copied, since they are no safetensors: {', '.join(companions.left_out)}"
            self.steps.warned.append(("pipeline.left_out", message))
        if companions.unlisted:
            message = f"not copied, since {MODEL_INDEX} says null of them: {', '.join(companions.unlisted)}"
            self.steps.warned.append(("pipeline.left_out", message))
        self.steps.companions = companions
        return folders

    def _plan(self, part: Opened, faults: Faults) -> BuildPlan | None:
        request, target = self._request, FORMATS[self._request.algorithm]
        preset = self.steps.chosen.loaded.preset if self.steps.chosen else None
        keeps = Keeps(preset, preset.rules(request.algorithm) if preset else None, tuple(request.keep_bf16))
        if part.export is None:
            found = self.steps.calibration
            return plan_quantized(
                target,
                part.model,
                keeps,
                max_shard_size=request.shard_bytes,
                weights=request.weights if isinstance(request, BuildNvfp4Request) else "max",
                calibrated=found.of(part.component.name) if found is not None else None,
            )
        return plan_mixed(
            target,
            part.export,
            part.base,
            keeps,
            faults,
            max_shard_size=request.shard_bytes,
            calibration=part.calibration,
            output=None if request.output is None else str(request.output),
        )

    def _fits(self) -> Fits | None:
        """Whether another target can hold what was planned, and what that costs."""
        request, steps = self._request, self.steps
        if request.to == "modelopt":
            return None
        if len(steps.parts) > 1:
            request.refuse("to", f"{request.to} takes one transformer; --component says which")
        fits = refuse_inexact(steps.parts[0], steps.plans[0], request)
        steps.warned += fits.warned
        return fits

    def _convert(self, stage: StagingDir, progress: Progress) -> None:
        """Write the target's files, read them back, and take out of the stage what they were made from."""
        steps = self.steps
        with_proof = (steps.parts[0], steps.proofs[0].report)
        # Here, whoever wrote what it is made of: it takes the base's files too, which a task does not.
        with open_executor("threads") as executor:
            done = convert_staged(stage, *with_proof, self._request, executor, progress, steps.clock)
        steps.converted = done
        steps.warned += done.warned
        for closed in done.closed:
            self._keep(closed)
        steps.inputs.check_unchanged()  # the base may have been read once more
        stage.remove_folder(STAGED)

    def _uncalibrated_line(self) -> str:
        """What is said first where the base itself is quantized."""
        fetched = self.steps.inputs.to_fetch
        fetching = f", fetching {sum(fetched.values()) / 1e9:.1f} GB" if fetched else ""
        named: Location | None = self.steps.parts[0].model.path if len(self.steps.parts) == 1 else self._base
        scales = "uncalibrated" if self._request.calibration is None else "with calibrated input scales"
        return f"no --export: quantizing {named}, {scales}{fetching}"

    def _open_gpu(self) -> "Gpu | None":
        if not isinstance(self._request, BuildNvfp4Request) or self._request.device == "cpu":
            return None
        from modelopt_convert.write.gpu import open_gpu

        with self.steps.clock.timed("device"):
            gpu = open_gpu()
        self.steps.device = gpu.name()
        return gpu

    def _prove(self, progress: Progress, gpu: "Gpu | None") -> None:
        """Prove, or measure, every transformer; its plan is brought in line with what was found."""
        request, steps, faults = self._request, self.steps, Faults()
        for part, plan in zip(steps.parts, steps.plans, strict=True):
            asked, mine = (part, plan, request, progress), faults.under(part.prefix)
            if part.export is None:
                with steps.clock.timed("measure"), mine.taken():
                    steps.proofs.append(measure_part(*asked, gpu))
            else:
                with steps.clock.timed("prove"):
                    steps.proofs.append(prove_part(*asked, mine))
        refuse_found(steps.parts, steps.proofs, request, progress, faults)
        for number, found in enumerate(steps.proofs):
            self._take(number, found)

    def _take(self, number: int, found: Proven) -> None:
        """Take over what was found of one transformer."""
        steps, part = self.steps, self.steps.parts[number]
        steps.proofs[number] = found
        steps.warned += found.warned
        steps.clipped |= {f"{part.prefix}{name}": one for name, one in found.clipped.items()}
        steps.plans[number] = found.plan

    def _write(self, stage: StagingDir, made: Made, executor: Executor, progress: Progress, gpu: "Gpu | None") -> None:
        steps, records = self.steps, dict[str, bytes]()
        for number, part in enumerate(steps.parts):
            proven = steps.proofs[number]
            with steps.clock.timed("stream"), torch_on_one_thread():
                place = f"{self._staged}{part.prefix}"
                if place:
                    stage.add_folder(place.rstrip("/"))
                try:
                    done = stream(
                        stage,
                        steps.plans[number],
                        part.readers,
                        progress,
                        place,
                        workers=self._request.worker_count,
                        executor=executor,
                        due=proven.due,
                        gpu=gpu,
                    )
                except InputError as error:
                    if error.code in _OF_VALUES:  # of one module, where the others may have faults, too
                        rest = steps.parts, steps.proofs, self._request, progress, Faults()
                        refuse_found(*rest, is_certain=True)
                    raise
            if proven.due:
                faults = Faults()
                steps.proofs[number] = conclude_part(
                    part, proven, done.judgements, self._request, faults.under(part.prefix)
                )
                refuse_found(steps.parts, steps.proofs, self._request, progress, faults)
                self._take(number, proven := steps.proofs[number])
            steps.clipped |= {
                f"{part.prefix}{name}": ClippedReport(count=one.count, largest=one.largest)
                for name, one in done.clipped.items()
            }
            mine = {name: one for name, one in steps.clipped.items() if name.startswith(part.prefix)}
            steps.warned += clipped_warning(mine)
            steps.warned += not_finite_warnings(done.not_finite, part.prefix)
            files = small_files(part, steps.plans[number], made, proven.report, done.digests)
            records[part.prefix.rstrip("/")] = files[RECORD]
            for name, data in files.items():
                stage.write_file(f"{place}{name}", data)
        if gpu is not None:
            steps.peak_gpu_bytes = gpu.peak_bytes()
        copied = self._copy(stage, progress)
        if steps.parts[0].prefix:
            plans = dict(zip(records, steps.plans, strict=True))
            for name, data in pipeline_files(records, plans, made, steps.companions, copied).items():
                stage.write_file(name, data)

    def _copy(self, stage: StagingDir, progress: Progress) -> dict[str, str]:
        """Put what belongs to a whole pipeline beside the transformers; the digest of each file."""
        if self.steps.companions is None:
            return {}
        files, digests = self.steps.companions.files, dict[str, str]()
        for folder in folders_of(files):
            stage.add_folder(folder)
        progress.begin("copy", sum(one.num_bytes for one in files.values()))
        with self.steps.clock.timed("copy"):
            for path, file in files.items():
                done = copy_file(file, stage.path / path, stage.mode_for(path), progress.advance)
                stage.written(path, durable=done.durable)
                digests[path] = done.digest
        return digests

    def _close(self, stage: StagingDir, progress: Progress) -> None:
        """Check what was written, and refuse to publish what is wrong."""
        request, steps, folder = self._request, self.steps, stage.path / self._staged
        with steps.clock.timed("check"):
            for part, plan in zip(steps.parts, steps.plans, strict=True):
                self._keep(structure_checked(check_structure(folder / part.prefix, plan)))
            for part, found in zip(steps.parts, steps.proofs, strict=True):
                losses = self._fused_losses(folder / part.prefix, found)
                steps.fused_losses |= {f"{part.prefix}{group}": one for group, one in losses.items()}
                steps.warned += _fused_warning(losses, part.prefix)
        if request.verify == "off":
            return
        parts = {part.prefix: (part.base, one.report) for part, one in zip(steps.parts, steps.proofs, strict=True)}
        device = "cpu" if request.verify == "cpu" else None
        options = VerifyOptions(
            device=device,
            sample=SAMPLED_ROWS,  # all of it was compared while it was written
            accept_near=request.accept_near,
            max_error=request.max_error,
            workers=request.worker_count,
        )
        with steps.clock.timed("verify"):
            of = steps.calibration.of if steps.calibration is not None else None
            calibrated = {part.prefix: of(part.component.name) for part in steps.parts} if of is not None else {}
            closed = verify_stage(folder, parts, options, steps.output, progress, calibrated)
        steps.verify = closed.verify
        self._keep(closed)

    def _fused_losses(self, folder: Path, found: Proven) -> dict[str, Mapping[str, float]]:
        """What engines lose of fused weights whose parts have global scales of their own, by group."""
        if not found.report.fused_scales_differ:
            return {}
        from modelopt_convert.verification.levels.container import stored_format

        rules = stored_format(self._request.algorithm)
        with opened_stage(folder) as reader:
            losses = {
                group: rules.fused_losses(reader, group.split(", ")) for group in found.report.fused_scales_differ
            }
        return {group: one for group, one in losses.items() if one}

    def _keep(self, closed: Closed) -> None:
        self.steps.checks.append(closed.check)
        self.steps.warned += closed.warned
        refuse_failed(closed)


def _uncalibrated(plan: BuildPlan) -> list[Warned]:
    """What is said, also of a dry run, where nothing is calibrated."""
    assert plan.weights is not None  # of a base
    lost, how = dynamic_words(plan.config), WEIGHTS_WORDS[plan.weights]
    return [
        ("build.uncalibrated", f"quantized from the base without calibration: weights by {how}, inputs dynamic"),
        *([("engine.dynamic_input_scale", lost)] if lost is not None else []),
    ]


def _fused_warning(losses: Mapping[str, Mapping[str, float]], prefix: str) -> list[Warned]:
    if not losses:
        return []
    worst = {engine: max(one[engine] for one in losses.values()) for engine in next(iter(losses.values()))}
    how = {"sglang": "which rounds block scales again", "vllm-omni": "which misreads the parts with smaller ones"}
    said = " and ".join(f"{error:.1%} in {engine}, {how[engine]}" for engine, error in worst.items())
    message = f"{prefix}one global scale for each of {len(losses)} fused weights costs up to {said}"
    return [("engine.fused_scales", message)]


def _of_other_format(loaded: LoadedPreset, algorithm: Algorithm) -> list[Warned]:
    """What is said of a preset whose choice, such as that of ``mopt advise``, is of another format."""
    if not (own := loaded.formats_instead(algorithm)):
        return []
    message = (
        f"preset {loaded.preset.name} chooses for {' and '.join(own)} alone: for {algorithm} its sets are inherited"
    )
    return [("preset.other_format", message)]


def _chosen(chosen: ChosenPreset) -> list[Warned]:
    if chosen.is_named:
        return [("preset.chosen", f"preset {chosen.loaded.preset.name} was chosen by the base's repo, which it lists")]
    also = f"; {', '.join(chosen.also)} would give the same" if chosen.also else ""
    unknown = ", which does not say whether this is just that model"
    return [("preset.chosen", f"preset {chosen.loaded.preset.name} was chosen by config.json{unknown}{also}")]
