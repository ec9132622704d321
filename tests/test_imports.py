"""Who may import whom, read from the source."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "modelopt_convert"

# Module: what it may import of ours, by blanks. Left out: convert.py and cli, the ends of the line.
ALLOWED = {
    "closeness": "",
    "dtypes": "",
    "errors": "",
    "fsops": "",
    "hub.leaks": "",
    "hub.ranges": "",
    "mounts": "",
    "sampling": "",
    "scale_shapes": "",
    "transforms.fp8": "",
    "transforms.nvfp4": "",
    "verify.backends.triton_kernels": "",
    "verify.html_figures": "",
    "verify.html_style": "",
    "verify.metrics": "",
    "verify.names": "",
    "verify_report": "",
    "workers": "",
    "dialects.ltx2": "errors",
    "hub.client": "errors",
    "layout": "closeness transforms.nvfp4",
    "local_file": "errors",
    "locks": "mounts",
    "output_rules": "errors mounts",
    "patterns": "errors",
    "report": "verify_report",
    "strict_json": "errors",
    "transforms.scales": "scale_shapes",
    "verify.html_report": "errors verify.html_figures verify.html_style",
    "verify.operands": "transforms.fp8 transforms.nvfp4",
    "error_table": "report",
    "header": "dtypes errors strict_json",
    "hub.access": "errors hub.client",
    "hub.range_source": "errors hub.client",
    "inspect_report": "report",
    "preset": "errors patterns",
    "proof": "closeness layout transforms.fp8 transforms.nvfp4",
    "torch_archive": "errors local_file",
    "transforms.raw": "transforms.fp8 transforms.nvfp4 transforms.scales",
    "verify.backends.padding": "scale_shapes transforms.scales verify.operands",
    "dialects.modelopt": "errors header patterns",
    "digests": "header",
    "engines.sglang": "header",
    "formats": "preset",
    "hub.remote_file": "errors hub.client hub.range_source hub.ranges",
    "proof_fp8": "closeness layout proof transforms.fp8",
    "shard_writer": "errors fsops header locks",
    "verify.backends.base": "preset",
    "dialects.detect": "engines.sglang header scale_shapes",
    "dialects.fp8": "dialects.modelopt dtypes errors header patterns",
    "dialects.nvfp4": "dialects.modelopt errors header scale_shapes",
    "hub.repo": "errors hub.client hub.range_source hub.remote_file local_file",
    "staging": "errors fsops header locks output_rules shard_writer",
    "verify.backends.bf16": "preset verify.backends.base verify.backends.padding verify.operands",
    "verify.backends.flashinfer_fp4": (
        "preset scale_shapes transforms.nvfp4 transforms.scales verify.backends.base verify.backends.padding "
        "verify.operands"
    ),
    "verify.backends.reference": "preset verify.backends.base verify.operands",
    "verify.backends.torch_scaled": "preset verify.backends.base verify.backends.padding verify.operands",
    "verify.backends.triton_gemm": (
        "preset verify.backends.base verify.backends.padding verify.backends.triton_kernels verify.operands"
    ),
    "hub.location": "errors hub.repo",
    "verify.backends.sgl_kernel": (
        "preset verify.backends.base verify.backends.padding verify.backends.torch_scaled verify.operands"
    ),
    "verify.probes": "verify.backends.base verify.backends.reference verify.metrics verify.operands",
    "sources": "hub.client hub.location local_file",
    "verify.backends": (
        "verify.backends.base verify.backends.bf16 verify.backends.flashinfer_fp4 verify.backends.reference "
        "verify.backends.sgl_kernel verify.backends.torch_scaled verify.backends.triton_gemm"
    ),
    "verify.selftest": (
        "transforms.fp8 transforms.nvfp4 transforms.scales verify.backends.base verify.operands verify.probes"
    ),
    "checkpoint": "errors header hub.location sources strict_json",
    "plan": "dialects.modelopt formats header patterns preset sampling sources",
    "accounting": "checkpoint hub.location report staging",
    "card": "engines.sglang error_table formats plan preset report",
    "check": (
        "checkpoint dialects.fp8 dialects.modelopt dialects.nvfp4 engines.sglang errors formats header "
        "patterns plan shard_writer"
    ),
    "components": "checkpoint errors sources strict_json",
    "lint": (
        "checkpoint dialects.modelopt dialects.nvfp4 dtypes engines.sglang header inspect_report patterns "
        "plan preset scale_shapes"
    ),
    "on_device": "checkpoint errors header transforms.nvfp4 transforms.raw",
    "plan_inputs": "dialects.modelopt dtypes errors patterns plan preset",
    "plan_keeps": "dialects.modelopt dtypes errors header patterns plan preset",
    "plan_names": "engines.sglang errors formats patterns plan preset",
    "reads": "checkpoint header patterns plan sampling",
    "samples": "checkpoint dialects.modelopt dtypes errors transforms.raw",
    "verify.request": "checkpoint sources workers",
    "verify.scan": "checkpoint digests errors report sources strict_json transforms.raw workers",
    "hub.publishable": "checkpoint components errors hub.leaks local_file strict_json",
    "looks": "checkpoint dialects.nvfp4 header layout lint sampling scale_shapes transforms.raw transforms.scales",
    "measure": "checkpoint dialects.modelopt errors header on_device plan transforms.nvfp4 transforms.raw workers",
    "pickle_source": "components dialects.fp8 sources torch_archive",
    "plan_mixed": (
        "dialects.fp8 dialects.modelopt dialects.nvfp4 dtypes errors formats header patterns plan plan_inputs "
        "plan_keeps plan_names"
    ),
    "plan_quantize": (
        "dialects.modelopt dialects.nvfp4 dtypes errors formats header patterns plan plan_inputs plan_keeps "
        "plan_names preset"
    ),
    "produce": "checkpoint errors header on_device patterns plan transforms.fp8 transforms.raw",
    "prove_fp8": (
        "checkpoint dialects.fp8 dialects.modelopt errors proof proof_fp8 samples sampling transforms.fp8 "
        "transforms.raw"
    ),
    "prove_nvfp4": (
        "checkpoint dialects.modelopt dialects.nvfp4 errors layout proof samples sampling transforms.raw "
        "transforms.scales"
    ),
    "source_part": "checkpoint header local_file plan reads",
    "verify.subject": (
        "checkpoint dialects.fp8 dialects.modelopt dialects.nvfp4 errors preset samples transforms.nvfp4 "
        "transforms.raw transforms.scales verify.operands"
    ),
    "verify.verdict": "errors verify.names verify.request verify_report",
    "hub.remote": "checkpoint components errors hub.publishable strict_json",
    "inspection": (
        "checkpoint components dialects.detect dialects.nvfp4 dtypes engines.sglang inspect_report lint looks sources"
    ),
    "opening": (
        "accounting checkpoint components dialects.fp8 dialects.ltx2 errors patterns pickle_source plan report sources"
    ),
    "prove": (
        "checkpoint dialects.fp8 dialects.modelopt dtypes errors formats patterns plan plan_mixed proof "
        "prove_fp8 prove_nvfp4 samples sampling transforms.raw workers"
    ),
    "shard_task": "patterns plan produce transforms.fp8",
    "verify.kernels": (
        "errors preset verify.backends verify.backends.base verify.names verify.operands verify.probes "
        "verify.selftest verify.subject verify_report"
    ),
    "fetching": "opening plan reads report",
    "manifest": "accounting card digests opening plan preset report",
    "stream": (
        "checkpoint on_device patterns plan produce reads shard_task shard_writer staging transforms.fp8 workers"
    ),
    "verify.container": (
        "checkpoint dialects.modelopt dialects.nvfp4 dtypes errors formats inspect_report inspection layout "
        "samples scale_shapes transforms.nvfp4 transforms.raw transforms.scales verify.scan verify.subject "
        "verify_report workers"
    ),
    "verify.decode": (
        "checkpoint closeness dialects.modelopt dtypes errors layout patterns proof prove prove_fp8 "
        "prove_nvfp4 report samples sampling transforms.raw verify.subject verify_report workers"
    ),
    "proving": "accounting errors formats opening plan proof prove reads report stream",
    "quantizing": "accounting engines.sglang fetching measure on_device opening plan report sources stream",
    "shard_attempt": "errors fsops plan shard_task shard_writer source_part stream workers",
    "space": "header manifest opening plan preset report",
    "verify.run": (
        "accounting checkpoint closeness errors layout report sources stream verify.container verify.decode "
        "verify.kernels verify.metrics verify.names verify.request verify.scan verify.subject verify.verdict "
        "verify_report workers"
    ),
    "ray_executor": "checkpoint errors fsops plan shard_attempt shard_task source_part staging stream",
    "verify.closing": (
        "accounting checkpoint errors report stream verify.request verify.run verify.subject verify.verdict "
        "verify_report"
    ),
    "verify.opened": "accounting checkpoint components report stream verify.request verify.run",
    "executors": "errors ray_executor sources stream",
    "hub.push": (
        "accounting card errors hub.access hub.client hub.publishable hub.remote report stream verify.opened "
        "verify.request"
    ),
}
WITH_TORCH = {
    "measure",
    "on_device",
    "closeness",
    "layout",
    "looks",
    "proof",
    "proof_fp8",
    "prove",
    "prove_fp8",
    "prove_nvfp4",
    "samples",
    "transforms.fp8",
    "transforms.nvfp4",
    "transforms.raw",
    "transforms.scales",
    "verify.backends",
    "verify.backends.base",
    "verify.backends.bf16",
    "verify.backends.flashinfer_fp4",
    "verify.backends.padding",
    "verify.backends.reference",
    "verify.backends.sgl_kernel",
    "verify.backends.torch_scaled",
    "verify.backends.triton_gemm",
    "verify.closing",
    "verify.container",
    "verify.decode",
    "verify.kernels",
    "verify.metrics",
    "verify.operands",
    "verify.probes",
    "verify.run",
    "verify.scan",
    "verify.selftest",
    "verify.subject",
}
COMMANDS = {"cli.build_nvfp4", "cli.convert_fp8", "cli.inspect", "cli.verify", "cli.presets", "cli.push", "cli.rewrite"}
ENDS = {"convert", "rewrite", "cli", "cli._build", "cli._options", "cli._output"} | COMMANDS


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


PACKAGES = {"__init__", "dialects", "engines", "hub", "transforms", "verify"}
MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}
CODE = sorted(MODULES.keys() - PACKAGES)


def imports(path: Path, *, top_level: bool) -> set[str]:
    body = ast.parse(path.read_text())
    nodes = body.body if top_level else list(ast.walk(body))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def test_every_module_is_in_the_table() -> None:
    assert set(CODE) == ALLOWED.keys() | ENDS


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_imports_point_one_way(module: str) -> None:
    ours = {name.removeprefix("modelopt_convert.") for name in imports(MODULES[module], top_level=False)}
    used = {name for name in ours if name in MODULES and name not in PACKAGES}
    if module in ("staging", "shard_writer"):
        used |= {"fsops"} & ours
    assert used <= set(ALLOWED[module].split())


@pytest.mark.parametrize("module", CODE)
def test_torch_is_imported_only_where_tensors_are(module: str) -> None:
    top = imports(MODULES[module], top_level=True)
    heavy = {"torch", "numpy", "safetensors", "modelopt", "flashinfer", "huggingface_hub"} & {
        name.partition(".")[0] for name in top
    }
    assert heavy <= ({"torch"} if module in WITH_TORCH else set())
    if module not in WITH_TORCH:
        ours = {name.removeprefix("modelopt_convert.") for name in top}
        assert not ours & WITH_TORCH


def test_transforms_know_nothing_of_the_rest() -> None:
    for module in (name for name in CODE if name.startswith("transforms.")):
        names = imports(MODULES[module], top_level=False)
        assert {name.partition(".")[0] for name in names} <= {
            "torch",
            "collections",
            "dataclasses",
            "functools",
            "modelopt_convert",
        }
