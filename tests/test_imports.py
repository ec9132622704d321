"""Who may import whom, when torch is imported, and how rooms and modules are named: all read from the source."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator

import pytest
from rooms import ANYWHERE, INSIDE, MODULES, PACKAGE, ROOMS, TREES, imported, room
from root import ROOT

from modelopt_convert.formats.table import FORMATS

# Help, usage errors, dry runs and refusals come from these, and a library of a tenth of a second would be waited for.
LIGHT = ("run", "report", "checkpoint", "preset", "engines", "families", "dialects", "plan", "stage", "api", "cli")
HEAVY = {"torch", "numpy", "safetensors", "huggingface_hub", "flashinfer", "modelopt", "diffusers", "transformers"}
PUBLIC = {
    "advise", "build_nvfp4", "calibrate", "compare", "convert_fp8", "swap_nibbles", "unswizzle_scales", "verify",
    "inspect", "push", "presets",
    "new_preset",
}  # fmt: skip
ENDINGS = re.compile(r"(s|es|ed|er|ers|ing|or|ors|ion|ions)$")


def statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs when a module is imported: not its functions, and not what only a type checker reads."""
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from statements(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            for part in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, part, []))


AT_START = {module: imported(statements(tree.body)) for module, tree in TREES.items()}
# Triton imports torch.
THEMSELVES = {module for module in INSIDE if AT_START[module] & {"torch", "triton"}}


def with_torch() -> set[str]:
    """The modules that import torch when they are imported, be it by way of others."""
    found: set[str] = set()
    more = THEMSELVES
    while more:
        found |= more
        more = {module for module in INSIDE if AT_START[module] & found} - found
    return found


def test_no_room_imports_a_room_above_it() -> None:
    assert {room(module) for module in INSIDE} == set(ROOMS)
    wrong = [
        f"{module} imports {other}"
        for module in INSIDE
        for other in ANYWHERE[module] & set(INSIDE)
        if ROOMS.index(room(other)) > ROOMS.index(room(module))
    ]
    assert wrong == []


def test_formats_are_arithmetic() -> None:
    own = [module for module in INSIDE if room(module) == "formats"]
    used = {name.split(".")[1] if "." in name else name for module in own for name in ANYWHERE[module]}
    assert used <= {
        *sys.stdlib_module_names,
        "torch",
        "numpy",
        "llvmlite",
        "triton",
        "modelopt_convert",
        "formats",
        "run",
    }


def test_libraries_are_imported_where_they_are_used() -> None:
    wrong = {module: AT_START[module] & HEAVY for module in INSIDE if module not in THEMSELVES}
    assert {module: names for module, names in wrong.items() if names} == {}


def test_torch_is_imported_only_where_tensors_are() -> None:
    assert sorted(module for module in with_torch() if room(module) in LIGHT) == []


def test_what_is_light_imports_nothing_heavy() -> None:
    """The same by experiment: every module without torch is imported, in one process, and torch does not come along."""
    light = [module for module in INSIDE if module not in with_torch()]
    code = "import importlib, sys; [importlib.import_module(one) for one in sys.argv[1:]]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *light], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = set(done.stdout.split())
    assert set(light) <= loaded and loaded & HEAVY == set()


def test_the_root_holds_the_public_face_and_rooms() -> None:
    found = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    files = {"__init__.py", "__main__.py", "api.py", "py.typed"}
    assert found == files | {name for name in ROOMS if name != "api"}
    assert [path for path in PACKAGE.rglob("*") if path.is_dir() and path.name != "__pycache__"
            and not (path / "__init__.py").is_file()] == []  # fmt: skip


@pytest.mark.parametrize("name", [name for name in ROOMS if name != "api"])
def test_a_room_says_in_three_sentences_what_lives_there(name: str) -> None:
    text = " ".join((ast.get_docstring(TREES[f"modelopt_convert.{name}"]) or "").split())
    assert len(re.findall(r"[.!?](?= [A-Z`]|$)", text)) == 3, text


def test_no_room_is_named_as_a_public_function_is() -> None:
    """Importing such a room would put the module in the place of the function."""
    assert {path.stem for path in PACKAGE.iterdir()} & PUBLIC == set()


def test_no_room_asks_which_format_it_is() -> None:
    """A format is new files. Who else says its name: dialects and engines, which have words of their own; a command."""
    names = {*FORMATS, *(one.quant_algo for one in FORMATS.values())}
    said = {
        module
        for module in INSIDE
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Constant) and node.value in names
    }
    backends = {"flashinfer_fp4", "sgl_kernel", "torch_scaled", "triton_gemm"}  # whose kernels take one format
    known = {f"modelopt_convert.verification.gemm.backends.{name}" for name in backends}
    # What a conversion loses, and what proves it, is another thing in each format.
    known |= {f"modelopt_convert.commands.convert.{name}" for name in ("inexact", "plan", "proof", "restored_config")}
    known |= {f"modelopt_convert.commands.{name}" for name in ("requests", "drawing_requests")}  # their defaults
    known |= {*(f"modelopt_convert.formats.{name}.format" for name in FORMATS)}
    assert {module for module in said if room(module) not in ("dialects", "engines")} == known


def test_no_two_modules_differ_by_an_ending() -> None:
    stems: dict[str, set[str]] = {}
    for path in MODULES.values():
        if path.stem != "__init__":
            name = path.stem.strip("_")
            stems.setdefault(ENDINGS.sub("", name), set()).add(name)
    assert [sorted(names) for names in stems.values() if len(names) > 1] == []
