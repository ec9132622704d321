"""Every code by which input is refused is in a table of cases; those tables are run by their own tests.

Byte noise does not reach deep checks: a rule that no case breaks could be taken out unseen.
"""

import ast
import importlib.util
from collections.abc import Iterator
from types import ModuleType

from figures import note
from root import ROOT

PREFIXES = ("header", "index", "config", "input", "pickle")
# Functions that put a prefix before the word that they are given, and which argument that is.
MAKERS = {
    ("header.py", "_refuse"): ("header", 3),
    ("torch_archive.py", "refusal"): ("pickle", 1),
    ("amax_file.py", "refusal"): ("pickle", 1),
}
# strict_json.py's, and the two files that are read whole: by the ``code`` that their callers give.
JSON_KINDS = ("json", "duplicate_key", "too_large")
# One test each, not a table.
ALONE = {
    "input.changed": "checkpoint/test_reader_hostile.py::test_a_file_cut_while_open_is_an_error_and_not_a_crash",
    "input.no_config": "commands/test_one_file.py::test_what_has_no_config_is_told_of_the_flag",
    "input.variant": "checkpoint/test_variants.py::test_each_of_several_precisions_can_be_chosen",
    "config.ignore": "preset/test_patterns.py::test_a_long_ignore_list_is_looked_up_and_one_of_too_many_globs_refused",
    "pickle.missing": "checkpoint/test_torch_archive.py::test_a_missing_file_is_refused",
    "pickle.content": "checkpoint/test_torch_archive.py::test_a_checkpoint_without_amax_is_refused",
    "pickle.not_zip": "checkpoint/test_torch_archive.py::test_what_is_no_zip_is_refused",
    "input.too_large": "checkpoint/test_bounds.py::test_a_sparse_shard_of_100_gb",
    "input.too_deep": "run/test_boundary.py::test_a_file_nested_too_deeply",
    "input.too_many_files": "checkpoint/test_bounds.py::test_an_index_of_many_files",
}


def codes() -> Iterator[str]:
    """Every code of these prefixes that the source can give, read from its syntax."""
    for path in (ROOT / "modelopt_convert").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            for keyword in node.keywords:
                if keyword.arg == "code" and isinstance(keyword.value, ast.Constant):
                    yield str(keyword.value.value)
            name = node.func.id if isinstance(node.func, ast.Name) else None
            prefix, place = MAKERS.get((path.name, name or ""), ("", 0))
            if prefix:
                kind = node.args[place]
                assert isinstance(kind, ast.Constant), (path.name, ast.unparse(node))
                yield f"{prefix}.{kind.value}"
    yield from (f"{prefix}.{kind}" for prefix in ("header", "index", "config") for kind in JSON_KINDS)


def cases(path: str) -> ModuleType:
    """A module of tests, for its tables."""
    spec = importlib.util.spec_from_file_location("cases", ROOT / "tests" / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tables() -> Iterator[str]:
    """The codes of every case of every table."""
    yield from (f"header.{row[2]}" for row in cases("checkpoint/test_header.py").REFUSED)
    yield from (row[2] for row in cases("checkpoint/test_reader.py").REFUSED)
    yield from (row[2] for row in cases("checkpoint/test_hostile_input.py").REFUSED)
    yield from (row[4] for row in cases("checkpoint/test_bounds.py").JUNK)
    yield from (row[1] for row in cases("checkpoint/test_torch_archive.py").REZIPPED)
    yield from (row[2] for row in cases("checkpoint/test_torch_archive.py").PATCHED)
    yield from (row[2] for row in cases("checkpoint/test_torch_archive_bounds.py").REFUSED)


def test_every_code_is_hit_by_a_case() -> None:
    known = {code for code in codes() if code.partition(".")[0] in PREFIXES and "." in code}
    assert len(known) > 30
    hit = set(tables()) | ALONE.keys()
    note(4, codes=len(known), hit=len(known & hit))
    assert known - hit == set()
    assert hit - known == set(), "no longer in the source"


def test_the_tests_named_here_exist_and_name_the_code() -> None:
    for code, place in ALONE.items():
        file, _, name = place.partition("::")
        functions = {
            node.name: ast.unparse(node)
            for node in ast.parse((ROOT / "tests" / file).read_text()).body
            if isinstance(node, ast.FunctionDef)
        }
        assert code in functions[name], (code, place)
