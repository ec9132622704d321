"""``mopt presets``."""

from typing import Annotated

import typer


def presets(
    name: Annotated[str | None, typer.Argument(metavar="[NAME|FILE]", help="Print this preset's TOML.")] = None,
) -> None:
    """List the presets, or print one: its TOML, and the ModelOpt command that makes the export.

    \b
    Examples:
      mopt presets
      mopt presets flux1-dev > mine.toml
    """
    from modelopt_convert.cli._output import printable
    from modelopt_convert.errors import MoptError
    from modelopt_convert.preset import load_preset, preset_names

    try:
        if name is None:
            for each in preset_names():
                preset = load_preset(each).preset
                sets = [f"{kind} {rules.status}" for kind, rules in preset.sets().items()]
                typer.echo(f"{each:24} {preset.class_name:32} {', '.join(sets)}")
            return
        loaded = load_preset(name)
    except MoptError as error:
        typer.echo(f"error: {printable(error.message)} [{error.code}]", err=True)
        typer.echo(f"hint: {printable(error.hint or '')}", err=True)
        raise typer.Exit(int(error.exit_code)) from error
    typer.echo(loaded.text, nl=False)
    for line in loaded.preset.recipe():
        typer.echo(f"# {line}")
