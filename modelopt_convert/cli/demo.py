"""``mopt demo``."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from modelopt_convert.cli._output import Output
    from modelopt_convert.commands.requests import BuildNvfp4Request
    from modelopt_convert.report.report import Report


def demo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder for all of it.")] = Path("mopt-demo"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON report on stdout, whatever the outcome.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Nothing on stdout, no progress; errors on stderr.")
    ] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="No colors.")] = False,
) -> None:
    """Build a checkpoint from a tiny base and its export, which come with mopt: no ModelOpt, no GPU, no network.

    \b
    Examples:
      mopt demo
      mopt demo my-demo --json

    The folder gets base/, export/ and out/, as if `mopt build-nvfp4` had been run on files of your own. It must be new:
    nothing is ever replaced.
    """
    from modelopt_convert.cli._output import Output, refused, run
    from modelopt_convert.cli.build import show_build
    from modelopt_convert.commands.demo import demo_files, refusal
    from modelopt_convert.run.errors import Interrupted, MoptError
    from modelopt_convert.run.signals import Signals

    output = Output(json=as_json, quiet=quiet, no_color=no_color)

    def show(out: "Output", report: "Report", request: "BuildNvfp4Request") -> None:
        base, target = shlex.quote(str(request.base)), shlex.quote(str(request.output))
        show_build(out, report, request, with_next=False)
        out.line("")
        out.line(
            f"{folder} holds base/ (BF16), export/ (what ModelOpt exports of it) and out/ (what mopt made of both)"
        )
        out.line("see out/README.md, the card, and out/mopt.json, the record; weights are random, and make no picture")
        out.line(f"next: mopt inspect {target} --base {base}")
        out.line(
            f"made by: mopt build-nvfp4 --preset flux1-dev --export {shlex.quote(str(request.export))} "
            f"--base {base} --output {target}"
        )

    with Signals() as signals:  # a signal is noted while files are made and removed, and acts in between
        try:
            with demo_files(folder) as request:
                with signals.acting():
                    pass
                run(output, request, lambda out, report: show(out, report, request))
        except (MoptError, Interrupted) as error:
            refused(output, refusal(error))


COMMANDS = {"demo": demo}
