"""``mopt swap-nibbles`` and ``mopt unswizzle-scales``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from modelopt_convert.cli import _options as options

if TYPE_CHECKING:
    from modelopt_convert.cli._output import Output
    from modelopt_convert.commands.rewrite import Kind
    from modelopt_convert.report.report import Report
    from modelopt_convert.write.executors import ExecutorName

SourceArgument = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A transformer folder, or one .safetensors file; it is not changed.")
]
OutputArgument = Annotated[Path, typer.Argument(metavar="OUTPUT", help="The folder to write.")]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="BASE", help="The unquantized base: only what needs it is rewritten, and proven."),
]
ForceOption = Annotated[
    bool, typer.Option("--force-names", help="Rewrite although loaders guess the old layout from the tensor names.")
]


def swap_nibbles(
    source: SourceArgument,
    output: OutputArgument,
    base: BaseOption = None,
    force_names: ForceOption = False,
    max_error: options.MaxErrorOption = 0.15,
    overwrite: options.OverwriteOption = False,
    dry_run: options.DryRunOption = False,
    download: options.DownloadOption = False,
    workers: options.WorkersOption = None,
    executor: options.ExecutorOption = options.Executor.THREADS,
    json: options.JsonOption = False,
    report_json: options.ReportOption = None,
    quiet: options.QuietOption = False,
    verbose: options.VerboseOption = False,
    no_color: options.NoColorOption = False,
) -> None:
    """Exchange the two codes in every byte of the packed weights.

    \b
    Examples:
      mopt swap-nibbles high-first low-first --base FLUX.1-dev
      mopt swap-nibbles comfy.safetensors low-first

    With --base, exits 1 (already in order) rather than make a right file wrong.
    """
    from modelopt_convert.cli._output import Output

    out = Output(json=json, report_path=report_json, quiet=quiet, verbose=verbose, no_color=no_color)
    _run(
        out,
        "swap-nibbles",
        "swap",
        source,
        output,
        base,
        force_names,
        max_error,
        overwrite,
        dry_run,
        download,
        workers,
        executor.value,
    )


def unswizzle_scales(
    source: SourceArgument,
    output: OutputArgument,
    base: BaseOption = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="From row-major to the 128x4 order.")] = False,
    force_names: ForceOption = False,
    max_error: options.MaxErrorOption = 0.15,
    overwrite: options.OverwriteOption = False,
    dry_run: options.DryRunOption = False,
    download: options.DownloadOption = False,
    workers: options.WorkersOption = None,
    executor: options.ExecutorOption = options.Executor.THREADS,
    json: options.JsonOption = False,
    report_json: options.ReportOption = None,
    quiet: options.QuietOption = False,
    verbose: options.VerboseOption = False,
    no_color: options.NoColorOption = False,
) -> None:
    """Bring block scales from the 128x4 (swizzled) order into row-major order, or back.

    \b
    Examples:
      mopt unswizzle-scales post-processed row-major --base FLUX.1-dev
      mopt unswizzle-scales row-major swizzled --reverse

    With --base, exits 1 (already in order) rather than make a right file wrong.
    """
    from modelopt_convert.cli._output import Output

    out = Output(json=json, report_path=report_json, quiet=quiet, verbose=verbose, no_color=no_color)
    kind: Kind = "swizzle" if reverse else "unswizzle"
    _run(
        out,
        "unswizzle-scales",
        kind,
        source,
        output,
        base,
        force_names,
        max_error,
        overwrite,
        dry_run,
        download,
        workers,
        executor.value,
    )


def _run(
    out: "Output",
    command: str,
    kind: "Kind",
    source: str,
    output: Path,
    base: str | None,
    force_names: bool,
    max_error: float,
    overwrite: bool,
    dry_run: bool,
    download: bool,
    workers: int | None,
    executor: "ExecutorName",
) -> NoReturn:
    from modelopt_convert.cli._output import run
    from modelopt_convert.commands.rewrite import RewriteRequest, rewrite
    from modelopt_convert.report.report import OutputReport, Report
    from modelopt_convert.run.workers import default_workers

    subject = options.location(source, "SOURCE", download=download)
    against = options.location(base, "--base", download=download)
    out.check_report_path(output, subject, against)
    report = Report(command=command, output=OutputReport(path=str(output)))
    request = RewriteRequest(
        source=subject,
        output=output,
        base=against,
        kind=kind,
        force_names=force_names,
        max_error=max_error,
        overwrite=overwrite,
        dry_run=dry_run,
        workers=workers or default_workers(),
        executor=executor,
    )
    run(out, report, lambda progress: rewrite(request, report, progress), lambda: _show(out, report))


def _show(out: "Output", report: "Report") -> None:
    from modelopt_convert.cli._output import show_cost, show_written

    show_written(out, report)
    for check in report.checks:
        out.line(f"check: {check['name']} {check['status']}")
    show_cost(out, report)
