"""The public functions: each takes the fields of its request as keywords, and returns the report of what was done.

They are what ``from modelopt_convert import ...`` gives; the command line does its work by them too. No torch and no
pydantic before a function is called.
"""

import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from modelopt_convert import __version__
from modelopt_convert.commands import requests
from modelopt_convert.commands.requests import Request, flags_of
from modelopt_convert.run.errors import (
    BackendError,
    CheckFailedError,
    ExitCode,
    InconclusiveError,
    InternalError,
    Interrupted,
    MoptError,
    RemoteError,
    StorageError,
)
from modelopt_convert.run.progress import Progress, Unwatched

if TYPE_CHECKING:
    from modelopt_convert.preset.preset import LoadedPreset
    from modelopt_convert.report.inspect import InspectReport
    from modelopt_convert.report.report import Report, Status

_P = ParamSpec("_P")
_Result = TypeVar("_Result")
_Reported = TypeVar("_Reported", covariant=True)
_Inner = TypeVar("_Inner")


class Command(Protocol[_Reported]):
    """What a request asks for, ready to be done."""

    def run(self, progress: Progress) -> None:
        """Do it.

        Raises:
            MoptError: One of its kinds.
        """

    def report(self, error: BaseException | None = None) -> _Reported:
        """What happened, also after a failure."""


def perform(request: Request[_Result]) -> _Result:
    """Do what a request asks for.

    Args:
        request: One of ``BuildNvfp4Request`` to ``PushRequest``.

    Returns:
        The report; ``mopt --json`` prints the same.

    Raises:
        MoptError: One of its kinds, with the report of the run as ``report``.
    """
    command = command_of(request)
    try:
        command.run(request.progress or Unwatched())
    except MoptError as error:
        error.report = command.report(error)
        raise
    return command.report()


def _function(kind: Callable[_P, Request[_Result]]) -> Callable[_P, _Result]:
    """The function that takes what a request takes, and does it."""

    def function(*words: _P.args, **named: _P.kwargs) -> _Result:
        return perform(kind(*words, **named))

    assert isinstance(kind, type) and issubclass(kind, Request)
    flags = flags_of(kind)
    helps = "".join(f"    {name}: {flag.help}\n" for name, (_, flag) in flags.items())
    taken = dict(signature(kind).parameters)
    progress = taken.pop("progress")
    plain = [one.replace(annotation=flags[name][0]) for name, one in taken.items()]
    function.__name__ = function.__qualname__ = kind.command.replace("-", "_")
    function.__doc__ = f"{kind.__doc__}\n\nArgs:\n{helps}    progress: Told how far the work is.\n{_ENDING}"
    function.__signature__ = Signature([*plain, progress])  # type: ignore[attr-defined]
    return function


_ENDING = """
Returns:
    The report; `mopt --json` prints the same.

Raises:
    MoptError: One of its kinds, with the report of the run as `report`; UsageError has none.
"""
build_nvfp4 = _function(requests.BuildNvfp4Request)
convert_fp8 = _function(requests.ConvertFp8Request)
swap_nibbles = _function(requests.SwapNibblesRequest)
unswizzle_scales = _function(requests.UnswizzleScalesRequest)
verify = _function(requests.VerifyRequest)
inspect = _function(requests.InspectRequest)
push = _function(requests.PushRequest)


def presets(name: str | Path | None = None) -> "list[LoadedPreset]":
    """The presets that come with mopt, sorted by name, or the one that is named.

    Args:
        name: A preset that comes with mopt, or the path of a TOML file.

    Raises:
        InputError: ``preset.unknown``, or the file is no preset.
    """
    from modelopt_convert.preset.preset import load_preset, preset_names

    return [load_preset(str(each)) for each in ([name] if name is not None else preset_names())]


# From here to the end: how the commands are called today.


def command_of(request: Request[_Result]) -> Command[_Result]:
    """The command that does what a request asks for; no torch is imported before it runs."""
    return _Present(request)


class _Present:
    """A command that fills a report which it is given."""

    def __init__(self, request: Request[Any]) -> None:
        """Do nothing yet."""
        from modelopt_convert.report.inspect import InspectReport
        from modelopt_convert.report.report import OutputReport, Report

        self._request = request
        self._report: Any = InspectReport()
        if not isinstance(request, requests.InspectRequest):
            output = getattr(request, "output", None)
            path = str(Path(output)) if output is not None else ""
            self._report = Report(command=request.command, output=OutputReport(path=path))

    def run(self, progress: Progress) -> None:
        """Call the function of today."""
        work: Any = {
            requests.BuildRequest: _build,
            requests.RewriteRequest: _rewrite,
            requests.VerifyRequest: _verify,
            requests.InspectRequest: _inspect,
            requests.PushRequest: _push,
        }
        (one,) = (work for kind, work in work.items() if isinstance(self._request, kind))
        one(self._request, self._report, progress)

    def report(self, error: BaseException | None = None) -> Any:
        """The report, with how it ended."""
        _end(self._report, error)
        return self._report


def _inner(kind: type[_Inner], request: Request[Any], **more: Any) -> _Inner:
    """The request as the function of today takes it: with inputs located."""
    names = [one.name for one in fields(kind) if hasattr(request, one.name)]  # type: ignore[arg-type]
    given = {name: request.locate(name) if name in request.inputs else getattr(request, name) for name in names}
    return kind(**(given | more))


def _build(request: requests.BuildRequest, report: "Report", progress: Progress) -> None:
    from modelopt_convert.checkpoint.hub.client import page_of
    from modelopt_convert.commands.build.command import BuildRequest, convert
    from modelopt_convert.commands.push.access import check_access
    from modelopt_convert.report.report import PushedReport

    more: dict[str, Any] = {"checkpoint": None} if isinstance(request, requests.BuildNvfp4Request) else {}
    more |= {"preset": str(request.preset)} if request.preset is not None else {}
    inner = _inner(
        BuildRequest,
        request,
        output=Path(request.output) if request.output is not None else None,
        keep_bf16=tuple(request.keep_bf16),
        max_shard_size=request.shard_bytes,
        workers=request.worker_count,
        **more,
    )
    if request.push_to is None:
        convert(inner, report, progress)
        return
    # Rights are asked for first: hours of work that may not be published are hours lost.
    check_access(request.push_to, create_pr=False, private=False, again="run the same command again")
    convert(inner, report, progress)
    if request.dry_run:
        report.pushed = PushedReport(repo_id=request.push_to, revision="main", url=page_of(request.push_to))
        return
    later = requests.PushRequest(report.output.path, request.push_to)
    try:
        _push(later, report, progress)
    except MoptError as error:
        stands = f"{later.checkpoint} stands; `{later.command_line()}` publishes it"
        if error.hint is None or later.command_line() not in error.hint:
            error.hint = f"{error.hint}; {stands}" if error.hint else stands
        raise


def _rewrite(request: requests.RewriteRequest, report: "Report", progress: Progress) -> None:
    from modelopt_convert.commands.rewrite import RewriteRequest, rewrite

    inner = _inner(RewriteRequest, request, output=Path(request.output), workers=request.worker_count)
    rewrite(inner, report, progress)


def _verify(request: requests.VerifyRequest, report: "Report", progress: Progress) -> None:
    from modelopt_convert.commands.verify import verify
    from modelopt_convert.verification.request import VerifyRequest

    where = request.locate("checkpoint") or Path()
    inner = _inner(VerifyRequest, request, checkpoint=where, sample=request.rows, workers=request.worker_count)
    if request.report is not None:
        from modelopt_convert.verification.page.document import require_plotly

        require_plotly()  # before the work, and not after it
    try:
        if request.checkpoint is None:
            from modelopt_convert.verification.transformer import verify_backends

            verify_backends(inner, report, progress)
        else:
            verify(inner, report, progress)
    except MoptError:  # what was found goes onto the page; that it cannot be written must not hide the verdict
        with suppress(MoptError):
            _write_page(request, report)
        raise
    _write_page(request, report)


def _write_page(request: requests.VerifyRequest, report: "Report") -> None:
    if request.report is None or report.verify is None:
        return
    from modelopt_convert.verification.page.document import render

    text = render(report.verify.model_dump())
    try:
        Path(request.report).write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"{request.report}: the page could not be written: {error.strerror}",
            code="storage.failed",
            path=str(request.report),
            hint="give --report a file in a folder that can be written",
        ) from error


def _inspect(request: requests.InspectRequest, report: "InspectReport", _: Progress) -> None:
    from modelopt_convert.commands.inspect import inspect

    source, base = request.locate("source"), request.locate("base")
    assert source is not None
    inspect(source, base, report, every_scale=request.all_scales, max_error=request.max_error)


def _push(request: requests.PushRequest, report: "Report", progress: Progress) -> None:
    from modelopt_convert.commands.push.command import PushRequest, push

    push(_inner(PushRequest, request), report, progress)


def _end(report: "Report | InspectReport", error: BaseException | None) -> None:
    """Put into the report how the run ended."""
    from modelopt_convert.report.report import ErrorReport, Report

    if isinstance(report, Report):
        torch = sys.modules.get("torch")  # not imported for its version's sake
        report.versions = {"mopt": __version__, "python": platform.python_version()}
        report.versions |= {"torch": str(torch.__version__)} if torch is not None else {}
    if error is None:
        return
    status: Status = "error"
    code, message, hint, path = "internal", f"{type(error).__name__}: {error}", None, None
    exit_code = ExitCode.INTERNAL
    if isinstance(error, MoptError):
        status = _STATUS.get(type(error), "refused")
        exit_code, code, message, hint, path = error.exit_code, error.code, error.message, error.hint, error.path
        if isinstance(error, StorageError) and isinstance(report, Report):
            report.output.published, report.output.kept_at = error.published, error.kept_at
    elif isinstance(error, Interrupted):
        status, code, message = "interrupted", "interrupted", f"stopped by signal {error.signum}"
        exit_code = ExitCode(128 + error.signum)
    else:
        hint = "this is a bug in mopt; report it with the traceback that MOPT_DEBUG=1 shows"
    report.status, report.exit_code = status, int(exit_code)
    report.error = ErrorReport(code=code, message=_unicode(message), hint=hint, path=path and _unicode(path))


_STATUS: "dict[type[MoptError], Status]" = {
    CheckFailedError: "mismatch",
    InconclusiveError: "inconclusive",
    StorageError: "error",
    RemoteError: "error",
    InternalError: "error",
    BackendError: "error",
}


def _unicode(text: str) -> str:
    """A path that is not UTF-8 has characters that no JSON can hold."""
    return text.encode(errors="backslashreplace").decode()
