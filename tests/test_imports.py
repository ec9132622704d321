"""Who may import whom, read from the source."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "modelopt_convert"

# Module: what it may import of ours, itself and its folder aside. Left out: convert.py and cli, the ends of the line.
ALLOWED = {
    "errors": set(),
    "dtypes": set(),
    "strict_json": {"errors"},
    "header": {"dtypes", "errors", "strict_json"},
    "checkpoint": {"errors", "header", "strict_json"},
    "patterns": {"errors"},
    "preset": {"errors", "patterns"},
    "scale_shapes": set(),
    "dialects.modelopt": {"errors", "header", "patterns", "scale_shapes"},
    "plan": {"dialects.modelopt", "header", "patterns", "preset"},
    "plan_nvfp4": {"dialects.modelopt", "dtypes", "errors", "header", "patterns", "plan", "preset"},
    "transforms.nvfp4": set(),
    "transforms.scales": {"scale_shapes"},
    "transforms.raw": {"transforms.nvfp4", "transforms.scales"},
    "closeness": {"transforms.nvfp4"},
    "layout": {"closeness", "transforms.nvfp4"},
    "proof": {"closeness", "layout", "transforms.nvfp4"},
    "prove": {
        "checkpoint",
        "dialects.modelopt",
        "dtypes",
        "errors",
        "layout",
        "patterns",
        "plan",
        "proof",
        "transforms.raw",
        "transforms.scales",
    },
    "fsops": set(),
    "shard_writer": {"errors", "fsops", "header"},
    "components": {"errors"},
    "locks": set(),
    "output_rules": {"errors"},
    "staging": {"errors", "fsops", "header", "locks", "output_rules", "shard_writer"},
    "engines.sglang": {"header"},
    "dialects.detect": {"engines.sglang", "header", "scale_shapes"},
    "check": {
        "checkpoint",
        "dialects.modelopt",
        "engines.sglang",
        "errors",
        "header",
        "patterns",
        "plan",
        "shard_writer",
    },
    "card": {"plan", "preset"},
    "report": set(),
    "inspect_report": {"report"},
    "stream": {"checkpoint", "errors", "header", "patterns", "plan", "staging", "transforms.raw"},
    "lint": {
        "checkpoint",
        "dialects.modelopt",
        "dtypes",
        "engines.sglang",
        "header",
        "inspect_report",
        "patterns",
        "plan",
        "preset",
        "scale_shapes",
        "transforms.raw",
        "transforms.scales",
    },
    "inspection": {
        "components",
        "checkpoint",
        "dialects.detect",
        "dialects.modelopt",
        "dtypes",
        "engines.sglang",
        "errors",
        "header",
        "inspect_report",
        "layout",
        "lint",
        "plan",
        "proof",
        "scale_shapes",
        "transforms.raw",
        "transforms.scales",
    },
}
WITH_TORCH = {
    "lint",
    "closeness",
    "inspection",
    "layout",
    "proof",
    "prove",
    "transforms.nvfp4",
    "transforms.scales",
    "transforms.raw",
}
COMMANDS = {"cli.build_nvfp4", "cli.inspect", "cli.presets", "cli.rewrite"}
ENDS = {"convert", "rewrite", "cli", "cli._options", "cli._output"} | COMMANDS


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}
CODE = sorted(MODULES.keys() - {"__init__", "dialects", "engines", "transforms"})


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
    used = {name for name in ours if name in MODULES and name not in ("__init__", "transforms", "dialects", "engines")}
    if module in ("staging", "shard_writer"):
        used |= {"fsops"} & ours
    assert used <= ALLOWED[module]


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
        assert {name.partition(".")[0] for name in names} <= {"torch", "collections", "modelopt_convert"}
