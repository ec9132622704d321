"""Every code of an error, a warning or a fault that the package can give, read from its source."""

import ast
import re
from collections.abc import Iterator

from rooms import TREES

CODE = re.compile(r"[a-z_]+\.[a-z_0-9]+")
# Constants of the same form that are none: files, modules, tensors.
OTHERS = re.compile(
    r".*\.(json|toml|pkl|zip|safetensors|offline|hf_xet|0)|torch\.(device|dtype|uint8)|(?!export).*\.(weight|bias|modulation)|modelopt_convert\..*|preset\.preset|report\.(advice|inspect|report|fidelity)|__future__.*"
)
# Functions that put a prefix before the word that they are given, and which argument that is.
MAKERS = {
    ("checkpoint.header", "_refuse"): ("header", 3),
    ("checkpoint.torch_archive", "refusal"): ("pickle", 1),
    ("dialects.modelopt.amax_file", "refusal"): ("pickle", 1),
    ("checkpoint.hub.client", "_error"): ("hub", 2),
    ("stage.output_rules", "_refuse"): ("output", 2),
}
# What strict_json.py makes of the ``code`` of its callers, and read_small.
JSON_KINDS = {"parse_json_object": ("json", "duplicate_key", "too_large"), "read_small": ("too_large",)}
# Put together where they are raised.
MADE = {
    *(f"export.missing_{role}" for role in ("weight_scale", "weight_scale_2", "input_scale")),
    *(f"check.{name}" for name in ("structure", "converted", "verify")),
    *(f"{role}.{word}" for role in ("export", "base") for word in ("lora", "no_config")),
    *(f"engine.{grade}" for grade in ("fails", "wrong", "loss")),
    *(f"{role}.missing" for role in ("weight_scale", "input_scale")),
    "preset.toml",  # in the form of a file's name
    *("usage", "internal", "interrupted"),
}

# The preset's own refusal says it; and a beginning of codes.
CAUGHT = {"preset.too_large", "export.missing_"}


def _of_calls(module: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        given = {one.arg: one.value for one in node.keywords}
        code = given.get("code")
        if isinstance(code, ast.Constant):
            yield from (f"{code.value}.{kind}" for kind in JSON_KINDS.get(node.func.id, ()))
        prefix, place = MAKERS.get((module, node.func.id), ("", 0))
        if prefix and isinstance(word := node.args[place], ast.Constant):
            yield f"{prefix}.{word.value}"


def all_codes() -> set[str]:
    """Every code."""
    found = set(MADE)
    for module, tree in TREES.items():
        # Key maps are names of modules, which look the same; there only what is called a code is one.
        nodes = [one.value for one in ast.walk(tree) if isinstance(one, ast.keyword) and one.arg == "code"]
        for node in nodes if ".families." in module else ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and CODE.fullmatch(text) and not OTHERS.fullmatch(text):
                found.add(text)
        found |= set(_of_calls(module.partition(".")[2], tree))
    return found - CAUGHT
