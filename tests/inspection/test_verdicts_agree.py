"""Laws of verdicts: the table and the report of a file say the same, and every count and name in them is the file's."""

import re
from pathlib import Path
from typing import Any

import pytest
from dialect_files import MAKERS
from safetensors import safe_open
from support import inspected, run_mopt

FIRST = re.compile(r"(\d+) (?:modules?|input scales?) \((\S+) first\)")


def table_of(source: Path) -> dict[str, str]:
    """The verdicts that people see, by engine."""
    text = run_mopt("inspect", source, "--engines", json_report=False).stdout
    rows = re.findall(r"^(sglang|vllm-omni|comfyui|diffusers|tensorrt-llm) \S+ +(\w+)  ", text, re.MULTILINE)
    return dict(rows)


def check(source: Path) -> dict[str, Any]:
    """The report, which agrees with the table and with the names of the file."""
    report = inspected(source, "--engines")
    verdicts = {one["engine"]: one["verdict"] for one in report["verdicts"]}
    assert table_of(source) == verdicts
    names, codes = set(), 0
    for file in [source] if source.is_file() else source.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                names.add(name.rpartition(".")[0])
                tensor = handle.get_slice(name)
                codes += int(
                    name.endswith(".weight")
                    and len(tensor.get_shape()) == 2
                    and tensor.get_dtype() in ("U8", "F8_E4M3", "F8_E5M2", "I8")
                )
    for one in report["verdicts"]:
        listed = {name for modules in one["modules"].values() for name in modules}
        assert listed <= names, one
        for count, first in FIRST.findall(one["how"]):
            assert first in names and int(count) <= len(names), one
            alike = [modules for modules in one["modules"].values() if min(modules) == first]
            assert not alike or int(count) in map(len, alike), one
        for count in re.findall(r"takes (\d+) modules for", one["how"]):
            assert int(count) == codes, one
    for view in report["engines"]:
        engine = view["name"].partition("@")[0]
        if verdicts[engine] == "refuses":
            assert view["misreads"], view
    return report


@pytest.mark.parametrize(("dialect", "maker"), MAKERS, ids=lambda item: getattr(item, "__name__", item))
def test_a_file_of_each_dialect(tmp_path: Path, dialect: str, maker: Any) -> None:
    assert check(maker(tmp_path / "made"))["dialect"]["name"] == dialect


@pytest.mark.parametrize("form", ["nvfp4", "fp8"])
@pytest.mark.parametrize("family", ["flux1", "flux2", "qwen_image", "wan"])
def test_the_folder_of_a_file_has_the_verdicts_of_the_file(
    families: Path, tmp_path: Path, family: str, form: str
) -> None:
    """An OUT of ComfyUI's has no config.json: no engine takes it for a repo, and SGLang loads either the same way."""
    export, base = families / family / form, families / family / "base"
    for target in ("comfyui", "bfl-diffusers") if family == "flux2" else ("comfyui",):
        out = tmp_path / target
        made = run_mopt("convert", export, out, "--to", target, "--base", base, "--inexact", "bf16")
        assert made.exit_code == 0, made.stderr
        of_folder, of_file = check(out)["verdicts"], check(next(out.glob("*.safetensors")))["verdicts"]
        assert of_folder == of_file
        told = next(one for one in of_file if one["engine"] == "sglang")
        if target == "comfyui" and family in ("flux1", "wan"):
            assert told["verdict"] == "refuses" and told["depends"] == "" and told["how"].startswith("raises ")
