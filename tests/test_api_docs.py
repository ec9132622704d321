"""The examples of docs/api.md, run in their order, where a user would run them."""

import contextlib
import inspect
import re
from io import StringIO
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub
from root import ROOT

import modelopt_convert
from modelopt_convert.run.errors import MoptError

TEXT = (ROOT / "docs" / "api.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_every_example_runs(exports: Path, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    for name, link in {"nvfp4": "out/hf", "fp8": "fp8/hf", "base": "FLUX.1-dev"}.items():
        (folder / link).parent.mkdir(parents=True, exist_ok=True)
        (folder / link).symlink_to(exports / name)
    monkeypatch.chdir(folder)
    told = StringIO()
    assert len(EXAMPLES) == 6
    with contextlib.redirect_stdout(told):
        for number, example in enumerate(EXAMPLES):
            exec(compile(example, f"docs/api.md, example {number + 1}", "exec"), {"__name__": "example"})
    assert "write diffusion_pytorch_model.safetensors: 100 %" in told.getvalue()
    assert "output.exists" in told.getvalue()


def test_every_public_name_is_described() -> None:
    missing = [name for name in modelopt_convert.__all__ if name != "__version__" and f"`{name}" not in TEXT]
    assert missing == []


def test_the_table_has_every_function_with_its_command_and_what_it_returns() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `mopt ([\w -]+)` \| .* \| `(.+)` \|$", TEXT, re.MULTILINE)
    public = {name: getattr(modelopt_convert, name) for name in modelopt_convert.__all__ if name != "perform"}
    functions = {name: inspect.signature(one) for name, one in public.items() if inspect.isfunction(one)}
    returned = {name: one.return_annotation.replace("modelopt_convert.", "") for name, one in functions.items()}
    words = {name: name.replace("_", "-") for name in returned} | {"new_preset": "presets new"}
    assert sorted(rows) == sorted((name, words[name], kind) for name, kind in returned.items())


def test_the_reference_says_something_of_every_keyword_field_and_error() -> None:
    reference = TEXT.partition("\n## Functions\n")[2]
    sections = {
        head: body for head, body in re.findall(r"^### (\w+)\n(.*?)(?=^### |\Z)", reference, re.MULTILINE | re.DOTALL)
    }
    assert len(sections) > 45
    for name in modelopt_convert.__all__:
        one = getattr(modelopt_convert, name)
        if inspect.isfunction(one):
            listed = re.findall(r"^- `(\w+)`: \S", sections[name], re.MULTILINE)
            assert [word for word in inspect.signature(one).parameters if word not in listed] == [], name
        elif isinstance(one, type) and issubclass(one, Exception):
            assert len(sections[name].split()) > 5, name
    undescribed = [
        line for body in sections.values() for line in re.findall(r"^- .*$", body, re.MULTILINE) if ": " not in line
    ]
    assert undescribed == []


def test_every_kind_of_error_is_in_the_table() -> None:
    kinds = MoptError.__subclasses__()
    rows = dict(re.findall(r"^\| (.+) \| (\d+) \| .* \|$", TEXT, re.MULTILINE))
    documented = {name: int(code) for names, code in rows.items() for name in re.findall(r"`(\w+)`", names)}
    assert documented == {kind.__name__: int(kind.exit_code) for kind in kinds}
