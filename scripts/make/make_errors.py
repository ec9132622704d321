"""Write docs/errors.md from the table of codes.

python scripts/make/make_errors.py
"""

from itertools import groupby
from pathlib import Path

from modelopt_convert.run.codes import explanations

TARGET = Path(__file__).resolve().parent.parent.parent / "docs" / "errors.md"
HEAD = """# Codes of errors, warnings and faults

Generated from `modelopt_convert/run/codes.toml` by `scripts/make/make_errors.py`; do not edit. mopt prints a code in
brackets behind each error, warning and fault, and `mopt explain CODE` shows its entry. A message may change between
releases, a code may not. [exit-codes.md](exit-codes.md) says what the process ends with.
"""


def render() -> str:
    """The page's text."""
    parts = [HEAD]
    for prefix, entries in groupby(explanations().values(), lambda one: one.code.partition(".")[0]):
        rows = [f"| `{one.code}` | {one.means} | {one.todo} |" for one in entries]
        parts.append("\n".join([f"## {prefix}", "", "| code | what it means | what to do |", "|---|---|---|", *rows]))
    return "\n".join(parts[:1]) + "\n" + "\n\n".join(parts[1:]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(render())
