"""The script that compares what two versions of mopt write sees a change, and finds what it makes fixtures with."""

import ast
import importlib
from pathlib import Path
from typing import Any

import output_digests
import pytest

WORDS = "swap-nibbles @exports/nvfp4 out"


def record(**files: str) -> dict[str, Any]:
    return {"fixtures": {"a": "1"}, "cases": {WORDS: {"exit_code": 0, "files": files, "rewrite_records": {"b": "2"}}}}


def test_one_changed_byte_is_a_difference(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = record(shard="1"), record(shard="2")
    assert output_digests.compare(before, before, ignore_records=False) == 0
    assert output_digests.compare(before, after, ignore_records=True) == 1
    assert f"{WORDS}\n  files: [('shard', '1')]\n  now: [('shard', '2')]" in capsys.readouterr().out
    assert output_digests.compare(before, {"fixtures": {"a": "1"}, "cases": {}}, ignore_records=True) == 1
    after = record(shard="1")
    after["cases"][WORDS]["rewrite_records"] = {}
    assert output_digests.compare(before, after, ignore_records=False) == 1
    assert output_digests.compare(before, after, ignore_records=True) == 0


def test_a_run_is_recorded(exports: Path, tmp_path: Path) -> None:
    (tmp_path / "exports").symlink_to(exports)
    found = output_digests.run(WORDS, tmp_path, None)
    assert found["exit_code"] == 0 and found["warnings"] == ["layout.unproven"]
    assert found["rewrite_records"].keys() == {"out/mopt.json"}
    assert found["files"].keys() == {"out/config.json", "out/diffusion_pytorch_model.safetensors"}
    refused = output_digests.run("swap-nibbles @exports/base out", tmp_path, None)
    assert (refused["exit_code"], refused["error"], refused["files"]) == (3, "layout.nothing_packed", {})
    assert "FIXTURES/exports/base" in refused["message"] and str(tmp_path) not in refused["message"]


def test_the_makers_of_fixtures_are_there() -> None:
    tree = ast.parse(Path(output_digests.__file__).read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    imports = [node for one in functions for node in ast.walk(one) if isinstance(node, ast.ImportFrom)]
    ours = {(node.module, name.name) for node in imports if "." not in (node.module or "") for name in node.names}
    assert len(ours) > 10
    assert [one for one in sorted(ours) if not hasattr(importlib.import_module(str(one[0])), one[1])] == []
