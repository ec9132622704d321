"""Who may import whom, read from the source."""

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
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The rooms that a module imports from, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("modelopt_convert.")}


def test_no_room_imports_a_room_above_it() -> None:
    modules = [path for path in PACKAGE.rglob("*.py") if room(path) not in ("__init__", "__main__")]
    assert {room(path) for path in modules} == set(ROOMS)
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {other}"
        for path in modules
        for other in imported(path)
        if ROOMS.index(other) > ROOMS.index(room(path))
    ]
    assert wrong == []
