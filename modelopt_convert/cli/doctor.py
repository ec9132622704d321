"""``mopt doctor``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from modelopt_convert.cli._text import Tone
    from modelopt_convert.commands.doctor import Finding

_TITLES = {
    "version": "versions",
    "disk": "disk",
    "gpu": "GPU",
    "backend": "GEMM backends",
    "hub": "Hugging Face Hub",
    "works": "what works here",
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

    Versions, GPU, GEMM backends, the Hub's login (never the token) and free disk. Exits 0 whatever
    it finds; each line comes as soon as it is known.
    """
    from modelopt_convert.run.terminal import first_sign

    with first_sign():
        from modelopt_convert.cli._console import reader_may_leave
        from modelopt_convert.cli._output import Output
        from modelopt_convert.commands.doctor import as_data, examine
        from modelopt_convert.run.errors import ExitCode, Interrupted
        from modelopt_convert.run.signals import Signals

    output, ended = Output(json=as_json, no_color=no_color), None
    findings: list[Finding] = []
    with Signals() as signals, reader_may_leave():
        try:
            with signals.acting():
                for one in examine(path):
                    signals.insist()  # drivers and clients may take an interruption for their own failure
                    if not findings or findings[-1].part != one.part:
                        output.line(f"{_TITLES[one.part]}:")
                    findings.append(one)
                    output.line(f"{one.status}: {one.name}: {one.found}", _TONES[one.status])
        except Interrupted as error:
            ended = error
        if as_json:
            typer.echo(json.dumps(as_data(findings, ended)))
    if ended is not None:
        output.aside(f"error: stopped by signal {ended.signum} [interrupted]")
        raise typer.Exit(int(ExitCode(128 + ended.signum)))


COMMANDS = {"doctor": doctor}
