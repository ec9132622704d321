"""``mopt push``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelopt_convert.cli import _options as options

if TYPE_CHECKING:
    from modelopt_convert.cli._output import Output
    from modelopt_convert.report.report import Report


def push(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A transformer folder, or the folder that a build wrote.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="ORGANIZATION/NAME; created if there is none.")],
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing to main.")
    ] = False,
    private: Annotated[
        bool, typer.Option("--private", help="Create the repo as a private one; refuse a public one.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="Commit there; made from main if there is none.")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", metavar="TEXT", help="Of the commit.")] = None,
    json: options.JsonOption = False,
    report_json: options.ReportOption = None,
    quiet: options.QuietOption = False,
    no_color: options.NoColorOption = False,
) -> None:
    """Publish a checkpoint on the Hugging Face Hub: verified first, in one commit, only what is missing there.

    \b
    Examples:
      mopt push flux1-dev-nvfp4 me/FLUX.1-dev-nvfp4
      mopt push flux1-dev-nvfp4 org/FLUX.1-dev-nvfp4 --create-pr --message 'New calibration'

    Stopped and run again it goes on where it was. Exit codes: 0 published, or already there; 1 the checkpoint fails its
    own check; 3 the Hub or mopt refuses; 5 the Hub or the way to it failed, try again.
    """
    if create_pr and revision is not None:
        raise typer.BadParameter("a pull request goes to main; leave one of the two out", param_hint="--create-pr")
    if checkpoint.parts[:1] == ("hf:",):
        raise typer.BadParameter(
            "is a folder on disk; `hf download REPO_ID --local-dir FOLDER` makes one", param_hint="CHECKPOINT"
        )
    if message is not None and not message.strip():
        raise typer.BadParameter("must not be empty", param_hint="--message")

    from modelopt_convert.cli._output import Output, run
    from modelopt_convert.report.report import OutputReport, Report

    out = Output(json=json, report_path=report_json, quiet=quiet, verbose=False, no_color=no_color)
    out.check_report_path(checkpoint)
    report = Report(command="push", output=OutputReport(path=""))

    def work(progress: object) -> None:
        from modelopt_convert.commands.push.command import PushRequest
        from modelopt_convert.commands.push.command import push as publish

        request = PushRequest(checkpoint, repo_id, create_pr, private, revision, message)
        publish(request, report, progress)  # type: ignore[arg-type]

    run(out, report, work, lambda: show_pushed(out, report))


def show_pushed(out: "Output", report: "Report") -> None:
    """Where it stands, what was sent, and the command that loads it."""
    from modelopt_convert.cli._output import human_bytes

    pushed = report.pushed
    if pushed is None:
        return
    if report.status == "planned":
        out.line(f"would push to {pushed.url}")
        return
    if pushed.commit is None:
        out.line(f"already there: {pushed.url}")
    else:
        sent = f"{len(pushed.sent)} files, {human_bytes(pushed.bytes_sent)}"
        out.line(f"pushed {sent}; {len(pushed.same)} were there: {pushed.url}")
        for path in pushed.deleted:
            out.line(f"deleted {path}, of the checkpoint before")
    out.line(f"next: {pushed.load}")
