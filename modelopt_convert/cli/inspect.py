"""``mopt inspect``."""

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from modelopt_convert.cli import _options as options

if TYPE_CHECKING:
    from modelopt_convert.cli._output import Output
    from modelopt_convert.report.inspect import ComponentReport, LintReport

_SHOWN = 10


def inspect(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A transformer folder, a pipeline folder, or one .safetensors file."),
    ],
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="The unquantized base: proves the layout.")
    ] = None,
    all_scales: Annotated[
        bool, typer.Option("--all", help="Look at the scales of every module, not of a few.")
    ] = False,
    engine: Annotated[
        str, typer.Option("--engine", metavar="NAME", help="Whose view of the checkpoint to show: sglang.")
    ] = "sglang",
    max_error: options.MaxErrorOption = 0.15,
    download: options.DownloadOption = False,
    json: options.JsonOption = False,
    report_json: options.ReportOption = None,
    quiet: options.QuietOption = False,
    no_color: options.NoColorOption = False,
) -> None:
    """Say what a checkpoint is, how it is laid out and how that is known, and what is wrong with it.

    \b
    Examples:
      mopt inspect flux2-dev-nvfp4.safetensors
      mopt inspect out/hf/transformer --base FLUX.1-dev --json

    Exits 0 whenever the source can be read: what is found is data.
    """
    if engine not in ("sglang", "sglang@0.5.23"):
        raise typer.BadParameter("known is sglang (0.5.23)", param_hint="--engine")

    from modelopt_convert.cli._output import Output, run
    from modelopt_convert.report.inspect import InspectReport

    out = Output(json=json, report_path=report_json, quiet=quiet, verbose=False, no_color=no_color)
    subject = options.location(source, "SOURCE", download=download)
    against = options.location(base, "--base", download=download)
    out.check_report_path(subject, against)
    report = InspectReport()

    def work(_: object) -> None:
        from modelopt_convert.commands.inspect import inspect as look

        look(subject, against, report, every_scale=all_scales, max_error=max_error)

    def show() -> None:
        for name, component in report.components.items():
            _show(out, name, component)

    run(out, report, work, show)


def _show(out: "Output", name: str, component: "ComponentReport") -> None:
    from modelopt_convert.cli._output import human_bytes

    totals, layout = component.totals, component.layout
    head = "" if name == "." else f"{name}: "
    out.line(f"{head}{component.dialect.name}, {totals.tensors} tensors, {human_bytes(totals.bytes)}")
    for evidence in component.dialect.evidence:
        out.line(f"  because {evidence}")
    out.table(
        ["dtype", "tensors", "size"],
        [[dtype, str(one["tensors"]), human_bytes(one["bytes"])] for dtype, one in totals.by_dtype.items()],
    )
    if component.modules:
        rows = Counter(
            (one.algorithm, one.nibble_order, one.nibble_basis, one.scale_layout, one.scale_basis, one.global_scale)
            for one in component.modules.values()
        )
        out.table(
            ["modules", "algorithm", "even column in", "scales", "global scale"],
            [
                [str(count), algorithm, f"{nibbles} nibble ({how})", f"{scales} ({known})", convention]
                if algorithm == "NVFP4"
                else [str(count), algorithm, "", "", ""]
                for (algorithm, nibbles, how, scales, known, convention), count in rows.items()
            ],
        )
        if layout.modules_contradicting:
            out.line(f"{layout.modules_contradicting} modules contradict what is declared or believed")
    if component.engine is not None:
        believed = component.engine.believes
        out.line(
            f"{component.engine.name} believes: {believed['nibble_order']} nibble first, "
            f"scales {believed['scale_layout']}, groups of {believed['group_size']}, "
            f"{believed['packed_modules']} packed modules"
        )
        for reason in component.engine.because:
            out.line(f"  because {reason}")
        if not component.engine.misreads:
            out.line("  nothing known contradicts that")
    codes = Counter(fault.code for fault in component.lint)
    for fault in _few(component):
        where = f"{fault.module}: " if fault.module else ""
        out.line(f"lint: {where}{fault.message} [{fault.code}]")
    hidden = sum(max(0, count - _SHOWN) for count in codes.values())
    if hidden:
        out.line(f"lint: {hidden} more of the same kinds; --json lists all")


def _few(component: "ComponentReport") -> "list[LintReport]":
    """The first faults of each kind."""
    seen: Counter[str] = Counter()
    shown = []
    for fault in component.lint:
        seen[fault.code] += 1
        if seen[fault.code] <= _SHOWN:
            shown.append(fault)
    return shown
