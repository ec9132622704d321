"""The straight line of ``mopt advise``: refuse, open, plan, draw, score, choose, measure, write.

torch and diffusers are imported on the way: what a budget cannot be is known from headers alone.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import product
from math import inf, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modelopt_convert import __version__
from modelopt_convert.checkpoint.calibration import Calibrated, read_calibration
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.pipeline import COMPONENTS, resolve_components
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.commands.build.inputs import Opened, base_repo, open_all
from modelopt_convert.commands.called import command_line
from modelopt_convert.commands.command import (
    Clock,
    Inputs,
    Warned,
    ending,
    peak_rss_bytes,
    versions,
    warnings_of,
)
from modelopt_convert.commands.drawing_requests import AdviseRequest
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.plan.from_base import plan_quantized
from modelopt_convert.plan.plan import BuildPlan, Keeps
from modelopt_convert.preset.advised import advised_text, patterns_of
from modelopt_convert.preset.preset import LoadedPreset, choose_preset, load_preset, parse_preset
from modelopt_convert.report.advice import AdviceReport, DrawnReport, MeasuredReport, PointReport, UnitReport
from modelopt_convert.run.errors import InputError
from modelopt_convert.run.progress import Forwards, Progress
from modelopt_convert.stage.written_file import check_file_place, check_file_writable, sealed, write_report

if TYPE_CHECKING:
    from modelopt_convert.fidelity.frontier import Item, Point
    from modelopt_convert.fidelity.prompts import Prompts
    from modelopt_convert.fidelity.trials import Trials
    from modelopt_convert.fidelity.units import Choices

_FEW = 8  # pictures, below which their mean says little of others
_PICTURES, _FORWARDS = 8, 16  # that units are judged by, unless it is said


@dataclass(slots=True)
class _Found:
    """What the steps have returned so far."""

    clock: Clock = field(default_factory=Clock)
    warned: list[Warned] = field(default_factory=list)
    report: AdviceReport = field(default_factory=AdviceReport)


class AdviseCommand:
    """Find which modules to keep in BF16, and write a preset of it."""

    def __init__(self, request: AdviseRequest) -> None:
        """Do nothing yet."""
        self._request = request
        self._output = Path(request.output)
        self._inputs = Inputs(request.locate("config"), request.variant)
        self._found = _Found()

    def report(self, error: BaseException | None = None) -> AdviceReport:
        """What was found, also after a failure."""
        return self._found.report.model_copy(
            update={
                "versions": versions(),
                "inputs": self._inputs.reports(),
                "network": self._inputs.network(),
                "timings_s": self._found.clock.seconds,
                "warnings": warnings_of([*self._inputs.left_aside(), *self._found.warned]),
                **ending(error),
            }
        )

    def run(self, progress: Progress) -> None:
        """Advise.

        Raises:
            MoptError: One of its kinds; nothing was written.
        """
        from modelopt_convert.fidelity.prompts import read_prompts
        from modelopt_convert.fidelity.transformer import require_diffusers
        from modelopt_convert.fidelity.units import choices_of

        request, found = self._request, self._found
        self._check_files()
        require_diffusers()
        prompts = read_prompts(Path(request.prompts))
        found.warned += prompts.warnings()
        base = request.locate("base")
        assert base is not None  # the request requires it
        calibration = read_calibration(Path(request.calibration)) if request.calibration is not None else None
        with self._inputs:
            ((part, warned),) = open_all(_alone(base), [""], None, self._inputs, found.clock)
            found.warned += warned
            loaded = self._preset(part)
            calibrated = calibration.of(part.component.name) if calibration is not None else None
            if calibrated is not None:
                calibrated.refuse_other_base(part.model.identity(), str(part.model.path))
            else:
                message = (
                    "without --calibration inputs are scaled as they come, and builds with the preset write no scales"
                )
                found.warned.append(("advise.dynamic", message))
            with found.clock.timed("plan"):
                choices = choices_of(FORMATS[request.format], part.model, loaded.preset, calibrated)
            self._tell(choices, loaded, calibrated)
            self._check_budget(choices)
            trials = self._load(part, choices, prompts, progress)
            items = self._score(trials, choices, part.model, progress)
            point = self._choose(trials, choices, items, progress)
            plan = self._write(part.model, choices, loaded, calibrated, point)
            found.warned += plan.warnings
            self._inputs.check_unchanged()
        self._keep(peak_rss_bytes=peak_rss_bytes())
        self._write_page()

    def _keep(self, **known: Any) -> None:
        self._found.report = self._found.report.model_copy(update=known)

    def _check_files(self) -> None:
        """Refuse places at which nothing could be written in the end."""
        request = self._request
        files = [Path(one) for one in (request.output, request.svg, request.report) if one is not None]
        for number, file in enumerate(files):
            others = [*request.reads(), *filter(None, [request.preset_file]), *files[:number]]
            check_file_place(file, others)
            check_file_writable(file)

    def _preset(self, part: Opened) -> LoadedPreset:
        request = self._request
        if request.preset is not None:
            return load_preset(str(request.preset))
        chosen = choose_preset(part.model.config, request.format, base_repo([part]))
        message = f"--preset {chosen.loaded.preset.name} was chosen by config.json"
        self._found.warned.append(("preset.chosen", message))
        return chosen.loaded

    def _tell(self, choices: "Choices", loaded: LoadedPreset, calibrated: Calibrated | None) -> None:
        self._keep(
            preset={"name": loaded.preset.name, "path": loaded.path, "sha256": loaded.sha256},
            format=self._request.format,
            activations="dynamic" if calibrated is None else "static",
            structural=list(choices.structural),
            least_bytes=choices.least_bytes,
            most_bytes=choices.most_bytes,
        )

    def _budget(self, choices: "Choices") -> int | None:
        """Most bytes of the output; None where pictures say what is enough."""
        if self._request.effective_bits is not None:
            return choices.bytes_of_bits(self._request.effective_bits)
        return self._request.budget_bytes

    def _check_budget(self, choices: "Choices") -> None:
        """Refuse a budget that nothing fits into, or everything.

        Raises:
            InputError: ``advise.budget``.
        """
        budget, least, most = self._budget(choices), choices.least_bytes, choices.most_bytes
        if budget is not None and not least <= budget < most:
            which = f"{budget:,} bytes ({choices.bits(budget):.2f} bits a weight)"
            raise InputError(
                f"{self._request.base}: expected a budget of {least:,} bytes ({choices.bits(least):.2f} bits a weight; "
                f"all {len(choices.units)} units packed) to less than {most:,} ({choices.bits(most):.2f}; none), "
                f"found {which}",
                code="advise.budget",
                path=str(self._request.base),
                hint="give a budget between the two"
                if budget < least
                else "the base itself fits into it: use it as it is, or give less",
            )

    def _load(self, part: Opened, choices: "Choices", prompts: "Prompts", progress: Progress) -> "Trials":
        from modelopt_convert.fidelity.checkpoint import has_room
        from modelopt_convert.fidelity.pipeline import Drawing, load_pipeline, takes_frames
        from modelopt_convert.fidelity.quantized_here import packed_weight
        from modelopt_convert.fidelity.selftest import kernels_agree, self_test
        from modelopt_convert.fidelity.transformer import load_transformer
        from modelopt_convert.fidelity.trials import Trials
        from modelopt_convert.verification.subject import device_of
        from modelopt_convert.write.measure import measure, measured_bytes

        request, found, base = self._request, self._found, part.model
        device = device_of(request.device)
        self._keep(device=str(device))
        with found.clock.timed("load"):
            transformer = load_transformer(base)
            name = part.component.name or COMPONENTS[0]
            pipeline = load_pipeline(request.pipeline, {name: transformer}, device=str(device), offload=request.offload)
        progress.begin("measure", measured_bytes(base, choices.plan))
        with found.clock.timed("quantize"):
            plan = choices.plan.with_scales(measure(base, choices.plan, 1, progress.advance))
            weights = {name: packed_weight(base, plan, name) for name in plan.packed}
        rule: Literal["static", "dynamic"] = "dynamic" if request.calibration is None else "static"
        pairs = list(product(prompts.texts, range(request.seeds)))
        how = Drawing(request.steps, request.size, request.frames)
        with found.clock.timed("self_test"):
            self_test({request.format}, device)
            compiled = device.type == "cuda" and kernels_agree({request.format}, device)
        keep = request.offload == "none" and has_room(weights, device)
        scales = _input_scales(plan)
        trials = Trials(pipeline, transformer, weights, rule, scales, how, pairs, keep=keep, compiled=compiled)
        self._keep(
            drawn=DrawnReport(
                pipeline=request.pipeline,
                prompts_sha256=prompts.sha256,
                prompts=len(prompts.texts),
                seeds=request.seeds,
                steps=request.steps,
                size=request.size,
                frames=request.frames if takes_frames(request.pipeline) else None,
                scored=self._scored(len(pairs)),
            )
        )
        if len(pairs) < _FEW:
            message = f"{len(pairs)} pictures: give more prompts or seeds, for figures that hold for others"
            found.warned.append(("advise.few_pictures", message))
        return trials

    def _scored(self, pairs: int) -> int:
        """Pictures, or forwards, that each unit is judged by."""
        if self._request.score == "forward":
            return self._request.scored or _FORWARDS
        return min(self._request.scored or _PICTURES, pairs)

    def _score(self, trials: "Trials", choices: "Choices", base: CheckpointReader, progress: Progress) -> "list[Item]":
        """Draw what there is to compare with, and pack one unit after the other."""
        from modelopt_convert.fidelity.frontier import Item
        from modelopt_convert.fidelity.sensitivity import check_recorded, spread_over

        request, found, path = self._request, self._found, str(base.path)
        scored = self._scored(len(trials.pairs))
        self._begin(progress, "draw unquantized", len(trials.pairs))
        with found.clock.timed("draw"):
            for _ in trials.draw_unquantized(scored if request.score == "forward" else 0):
                progress.advance(request.steps)
        check_recorded(trials.calls, trials.pictures, trials.ran, list(trials.weights), path)
        numbers = spread_over(range(len(trials.pairs)), scored)
        forwards = scored if request.score == "forward" else scored * request.steps
        progress.begin(f"score {len(choices.units)} units", Forwards(len(choices.units) * forwards))
        items: list[Item] = []
        with found.clock.timed("score"):
            for unit in choices.units:
                if request.score == "forward":
                    error = trials.moved_by(unit.members)
                else:
                    error = sum(trials.errors(unit.members, numbers)) / len(numbers)
                if error == float("inf"):
                    raise InputError(
                        f"{path}: expected finite values with {unit.name} packed, found NaN or infinity",
                        code="advise.not_finite",
                        path=path,
                        hint="give a preset that has it as structural",
                    )
                items.append(Item(unit.name, error, unit.bytes_kept - unit.bytes_packed))
                progress.advance(forwards)
                progress.detail(f"{unit.name}: {error:.3e}")
        self._keep(
            score=request.score,
            units=[
                UnitReport(
                    name=unit.name,
                    members=list(unit.members),
                    bytes_kept=unit.bytes_kept,
                    bytes_packed=unit.bytes_packed,
                    error_alone=item.error,
                )
                for unit, item in zip(choices.units, items, strict=True)
            ],
        )
        return items

    def _choose(self, trials: "Trials", choices: "Choices", items: "Sequence[Item]", progress: Progress) -> PointReport:
        """The choice, with points of the frontier, those that are asked for measured.

        Raises:
            InputError: ``advise.psnr``.
        """
        from modelopt_convert.fidelity.frontier import best_within, first_reaching, frontier

        request = self._request
        measured: dict[tuple[str, ...], MeasuredReport] = {}

        def run(point: "Point") -> MeasuredReport:
            if point.keeps not in measured:
                what = f"draw with {len(items) - len(point.keeps)} of {len(items)} units packed"
                self._begin(progress, what, len(trials.pairs))
                with self._found.clock.timed("draw packed"):
                    measured[point.keeps] = self._measured(trials, choices, point.keeps, progress)
            return measured[point.keeps]

        hull = frontier(items)[:-1]  # the last packs nothing
        budget = self._budget(choices)
        if budget is not None:
            point = best_within(items, budget - choices.least_bytes)
            assert point is not None  # it was checked that the budget holds the least
        else:
            wanted = request.psnr or 0.0
            point = first_reaching(hull, lambda one: reaches(run(one), wanted))
            if point is None:
                raise InputError(
                    f"{request.base}: expected a PSNR whose lower 95% bound is {wanted:g} dB, found "
                    f"{_db(run(hull[-1]))} of {len(trials.pairs)} pictures with all units but one kept",
                    code="advise.psnr",
                    path=str(request.base),
                    hint="ask for a smaller --psnr, draw more pictures by --seeds, which brings the bound nearer to "
                    "the mean, or use the base as it is",
                )
        run(point)
        room = choices.most_bytes - choices.least_bytes
        for number in range(request.points):
            run(min(hull, key=lambda one: abs(one.cost - room * number // request.points)))

        def told(one: "Point") -> PointReport:
            num_bytes = choices.least_bytes + one.cost
            return PointReport(
                bytes=num_bytes,
                bits=choices.bits(num_bytes),
                keeps=list(one.keeps),
                error_predicted=one.error,
                measured=measured.get(one.keeps),
            )

        chosen = told(point)
        self._keep(frontier=[told(one) for one in hull], chosen=chosen)
        return chosen

    def _measured(
        self, trials: "Trials", choices: "Choices", keeps: Collection[str], progress: Progress
    ) -> MeasuredReport:
        from modelopt_convert.fidelity.metrics import spread

        packed = [name for unit in choices.units if unit.name not in keeps for name in unit.members]
        errors: list[float] = []
        for one in trials.errors(packed, range(len(trials.pairs))):
            errors.append(one)
            progress.advance(self._request.steps)
        over = spread([-10 * log10(one) if one else inf for one in errors])
        is_forward = self._request.score == "forward"
        return MeasuredReport(
            error=trials.moved_by(packed) if is_forward else sum(errors) / len(errors),
            psnr=_finite(over.mean),
            std=over.std,
            lower95=_finite(over.lower95),
            n=over.n,
        )

    def _begin(self, progress: Progress, what: str, pictures: int) -> None:
        progress.begin(what, Forwards(pictures * self._request.steps))

    def _write(
        self,
        base: CheckpointReader,
        choices: "Choices",
        loaded: LoadedPreset,
        calibrated: Calibrated | None,
        chosen: PointReport,
    ) -> BuildPlan:
        """Write the preset and the plot, once the preset is known to plan the very build that was measured."""
        from modelopt_convert.fidelity.plot import plot_file

        request, report = self._request, self._found.report
        assert chosen.measured is not None
        errors = {unit.name: unit.error_alone for unit in report.units}
        units = {name: unit for unit in choices.units for name in unit.members}
        kept = [name for name in choices.plan.packed if units[name].name in set(chosen.keeps)]
        patterns = {
            pattern: f"error {sum(errors[one] for one in {units[name].name for name in names}):.3g}"
            for pattern, names in patterns_of(kept, choices.plan.packed, _modules(base)).items()
        }
        packed = f"{len(choices.units) - len(chosen.keeps)} of {len(choices.units)} units packed"
        figures = f"{chosen.bytes:,} bytes, {chosen.bits:.2f} bits a weight; PSNR {_db(chosen.measured)}"
        inputs = "calibrated" if report.activations == "static" else "dynamic"
        source = f"mopt {__version__} advise: {packed}, {figures} (inputs {inputs}; emulated, no engine's kernel ran)"
        told = [
            f"{packed}: {figures}, n = {chosen.measured.n}.",
            f"Mean squared error ({report.score}): {chosen.error_predicted:.3g} predicted, "
            f"{chosen.measured.error:.3g} measured.",
            "Beside each pattern: the sum of what packing its units, each alone, adds to that error.",
        ]
        text = sealed(advised_text(loaded, request.format, source, patterns, told, self._output))
        plan = self._planned(text, base, calibrated)
        wanted = [name for name in choices.plan.packed if name not in set(kept)]
        assert plan.packed == wanted and plan.total_bytes == chosen.bytes, "the preset is another choice"
        write_report(self._output, text)
        self._keep(output=str(self._output))
        if request.svg is not None:
            write_report(Path(request.svg), plot_file(report.model_dump()))
        return plan

    def _planned(self, text: str, base: CheckpointReader, calibrated: Calibrated | None) -> BuildPlan:
        preset = parse_preset(text, path=str(self._output)).preset
        keeps = Keeps(preset, preset.rules(self._request.format), ())
        target = FORMATS[self._request.format]
        return plan_quantized(target, base, keeps, max_shard_size=base.num_bytes, calibrated=calibrated)

    def _write_page(self) -> None:
        if self._request.report is not None:
            from modelopt_convert.fidelity.advice_page import render

            date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
            text = render(self.report().model_dump(), command=command_line(self._request), date=date)
            write_report(Path(self._request.report), text)


def _alone(base: Any) -> Any:
    """The one transformer that is meant.

    Raises:
        InputError: ``input.ambiguous``.
    """
    found = resolve_components(None, base, ())
    if len(found) > 1:
        raise InputError(
            f"base {base}: expected one transformer, found {' and '.join(str(one.name) for one in found)}",
            code="input.ambiguous",
            path=str(base),
            hint=f"advise on one at a time: {found[0].base}",
        )
    return found


def _modules(base: CheckpointReader) -> list[str]:
    return list(dict.fromkeys(module_of(name) for name in base.tensors))


def _input_scales(plan: BuildPlan) -> dict[str, float]:
    """Those that the build would write."""
    steps = {name: plan.steps.get(f"{name}.input_scale") for name in plan.packed}
    return {name: step.value for name, step in steps.items() if step is not None and step.value is not None}


def _finite(value: float | None) -> float | None:
    return None if value is None or value == float("inf") else value


def reaches(found: MeasuredReport, wanted: float) -> bool:
    """Whether the lower bound does, as ``mopt compare --require`` asks; the mean of few pictures is chance."""
    return found.psnr is None or (found.lower95 is not None and found.lower95 >= wanted)


def _db(found: MeasuredReport) -> str:
    if found.psnr is None:
        return "without bound"
    bound = "no bound" if found.lower95 is None else f"lower bound {found.lower95:.2f}"
    return f"{found.psnr:.2f} dB ({bound})"
