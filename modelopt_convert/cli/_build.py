"""What ``build-nvfp4`` and ``convert-fp8`` share: from options to a run, and what people are shown of it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from modelopt_convert.cli._options import location

if TYPE_CHECKING:
    from modelopt_convert.cli._output import Output, ProgressBar
    from modelopt_convert.commands.build.command import BuildRequest
    from modelopt_convert.formats.format import Algorithm
    from modelopt_convert.report.report import Report
    from modelopt_convert.write.executors import ExecutorName

_SIZE = re.compile(r"[0-9]+(\.[0-9]+)? ?[KMGT]i?B", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Telling:
    """How the user wants to be told, as given."""

    json: bool
    report_json: Path | None
    quiet: bool
    verbose: bool
    no_color: bool


def run_build(
    algorithm: "Algorithm",
    command: str,
    *,
    export: str | None,
    base: str | None,
    checkpoint: str | None,
    component: Sequence[str] | None,
    output: Path | None,
    preset: str | None,
    keep_bf16: list[str] | None,
    max_shard_size: str,
    max_error: float,
    overwrite: bool,
    allow_known_broken: bool,
    verify: str,
    push_to: str | None,
    dry_run: bool,
    download: bool,
    workers: int | None,
    executor: "ExecutorName",
    telling: Telling,
    device: str = "cpu",
) -> NoReturn:
    """Run the command and exit with its code."""
    if preset == "none" and output is None:
        raise typer.BadParameter("is required with --preset none", param_hint="--output")
    if algorithm == "nvfp4" and base is None and preset in (None, "none"):
        raise typer.BadParameter("is required, unless a preset is named that names the base", param_hint="--base")

    if device == "cuda" and executor == "ray":
        raise typer.BadParameter("cuda is for --executor threads", param_hint="--device")
    if device == "cuda" and export is not None:
        raise typer.BadParameter("cuda quantizes the base; with --export nothing is quantized", param_hint="--device")
    if output is not None and output.parts[:1] == ("hf:",):
        raise typer.BadParameter("is a folder on disk; --push-to REPO_ID publishes it", param_hint="--output")

    from modelopt_convert.cli._output import Output, run
    from modelopt_convert.cli.push import show_pushed
    from modelopt_convert.commands.build.command import BuildRequest, convert
    from modelopt_convert.report.report import OutputReport, Report
    from modelopt_convert.run.workers import default_workers

    out = Output(
        json=telling.json,
        report_path=telling.report_json,
        quiet=telling.quiet,
        verbose=telling.verbose,
        no_color=telling.no_color,
    )
    whole = download and not dry_run
    sources = (
        location(export, "--export", download=whole),
        location(base, "--base", download=whole),
        location(checkpoint, "--checkpoint", download=whole),
    )
    out.check_report_path(output, *sources)
    report = Report(command=command, output=OutputReport(path=str(output) if output else ""))
    request = BuildRequest(
        algorithm=algorithm,
        export=sources[0],
        base=sources[1],
        checkpoint=sources[2],
        components=tuple(dict.fromkeys(component or ())),
        output=output,
        preset=preset,
        keep_bf16=tuple(keep_bf16 or ()),
        max_shard_size=_shard_bytes(max_shard_size),
        max_error=max_error,
        overwrite=overwrite,
        allow_known_broken=allow_known_broken,
        verify=verify,  # type: ignore[arg-type]
        dry_run=dry_run,
        download=download,
        workers=workers or default_workers(),
        executor=executor,
        device=device,  # type: ignore[arg-type]
    )

    def work(progress: "ProgressBar") -> None:
        if push_to is None:
            convert(request, report, progress)
        else:
            _build_and_push(request, push_to, report, progress)

    def show() -> None:
        _show(out, report)
        show_pushed(out, report)

    run(out, report, work, show)


def _build_and_push(request: "BuildRequest", repo_id: str, report: "Report", progress: "ProgressBar") -> None:
    """Rights are asked for first: hours of work that may not be published are hours lost."""
    from modelopt_convert.checkpoint.hub.client import page_of
    from modelopt_convert.commands.build.command import convert
    from modelopt_convert.commands.push.access import check_access
    from modelopt_convert.commands.push.command import PushRequest, push
    from modelopt_convert.report.report import PushedReport
    from modelopt_convert.run.errors import MoptError

    check_access(repo_id, create_pr=False, private=False, again="run the same command again")
    convert(request, report, progress)
    if request.dry_run:
        report.pushed = PushedReport(repo_id=repo_id, revision="main", url=page_of(repo_id))
        return
    later = PushRequest(Path(report.output.path), repo_id)
    try:
        push(later, report, progress)
    except MoptError as error:
        stands = f"{later.checkpoint} stands; `{later.command()}` publishes it"
        if error.hint is None or later.command() not in error.hint:
            error.hint = f"{error.hint}; {stands}" if error.hint else stands
        raise


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
    from modelopt_convert.cli._output import human_bytes, show_cost, show_written
    from modelopt_convert.engines.sglang import load_command

    show_written(out, report)
    several = any(rule.component for rule in report.rules)
    out.table(
        ["pattern kept in BF16", "matched", "replaced", "bytes", "kind"],
        [
            [
                f"{rule.component or ''}{': ' if several else ''}{rule.pattern}",
                str(rule.matched),
                str(rule.replaced),
                human_bytes(rule.bytes),
                rule.kind,
            ]
            for rule in report.rules
        ],
    )
    out.line("")
    for limit in (report.preset or {}).get("known_limits", ()):
        out.line(f"known limit: {limit}")
    if report.dequantized:
        more = f" and {len(report.dequantized) - 3} more" if len(report.dequantized) > 3 else ""
        out.line(f"dequantized for want of a base: {', '.join(report.dequantized[:3])}{more}")
    planned = report.status == "planned"
    for name, one in report.network.items():
        count, verb = (one.to_fetch_bytes or 0, "would fetch") if planned else (one.fetched_bytes, "fetched")
        sizes = f"{human_bytes(count)} of {human_bytes(one.of_bytes)}"
        out.line(f"{verb} {sizes} of the {name}, {one.repo}@{one.commit[:12]}")
    if planned:
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
            rules = ", ".join(sorted({one.rule for one in members if one.rule}))
            out.line(f"proof: {count} modules {verdict}{share}{f' ({rules})' if rules else ''}")
    if report.device is not None:
        out.line(f"quantized on {report.device}, with {human_bytes(report.peak_gpu_bytes or 0)} of its memory")
    parity = [f"gpu parity {check['gpu_parity']}" for check in report.checks if "gpu_parity" in check]
    out.line("checks: " + ", ".join([*(f"{check['name']} {check['status']}" for check in report.checks), *parity]))
    show_cost(out, report)
    folders = sorted({shard["file"].rpartition("/")[0] for shard in report.output.shards} - {""})
    out.line(f"next: {load_command(report.output.path, 'BASE', folders)}")


def _percent(part: int, whole: int) -> str:
    """Rounded down, so that 100.00% means all."""
    return f"{part * 10000 // whole / 100:.2f}%"
