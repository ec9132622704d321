"""Write docs/errors.md from the table of codes.

python scripts/make/make_errors.py
"""

import re
from itertools import groupby
from pathlib import Path

from modelopt_convert.run.codes import explanations

TARGET = Path(__file__).resolve().parent.parent.parent / "docs" / "errors.md"
HEAD = """# Codes of errors, warnings and faults

<!-- Generated from `modelopt_convert/run/codes.toml` by `scripts/make/make_errors.py`; do not edit. -->

mopt prints a code in brackets behind each error, warning and fault. `mopt explain CODE` shows the entry of a code. A
message may change between releases, a code may not. [exit-codes.md](exit-codes.md) says what the process ends with.

In these texts the *export* is what ModelOpt wrote, the *base* is the original model, OUT is the folder that `--output`
names, and an *engine* is a program that serves the model, such as SGLang. A *fault* is something that `mopt inspect`
found: the checkpoint can be read, and something in it is wrong or unusual.
"""


def render() -> str:
    """The page's text."""
    parts = [HEAD]
    for prefix, entries in groupby(explanations().values(), lambda one: one.code.partition(".")[0]):
        # A heading for each code, so that a link can lead to it.
        parts.append(f"## {prefix}")
        parts += [f"### {one.code}\n\n{_plain(one.means)}\n\nTo do: {_plain(one.todo)}" for one in entries]
    return "\n".join(parts[:1]) + "\n" + "\n\n".join(parts[1:]) + "\n"


def _plain(text: str) -> str:
    return re.sub(r"\bdocs/([\w-]+\.md)", r"[\1](\1)", text.replace("*", r"\*").replace("__", r"\_\_"))


if __name__ == "__main__":
    TARGET.write_text(render())
