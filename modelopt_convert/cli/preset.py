"""``mopt presets``."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelopt_convert import api
from modelopt_convert.cli._options import completed
from modelopt_convert.commands.requests import preset_values
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.run.errors import MoptError, UsageError

if TYPE_CHECKING:
    from modelopt_convert.preset.preset import LoadedPreset


def presets(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME|FILE",
            help="Print this preset's TOML.",
            autocompletion=lambda incomplete: completed(preset_values(), incomplete),
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, whatever the outcome.")] = False,
) -> None:
    """List the presets, or print one: its TOML, and the ModelOpt command that makes the export.

    \b
    Examples:
      mopt presets
      mopt presets flux1-dev > mine.toml
      mopt presets --json
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
        if as_json:
            from modelopt_convert.commands.command import ending
            from modelopt_convert.report.report import OutputReport, Report

            with reader_may_leave():
                report = Report(command="presets", output=OutputReport(path=""), **ending(error))
                typer.echo(report.to_json())
        raise typer.Exit(int(error.exit_code)) from error
    with reader_may_leave():
        if as_json:
            typer.echo(json.dumps({"schema": "mopt.presets/1", "presets": [_described(one) for one in loaded]}))
            return
        if name is None:
            typer.echo("  ".join([f"{'preset':20}", f"{'class':30}", *(f"{kind:9}" for kind in FORMATS)]).rstrip())
            for preset in (one.preset for one in loaded):
                status = {kind: rules.status for kind, rules in preset.sets().items()}
                states = [f"{status.get(kind, ''):9}" for kind in FORMATS]
                typer.echo("  ".join([f"{preset.name:20}", f"{preset.class_name:30}", *states]).rstrip())
            return
        typer.echo(loaded[0].text, nl=False)
        for line in loaded[0].preset.recipe():
            typer.echo(f"# {line}")


def _described(loaded: "LoadedPreset") -> dict[str, Any]:
    """A preset as a script may want it: what it is for, every field with what it inherits, and its text."""
    from modelopt_convert.run.text import unicode_text

    preset = loaded.preset
    return {
        "name": preset.name,
        "path": unicode_text(loaded.path),
        "formats": {kind: rules.status for kind, rules in preset.sets().items()},
        "fields": preset.model_dump(mode="json"),
        "recipe": preset.recipe(),
        "toml": loaded.text,
        "sha256": loaded.sha256,
    }


COMMANDS = {"presets": presets}
