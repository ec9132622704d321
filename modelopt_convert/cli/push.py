"""``mopt push``."""

from typing import TYPE_CHECKING

from modelopt_convert.cli._options import SILENT, from_request
from modelopt_convert.commands.requests import PushRequest

if TYPE_CHECKING:
    from modelopt_convert.cli._output import Output
    from modelopt_convert.report.report import Report


def push(request: PushRequest, output: "Output") -> None:
    """Publish a checkpoint on the Hugging Face Hub: verified first, in one commit, only what is missing there.

    \b
    Examples:
      mopt push flux1-dev-nvfp4 me/FLUX.1-dev-nvfp4
      mopt push flux1-dev-nvfp4 me/FLUX.1-dev-nvfp4 --dry-run
      mopt push flux1-dev-nvfp4 org/FLUX.1-dev-nvfp4 --create-pr --message 'New calibration'

    A push that was stopped goes on where it was when it is run again. Exit codes: 0 published, or already there; 1 the
    checkpoint fails its own check; 3 the Hub or mopt refuses; 5 the Hub or the way to it failed, try again.
    """
    from modelopt_convert.cli._output import run

    def show(out: "Output", report: "Report") -> None:
        show_pushed(out, report)
        if request.dry_run:
            out.line(f"next: {request.command_line()}")

    run(output, request, show)


def show_pushed(out: "Output", report: "Report") -> None:
    """Where it stands, what was sent, and the command that loads it."""
    from modelopt_convert.cli._output import human_bytes

    pushed = report.pushed
    if pushed is None:
        return
    if report.status == "planned":
        sizes = f" {len(pushed.sent)} files, {human_bytes(pushed.bytes_sent)}," if pushed.sent else ""
        out.line(f"would push{sizes} to {pushed.url}")
        for one, fate in (*((one, "send") for one in pushed.sent), *((one, "delete") for one in pushed.deleted)):
            out.line(f"  {fate} {one}")
        if pushed.same:
            out.line(f"  {len(pushed.same)} are there, and equal")
        return
    if pushed.commit is None:
        out.line(f"already there: {pushed.url}")
    else:
        sent = f"{len(pushed.sent)} files, {human_bytes(pushed.bytes_sent)}"
        out.line(f"pushed {sent}; {len(pushed.same)} were there: {pushed.url}")
        for path in pushed.deleted:
            out.line(f"deleted {path}, of the checkpoint before")
    if pushed.load is not None:
        out.line(f"next: {pushed.load}")


COMMANDS = {"push": from_request(PushRequest, push, without=SILENT)}
