"""``mopt build-nvfp4`` and ``mopt convert-fp8``."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from modelopt_convert.cli._options import from_request
from modelopt_convert.commands.requests import BuildNvfp4Request, BuildRequest, ConvertFp8Request

if TYPE_CHECKING:
    from modelopt_convert.cli._output import Output
    from modelopt_convert.report.report import ModuleReport, ProofReport, Report


def build_nvfp4(request: BuildNvfp4Request, output: "Output") -> None:
    """Build a mixed BF16+NVFP4 transformer repo from a ModelOpt export and its base, or from the base alone.

    \b
    Examples:
      mopt build-nvfp4 --preset flux1-dev
      mopt build-nvfp4 --preset flux1-dev --export out/hf --base FLUX.1-dev
      mopt build-nvfp4 --base FLUX.1-dev --output OUT --keep-bf16 'transformer_blocks.[:2].**' --dry-run

    Every packed weight of an export is proven against the base before anything is written. Without --export the base's
    own weights are quantized, uncalibrated, but for those that the preset keeps. Without --base it is the preset's,
    on the Hub. Of a pipeline with two transformers each one that was quantized is built, into OUT/transformer and
    OUT/transformer_2. Exit codes: see mopt --help.
    """
    _run(request, output)


def convert_fp8(request: ConvertFp8Request, output: "Output") -> None:
    """Convert a ModelOpt FP8 export, or the base alone, into an FP8 transformer repo, sensitive modules in BF16.

    \b
    Examples:
      mopt convert-fp8 --preset flux1-dev
      mopt convert-fp8 --preset flux1-dev --export out/hf --base FLUX.1-dev
      mopt convert-fp8 --preset flux1-dev --export old/hf --checkpoint old/ckpt/backbone.pt --base FLUX.1-dev

    With --base every weight of an export is proven before anything is written, and modules kept in BF16 are the base's.
    Without it they are dequantized, and the result is published as not proven. Without --export the base's own weights
    are quantized by max calibration, inputs dynamic; without --base it is the preset's, on the Hub. Of a pipeline with
    two transformers each one that was quantized is converted, into OUT/transformer and OUT/transformer_2. Exit codes:
    see mopt --help.
    """
    _run(request, output)


def _run(request: BuildRequest, output: "Output") -> None:
    from modelopt_convert.cli._output import run
    from modelopt_convert.cli.push import show_pushed

    def show(out: "Output", report: "Report") -> None:
        show_build(out, report, request)
        show_pushed(out, report)

    run(output, request, show)


def show_build(out: "Output", report: "Report", request: BuildRequest, *, with_next: bool = True) -> None:
    """The answer, then what it rests on; tables with ``-v``."""
    from modelopt_convert.cli._output import human_bytes, show_cost, show_counts, show_written

    planned, proof = report.status == "planned", report.proof
    show_written(out, report, "" if proof is None or planned else proof.words or proof.status)
    if not planned and with_next:
        out.line(f"next: {_next(report, request)}")
    if report.convert is not None:
        from modelopt_convert.cli.convert import show_converted

        show_converted(out, report.convert)
    out.line("")
    if out.verbose:
        show_counts(out, report)
        _show_rules(out, report)
    for limit in (report.preset or {}).get("known_limits", ()) if request.to == "modelopt" else ():
        out.line(f"known limit: {limit}")
    others = ", ".join(sorted({f"{one.engine} {one.grade}" for one in report.engines if one.engine != report.engine}))
    if others:
        out.line(f"other engines: {others}")
    if report.dequantized:
        more = f" and {len(report.dequantized) - 3} more" if len(report.dequantized) > 3 else ""
        out.line(f"dequantized for want of a base: {', '.join(report.dequantized[:3])}{more}")
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
    if proof is not None:
        _show_proof(out, proof)
    if report.device is not None:
        done = "quantized" if report.calibration is not None else "compared"
        out.line(f"{done} on {report.device}, with {human_bytes(report.peak_gpu_bytes or 0)} of its memory")
    parity = [f"gpu parity {check['gpu_parity']}" for check in report.checks if "gpu_parity" in check]
    out.line("checks: " + ", ".join([*(f"{check['name']} {check['status']}" for check in report.checks), *parity]))
    show_cost(out, report)
    if report.output.copied:
        size = human_bytes(sum(one["bytes"] for one in report.output.copied))
        out.line(f"copied beside the transformers: {len(report.output.copied)} files, {size}")


def _show_rules(out: "Output", report: "Report") -> None:
    from modelopt_convert.cli._output import human_bytes

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


def _next(report: "Report", request: BuildRequest) -> str:
    """A command that runs as printed: SGLang's where it loads OUT and the model is known, else the proof once more."""
    from modelopt_convert.commands.serving import loads_right, model_of
    from modelopt_convert.engines.sglang import load_command

    against = any(warning["code"] == "preset.structural" for warning in report.warnings)
    folders = sorted({shard["file"].rpartition("/")[0] for shard in report.output.shards} - {""})
    out, place = shlex.quote(report.output.path), request.base
    model = request.base_model or model_of(report.inputs, place)
    if request.to == "comfyui":
        files = " ".join(shlex.quote(str(Path(report.output.path) / one["file"])) for one in report.output.shards)
        return f"cp {files} ComfyUI/models/diffusion_models/"
    if request.to == "bf16":
        return f"mopt inspect {shlex.quote(report.output.path)}"
    if request.to == "modelopt" and loads_right(report.engines, request.engine) and not against:
        if report.output.load is not None:
            return report.output.load
        if model is not None:
            return load_command(out, model, folders)
    known = f" --base {shlex.quote(str(place))}" if place is not None else f" --base hf://{model}" if model else ""
    return f"mopt verify {out}{known}"


def _show_proof(out: "Output", proof: "ProofReport") -> None:
    """A line for each verdict; modules that the base replaces are sampled, although all that is written is compared."""
    is_whole = any(one.compared == "all" for one in proof.modules.values())
    groups: dict[tuple[str, str], list[ModuleReport]] = {}
    for one in proof.modules.values():
        groups.setdefault((one.verdict, "" if one.compared == "all" else "sampled "), []).append(one)
    for (verdict, sampled), members in sorted(groups.items()):
        codes, equal = sum(one.codes for one in members), sum(one.codes_equal for one in members)
        share = f", {_percent(equal, codes)} of {codes} {sampled}codes" if codes else ""
        rules = ", ".join(sorted({one.rule for one in members if one.rule}))
        instead = "; the base's are written instead" if sampled and is_whole else ""
        out.line(f"proof: {len(members)} modules {verdict}{share}{f' ({rules})' if rules else ''}{instead}")


def _percent(part: int, whole: int) -> str:
    """Rounded down, so that 100.00% means all."""
    return f"{part * 10000 // whole / 100:.2f}%"


COMMANDS = {
    "build-nvfp4": from_request(BuildNvfp4Request, build_nvfp4),
    "convert-fp8": from_request(ConvertFp8Request, convert_fp8),
}
