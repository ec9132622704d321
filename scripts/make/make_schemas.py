"""Write docs/schemas: the JSON schemas of mopt.json and of both reports.

python scripts/make/make_schemas.py
"""

import json
from pathlib import Path
from typing import Any

from manifest import Record
from pydantic.json_schema import GenerateJsonSchema

from modelopt_convert.report.advice import AdviceReport
from modelopt_convert.report.fidelity import FidelityReport
from modelopt_convert.report.inspect import InspectReport
from modelopt_convert.report.report import Report

FOLDER = Path(__file__).resolve().parent.parent.parent / "docs" / "schemas"
# A report always has every field, and a record those of its command.
MODELS = {
    "mopt.manifest-1": (Record, False),
    "mopt.report-1": (Report, True),
    "mopt.inspect-1": (InspectReport, True),
    "mopt.fidelity-1": (FidelityReport, True),
    "mopt.advice-1": (AdviceReport, True),
}


class _Untitled(GenerateJsonSchema):
    """Fields have names, and need no titles that say the same."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def render() -> dict[str, str]:
    """The text of each schema, by the name of its file."""
    found = {}
    for name, (model, whole) in MODELS.items():
        schema = model.model_json_schema(schema_generator=_Untitled)
        for one in (schema, *schema["$defs"].values()):
            _open(one, whole)
        head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
        found[f"{name}.json"] = json.dumps(head | schema, indent=2) + "\n"
    return found


def _open(schema: dict[str, Any], whole: bool) -> None:
    """Take what has more keys, since keys are only ever added; of a report, nothing that has fewer."""
    schema.pop("additionalProperties", None)
    if whole:
        schema["required"] = list(schema["properties"])


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in render().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
