"""The public functions: each takes the fields of its request as keywords, and returns the report of what was done.

With the types that they take, give and raise they are what ``from modelopt_convert import ...`` gives; the command line
does its work by them too. No torch and no pydantic before a function is called.
"""

from collections.abc import Callable
from importlib import import_module
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ForwardRef, ParamSpec, TypeVar, get_args

import modelopt_convert
from modelopt_convert.checkpoint.location import Location, parse_location
from modelopt_convert.commands.drawing_requests import AdviseRequest, CalibrateRequest, CompareRequest
from modelopt_convert.commands.flags import Request, check_value, flags_of
from modelopt_convert.commands.requests import (
    BuildNvfp4Request,
    BuildRequest,
    ConvertFp8Request,
    ConvertRequest,
    InspectRequest,
    PushRequest,
    RewriteRequest,
    SwapNibblesRequest,
    UnswizzleScalesRequest,
    VerifyRequest,
)
from modelopt_convert.run.boundary import bounded
from modelopt_convert.run.errors import (
    BackendError,
    CheckFailedError,
    InconclusiveError,
    InputError,
    InternalError,
    MoptError,
    OutputRefusedError,
    RemoteError,
    StorageError,
    UsageError,
)
from modelopt_convert.run.progress import Guarded, Progress, ProgressFailed, Unwatched
from modelopt_convert.run.text import shown

if TYPE_CHECKING:
    from modelopt_convert.commands.command import Command
    from modelopt_convert.preset.preset import LoadedPreset
    from modelopt_convert.report.advice import AdviceReport
    from modelopt_convert.report.fidelity import FidelityReport
    from modelopt_convert.report.inspect import InspectReport
    from modelopt_convert.report.report import PublishedReport, Report, VerifiedReport

# What the package gives.
__all__ = [
    "AdviceReport",
    "AdviseRequest",
    "BackendError",
    "BuildNvfp4Request",
    "CalibrateRequest",
    "CheckFailedError",
    "CompareRequest",
    "ConvertFp8Request",
    "ConvertRequest",
    "FidelityReport",
    "InconclusiveError",
    "InputError",
    "InspectReport",
    "InspectRequest",
    "InternalError",
    "LoadedPreset",
    "MoptError",
    "OutputRefusedError",
    "Progress",
    "PublishedReport",
    "PushRequest",
    "RemoteError",
    "Report",
    "StorageError",
    "SwapNibblesRequest",
    "UnswizzleScalesRequest",
    "UsageError",
    "VerifiedReport",
    "VerifyRequest",
    "advise",
    "build_nvfp4",
    "calibrate",
    "compare",
    "convert",
    "convert_fp8",
    "inspect",
    "new_preset",
    "perform",
    "presets",
    "push",
    "swap_nibbles",
    "unswizzle_scales",
    "verify",
]
# Models of pydantic, imported when they are first asked for.
_MODELS = {
    "AdviceReport": "report.advice",
    "FidelityReport": "report.fidelity",
    "InspectReport": "report.inspect",
    "LoadedPreset": "preset.preset",
    **dict.fromkeys(("PublishedReport", "Report", "VerifiedReport"), "report.report"),
}

_P = ParamSpec("_P")
_Result = TypeVar("_Result")


def perform(request: Request[_Result]) -> _Result:
    """Do what a request asks for.

    Args:
        request: One of ``BuildNvfp4Request`` to ``PushRequest``.

    Returns:
        The report; ``mopt --json`` prints the same.

    Raises:
        TypeError: It is no request.
        MoptError: One of its kinds, with the report of the run as ``report``.
        Exception: What the request's progress raised, as it is.
    """
    if not isinstance(request, Request):
        raise TypeError(f"expected a request, found {shown(request)}")
    command = command_of(request)
    try:
        with bounded(request.reads()):
            command.run(Guarded(request.progress) if request.progress is not None else Unwatched())
    except MoptError as error:
        error.report = command.report(error)
        raise
    except ProgressFailed as failed:
        raise failed.error from failed.error.__cause__
    report: _Result = command.report()
    return report


def _function(kind: Callable[_P, Request[_Result]]) -> Callable[_P, _Result]:
    """The function that takes what a request takes, and does it."""

    def function(*words: _P.args, **named: _P.kwargs) -> _Result:
        return perform(kind(*words, **named))

    assert isinstance(kind, type) and issubclass(kind, Request)
    result = f"{modelopt_convert.__name__}.{_result_name(kind)}"
    flags = flags_of(kind)
    helps = "".join(f"    {name}: {flag.help}\n" for name, (_, flag) in flags.items())
    taken = dict(signature(kind).parameters)
    progress = taken.pop("progress")
    plain = [one.replace(annotation=flags[name][0]) for name, one in taken.items()]
    function.__name__ = function.__qualname__ = kind.command.replace("-", "_")
    function.__doc__ = f"{kind.__doc__}\n\nArgs:\n{helps}    progress: Told how far the work is.\n{_ENDING}"
    function.__signature__ = Signature([*plain, progress], return_annotation=result)  # type: ignore[attr-defined]
    function.__annotations__ = {one.name: one.annotation for one in (*plain, progress)} | {"return": result}
    return function


def _result_name(kind: type[Request[Any]]) -> str:
    """What a request's report is called; the report's class is a model, and not imported for the sake of its name."""
    written = (base for one in kind.__mro__ for base in vars(one).get("__orig_bases__", ()))
    words = (word for base in written for word in get_args(base))
    return next(word.__forward_arg__ for word in words if isinstance(word, ForwardRef))


_ENDING = """
Returns:
    The report; `mopt --json` prints the same.

Raises:
    MoptError: One of its kinds, with the report of the run as `report`; UsageError has none.
"""
build_nvfp4 = _function(BuildNvfp4Request)
convert_fp8 = _function(ConvertFp8Request)
calibrate = _function(CalibrateRequest)
convert = _function(ConvertRequest)
swap_nibbles = _function(SwapNibblesRequest)
unswizzle_scales = _function(UnswizzleScalesRequest)
verify = _function(VerifyRequest)
inspect = _function(InspectRequest)
advise = _function(AdviseRequest)
compare = _function(CompareRequest)
push = _function(PushRequest)


def presets(name: str | Path | None = None) -> "list[modelopt_convert.LoadedPreset]":
    """The presets that come with mopt, sorted by name, or the one that is named.

    Args:
        name: A preset that comes with mopt, or the path of a TOML file.

    Raises:
        UsageError: It is neither a name nor a path.
        MoptError: Such as InputError ``preset.unknown``, without a report.
    """
    check_value("NAME|FILE", str | Path | None, name)
    with bounded([Path(name)] if name is not None else [], needs_libraries=False):
        from modelopt_convert.preset.preset import load_preset, preset_names

        return [load_preset(str(each)) for each in ([name] if name is not None else preset_names())]


def new_preset(
    base: str | Path, *, config: str | Path | None = None, variant: str | None = None
) -> "modelopt_convert.LoadedPreset":
    """A preset drafted from the headers and the config of any transformer; its ``text`` is the TOML.

    What stays in BF16 is proposed by names and shapes, with the reason beside each pattern; the rest is quantized. No
    tensor is read. Title, repo and license are left out: headers do not tell them.

    Args:
        base: The unquantized base: transformer, pipeline or file, also ``hf://``.
        config: A config.json, or a folder with one, for a base that has none.
        variant: Of weights in several precisions, these, such as fp16.

    Raises:
        UsageError: A value is not one that is taken.
        MoptError: Such as InputError ``base.quantized`` or ``preset.draft``, without a report.
    """
    given: dict[str, str | Path | None] = {"BASE": base, "--config": config}
    check_value("BASE", str | Path, base)
    check_value("--config", str | Path | None, config)
    check_value("--variant", str | None, variant)
    found: dict[str, Location] = {}
    for name, place in given.items():
        if place is not None:
            try:
                found[name] = parse_location(str(place))
            except InputError as error:
                raise UsageError(name, f"{error.message}; {error.hint}") from error
    with bounded([one for one in found.values() if isinstance(one, Path)], needs_libraries=False):
        from modelopt_convert.commands.new_preset import drafted

        return drafted(found["BASE"], found.get("--config"), variant)


def __getattr__(name: str) -> Any:
    if name in _MODELS:
        return getattr(import_module(f"{modelopt_convert.__name__}.{_MODELS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def command_of(request: Request[Any]) -> "Command[Any]":
    """The command that does what a request asks for; no torch is imported before it runs."""
    match request:
        case BuildRequest() if request.push_to is not None:
            from modelopt_convert.commands.push.after_build import PublishingBuild

            return PublishingBuild(request)
        case BuildRequest():
            from modelopt_convert.commands.build.command import BuildCommand

            return BuildCommand(request)
        case CalibrateRequest():
            from modelopt_convert.commands.calibrate import CalibrateCommand

            return CalibrateCommand(request)
        case RewriteRequest():
            from modelopt_convert.commands.rewrite.command import RewriteCommand

            return RewriteCommand(request)
        case ConvertRequest():
            from modelopt_convert.commands.convert.command import ConvertCommand

            return ConvertCommand(request)
        case VerifyRequest():
            from modelopt_convert.commands.verify import VerifyCommand

            return VerifyCommand(request)
        case AdviseRequest():
            from modelopt_convert.commands.advise import AdviseCommand

            return AdviseCommand(request)
        case CompareRequest():
            from modelopt_convert.commands.compare import CompareCommand

            return CompareCommand(request)
        case InspectRequest():
            from modelopt_convert.commands.inspect import InspectCommand

            return InspectCommand(request)
        case _:
            from modelopt_convert.commands.push.command import PushCommand

            assert isinstance(request, PushRequest)
            return PushCommand(request)
