"""``mopt verify``."""

import contextlib
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelopt_convert.cli import _options as options
from modelopt_convert.run.errors import MoptError
from modelopt_convert.verification.gemm.names import ALIASES, NAMES, SGLANG_VARIABLE

if TYPE_CHECKING:
    from modelopt_convert.cli._output import Output
    from modelopt_convert.report.report import Report

_SHOWN = 10


class Required(StrEnum):
    """What must have run."""

    NATIVE = "native"
    GPU = "gpu"


def verify(
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="CHECKPOINT", help="A transformer folder, or the pipeline folder that holds it."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="The unquantized base: proves it again.")
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            metavar="best|all|NAME[,NAME]",
            help="Which GEMMs to compare; SGLang's names are known. One that is named must run.",
        ),
    ] = "best",
    device: Annotated[options.Device | None, typer.Option("--device", help="Default: the GPU if there is one.")] = None,
    sample: Annotated[
        str, typer.Option("--sample", metavar="N|all", help="Rows of each module that are compared with the base.")
    ] = "16",
    require: Annotated[
        Required | None, typer.Option("--require", help="Exit 6 unless the kernel level ran so on every module.")
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option("--max-error", min=0.0, help="Largest relative error of a module whose codes are not reproduced."),
    ] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Test the backends alone, without a checkpoint.")
    ] = False,
    prewarm: Annotated[
        bool, typer.Option("--prewarm", help="Build kernels, for CHECKPOINT's shapes if one is given, and stop.")
    ] = False,
    workers: options.WorkersOption = None,
    download: options.DownloadOption = False,
    json: options.JsonOption = False,
    report_json: options.ReportOption = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.html", help="Write a page to look at, too.")
    ] = None,
    quiet: options.QuietOption = False,
    no_color: options.NoColorOption = False,
) -> None:
    """Verify a checkpoint: container, layout, decoded values and kernels, each level on its own.

    \b
    Examples:
      mopt verify OUT
      mopt verify OUT --base FLUX.1-dev --backend all --report verify.html
      mopt verify --self-test --backend all --json

    Without a base the record in mopt.json is the proof: every byte is compared with it. Exit codes: 0 passed; 1 wrong;
    6 nothing proves it, or what --require names did not run; 7 a backend is broken or backends disagree.
    """
    names = tuple(dict.fromkeys(part.strip().lower() for part in backend.split(",")))
    preferred = os.environ.get(SGLANG_VARIABLE, "").strip().lower() or None
    _check_names(names, "--backend")
    if preferred is not None:
        _check_names((preferred,), SGLANG_VARIABLE)
    if sample != "all" and not (sample.isascii() and sample.isdecimal() and len(sample) <= 7 and int(sample) > 0):
        raise typer.BadParameter("must be a number of rows, or all", param_hint="--sample")

    if checkpoint is None and not (self_test or prewarm):
        raise typer.BadParameter("is required, but for --self-test and --prewarm", param_hint="CHECKPOINT")
    if checkpoint is not None and self_test:
        raise typer.BadParameter("is not looked at by --self-test", param_hint="CHECKPOINT")

    from modelopt_convert.cli._output import Output, check_file, run
    from modelopt_convert.report.report import OutputReport, Report

    out = Output(json=json, report_path=report_json, quiet=quiet, verbose=False, no_color=no_color)
    subject = options.location(checkpoint, "CHECKPOINT", download=download)
    against = options.location(base, "--base", download=download)
    out.check_report_path(subject, against)
    check_file(report, "--report", subject, against)
    if report is not None and report == report_json:
        raise typer.BadParameter("must be another file than --report-json", param_hint="--report")
    found = Report(command="verify", output=OutputReport(path=""))

    def work(progress: object) -> None:
        from modelopt_convert.commands.verify import verify as look
        from modelopt_convert.run.workers import default_workers
        from modelopt_convert.verification.request import VerifyRequest

        request = VerifyRequest(
            checkpoint=subject or Path(),
            base=against,
            backends=names,
            device=device.value if device else None,
            sample=None if sample == "all" else int(sample),
            require=require.value if require else None,
            max_error=max_error,
            prewarm=prewarm,
            preferred=ALIASES.get(preferred, preferred) if preferred else None,
            workers=workers or default_workers(),
        )
        if report is not None:
            from modelopt_convert.verification.page.document import require_plotly

            require_plotly()  # before the work, and not after it
        try:
            if checkpoint is None:
                from modelopt_convert.verification.transformer import verify_backends

                verify_backends(request, found, progress)  # type: ignore[arg-type]
            else:
                look(request, found, progress)  # type: ignore[arg-type]
        except MoptError:  # what was found goes onto the page; that it cannot be written must not hide the verdict
            with contextlib.suppress(MoptError):
                _write_page(report, found)
            raise
        _write_page(report, found)

    def show() -> None:
        _show(out, found)
        if report is not None and report.is_file():
            out.line(f"page: {report}")

    run(out, found, work, show, show_failed=True)


def _check_names(names: tuple[str, ...], where: str) -> None:
    """An unknown name is a usage error: falling back to another kernel would prove nothing."""
    if names in (("best",), ("all",)):
        return
    unknown = [name for name in names if name not in NAMES and name not in ALIASES]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is none of best, all, {', '.join(NAMES)}", param_hint=where)


def _write_page(path: Path | None, report: "Report") -> None:
    if path is None or report.verify is None:
        return
    from modelopt_convert.run.errors import StorageError
    from modelopt_convert.verification.page.document import render

    text = render(report.verify.model_dump())
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"{path}: the page could not be written: {error.strerror}",
            code="storage.failed",
            path=str(path),
            hint="give --report a file in a folder that can be written",
        ) from error


def _show(out: "Output", report: "Report") -> None:
    """Table of levels, backends and what failed."""
    from modelopt_convert.cli._output import show_cost

    found = report.verify
    if found is None:
        return
    if found.levels:
        out.table(
            ["level", "status", "reason"],
            [[f"{level.level} {level.title}", level.status, level.reason] for level in found.levels],
        )
        out.line("")
    if found.backends:
        out.table(
            ["backend", "kind", "modules", "status", "reason"],
            [[one.name, one.kind, str(one.modules), one.status, one.reason] for one in found.backends],
        )
        out.line("")
    for level in found.levels:
        for kind, words in (("fail", level.failures), ("warn", level.warnings)):
            for text in words[:_SHOWN]:
                out.line(f"{kind}: {level.level}: {text}")
            if len(words) > _SHOWN:
                out.line(f"{kind}: {level.level}: {len(words) - _SHOWN} more; --json lists all")
    if found.modules:
        label = "FP4" if found.algorithm == "nvfp4" else "FP8"
        out.line(f"native {label} kernels executed: {found.native_executed} modules")
    show_cost(out, report)
    out.line(f"verdict: {found.verdict}: {found.statement}")
