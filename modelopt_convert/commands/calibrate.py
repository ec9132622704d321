"""The straight line of ``mopt calibrate``: refuse, open, go on from finished runs, run, merge, stage, publish.

torch and diffusers are imported on the way.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelopt_convert.checkpoint.calibration import COMPENSATIONS, FILE, SCHEMA, STATS, file_digest
from modelopt_convert.checkpoint.content import CONTENT
from modelopt_convert.checkpoint.header import METADATA, TensorSpec, build_header
from modelopt_convert.checkpoint.location import local_path
from modelopt_convert.checkpoint.pipeline import COMPONENTS, resolve_components
from modelopt_convert.checkpoint.reader import CHUNK_BYTES, CheckpointReader
from modelopt_convert.checkpoint.record import RECORD, digest_of, write_record
from modelopt_convert.checkpoint.strict_json import json_bytes
from modelopt_convert.commands.build.inputs import Opened, open_all
from modelopt_convert.commands.command import (
    Clock,
    Inputs,
    Warned,
    ending,
    output_report,
    peak_rss_bytes,
    published_warnings,
    versions,
    warnings_of,
)
from modelopt_convert.commands.drawing_requests import CalibrateRequest
from modelopt_convert.plan.inputs import check_merged, check_unquantized
from modelopt_convert.report.calibrate import CalibrationReport
from modelopt_convert.report.report import Report
from modelopt_convert.run.errors import InconclusiveError, OutputRefusedError
from modelopt_convert.run.progress import Progress
from modelopt_convert.run.text import few
from modelopt_convert.stage.directory import Published, StagingDir
from modelopt_convert.stage.output_rules import canonical_output, check_output_allowed
from modelopt_convert.stage.resumable import Parts
from modelopt_convert.stage.space import disk_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from modelopt_convert.fidelity.calibration import Watch
    from modelopt_convert.fidelity.moments import KeptCompensations
    from modelopt_convert.fidelity.pipeline import Drawing
    from modelopt_convert.fidelity.prompts import Prompts
    from modelopt_convert.fidelity.runs import KeptRuns, Merged

_LOW_RATIO = 0.9  # of the amax of one half of the runs; fidelity tests had 0.98 in the mean of modules


@dataclass(slots=True)
class _Found:
    """What the steps have returned so far."""

    clock: Clock = field(default_factory=Clock)
    warned: list[Warned] = field(default_factory=list)
    told: CalibrationReport | None = None
    specs: Mapping[str, Sequence[TensorSpec]] = field(default_factory=dict)
    published: Published | None = None
    device: str | None = None
    peak_rss_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class _AtWork:
    """A pipeline that is loaded.

    Attributes:
        pipeline: diffusers'.
        device: As torch names it.
        device_name: What it is called.
        transformers: By the prefix of their modules' names.
        bases: What each was loaded from, by prefix.
    """

    pipeline: Any
    device: str
    device_name: str
    transformers: "Mapping[str, nn.Module]"
    bases: Mapping[str, CheckpointReader]

    @property
    def step_bytes(self) -> int:
        """Of all transformers, which each step reads."""
        return sum(one.num_bytes for one in self.bases.values())

    def weight(self, module: str) -> "Tensor":
        """A Linear's weight, as it lies: with ``offload`` the model itself has it elsewhere."""
        from modelopt_convert.proof.tensors import load_weight

        prefix = next(one for one in self.bases if module.startswith(one))
        return load_weight(self.bases[prefix], f"{module.removeprefix(prefix)}.weight")


class CalibrateCommand:
    """Run a pipeline, and keep what goes into each Linear of its transformer."""

    def __init__(self, request: CalibrateRequest) -> None:
        """Do nothing yet."""
        self._request = request
        self._output = Path(request.output)
        self._inputs = Inputs(request.locate("config"), request.variant)
        self._found = _Found()
        self._frames: int | None = None

    def report(self, error: BaseException | None = None) -> Report:
        """What happened, also after a failure."""
        found = self._found
        return Report(
            command=self._request.command,
            inputs=self._inputs.reports(),
            network=self._inputs.network(),
            output=output_report(str(self._output), found.specs, {}, found.published, error),
            calibrated=found.told,
            device=found.device,
            peak_rss_bytes=found.peak_rss_bytes,
            timings_s=found.clock.seconds,
            warnings=warnings_of([*self._inputs.left_aside(), *found.warned]),
            versions=versions(),
            **ending(error),
        )

    def run(self, progress: Progress) -> None:
        """Calibrate.

        Raises:
            MoptError: One of its kinds; nothing was published, and finished runs are kept.
        """
        from modelopt_convert.fidelity.prompts import read_prompts

        request, found = self._request, self._found
        base = request.locate("base")
        assert base is not None  # the request requires it
        components = resolve_components(None, base, ())
        paths = tuple(filter(None, map(local_path, (base, *(one.base for one in components))))) + tuple(request.reads())
        self._output = output = canonical_output(self._output)
        check_output_allowed(output, paths, overwrite=request.overwrite, overwrite_foreign=None)
        prompts = read_prompts(Path(request.prompts))
        found.warned += prompts.warnings()
        with self._inputs:
            names = [str(one.name or COMPONENTS[0]) for one in components]
            folders = names if len(names) > 1 else [""]
            parts: dict[str, Opened] = {}
            for name, (part, warned) in zip(
                names, open_all(components, folders, None, self._inputs, found.clock), strict=True
            ):
                check_unquantized(part.model)
                check_merged(part.model, "base")
                found.warned += warned
                parts[name] = part
            from modelopt_convert.fidelity.pipeline import pipeline_identity, takes_frames
            from modelopt_convert.fidelity.runs import KeptRuns
            from modelopt_convert.fidelity.transformer import require_diffusers

            require_diffusers()
            with found.clock.timed("identify"):
                identity = pipeline_identity(request.pipeline, names)
                self._frames = request.frames if takes_frames(request.pipeline) else None
            kept = Parts(output)
            kept.open()
            runs = KeptRuns(kept, prompts.texts, request.seeds, request.part)
            if not request.gptq and any(number >= runs.count for number in kept.numbers()):
                raise OutputRefusedError(
                    f"{kept.path}: holds more than the {runs.count} runs of this calibration: others, or what was kept "
                    "for --gptq",
                    code="calibrate.other_runs",
                    path=str(kept.path),
                    hint="give --gptq, give another --output, or remove that folder",
                )
            missing = runs.missing()
            progress.announce(self._line(runs, len(missing)))
            compensations: KeptCompensations | None = None
            if missing or request.gptq:
                models = self._load(parts, progress)
                settings = self._settings(parts, identity, prompts)
                runs.require(settings)
                at_work = self._begin(parts, models)
                self._run(runs, missing, at_work, progress)
                if request.gptq and runs.done == runs.count:
                    compensations = self._compensate(runs, settings, at_work, progress)
            else:
                with found.clock.timed("read"):
                    _read_whole(parts, progress)
                settings = self._settings(parts, identity, prompts)
                runs.require(settings)
            self._inputs.check_unchanged()
            left = compensations.missing((1, 1)) if compensations is not None else []
            if runs.done < runs.count or left or request.share is not None:
                self._tell(runs, len(missing))
                found.warned.append(
                    ("calibrate.unmerged", _unmerged(runs, compensations, len(left), gptq=request.gptq))
                )
                return
            with found.clock.timed("merge"):
                merged = runs.merged()
            self._publish(paths, merged, compensations, parts, settings)
        with found.clock.timed("remove"):
            try:
                kept.remove()
            except OSError as error:
                found.warned.append(("parts.not_removed", f"{kept.path}: merged, and not removed: {error.strerror}"))
        found.peak_rss_bytes = peak_rss_bytes()

    def _settings(self, parts: Mapping[str, Opened], pipeline: Mapping[str, str], prompts: "Prompts") -> dict[str, Any]:
        """What two runs must have in common to be of one calibration; the bases were read whole."""
        request = self._request
        return {
            "base": {name: _bytes_of(part) for name, part in parts.items()},
            "pipeline": dict(pipeline),
            "prompts": {"sha256": prompts.sha256, "count": len(prompts.texts)},
            "seeds": request.seeds,
            "steps": request.steps,
            "size": request.size,
            "frames": self._frames,
        }

    def _load(self, parts: Mapping[str, Opened], progress: Progress) -> "dict[str, nn.Module]":
        from modelopt_convert.fidelity.transformer import load_transformer

        models = {}
        with self._found.clock.timed("load"):
            for name, part in parts.items():
                progress.begin(f"load {name}", part.model.num_bytes)
                models[name] = load_transformer(part.model)
                progress.advance(part.model.num_bytes)
        return models

    def _begin(self, parts: Mapping[str, Opened], models: "Mapping[str, nn.Module]") -> _AtWork:
        """The pipeline, ready to run."""
        from modelopt_convert.fidelity.pipeline import load_pipeline

        request = self._request
        device, name = _device(request.device)
        self._found.device = name
        with self._found.clock.timed("load"):
            pipeline = load_pipeline(request.pipeline, models, device=device, offload=request.offload)
        transformers = {parts[one].prefix: model for one, model in models.items()}
        return _AtWork(pipeline, device, name, transformers, {one.prefix: one.model for one in parts.values()})

    def _run(self, runs: "KeptRuns", missing: Sequence[int], at_work: _AtWork, progress: Progress) -> None:
        """Do what is not done, and keep each run as it ends."""
        from modelopt_convert.fidelity.calibration import Watch
        from modelopt_convert.fidelity.pipeline import run_once

        progress.begin("run", at_work.step_bytes * self._request.steps * len(missing))
        for done, number in enumerate(missing, 1):
            prompt, seed = runs.of(number)
            words = f"prompt {prompt[:60]!r}, seed {seed}"
            with self._found.clock.timed("run"):
                with Watch(at_work.transformers) as watch:
                    after_step = _after_step(watch, words, at_work.step_bytes, progress)
                    run_once(at_work.pipeline, prompt, seed, self._drawing, after_step, output="latent")
                watch.refuse_not_finite(f"after the last step of {words}")
            runs.keep(number, watch, at_work.device_name)
            progress.detail(f"run {number + 1} of {runs.count}: {words}")
            self._tell(runs, done)

    def _compensate(
        self, runs: "KeptRuns", settings: Mapping[str, Any], at_work: _AtWork, progress: Progress
    ) -> "KeptCompensations":
        """Run everything again for the inputs of this share, as many at a time as there is room for."""
        import torch

        from modelopt_convert.fidelity.calibration import linears
        from modelopt_convert.fidelity.moments import KeptCompensations, Moments, first_with_input, windows
        from modelopt_convert.fidelity.pipeline import gpu_memory, run_once

        modules = linears(at_work.transformers)
        merged = runs.merged()
        by_input: defaultdict[str, list[str]] = defaultdict(list)
        for name, first in first_with_input(merged.seen).items():
            by_input[first].append(name)
        squares, device = merged.tensors(), torch.device(at_work.device)

        def weights_of(names: Sequence[str]) -> "Iterator[tuple[Tensor, Tensor]]":
            for name in names:
                yield at_work.weight(name).to(device, torch.bfloat16), squares[f"{name}.mean_square"].to(device)

        kept = KeptCompensations(runs.parts, runs.count, list(by_input), settings)
        columns = {name: modules[name].in_features for name in kept.missing(self._request.part)}
        for window in windows(columns, device):
            progress.begin(f"moments of {len(window)} inputs", at_work.step_bytes * self._request.steps * runs.count)
            with self._found.clock.timed("moments"), Moments({name: modules[name] for name in window}) as moments:
                for number in range(runs.count):
                    after_step = _advancing(at_work.step_bytes, progress)
                    run_once(at_work.pipeline, *runs.of(number), self._drawing, after_step, output="latent")
            with self._found.clock.timed("compensate"), gpu_memory():
                for name in window:
                    kept.keep(name, moments.sums.pop(name), partial(weights_of, by_input[name]))
        return kept

    @property
    def _drawing(self) -> "Drawing":
        from modelopt_convert.fidelity.pipeline import Drawing

        return Drawing(self._request.steps, self._request.size, self._request.frames)

    def _publish(
        self,
        paths: Sequence[Path],
        merged: "Merged",
        compensations: "KeptCompensations | None",
        parts: Mapping[str, Opened],
        settings: Mapping[str, Any],
    ) -> None:
        """Write CALIB beside its place, and put it there."""
        from modelopt_convert.fidelity.moments import first_with_input
        from modelopt_convert.formats.tensor_bytes import to_bytes

        request, found = self._request, self._found
        tensors = merged.tensors()
        specs = [
            TensorSpec(name, "F32" if one.is_floating_point() else "I64", tuple(one.shape))
            for name, one in tensors.items()
        ]
        firsts = first_with_input(merged.seen) if compensations is not None else {}
        larger = list(compensations.specs()) if compensations is not None else []
        said = {
            "schema": SCHEMA,
            **{key: one for key, one in settings.items() if key != "base"},
            "runs": settings["prompts"]["count"] * request.seeds,
            "headroom": request.headroom,
            "devices": list(merged.devices),
            "transformers": {
                name: {"base": _bytes_of(part), "modules": merged.modules(part.prefix, firsts)}
                for name, part in parts.items()
            },
        }
        size = build_header([*specs, *larger], METADATA)[2]
        need = disk_bytes([size, *[2 * len(json_bytes(said)) + 64 * len([*specs, *larger])] * 2])
        with (
            found.clock.timed("publish"),
            StagingDir(
                self._output, paths, overwrite=request.overwrite, overwrite_foreign=None, need_bytes=need
            ) as stage,
        ):
            with stage.shard(STATS, specs) as writer:
                for spec in writer.layout:
                    writer.write(spec.name, [to_bytes(tensors[spec.name])])
            stage.written(STATS, durable=writer.durable)
            digests, metadata = dict(writer.digests), {STATS: METADATA}
            if compensations is not None:
                with stage.shard(COMPENSATIONS, larger) as writer:
                    for spec in writer.layout:
                        writer.write(spec.name, [to_bytes(compensations.tensor(spec.name))])
                stage.written(COMPENSATIONS, durable=writer.durable)
                said["compensations"] = compensations.said(writer.digests)
                digests |= writer.digests
                metadata[COMPENSATIONS] = METADATA
            raw = json_bytes(said | {"stats_xxh3_128": file_digest(stage.path / STATS)})
            stage.write_file(FILE, raw)
            headers = ([*specs, *larger], metadata)
            record = write_record(request.command, {}, tensors=digests, files={FILE: raw}, headers=headers)
            stage.write_file(RECORD, record)
            try:
                stage.publish()
            finally:  # also when a signal that was held acts right after the swap
                found.published = stage.published
                found.warned += published_warnings(stage.published)
        found.specs = {STATS: specs, **({COMPENSATIONS: larger} if larger else {})}
        never = [name for name in merged.names if name not in merged.seen]
        if never:
            message = f"{len(never)} modules never ran, and have no amax: {few(never)}"
            found.warned.append(("calibrate.never_ran", message))
        ratio = merged.half_ratio()
        if ratio is not None and ratio < _LOW_RATIO:
            message = (
                f"one half of the runs has {ratio:.3f} of the amax of all, in the mean of modules: take more prompts"
            )
            found.warned.append(("calibrate.few_runs", message))
        assert found.told is not None
        more = {"digest": digest_of(raw), "kept_in": None, "never_ran": never, "half_ratio": ratio}
        found.told = found.told.model_copy(update=more | {"modules": len(merged.seen)})

    def _line(self, runs: "KeptRuns", missing: int) -> str:
        self._tell(runs, 0)
        done = f", {runs.done} done before" if runs.done else ""
        share = f" in share {self._request.share}" if self._request.share else ""
        return f"{runs.count} runs of {self._request.steps} steps{done}, {missing} to do{share}"

    def _tell(self, runs: "KeptRuns", here: int) -> None:
        request = self._request
        self._found.told = CalibrationReport(
            path=str(self._output),
            digest=None,
            headroom=request.headroom,
            prompts=runs.count // request.seeds,
            runs=runs.count,
            runs_done=runs.done,
            runs_here=here,
            kept_in=str(runs.parts.path),
        )


def _bytes_of(part: Opened) -> dict[str, str]:
    """What identifies a base wherever it lies, and wherever it comes from."""
    identity = part.model.identity()
    return {key: identity[key] for key in ("headers_sha256", CONTENT) if key in identity}


def _after_step(watch: "Watch", words: str, num_bytes: int, progress: Progress) -> "Callable[[int, Tensor], None]":
    def after_step(step: int, _: "Tensor") -> None:
        watch.refuse_not_finite(f"in step {step + 1} of {words}")
        progress.advance(num_bytes)

    return after_step


def _advancing(num_bytes: int, progress: Progress) -> "Callable[[int, Tensor], None]":
    def after_step(_: int, __: "Tensor") -> None:
        progress.advance(num_bytes)

    return after_step


def _unmerged(runs: "KeptRuns", compensations: "KeptCompensations | None", left: int, *, gptq: bool) -> str:
    more, also = ", after the same shares once more for --gptq," if gptq else "", ""
    if compensations is not None:
        count = len(compensations.names)
        more, also = "", f" and {count - left} of {count} inputs for --gptq"
    return (
        f"{runs.done} of {runs.count} runs{also} are done, and kept in {runs.parts.path}; once all are there{more} the "
        "same command without --share merges them"
    )


def _read_whole(parts: Mapping[str, Opened], progress: Progress) -> None:
    """Read bases for their digests alone."""
    for name, part in parts.items():
        progress.begin(f"read {name}", part.model.num_bytes)
        for tensor in part.model.tensors:
            for piece in part.model.buffered(tensor, CHUNK_BYTES):
                progress.advance(len(piece))


def _device(wanted: str | None) -> tuple[str, str]:
    """Where to run, as torch names it, and its name.

    Raises:
        InconclusiveError: ``device.none``.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise InconclusiveError(
            "--device cuda: torch sees no GPU",
            code="device.none",
            hint="install the CUDA build of torch on a machine with a GPU, or leave --device out",
        )
    device = wanted or ("cuda" if has_gpu else "cpu")
    return device, torch.cuda.get_device_name() if device == "cuda" else "cpu"
