"""A command of the command line, made from its request: arguments and options are the fields that have a flag."""

from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from inspect import Parameter, Signature
from pathlib import Path
from types import GenericAlias, NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import typer

from modelopt_convert.commands.flags import Flag, Request, choices_of, flags_of
from modelopt_convert.run.errors import UsageError
from modelopt_convert.run.terminal import first_sign

if TYPE_CHECKING:
    from modelopt_convert.cli._output import Output


SILENT = ("verbose",)  # what commands leave out that have no line per tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Telling:
    """How the user wants to be told: what every command takes beside its request."""

    json: Annotated[bool, Flag("One JSON report on stdout, whatever the outcome.")] = False
    report_json: Annotated[Path | None, Flag("Write the JSON report there, whatever the outcome.", metavar="PATH")] = (
        None
    )
    quiet: Annotated[bool, Flag("Nothing on stdout, no progress; errors on stderr.", short="-q")] = False
    verbose: Annotated[bool, Flag("Tables of all that was done; one line for each tensor on stderr.", short="-v")] = (
        False
    )
    no_color: Annotated[bool, Flag("No colors.")] = False


def from_request(
    kind: type[Request[Any]], work: "Callable[[Any, Output], None]", *, without: Sequence[str] = ()
) -> Callable[..., None]:
    """The function that Typer makes a command of.

    Args:
        kind: The request that is made from what the user gives.
        work: Does what is asked; the docstring is the command's help.
        without: Fields of ``Telling`` that mean nothing for this command.
    """

    def command(**given: Any) -> None:
        told = {one.name: given.pop(one.name) for one in fields(Telling) if one.name in given}
        try:
            request = kind(**{name: value for name, value in given.items() if value is not None})
        except UsageError as error:
            from modelopt_convert.run.text import printable

            raise typer.BadParameter(printable(error.reason), param_hint=error.flag) from error
        with first_sign():
            from modelopt_convert.cli._output import Output

            output = Output(**told)
        output.check_report_path(*request.on_disk())
        work(request, output)

    flags = flags_of(kind) | flags_of(Telling)
    ours = {one.name: one for one in (*fields(kind), *fields(Telling)) if one.name in flags}
    names = sorted((name for name in ours if name not in without), key=lambda name: bool(ours[name].kw_only))
    for name in [name for name in names if flags[name][1].after]:
        names.remove(name)
        names.insert(names.index(str(flags[name][1].after)) + 1, name)
    parameters = [_parameter(ours[name], *flags[name]) for name in names]
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__doc__ = work.__doc__
    return command


def _parameter(one: Field[Any], kind: Any, flag: Flag) -> Parameter:
    taken = [each for each in get_args(kind) if each is not NoneType] if get_origin(kind) is UnionType else [kind]
    words = choices_of(kind)
    single = str if words else taken[0]  # the request itself says which word was meant
    if get_origin(kind) is Sequence:
        each = get_args(kind)[0]
        single = GenericAlias(list, str if words else get_args(each)[0] if isinstance(each, UnionType) else each)
    typed = single
    default = Parameter.empty if one.default is MISSING else one.default
    if default in (None, ()):
        typed, default = typed | None, None
    elif typed is str and default is not Parameter.empty:
        default = str(default)
    if not one.kw_only:
        return Parameter(
            one.name,
            Parameter.POSITIONAL_OR_KEYWORD,
            default=default,
            annotation=Annotated[typed, typer.Argument(metavar=flag.metavar, help=flag.help)],
        )
    spelled = [flag.name or f"--{one.name.replace('_', '-')}", *([flag.short] if flag.short else [])]
    values = flag.values or ((lambda: words) if words else None)
    option = typer.Option(
        *spelled,
        metavar=f"<{'|'.join(words)}>" if words and flag.metavar is None else flag.metavar,
        help=flag.help,
        min=flag.minimum,
        max=flag.maximum,
        autocompletion=None if values is None else lambda incomplete: completed(values(), incomplete),
    )
    return Parameter(one.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[typed, option])


def completed(values: Sequence[str], incomplete: str) -> list[str]:
    """The values that go on from what a shell has so far; of a list with commas, those of its last part."""
    before, comma, begun = incomplete.rpartition(",")
    return [f"{before}{comma}{one}" for one in values if one.startswith(begun)]
