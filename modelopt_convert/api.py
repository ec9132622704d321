"""The public functions: each takes the fields of its request as keywords, and returns the report of what was done.

They are what ``from modelopt_convert import ...`` gives; the command line does its work by them too. No torch and no
pydantic before a function is called.
"""

from collections.abc import Callable
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from modelopt_convert.commands import requests
from modelopt_convert.commands.requests import Request, flags_of
from modelopt_convert.run.errors import MoptError
from modelopt_convert.run.progress import Unwatched

if TYPE_CHECKING:
    from modelopt_convert.commands.command import Command
    from modelopt_convert.preset.preset import LoadedPreset

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
    """
    if not isinstance(request, Request):
        raise TypeError(f"expected a request, found {request!r}")
    command: Command[_Result] = command_of(request)
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


def command_of(request: Request[Any]) -> "Command[Any]":
    """The command that does what a request asks for; no torch is imported before it runs."""
    match request:
        case requests.BuildRequest() if request.push_to is not None:
            from modelopt_convert.commands.push.after_build import PublishingBuild

            return PublishingBuild(request)
        case requests.BuildRequest():
            from modelopt_convert.commands.build.command import BuildCommand

            return BuildCommand(request)
        case requests.RewriteRequest():
            from modelopt_convert.commands.rewrite import RewriteCommand

            return RewriteCommand(request)
        case requests.VerifyRequest():
            from modelopt_convert.commands.verify import VerifyCommand

            return VerifyCommand(request)
        case requests.InspectRequest():
            from modelopt_convert.commands.inspect import InspectCommand

            return InspectCommand(request)
        case _:
            from modelopt_convert.commands.push.command import PushCommand

            assert isinstance(request, requests.PushRequest)
            return PushCommand(request)
