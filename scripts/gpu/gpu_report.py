"""The figures of verify_gpu.py as a page."""

from collections.abc import Iterator
from typing import Any

from modelopt_convert.verification.gemm.metrics import CALC_DIFF_LIMIT, COLUMN_LIMIT, GAIN_LIMIT, ROW_LIMIT
from modelopt_convert.verification.gemm.probes import SWEEP

PROBES = ("identity", "random", "sweep", "poison")


def markdown(report: dict[str, Any]) -> str:
    """The whole page."""
    environment, model = report["environment"], report["model"]
    lines = [
        f"# GEMM backends on one {environment.get('gpu', 'CPU')}",
        "",
        "Written by `scripts/gpu/verify_gpu.sh`; do not edit. The JSON file beside it has all figures by layer.",
        "",
        f"    {report['command']}",
        "",
        ", ".join(f"{name} {value}" for name, value in environment.items()) + ".",
        "",
        f"Weights: seeded, with outlier channels, in a `{model['class']}` with {model['num_attention_heads']} heads of "
        f"{model['attention_head_dim']} and {model['num_layers']} + {model['num_single_layers']} blocks; quantized, "
        "calibrated on random inputs and exported by ModelOpt itself, with bias. They are not a trained model's.",
        "",
        "Outputs are compared with the product of the decoded operands in float64. Limits: calc_diff "
        f"{CALC_DIFF_LIMIT:.0e}, worst row {ROW_LIMIT:.0e}, worst column {COLUMN_LIMIT:.0e}, "
        f"|gain - 1| {GAIN_LIMIT:.0e}, all finite. The identity probe asks for every decoded weight bit for bit. "
        f"The sweep compares all rows at M of {', '.join(map(str, SWEEP))}.",
    ]
    for algorithm in ("nvfp4", "fp8"):
        lines += ["", *_format(algorithm.upper(), report[algorithm])]
    lines += ["", *_emulator(report["mmaemu"])]
    return "\n".join(lines) + "\n"


def _format(title: str, figures: dict[str, Any]) -> Iterator[str]:
    modules = figures["modules"]
    yield f"## {title}: {modules} modules"
    yield ""
    yield f"Native {title} kernels executed: {figures['native_kernels_executed']} of {modules} modules."
    yield ""
    figures_of = "worst calc_diff | worst row | worst column"
    yield f"| backend | self-test | identity | random | sweep | poison | {figures_of} | odd shapes |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name, found in figures["backends"].items():
        if found["unavailable"] is None:
            passed = " | ".join(f"{found['passed'][probe]} of {modules}" for probe in PROBES)
            worst = found["worst"]
            odd = sum(result == "pass" for result in found["odd shapes"].values())
            yield (
                f"| {name} | {found['self_test']} | {passed} | {worst['calc_diff']:.1e} | {worst['worst_row']:.1e} "
                f"| {worst['worst_column']:.1e} | {odd} of {len(found['odd shapes'])} |"
            )
    for name, found in figures["backends"].items():
        if found["unavailable"] is not None:
            yield ""
            yield f"- {name}: did not run. {found['unavailable']}"
    yield ""
    yield "Odd shapes (padding needed; made-up weights): " + ", ".join(
        next(found["odd shapes"] for found in figures["backends"].values() if "odd shapes" in found)
    )
    yield ""
    yield "| backend | s a module: median | largest | all modules | ms a gemm: median | largest | peak GPU memory |"
    yield "|---|---|---|---|---|---|---|"
    for name, found in figures["backends"].items():
        if found["unavailable"] is None:
            seconds, peak = found["seconds_a_layer"], found["peak_gpu_bytes"]
            gemm = sorted(layer["gemm_ms"] for layer in found["layers"].values())
            memory = f"{peak / 2**30:.2f} GiB" if peak else "-"
            yield (
                f"| {name} | {seconds['median']:.2f} | {seconds['largest']:.2f} | {seconds['all']:.1f} "
                f"| {gemm[len(gemm) // 2]:.2f} | {gemm[-1]:.2f} | {memory} |"
            )
    yield ""
    yield "Seconds are of all four probes, with the copy to the GPU, activations drawn on the CPU and exact products."
    yield ""
    yield "Milliseconds are of one gemm with 512 rows of activations, as the backend takes them from the checker."
    for name, table in figures["planted"].items():
        yield from ("", *_planted(name, table))


def _planted(name: str, table: dict[str, Any]) -> Iterator[str]:
    yield f"### Faults planted before {name}, in `{table['module']}`"
    yield ""
    yield "| fault | seen by | calc_diff | relative Frobenius | gain | worst row | worst column |"
    yield "|---|---|---|---|---|---|---|"
    for fault, found in table["faults"].items():
        metrics = found["random"]["metrics"]
        seen = ", ".join([*found["seen"], *(f"{probe} (warns)" for probe in found["warned"])]) or "**none**"
        yield (
            f"| {fault} | {seen} | {metrics['calc_diff']:.1e} | {metrics['relative_frobenius']:.1e} "
            f"| {metrics['gain']:.4f} | {metrics['worst_row']:.1e} | {metrics['worst_column']:.1e} |"
        )


def _emulator(found: dict[str, Any]) -> Iterator[str]:
    yield "## FP8 against a CPU emulator of the tensor cores"
    yield ""
    if "unavailable" in found:
        yield f"Did not run: {found['unavailable']}."
        return
    yield "`torch._scaled_mm` on this GPU against `mmaemu.scaled_mm` on the CPU, both with slow accumulation."
    yield ""
    for shape, result in found.items():
        if isinstance(result, str):
            yield f"- {shape}: {result}"
        else:
            yield f"- {shape}: {result['bits_differ']} of {result['values']} values differ"
