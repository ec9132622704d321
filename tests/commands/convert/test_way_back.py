"""A record is a claim: what of it the file contradicts is told and not used."""

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Outcome, edit_json, load, run_mopt


@pytest.fixture
def there(families: Path, tmp_path: Path) -> Path:
    """Wan in compressed-tensors, two of whose scales only the record gives back."""
    done = run_mopt("convert", families / "wan" / "nvfp4", tmp_path / "there", "--to", "compressed-tensors")
    assert done.exit_code == 0, done.stderr
    return tmp_path / "there"


def back(there: Path, out: Path) -> tuple[Outcome, str]:
    done = run_mopt("convert", there, out, "--to", "modelopt")
    assert done.exit_code == 0 and done.report is not None, done.stderr
    return done, " ".join(one["message"] for one in done.report["warnings"] if one["code"] == "convert.not_restored")


def kept(record: dict[str, Any]) -> dict[str, list[Any]]:
    return {
        name: entry
        for one in record["converted"]["files"].values()
        for name, entry in one["tensors"].items()
        if len(entry) > 2
    }


def test_a_kept_scale_that_is_not_the_reciprocal_is_not_used(there: Path, families: Path, tmp_path: Path) -> None:
    forged: list[str] = []

    def forge(record: dict[str, Any]) -> None:
        name, entry = next((one, found) for one, found in kept(record).items() if one.endswith("weight_scale_2"))
        (value,) = struct.unpack("<f", base64.b64decode(entry[2]))
        entry[2] = base64.b64encode(struct.pack("<f", value * 1.5)).decode()
        forged.append(name)

    edit_json(there / "mopt.json", forge)
    done, told = back(there, tmp_path / "back")
    assert forged[0] in told
    found = load(tmp_path / "back")[forged[0]]
    wanted = load(families / "wan" / "nvfp4" / "transformer")[forged[0]]
    assert abs(float(found / wanted) - 1) < 2**-22
    assert done.report is not None and forged[0] not in done.report["convert"]["restored"]


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a path": lambda said: said["files"].update({"../x.safetensors": said["files"].popitem()[1]}),
    "no files": lambda said: said.pop("files"),
    "no tensors": lambda said: next(iter(said["files"].values())).update(tensors=3),
    "another size": lambda said: next(iter(said["files"].values()))["tensors"].update(x=["F32", [2], "AAAA"]),
    "a dtype": lambda said: next(iter(said["files"].values()))["tensors"].update(x=["F33", [2]]),
    "a spelling": lambda said: said.update(spelling="klingon"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_malformed_record_is_told_and_not_used(there: Path, tmp_path: Path, forgery: str) -> None:
    """An entry that is malformed is lost alone; in anything around the entries all is."""
    whole, _ = back(there, tmp_path / "whole")
    assert whole.report is not None and whole.report["convert"]["restored"]
    left = whole.report["convert"]["restored"] if forgery in ("another size", "a dtype") else []
    edit_json(there / "mopt.json", lambda record: FORGERIES[forgery](record["converted"]))
    done, _ = back(there, tmp_path / "back")
    assert done.report is not None
    assert "record.content" in {one["code"] for one in done.report["warnings"]}
    assert not (tmp_path / "x.safetensors").exists() and done.report["convert"]["restored"] == left


def test_a_tensor_that_the_record_invents_is_not_written(there: Path, tmp_path: Path) -> None:
    def invent(record: dict[str, Any]) -> None:
        tensors = next(iter(record["converted"]["files"].values()))["tensors"]
        tensors["blocks.0.evil.weight"] = ["F32", [1], base64.b64encode(bytes(4)).decode()]

    edit_json(there / "mopt.json", invent)
    _, told = back(there, tmp_path / "back")
    assert told and "blocks.0.evil.weight" not in load(tmp_path / "back")


def test_a_config_that_the_record_invents_is_not_written(there: Path, tmp_path: Path) -> None:
    def invent(record: dict[str, Any]) -> None:
        config = json.loads(record["converted"]["config"])
        record["converted"]["config"] = json.dumps({**config, "num_layers": 99})

    edit_json(there / "mopt.json", invent)
    _, told = back(there, tmp_path / "back")
    assert "config.json" in told and json.loads((tmp_path / "back" / "config.json").read_text())["num_layers"] != 99
