"""``mopt compare``: open, test the emulation, run base and checkpoints, write the page, conclude."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelopt_convert.checkpoint.pipeline import transformers_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.commands.called import command_line
from modelopt_convert.commands.command import (
    Clock,
    Inputs,
    Warned,
    ending,
    not_compared,
    peak_rss_bytes,
    versions,
    warnings_of,
)
from modelopt_convert.commands.drawing_requests import CompareRequest
from modelopt_convert.fidelity.prompts import read_prompts
from modelopt_convert.fidelity.thresholds import LEAST_PAIRS
from modelopt_convert.plan.inputs import check_roles
from modelopt_convert.report.fidelity import CheckpointFidelity, DrawingReport, FidelityReport, OracleReport
from modelopt_convert.report.verify import DeviceReport
from modelopt_convert.run.errors import CheckFailedError, InconclusiveError, InputError, MoptError
from modelopt_convert.run.progress import Progress
from modelopt_convert.stage.written_file import check_file_place, check_file_writable, write_report

if TYPE_CHECKING:
    import torch

    from modelopt_convert.fidelity.comparison import Made, Pair

_ALONE, _NAME = ".", "transformer"
_STEPS, _SIZE, _FRAMES = 8, 512, 1
_CLIPPED = 0.01  # of the activations of a module: a calibration that saw such prompts clips next to none


class CompareCommand:
    """Compare checkpoints with their base."""

    def __init__(self, request: CompareRequest) -> None:
        """Do nothing yet."""
        self._request = request
        self._clock = Clock()
        self._inputs = Inputs(request.locate("config"), request.variant, variant_of_base=True)
        self._warned: list[Warned] = []
        self._env: DeviceReport | None = None
        self._oracles: list[OracleReport] = []
        self._drawing: DrawingReport | None = None
        self._found: list[CheckpointFidelity] = []
        self._pictures: list[list[bytes]] = []
        self._peak: int | None = None
        self._peak_gpu: int | None = None

    def run(self, progress: Progress) -> None:
        """Compare.

        Raises:
            CheckFailedError: ``fidelity.below``.
            InconclusiveError: ``fidelity.few_pairs``, or ``verify.no_gpu``.
            BackendError: ``fidelity.self_test``.
            MoptError: Something cannot be opened or run, or the page not be written.
        """
        request = self._request
        if request.report is not None:
            check_file_place(Path(request.report), request.on_disk())
            check_file_writable(Path(request.report))
        prompts = read_prompts(Path(request.prompts)) if request.prompts is not None else None
        if prompts is not None:
            self._warned += prompts.warnings()
            self._drawing = DrawingReport(
                kind="pictures",
                pipeline=request.pipeline,
                prompts_sha256=prompts.sha256,
                prompts=len(prompts.texts),
                seeds=request.seeds,
                steps=request.steps or _STEPS,
                size=request.size or _SIZE,
                pairs=len(prompts.texts) * request.seeds,
            )
        with self._inputs as inputs:
            with self._clock.timed("open"):
                opened, base = self._open(inputs)
            self._compare(opened, base, prompts.texts if prompts is not None else (), progress)
        self._peak = peak_rss_bytes()
        try:
            self._conclude()
        except MoptError as error:
            with suppress(MoptError):  # that the page cannot be written hides no verdict
                self._write_page(error)
            raise
        self._write_page(None)

    def report(self, error: BaseException | None = None) -> FidelityReport:
        """What was found, also after a failure."""
        return FidelityReport(
            versions=versions() | _diffusers_version(),
            inputs=self._inputs.reports(),
            network=self._inputs.network(),
            env=self._env,
            oracles=self._oracles,
            drawing=self._drawing,
            checkpoints=self._found,
            peak_gpu_bytes=self._peak_gpu,
            peak_rss_bytes=self._peak,
            timings_s=self._clock.seconds,
            warnings=warnings_of([*self._inputs.left_aside(), *self._warned]),
            **ending(error),
        )

    def _open(self, inputs: Inputs) -> tuple[dict[str, dict[str, CheckpointReader]], dict[str, CheckpointReader]]:
        """Readers of each checkpoint's transformers by path and name, and of the base's by name."""
        request, against = self._request, self._request.locate("base")
        opened: dict[str, dict[str, CheckpointReader]] = {}
        base: dict[str, CheckpointReader] = {}
        for number, (where, place) in enumerate(request.checkpoints.items()):
            role = f"other_{number}" if number > 1 else "other" if number else "checkpoint"
            mine: dict[str, CheckpointReader] = {}
            for folder, path, base_path in transformers_of(place, against):
                name = _NAME if folder == _ALONE else folder
                key = f"{name}/" if name != _NAME else ""
                mine[name] = reader = inputs.open(f"{key}{role}", path)
                if name not in base:
                    assert base_path is not None  # a base is given
                    base[name] = inputs.open(f"{key}base", base_path, is_base=True)
                    self._warned += inputs.present(f"{key}base")
                check_roles(reader, base[name])
                self._warned += inputs.present(f"{key}{role}", base[name].tensors)
                self._warned += not_compared(reader, base[name])
                inputs.lend_config(f"{key}{role}", base[name])
                self._warned += self._taken(reader)
            opened[where] = mine
            if mine.keys() != base.keys():
                raise InputError(
                    f"{place}: expected {' and '.join(base)} as in the other checkpoint, found {' and '.join(mine)}",
                    code="fidelity.parts",
                    path=str(place),
                    hint="compare one transformer of each, or both whole pipelines",
                )
        return opened, base

    def _taken(self, reader: CheckpointReader) -> list[Warned]:
        """The rule, where config.json does not say which."""
        if self._request.rule is not None or reader.config.get("quantization_config") is not None:
            return []
        words = f"{reader.path}: no quantization_config says how activations are quantized: static input scales taken"
        return [("fidelity.rule_taken", words)]

    def _compare(
        self,
        opened: dict[str, dict[str, CheckpointReader]],
        base: dict[str, CheckpointReader],
        prompts: Sequence[str],
        progress: Progress,
    ) -> None:
        from modelopt_convert.fidelity.transformer import require_diffusers

        require_diffusers()
        import torch

        from modelopt_convert.fidelity.comparison import compare, drawing, feeding, pairs_of
        from modelopt_convert.fidelity.figures import checkpoint_figures
        from modelopt_convert.fidelity.metrics import lpips_measure
        from modelopt_convert.fidelity.page import png
        from modelopt_convert.fidelity.pipeline import Drawing, gpu_memory, pipeline_identity, takes_frames
        from modelopt_convert.fidelity.transformer import load_transformer
        from modelopt_convert.verification.subject import device_of
        from modelopt_convert.verification.transformer import describe

        request, device = self._request, device_of(self._request.device)
        self._env = describe(device)
        frames = request.frames or _FRAMES
        if request.pipeline is not None:
            with self._clock.timed("identify"):
                self._drew(
                    identity=pipeline_identity(request.pipeline, base),
                    frames=frames if takes_frames(request.pipeline) else None,
                )
        made = self._made(opened, base, device)
        with self._clock.timed("load"):
            models = {name: load_transformer(reader) for name, reader in base.items()}
        if request.pipeline is not None:
            pairs = [*pairs_of(prompts, request.seeds)]
            how = Drawing(request.steps or _STEPS, request.size or _SIZE, frames)
            start = drawing(
                request.pipeline,
                pairs,
                how,
                device=str(device),
                offload=request.offload,
                tell_tokens=lambda count: self._drew(max_sequence_length=count),
            )
        else:
            pairs, inputs = self._inputs_alone(models)
            start = feeding(inputs, device=device)
        progress.announce(f"{len(pairs)} runs of the base, and of {len(made)} checkpoint{'s' * (len(made) > 1)}")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with self._clock.timed("run"), gpu_memory(is_alone=request.pipeline is None):
            drawn, seen = compare(
                models, made, len(pairs), start, lambda what: progress.detail(f"ran: {what}"), device=device
            )
        if device.type == "cuda":
            self._peak_gpu = torch.cuda.max_memory_allocated(device)
        with self._clock.timed("measure"):
            lpips = lpips_measure() if request.pipeline is not None else None
            for one, each in zip(made, seen, strict=True):
                self._found.append(checkpoint_figures(one, each, drawn, pairs, request.thresholds, lpips))
                self._warned += _clipped(self._found[-1])
            if request.report is not None and request.pipeline is not None:
                self._pictures = [png(number, drawn, [each.runs for each in seen]) for number in range(len(pairs))]

    def _drew(self, **known: Any) -> None:
        """Something of what is drawn is known by now."""
        assert self._drawing is not None  # of a pipeline, it is there from the start
        self._drawing = self._drawing.model_copy(update=known)

    def _made(
        self,
        opened: dict[str, dict[str, CheckpointReader]],
        base: dict[str, CheckpointReader],
        device: "torch.device",
    ) -> "list[Made]":
        """Every checkpoint, read, after the emulation was tested for its format."""
        from modelopt_convert.fidelity.checkpoint import has_room, read_quantized
        from modelopt_convert.fidelity.comparison import Made
        from modelopt_convert.fidelity.selftest import kernels_agree, self_test

        request, made = self._request, list[Made]()
        with self._clock.timed("load"):
            for path, readers in opened.items():
                read = {name: read_quantized(reader, base[name], request.rule) for name, reader in readers.items()}
                parts = {name: quantized for name, (quantized, _) in read.items()}
                made.append(Made(path, parts, {name: model for name, (_, model) in read.items()}))
        algorithms = {part.format.algorithm for one in made for part in one.parts.values()}
        with self._clock.timed("self_test"):
            self._oracles = [OracleReport(name=one.name, against=one.detail) for one in self_test(algorithms, device)]
            compiled = device.type == "cuda" and kernels_agree(algorithms, device)
        whole = {name: weight for one in made for part in one.parts.values() for name, weight in part.weights.items()}
        keep = request.offload == "none" and has_room(whole, device)
        return [Made(one.path, one.parts, one.models, keep=keep, compiled=compiled) for one in made]

    def _inputs_alone(self, models: dict[str, Any]) -> "tuple[list[Pair], list[dict[str, Any]]]":
        """Inputs of a transformer without its pipeline, numbered."""
        import torch

        from modelopt_convert.fidelity.comparison import Pair
        from modelopt_convert.fidelity.inputs import captured, distinct, random_inputs

        request = self._request
        if len(models) > 1:
            raise InputError(
                f"{request.base}: expected one transformer, found {' and '.join(models)}",
                code="fidelity.parts",
                path=str(request.base),
                hint="give one of them, or --pipeline and --prompts",
            )
        if request.captured is not None:
            calls = captured(Path(request.captured), torch.bfloat16)
            inputs: list[dict[str, Any]] = [*distinct(calls)]
            if len(inputs) < len(calls):
                words = f"{len(calls) - len(inputs)} of {len(calls)} inputs are repeated: each counts once"
                self._warned.append(("fidelity.repeated", words))
            kind = "captured inputs"
        else:
            inputs = random_inputs(next(iter(models.values())), request.seeds, request.size or _SIZE)
            kind = "random inputs"
            self._warned.append(
                ("fidelity.random", "inputs are random, and unlike those of pictures: figures compare, and no more")
            )
        self._drawing = DrawingReport(kind=kind, pairs=len(inputs))
        return [Pair("", number) for number in range(len(inputs))], inputs

    def _conclude(self) -> None:
        if not self._request.thresholds:
            return
        asked = self._request.require
        pairs = self._drawing.pairs if self._drawing is not None else 0
        if pairs < LEAST_PAIRS:
            raise InconclusiveError(
                f"--require {asked}: expected at least {LEAST_PAIRS} pairs, found {pairs}",
                code="fidelity.few_pairs",
                hint="give more prompts or --seeds",
            )
        for one in self._found:
            below = [each for each in one.required if not each.met]
            if below:
                first, found = below[0], one.aggregate.get(below[0].condition.partition("=")[0][:-1])
                bound = "unknown" if first.bound is None else f"{first.bound:.4g}"
                mean = f", mean {found.mean:.4g}" if found is not None and found.mean is not None else ""
                raise CheckFailedError(
                    f"{one.path}: {first.condition} does not hold: the bound is {bound}{mean} of {pairs} pairs",
                    code="fidelity.below",
                    path=one.path,
                    hint="the report names the modules that lose most; keep these in BF16, or give more pairs",
                )

    def _write_page(self, error: MoptError | None) -> None:
        if self._request.report is None:
            return
        from modelopt_convert.fidelity.page import render

        date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        found = self.report(error).model_dump()
        page = render(found, self._pictures, command=command_line(self._request), date=date)
        write_report(Path(self._request.report), page)


def _clipped(one: CheckpointFidelity) -> list[Warned]:
    """That input scales are too small for what comes in."""
    found = {name: module.clipped for name, module in one.modules.items() if module.clipped > _CLIPPED}
    if not found:
        return []
    worst = max(found, key=lambda name: found[name])
    words = (
        f"{one.path}: {len(found)} of {len(one.modules)} modules clip more than {_CLIPPED:.0%} of their activations: "
        f"{worst} {found[worst]:.1%}; their input scales are too small"
    )
    return [("fidelity.clipped", words)]


def _diffusers_version() -> dict[str, str]:
    import sys

    found = sys.modules.get("diffusers")
    return {"diffusers": str(found.__version__)} if found is not None else {}
