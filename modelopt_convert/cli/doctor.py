"""``mopt doctor``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from modelopt_convert.cli._text import Tone

_TITLES = {
    "works": "what works here",
    "version": "versions",
    "gpu": "GPU",
    "backend": "GEMM backends",
    "hub": "Hugging Face Hub",
    "disk": "disk",
}
_TONES: "dict[str, Tone]" = {"ok": "good", "missing": "doubt", "broken": "bad"}


def doctor(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The folder that OUT shall be written in.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="No colors.")] = False,
) -> None:
    """Say what there is on this machine, and what of mopt works here.

    \b
    Examples:
      mopt doctor
      mopt doctor /data/checkpoints --json

    Versions, GPU, GEMM backends, the Hub's login (never the token) and free disk. Exits 0 whatever it finds.
    """
    from modelopt_convert.cli._console import reader_may_leave
    from modelopt_convert.cli._output import Output
    from modelopt_convert.commands.doctor import as_data, examine
    from modelopt_convert.run.terminal import first_sign

    with first_sign():
        findings = examine(path)
    with reader_may_leave():
        if as_json:
            typer.echo(json.dumps(as_data(findings)))
            return
        output = Output(no_color=no_color)
        for part, title in _TITLES.items():
            output.line(f"{title}:")
            for one in findings:
                if one.part == part:
                    output.line(f"{one.status}: {one.name}: {one.found}", _TONES[one.status])
            output.line("")


COMMANDS = {"doctor": doctor}
