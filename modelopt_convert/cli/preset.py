"""``mopt presets``."""

from typing import Annotated

import typer

from modelopt_convert import api
from modelopt_convert.run.errors import MoptError, UsageError


def presets(
    name: Annotated[str | None, typer.Argument(metavar="[NAME|FILE]", help="Print this preset's TOML.")] = None,
) -> None:
    """List the presets, or print one: its TOML, and the ModelOpt command that makes the export.

    \b
    Examples:
      mopt presets
      mopt presets flux1-dev > mine.toml
    """
    from modelopt_convert.cli._console import reader_may_leave
    from modelopt_convert.run.text import printable

    try:
        loaded = api.presets(name)
    except UsageError as error:
        raise typer.BadParameter(printable(error.reason), param_hint=error.flag) from error
    except MoptError as error:
        typer.echo(f"error: {printable(error.message)} [{error.code}]", err=True)
        typer.echo(f"hint: {printable(error.hint or '')}", err=True)
        raise typer.Exit(int(error.exit_code)) from error
    with reader_may_leave():
        if name is None:
            for preset in (one.preset for one in loaded):
                sets = [f"{kind} {rules.status}" for kind, rules in preset.sets().items()]
                typer.echo(f"{preset.name:24} {preset.class_name:32} {', '.join(sets)}")
            return
        typer.echo(loaded[0].text, nl=False)
        for line in loaded[0].preset.recipe():
            typer.echo(f"# {line}")


COMMANDS = {"presets": presets}
