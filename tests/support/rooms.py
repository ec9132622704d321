"""The rooms of the package in their order, and what imports what, read from the source."""

import ast
from pathlib import Path

from root import ROOT

PACKAGE = ROOT / "modelopt_convert"
# From below to above: a room imports rooms before it, and its own.
ROOMS = (
    "run", "formats", "report", "checkpoint", "preset", "engines", "dialects", "plan", "proof", "stage", "write",
    "inspection", "verification", "commands", "api", "cli",
)  # fmt: skip


def room(path: Path) -> str:
    """The room that a module lies in: a folder, or a module beside the folders."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    """Every module of every room."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if room(path) not in ("__init__", "__main__")]


def imported(path: Path) -> set[str]:
    """The rooms that a module imports from, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("modelopt_convert.")}
