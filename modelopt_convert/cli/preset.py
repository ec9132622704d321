"""``mopt presets``."""

import json
import shlex
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelopt_convert import api
from modelopt_convert.cli._options import completed
from modelopt_convert.commands.requests import preset_values
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.run.errors import MoptError, UsageError

if TYPE_CHECKING:
    from modelopt_convert.preset.preset import LoadedPreset


NEW = "new"


def presets(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME|FILE|new",
            help="Print this preset's TOML, or a new one for BASE.",
            autocompletion=lambda incomplete: completed([*preset_values(), NEW], incomplete),
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Argument(metavar="BASE", help="For `new`: the unquantized transformer, pipeline or file.")
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option("--variant", metavar="NAME", help="Of BASE's weights in several precisions, these, such as fp16."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="PATH", help="A config.json, or a folder with one, for a BASE without."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, whatever the outcome.")] = False,
) -> None:
    """List the presets, print one, or draft a new one for any transformer from its headers and config.

    \b
    Examples:
      mopt presets
      mopt presets flux1-dev > mine.toml
      mopt presets new BASE > mine.toml
      mopt presets --json

    `new` says beside each pattern why modules stay in BF16. Nobody has shown a draft
    in an engine: read it, then build with --preset ./mine.toml.
    """
    from modelopt_convert.cli._console import reader_may_leave
    from modelopt_convert.run.text import printable

    of_base = {"BASE": base, "--variant": variant, "--config": config}
    given = {flag: value for flag, value in of_base.items() if value is not None}
    try:
        if name == NEW:
            if base is None:
                raise UsageError("BASE", f"is required: mopt presets {NEW} BASE")
            loaded = [api.new_preset(base, config=config, variant=variant)]
        elif given:
            raise UsageError(next(iter(given)), f"is for mopt presets {NEW} BASE")
        else:
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
    with suppress(OSError):
        for words in (words for one in loaded for words in one.warnings):
            typer.echo(f"warning: {printable(words)}", err=True)
    with reader_may_leave():
        if as_json:
            typer.echo(json.dumps({"schema": "mopt.presets/1", "presets": [_described(one) for one in loaded]}))
            return
        if name is None:
            rows = [["preset", "class", *FORMATS]]
            for preset in (one.preset for one in loaded):
                status = {kind: rules.status for kind, rules in preset.sets().items()}
                rows.append([preset.name, preset.class_name, *(status.get(kind, "") for kind in FORMATS)])
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            for row in rows:
                typer.echo("  ".join(map(str.ljust, row, widths)).rstrip())
            return
        typer.echo(loaded[0].text, nl=False)
        for line in loaded[0].preset.recipe():
            typer.echo(f"# {line}")
    if name == NEW:
        flags = [word for flag, value in given.items() for word in ("--base" if flag == "BASE" else flag, value)]
        build = shlex.join(["mopt", *loaded[0].build, "--preset", "./mine.toml", *flags])
        with suppress(OSError):
            typer.echo(f"next: read it, save it as mine.toml, then {printable(build)}", err=True)


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
