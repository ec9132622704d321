"""The schemas of docs/schemas are those of the code, and what mopt writes is what they say."""

import copy as copies
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from make_schemas import FOLDER, render
from pydantic import BaseModel, ValidationError
from support import copy, edit, run_mopt

from modelopt_convert.report.fidelity import CheckpointFidelity, FidelityReport
from modelopt_convert.report.inspect import InspectReport
from modelopt_convert.report.report import (
    OutputReport,
    ProofReport,
    PublishedReport,
    PushedReport,
    Report,
    VerifiedReport,
)
from modelopt_convert.report.verify import VerifyReport

SCHEMAS: dict[str, dict[str, Any]] = {path.name: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
RECORD, REPORT, INSPECT = "mopt.manifest-1.json", "mopt.report-1.json", "mopt.inspect-1.json"


def faults(name: str, document: Any, *, closed: bool = True) -> list[str]:
    """What a schema has against a document; ``closed``: also keys that the schema does not know."""
    schema = copies.deepcopy(SCHEMAS[name])
    for one in (schema, *schema["$defs"].values()):
        if closed:
            one["additionalProperties"] = False
    return [f"{fault.json_path}: {fault.message}" for fault in Draft202012Validator(schema).iter_errors(document)]


@pytest.mark.parametrize(
    "model", [Report, ProofReport, PushedReport, InspectReport, VerifyReport, FidelityReport, CheckpointFidelity]
)
def test_no_step_writes_into_a_report(model: type[BaseModel]) -> None:
    """A report is put together where a command ends, from what its steps returned."""
    for name in model.model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(model.model_construct(), name, None)


def records(folder: Path) -> Iterator[Any]:
    for path in folder.rglob("mopt.json"):
        yield json.loads(path.read_text())


@pytest.fixture(scope="module")
def written(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """What each kind of run wrote, and its report."""
    room = tmp_path_factory.mktemp("written")
    base, nvfp4, fp8 = exports / "base", exports / "nvfp4", exports / "fp8"
    for name in ("transformer", "transformer_2"):
        copy(base, room / "two" / name)
    edit(nvfp4, room / "source")
    runs: dict[str, list[str | Path]] = {
        "build": ["build-nvfp4", "--preset", "flux1-dev", "--export", nvfp4, "--base", base, "--base-model", "me/it"],
        "planned": ["build-nvfp4", "--preset", "flux1-dev", "--export", nvfp4, "--base", base, "--dry-run"],
        "quantized here": ["build-nvfp4", "--preset", "flux1-dev", "--base", base],
        "fp8": ["convert-fp8", "--preset", "flux1-dev", "--export", fp8, "--base", base],
        "unproven": ["convert-fp8", "--preset", "none", "--export", fp8],
        "pipeline": ["build-nvfp4", "--preset", "flux1-dev", "--base", room / "two"],
        "refused": ["build-nvfp4", "--preset", "flux1-dev", "--export", room / "nowhere", "--base", base],
    }
    found = {}
    for name, words in runs.items():
        report = run_mopt(*words, "--output", room / name).report
        found[name] = (room / name, report)
    rewrites: dict[str, list[str | Path]] = {
        "swapped": ["swap-nibbles", room / "source", room / "swapped"],
        "proven": ["unswizzle-scales", room / "swizzled", room / "proven", "--base", base],
    }
    run_mopt("unswizzle-scales", room / "source", room / "swizzled", "--reverse")
    rewrites["converted"] = ["convert", fp8, room / "converted", "--to", "torchao"]
    for name, words in rewrites.items():
        found[name] = (room / name, run_mopt(*words).report)
    found["verified"] = (
        room / "verified",
        run_mopt("verify", room / "build", "--base", base, "--device", "cpu").report,
    )
    return found


def test_schemas_are_current() -> None:
    assert {path.name: path.read_text() for path in FOLDER.iterdir()} == render(), "run scripts/make/make_schemas.py"


def test_schemas_are_schemas() -> None:
    for schema in SCHEMAS.values():
        Draft202012Validator.check_schema(schema)


def test_every_report_is_what_its_schema_says(written: dict[str, tuple[Path, Any]]) -> None:
    for name, (_, report) in written.items():
        assert faults(REPORT, report) == [], name
    assert {report["status"] for _, report in written.values()} == {"ok", "planned", "refused"}


def test_every_record_is_what_its_schema_says(written: dict[str, tuple[Path, Any]]) -> None:
    found = {name: list(records(folder)) for name, (folder, _) in written.items()}
    assert {name: len(each) for name, each in found.items()} == {
        "build": 1, "planned": 0, "quantized here": 1, "fp8": 1, "unproven": 1, "pipeline": 3, "refused": 0,
        "swapped": 1, "proven": 1, "converted": 1, "verified": 0,
    }  # fmt: skip
    assert {name: fault for name, each in found.items() for one in each for fault in faults(RECORD, one)} == {}
    assert {key for each in found.values() for one in each for key in one} == SCHEMAS[RECORD]["properties"].keys()


def test_what_inspect_finds_is_what_its_schema_says(exports: Path, tmp_path: Path) -> None:
    for words in (["nvfp4", "--base", "base"], ["fp8"], ["base"], ["nowhere"]):
        report = run_mopt("inspect", *(word if word.startswith("-") else exports / word for word in words)).report
        assert faults(INSPECT, report) == [], words


def test_a_wrong_type_or_a_missing_key_is_a_fault_and_a_new_key_is_none(written: dict[str, tuple[Path, Any]]) -> None:
    folder, report = written["build"]
    (record,) = records(folder)
    module = next(iter(record["proof"]["modules"]))
    for name, document, path in (
        (RECORD, record, ("digests", "headers")),
        (RECORD, record, ("digests", "algorithm")),
        (RECORD, record, ("proof", "modules", module, "codes")),
        (REPORT, report, ("output", "bytes")),
        (REPORT, report, ("proof", "status")),
    ):
        planted = copies.deepcopy(document)
        parent = planted
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = ["planted"]
        assert faults(name, planted, closed=False) != [], path
    for name, document in ((RECORD, record), (REPORT, report)):
        assert faults(name, {key: one for key, one in document.items() if key != "command"}) != []
        assert faults(name, document | {"new": 1}, closed=False) == []
        assert faults(name, document | {"new": 1}) != []


def test_a_report_its_dict_and_its_json_have_the_same_keys(written: dict[str, tuple[Path, Any]], exports: Path) -> None:
    found = [(Report, report) for _, report in written.values()]
    found.append((InspectReport, run_mopt("inspect", exports / "nvfp4").report))
    for kind, report in found:
        made = kind.model_validate(report)
        assert made.model_dump() == json.loads(made.to_json()) == report
        assert kind.model_validate(made.model_dump()) == made
    assert list(Report.model_fields) == list(VerifiedReport.model_fields) == list(PublishedReport.model_fields)


def test_names_of_a_report_are_text() -> None:
    """Else no reader of JSON but Python's would take it."""
    report = Report(command="x", output=OutputReport(path="o\udcff"), timings_s={"t\udcff": 1.5, "nan": float("nan")})
    found = json.loads(report.to_json())
    assert found["output"]["path"] == "o\\udcff" and found["timings_s"] == {"t\\udcff": 1.5, "nan": None}
    assert report.output.path == "o\udcff"
