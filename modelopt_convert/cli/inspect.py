"""``mopt inspect``."""

from collections import Counter
from typing import TYPE_CHECKING

from modelopt_convert.cli._options import from_request
from modelopt_convert.commands.requests import InspectRequest
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.run.text import few, general

if TYPE_CHECKING:
    from modelopt_convert.cli._output import Output
    from modelopt_convert.report.inspect import ComponentReport, InspectReport, LintReport


def inspect(request: InspectRequest, output: "Output") -> None:
    """Say what a checkpoint is, how it is laid out and how that is known, and what is wrong with it.

    \b
    Examples:
      mopt inspect flux2-dev-nvfp4.safetensors
      mopt inspect out/hf/transformer --base FLUX.1-dev --json
      mopt inspect qwen-image-nvfp4.safetensors --engines

    Exits 0 whenever the source can be read: what is found is data.
    """
    from modelopt_convert.cli._output import run

    def show(out: "Output", report: "InspectReport") -> None:
        for name, component in report.components.items():
            _show_component(out, name, component, has_base=request.base is not None)
            if request.engines and not component.verdicts:
                out.line("engines: nothing here is quantized, so there is nothing that they could misread")

    run(output, request, show)


def _show_component(out: "Output", name: str, component: "ComponentReport", *, has_base: bool) -> None:
    from modelopt_convert.cli._output import human_bytes

    totals, layout = component.totals, component.layout
    head = "" if name == "." else f"{name}: "
    out.line(f"{head}{component.dialect.name}, {totals.tensors} tensors, {human_bytes(totals.bytes)}")
    for evidence in component.dialect.evidence:
        out.detail(f"  because {evidence}")
    if component.config_from not in (None, "config.json"):
        out.line(f"  config from: {component.config_from}")
    if component.modules:
        _show_modules(out, component, has_base=has_base)
        if layout.modules_contradicting:
            out.line(f"{layout.modules_contradicting} modules contradict what is declared or believed")
    kinds: dict[str, list[LintReport]] = {}
    for fault in component.lint:
        words = general(fault.message.replace(fault.module, "")) if fault.module else fault.message
        kinds.setdefault(f"{fault.code} {words}", []).append(fault)
    for faults in kinds.values():
        out.line(f"lint: {_joint(faults)} [{faults[0].code}]")
    if component.verdicts:
        _show_verdicts(out, component)
    for engine in component.engines if not component.verdicts else ():
        believed = engine.believes
        read = (
            f"{believed['nibble_order']} nibble first, scales {believed['scale_layout']}, "
            f"{_groups(believed['group_size'])}, "
        )
        has_layout = believed["nibble_order"] != "none"
        out.line(f"{engine.name} believes: {read if has_layout else ''}{believed['packed_modules']} packed modules")
        for reason in engine.because:
            out.detail(f"  because {reason}")
        told = {fault.message for fault in component.lint}  # of one engine they are faults above
        for words in [one for one in engine.misreads if one not in told]:
            out.line(f"  it {words.removeprefix(engine.name).strip()}")
        if not engine.misreads:
            out.line("  nothing known contradicts that")
    if out.verbose:
        out.table(
            ["dtype", "tensors", "size"],
            [[dtype, str(one["tensors"]), human_bytes(one["bytes"])] for dtype, one in totals.by_dtype.items()],
        )


def _groups(size: int | None) -> str:
    return "groups of no size that it knows" if size is None else f"groups of {size}"


def _show_modules(out: "Output", component: "ComponentReport", *, has_base: bool) -> None:
    """How the modules lie, a line for those that lie alike, and how that is known."""
    rows = Counter(
        (one.algorithm, one.nibble_order, one.nibble_basis, one.scale_layout, one.scale_basis, one.global_scale)
        for one in component.modules.values()
    )
    out.table(
        ["modules", "algorithm", "even column in", "scales", "global scale"],
        [
            [str(count), algorithm, f"{nibbles} nibble ({how})", f"{scales} ({known})", convention]
            if nibbles != "none"
            else [str(count), algorithm, "", _scale_words(scales, known), ""]
            for (algorithm, nibbles, how, scales, known, convention), count in rows.items()
        ],
    )
    if any("proven" in (one.nibble_basis, one.scale_basis) for one in component.modules.values()):
        out.line("  proven: sampled rows of each weight tell the layout; `mopt verify --base` compares every byte")
    elif any("undetermined" in (one.nibble_order, one.scale_layout) for one in component.modules.values()):
        can_tell = {one.algorithm for one in component.modules.values()} & {one.quant_algo for one in FORMATS.values()}
        if not can_tell:
            why = "neither shape nor marker tells, nor does a base: `mopt convert` asks for --from comfyui or modelopt"
        elif has_base:
            why = "read in no layout that mopt knows do the codes fit the base"
        else:
            why = "--base BASE, the model that it was made from, tells"
        out.line(f"  undetermined: {why}")


def _scale_words(scales: str, known: str) -> str:
    """The order of block scales of weights that are not packed; nothing where the format has no such scales."""
    if scales == "none":
        return ""
    return scales if known == "none" else f"{scales} ({known})"


def _show_verdicts(out: "Output", component: "ComponentReport") -> None:
    """What each engine makes of the file, and what that depends on."""
    rows = [[f"{one.engine} {one.version}", one.verdict, one.how] for one in component.verdicts]
    out.table(["engine", "verdict", "how"], rows)
    for one in component.verdicts:
        for words in [*([one.depends] if one.depends else []), *one.notes]:
            out.line(f"  {one.engine}: {words}")


def _joint(faults: "list[LintReport]") -> str:
    """One kind of fault in a line: of several modules their number and the first names."""
    first = faults[0]
    if len(faults) == 1:
        return f"{first.module}: {first.message}" if first.module else first.message
    names = few([str(fault.module) for fault in faults])
    differ = len({fault.message for fault in faults}) > 1
    return f"{len(faults)} modules: {first.message}{', for the first' if differ else ''}: {names}"


COMMANDS = {"inspect": from_request(InspectRequest, inspect)}
