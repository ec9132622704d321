"""``mopt demo``."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from modelopt_convert.cli._output import Output
    from modelopt_convert.report.report import Report


def demo(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="A new folder for all of it.")] = Path("mopt-demo"),
    no_color: Annotated[bool, typer.Option("--no-color", help="No colors.")] = False,
) -> None:
    """Build a checkpoint from a tiny base and its export, which come with mopt: no ModelOpt, no GPU, no network.

    \b
    Examples:
      mopt demo
      mopt demo my-demo

    The folder gets base/, export/ and out/, as if `mopt build-nvfp4` had been run on files of your own. It must be new:
    nothing is ever replaced.
    """
    from modelopt_convert.cli._output import Output, run
    from modelopt_convert.cli.build import show_build
    from modelopt_convert.commands.demo import demo_request
    from modelopt_convert.run.errors import MoptError

    output = Output(no_color=no_color)
    try:
        request = demo_request(folder)
    except MoptError as error:
        output.aside(f"error: {error.message} [{error.code}]")
        output.aside(f"hint: {error.hint}")
        raise typer.Exit(int(error.exit_code)) from error

    def show(out: "Output", report: "Report") -> None:
        base, target = shlex.quote(str(request.base)), shlex.quote(str(request.output))
        show_build(out, report, request)
        out.line("")
        out.line(
            f"{folder} holds base/ (BF16), export/ (what ModelOpt exports of it) and out/ (what mopt made of both)"
        )
        out.line("see out/README.md, the card, and out/mopt.json, the record; weights are random, and make no picture")
        for line in (f"verify {target} --base {base}", f"inspect {target} --base {base}"):
            out.line(f"next: mopt {line}")
        out.line(
            f"made by: mopt build-nvfp4 --preset flux1-dev --export {shlex.quote(str(request.export))} "
            f"--base {base} --output {target}"
        )

    run(output, request, show)


COMMANDS = {"demo": demo}
