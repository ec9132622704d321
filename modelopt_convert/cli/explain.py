"""``mopt explain``."""

from typing import Annotated

import typer

from modelopt_convert.run.errors import UsageError


def explain(
    code: Annotated[str, typer.Argument(metavar="CODE", help="The word in brackets behind an error or a warning.")],
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Say what the code of an error, a warning or a fault means, and what to do.

    \b
    Examples:
      mopt explain header.foreign
      mopt explain export.missing_input_scale --json
    """
    from modelopt_convert.cli._console import reader_may_leave
    from modelopt_convert.run import codes
    from modelopt_convert.run.text import printable

    try:
        found = codes.explain(code)
    except UsageError as error:
        raise typer.BadParameter(printable(error.reason), param_hint=error.flag) from error
    with reader_may_leave():
        if json:
            from json import dumps

            typer.echo(dumps({"code": found.code, "means": found.means, "to_do": found.todo}))
        else:
            typer.echo(f"{found.code}: {found.means}\nto do: {found.todo}")


COMMANDS = {"explain": explain}
