"""``mopt explain``."""

import shutil
import sys
from typing import Annotated

import typer

from modelopt_convert.run.errors import UsageError

_VERDICTS = ("near", "pass", "fail", "inconclusive", "backend broken", "backends disagree")


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
    from modelopt_convert.cli._text import wrapped
    from modelopt_convert.report.words import PROOFS, PROVEN
    from modelopt_convert.run import codes
    from modelopt_convert.run.terminal import is_terminal
    from modelopt_convert.run.text import printable

    try:
        found = codes.explain(code)
    except UsageError as error:
        reason = error.reason
        if code and code.lower() in (*PROOFS, *PROVEN, *_VERDICTS):
            reason = f"{code!r} is no code of mopt's; it is a verdict: docs/proven.md says what each verdict means"
        raise typer.BadParameter(printable(reason), param_hint=error.flag) from error
    with reader_may_leave():
        if json:
            from json import dumps

            typer.echo(dumps({"code": found.code, "means": found.means, "to_do": found.todo}))
        else:
            width = shutil.get_terminal_size().columns if is_terminal(sys.stdout) else None
            for text in (f"{found.code}: {found.means}", f"to do: {found.todo}"):
                typer.echo("\n".join(wrapped(text, width)))


COMMANDS = {"explain": explain}
