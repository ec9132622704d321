"""``mopt build-nvfp4``."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelopt_convert.cli import _options as options

if TYPE_CHECKING:
    from modelopt_convert.cli._output import Output
    from modelopt_convert.report import Report


_SIZE = re.compile(r"[0-9]+(\.[0-9]+)? ?[KMGT]i?B", re.IGNORECASE)


def build_nvfp4(
    preset: options.PresetOption = None,
    export: Annotated[
        Path | None,
        typer.Option("--export", metavar="EXPORT", help="ModelOpt NVFP4 export: its transformer or pipeline folder."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option("--base", metavar="BASE", help="The unquantized base: its transformer or pipeline folder."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="OUT", help="Where to write; default ./<preset>-nvfp4.")
    ] = None,
    keep_bf16: options.KeepOption = None,
    max_shard_size: options.ShardSizeOption = "5GB",
    max_error: options.MaxErrorOption = 0.15,
    overwrite: options.OverwriteOption = False,
    dry_run: options.DryRunOption = False,
    json: options.JsonOption = False,
    report_json: options.ReportOption = None,
    quiet: options.QuietOption = False,
    verbose: options.VerboseOption = False,
    no_color: options.NoColorOption = False,
) -> None:
    """Build a mixed BF16+NVFP4 transformer repo from a ModelOpt export and its base.

    \b
    Examples:
      mopt build-nvfp4 --preset flux1-dev --export out/hf --base FLUX.1-dev
      mopt build-nvfp4 --export out/hf --base FLUX.1-dev --keep-bf16 'transformer_blocks.[:2].**' --dry-run

    Every packed weight is proven against the base before anything is written. Exit codes: see mopt --help.
    """
    if export is None:
        raise typer.BadParameter("is required: the folder of a ModelOpt NVFP4 export", param_hint="--export")
    if base is None:
        raise typer.BadParameter("is required: the folder of the base the export was made from", param_hint="--base")
    if preset == "none" and output is None:
        raise typer.BadParameter("is required with --preset none", param_hint="--output")

    from modelopt_convert.cli._output import Output, run
    from modelopt_convert.convert import BuildRequest
    from modelopt_convert.convert import build_nvfp4 as build
    from modelopt_convert.report import OutputReport, Report

    out = Output(json=json, report_path=report_json, quiet=quiet, verbose=verbose, no_color=no_color)
    out.check_report_path(output, export, base)
    report = Report(command="build-nvfp4", output=OutputReport(path=str(output) if output else ""))
    request = BuildRequest(
        export=export,
        base=base,
        output=output,
        preset=preset,
        keep_bf16=tuple(keep_bf16 or ()),
        max_shard_size=_shard_bytes(max_shard_size),
        max_error=max_error,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    run(out, report, lambda progress: build(request, report, progress), lambda: _show(out, report))


def _shard_bytes(text: str) -> int:
    from pydantic import ByteSize, TypeAdapter

    try:
        if not _SIZE.fullmatch(text):  # pydantic reads as far as it understands, and bits too
            raise ValueError(text)
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(
            f"{text!r} is not a size such as 5GB or 500MB", param_hint="--max-shard-size"
        ) from error
    if size <= 0:
        raise typer.BadParameter("must be more than nothing", param_hint="--max-shard-size")
    return size


def _show(out: "Output", report: "Report") -> None:
    from modelopt_convert.cli._output import human_bytes, show_written

    show_written(out, report)
    out.table(
        ["pattern kept in BF16", "matched", "replaced", "bytes", "kind"],
        [
            [rule.pattern, str(rule.matched), str(rule.replaced), human_bytes(rule.bytes), rule.kind]
            for rule in report.rules
        ],
    )
    out.line("")
    if report.status == "planned":
        assert report.peak_working_bytes is not None and report.free_bytes is not None
        out.line(
            f"memory {human_bytes(report.peak_working_bytes)} beyond start-up, {human_bytes(report.free_bytes)} free"
        )
        return
    if report.proof is not None:
        for verdict, count in report.proof.counts.items():
            members = [one for one in report.proof.modules.values() if one.verdict == verdict]
            codes, equal = sum(one.codes for one in members), sum(one.codes_equal for one in members)
            share = f", {_percent(equal, codes)} of {codes} sampled codes" if codes else ""
            out.line(f"proof: {count} modules {verdict}{share}")
    out.line("checks: " + ", ".join(f"{check['name']} {check['status']}" for check in report.checks))
    out.line(f"next: sglang generate --model-path BASE --transformer-path {report.output.path} --prompt '...'")


def _percent(part: int, whole: int) -> str:
    """Rounded down, so that 100.00% means all."""
    return f"{part * 10000 // whole / 100:.2f}%"
