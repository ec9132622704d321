"""What a command prints and where: the result on stdout, everything else on stderr; and how a run ends."""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Timer
from types import TracebackType
from typing import Any, NoReturn, Self, TextIO, TypeVar

import typer

from modelopt_convert.api import command_of
from modelopt_convert.cli._console import drop, reader_may_leave
from modelopt_convert.cli._options import Telling
from modelopt_convert.cli._text import Tone, painted, table_lines, wrapped
from modelopt_convert.commands.drawing_requests import AdviseRequest, CalibrateRequest, CompareRequest
from modelopt_convert.commands.flags import Request
from modelopt_convert.commands.requests import (
    BuildRequest,
    PushRequest,
    RewriteRequest,
    VerifyRequest,
)
from modelopt_convert.report.advice import AdviceReport
from modelopt_convert.report.fidelity import FidelityReport
from modelopt_convert.report.inspect import InspectReport
from modelopt_convert.report.report import ErrorReport, FaultReport, Report
from modelopt_convert.report.words import PROVEN_WORDS
from modelopt_convert.run.boundary import bounded, debugging, storage_error
from modelopt_convert.run.errors import ExitCode, InternalError, Interrupted, MoptError, OutputRefusedError
from modelopt_convert.run.progress import Forwards
from modelopt_convert.run.quiet import quiet_libraries
from modelopt_convert.run.signals import Signals
from modelopt_convert.run.terminal import is_terminal
from modelopt_convert.run.text import printable
from modelopt_convert.stage.written_file import check_file_place, check_file_writable, write_report

Shown = TypeVar("Shown", Report, InspectReport, FidelityReport, AdviceReport)


class Output(Telling):
    """What is told, as the user wants it."""

    __slots__ = ()

    def line(self, text: str, tone: Tone | None = None) -> None:
        """One line of the result, for people; ``tone`` is what its first words mean."""
        if self.json or self.quiet:
            return
        for number, part in enumerate(wrapped(printable(text), _width())):
            _echo(part, tone if number == 0 else None, self._colors(sys.stdout))

    def detail(self, text: str) -> None:
        """One line of the result for those who asked for more."""
        if self.verbose:
            self.line(text)

    def aside(self, text: str) -> None:
        """One line on stderr; that nobody can read it must not change how a run ends."""
        with contextlib.suppress(OSError):
            _echo(printable(text), None, self._colors(sys.stderr), err=True)

    def table(self, columns: list[str], rows: list[list[str]]) -> None:
        """A table of the result; the columns but the first and the last hold numbers."""
        for text in table_lines(columns, [[printable(cell) for cell in row] for row in rows], _width()):
            self.line(text)

    def _colors(self, stream: TextIO | None) -> bool:
        if self.no_color or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            return False
        return bool(os.environ.get("FORCE_COLOR")) or is_terminal(stream)

    def check_report_path(self, *others: Path) -> None:
        """Refuse a report path that could not be written in the end, or lies in one of ``others``: inputs, OUT."""
        check_file(self.report_json, "--report-json", *others)


def _width() -> int | None:
    """Of the terminal; a pipe has none, and what scripts may read is not folded."""
    return shutil.get_terminal_size().columns if is_terminal(sys.stdout) else None


def _echo(text: str, tone: Tone | None, colors: bool, *, err: bool = False) -> None:
    typer.echo(painted(text, tone) if colors else text, err=err, color=colors)


def check_file(file: Path | None, option: str, *others: Path) -> None:
    """Refuse a file to be written at the end that could not be, or that lies in an input or in OUT.

    Args:
        file: The file, if one is named.
        option: The option that names it.
        others: Inputs and OUT, as far as they lie on disk.
    """
    if file is not None:
        try:
            check_file_place(file, others)
        except OutputRefusedError as error:
            raise typer.BadParameter(printable(error.message), param_hint=option) from error


_PATIENCE_S = 2.0
_SHARD = re.compile(r"write .*-([0-9]{5})-of-([0-9]{5})\.safetensors")
_VERIFY = ("read", "decode", "self-test", "prewarm", "multiply")


def steps_of(request: Request[Any]) -> list[tuple[str, ...]]:
    """The steps of a run from the first to the last, each as the first words of its phases."""
    match request:
        case BuildRequest():
            closing = [_VERIFY] * (request.verify != "off") + [("compare", "send")] * (request.push_to is not None)
            return [("prove", "measure"), ("write", "copy"), *closing]
        case RewriteRequest():
            return [("write",), _VERIFY]
        case VerifyRequest():
            return [("read",), ("decode",), ("self-test", "prewarm", "multiply")]
        case PushRequest():
            return [_VERIFY, ("compare", "send")]
        case AdviseRequest():
            return [("measure",), ("draw",), ("score",)]
        case _:
            return []


class ProgressBar:
    """Progress by bytes: a bar if stderr is a terminal, else a line per phase; nothing if quiet."""

    def __init__(self, output: Output, steps: Sequence[tuple[str, ...]] = (), *, is_far: bool = False) -> None:
        """Draw nothing yet.

        Args:
            output: How the user wants to be told.
            steps: See ``steps_of``.
            is_far: Whether the Hub is asked first: where it is slow that is told, since nothing else is meanwhile.
        """
        self._waiting = Timer(_PATIENCE_S, self._tell_waiting) if is_far and not output.quiet else None
        self._output = output
        self._steps = steps
        self._step = 0
        self._bar = None
        if is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb" and not output.quiet:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                Task,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )
            from rich.text import Text

            class Done(DownloadColumn):
                def render(self, task: Task) -> Text:
                    if not task.fields.get("is_counted"):
                        return super().render(task)
                    return Text(f"{task.completed:.0f}/{task.total or 0:.0f} forwards")

            class Speed(TransferSpeedColumn):
                def render(self, task: Task) -> Text:
                    return Text() if task.fields.get("is_counted") else super().render(task)

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                Done(),
                Speed(),
                TimeRemainingColumn(compact=True),
            )
            console = Console(stderr=True, markup=False, highlight=False, no_color=output.no_color or None)
            self._bar = Progress(*columns, console=console, transient=True, expand=True)
            self._bar.add_task("open", total=None)

    def __enter__(self) -> Self:
        """Begin drawing."""
        if self._waiting is not None:
            self._waiting.daemon = True
            self._waiting.start()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Clear the bar."""
        self._answered()
        if self._bar is not None:
            self._bar.stop()

    def begin(self, what: str, total_bytes: int) -> None:
        """A phase begins."""
        self._answered()
        if self._bar is not None:
            shard = _SHARD.match(what)
            number, count = map(int, shard.groups()) if shard else (1, 1)
            # Of shards to come all that is known here is that they are about as large: so time left is of the whole.
            total, text = total_bytes * (count - number + 1), printable(self._described(what))
            if number == 1:
                for task in self._bar.task_ids:
                    self._bar.remove_task(task)
                self._bar.add_task(text, total=total, is_counted=isinstance(total_bytes, Forwards))
            else:
                self._bar.update(self._bar.task_ids[-1], description=text, total=self._bar.tasks[-1].completed + total)
        elif not self._output.quiet:
            is_counted = isinstance(total_bytes, Forwards)
            self._output.aside(f"{what}: {f'{total_bytes} forwards' if is_counted else human_bytes(total_bytes)}")

    def _described(self, what: str) -> str:
        """A phase with the step that it belongs to; a push after a build verifies once more, and goes no step back."""
        word = what.partition(" ")[0]
        found = [number for number, words in enumerate(self._steps, 1) if word in words]
        self._step = max([self._step, *found])
        text = what.replace("diffusion_pytorch_model-", "").removesuffix(".safetensors")
        return f"step {self._step} of {len(self._steps)}: {text}" if self._step else text

    def _answered(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()

    def _tell_waiting(self) -> None:
        if self._bar is None:
            self._output.aside("waiting for the Hub ...")
        else:
            self._bar.update(self._bar.task_ids[-1], description="waiting for the Hub")

    def advance(self, num_bytes: int) -> None:
        """So many more bytes are done."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[-1], num_bytes)

    def announce(self, text: str) -> None:
        """One line that is to be read before the work."""
        if not self._output.quiet:
            self._output.aside(text)

    def detail(self, text: str) -> None:
        """One line for those who asked for more."""
        if self._output.verbose:
            self._output.aside(text)


def show_written(output: Output, report: Report, proof: str = "") -> None:
    """What is known of the weights, what was or would be written, and where."""
    files = len(report.output.shards)
    verb = "would write" if report.status == "planned" else "wrote"
    size = human_bytes(report.output.bytes)
    plural = "" if files == 1 else "s"
    if proof:
        output.line(proof, "good" if proof == PROVEN_WORDS else "doubt")
    output.line(
        f"{verb} {report.output.path or 'OUT'}: {report.output.tensors} tensors, {size} in {files} file{plural}"
    )


def show_counts(output: Output, report: Report) -> None:
    """The fate of every input tensor, counted."""
    output.table(
        ["input", "tensors", "fate"],
        [[name, str(count), fate] for name, fates in report.counts.items() for fate, count in fates.items()],
    )
    output.line("")


def show_cost(output: Output, report: Report) -> None:
    """What the work took: peak memory, and how fast the output was written; nothing of what only was planned."""
    if report.peak_rss_bytes is None:
        return
    rate = report.throughput_bytes_per_s
    # Most disks write some GB/s: one decimal; small checkpoints take their time for other things.
    speed = "" if rate is None else f"{rate / 1e9:.1f} GB/s" if rate >= 1e9 else f"{rate / 1e6:.1f} MB/s"
    output.line(f"peak memory {human_bytes(report.peak_rss_bytes)}{f', written at {speed}' if speed else ''}")


def human_bytes(count: int) -> str:
    """Decimal units, as file sizes on the Hub."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def run(
    output: Output, request: Request[Shown], show: Callable[[Output, Shown], None], *, show_failed: bool = False
) -> NoReturn:
    """Do what is asked, ``show`` the report (with ``show_failed`` after a failure too), and exit as documented.

    The report file comes before anything that is printed: a reader may be slow, or stop the run.
    """
    with Signals() as signals:
        command = command_of(request)
        failure: BaseException | None = None
        try:
            is_far = any(not isinstance(request.locate(name), Path | None) for name in request.inputs)
            bar = ProgressBar(output, steps_of(request), is_far=is_far)
            loads_models = isinstance(request, AdviseRequest | CalibrateRequest | CompareRequest)
            silence = quiet_libraries() if loads_models and not output.verbose else contextlib.nullcontext()
            with silence, signals.acting(), bar as progress, bounded(request.reads()):
                if output.report_json is not None:
                    check_file_writable(output.report_json)
                command.run(progress)
        except (Exception, Interrupted) as error:
            foreseen = isinstance(error, MoptError | Interrupted) and not isinstance(error, InternalError)
            if debugging() and not foreseen:
                raise
            failure = error
        report = _ended(command.report(failure), failure)
        report, unwritten = _written(output, report)
        try:
            with signals.acting():
                _tell(output, report, show, show_failed, unwritten)
        except OSError as error:
            failed = storage_error(error, "the result could not be printed")
            output.aside(f"error: {failed.message} [{failed.code}]")
            if report.exit_code == ExitCode.OK:
                report, unwritten = _written(output, report.model_copy(update={"exit_code": int(ExitCode.STORAGE)}))
        except Interrupted as error:
            drop(sys.stdout)
            if failure is None:
                report = _ended(command.report(error), error)
                report, unwritten = _written(output, report)
                _tell_error(output, report.error)
        if unwritten is not None:  # last, so that a run that ends with an error does not look like a success
            output.aside(f"error: {unwritten.message} [{unwritten.code}]")
    raise typer.Exit(report.exit_code)


def refused(output: Output, report: Report) -> NoReturn:
    """Tell of a refusal that came before there was a run, and exit as documented."""
    _tell(output, report, lambda _out, _report: None, show_failed=False)
    raise typer.Exit(report.exit_code)


def _ended(report: Shown, failure: BaseException | None) -> Shown:
    """The report, with what stands where nobody would expect it."""
    stands = isinstance(report, Report) and report.output.published
    if isinstance(failure, Interrupted) and report.error is not None and isinstance(report, Report) and stands:
        hint = f"{report.output.path} is in place, new and whole"
        return report.model_copy(update={"error": report.error.model_copy(update={"hint": hint})})
    return report


def _tell(
    output: Output,
    report: Shown,
    show: Callable[[Output, Shown], None],
    show_failed: bool,
    unwritten: ErrorReport | None = None,
) -> None:
    with reader_may_leave():
        for warning in report.warnings:
            output.aside(f"warning: {warning['message']} [{warning['code']}]")
        if report.error is None or show_failed:
            show(output, report)
        _tell_error(output, report.error)
        if output.json:
            failed = unwritten is not None and report.error is None
            told = report.model_copy(update={"status": "error", "error": unwritten}) if failed else report
            typer.echo(told.to_json())


def _tell_error(output: Output, error: ErrorReport | None) -> None:
    if error is not None:
        # Of a joint failure each kind; what is one verdict on many is said in its own words.
        is_joint = len(error.faults) > 1 and error.message.startswith(error.faults[0].message)
        for one in error.faults if is_joint else [error]:
            output.aside(f"error: {one.message} [{one.code}]")
            if one.hint:
                output.aside(f"hint: {one.hint}")
            faults = [one] if isinstance(one, FaultReport) else error.faults
            for name in (name for fault in faults for name in fault.names if output.verbose):
                output.aside(f"at: {name}")


def _written(output: Output, report: Shown) -> tuple[Shown, ErrorReport | None]:
    """The report, written where it is asked for; where that failed, with another exit code, and what failed."""
    if output.report_json is None:
        return report, None
    try:
        if isinstance(report, Report) and report.output.path:  # OUT may have been named after the preset only now
            output.check_report_path(Path(report.output.path))
        write_report(output.report_json, f"{report.to_json()}\n")
    except (MoptError, typer.BadParameter) as error:
        code, hint = (error.code, error.hint) if isinstance(error, MoptError) else ("report.place", None)
        words = f"{output.report_json}: the report could not be written: {error}"
        told = ErrorReport(code=code, message=words, hint=hint, path=str(output.report_json))
        is_told = report.error is not None and report.error.code == code
        after = report.model_copy(update={"exit_code": report.exit_code or int(ExitCode.STORAGE)})
        return after, None if is_told else told
    return report, None
