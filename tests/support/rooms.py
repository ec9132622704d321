"""The rooms of the package in their order, and what imports what, read from the source."""

import ast
from collections.abc import Iterable
from pathlib import Path

from root import ROOT

PACKAGE = ROOT / "modelopt_convert"
# From below to above: a room imports rooms before it, and its own.
ROOMS = (
    "run", "formats", "report", "checkpoint", "preset", "engines", "families", "dialects", "plan", "proof", "stage",
    "write", "inspection", "verification", "fidelity", "commands", "api", "cli",
)  # fmt: skip


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}
INSIDE = sorted(MODULES.keys() - {"modelopt_convert", "modelopt_convert.__main__"})
TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}


def room(module: str) -> str:
    """The room that a module lies in: a folder, or a module beside the folders."""
    return module.split(".")[1]


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Modules that these nodes import; of ours those above each, too, which Python imports first."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    whole = {".".join(name.split(".")[: count + 1]) for name in names for count in range(name.count(".") + 1)}
    return {name for name in whole if name in MODULES or "." not in name}


ANYWHERE = {module: imported(ast.walk(tree)) for module, tree in TREES.items()}
