"""Write docs/cli.md: every command with its help, read from the command line itself.

python scripts/make/make_cli.py
"""

from itertools import groupby
from pathlib import Path
from typing import Any

from typer.main import get_command

from modelopt_convert.cli import app

TARGET = Path(__file__).resolve().parent.parent.parent / "docs" / "cli.md"
HEAD = (
    "# The command line\n\n"
    "<!-- Generated from the commands' own help by `scripts/make/make_cli.py`; do not edit. -->\n\n"
    "What `--help` of each command says."
)
BLOCK = "\b"  # before lines that are to stay as they are


def render() -> str:
    """The page's text."""
    root: Any = get_command(app)
    context = root.make_context("mopt", [], resilient_parsing=True)
    parts = [HEAD, *_command("mopt", root, context)]
    for name in root.list_commands(context):
        command = root.get_command(context, name)
        usage = f"mopt {name}"
        parts += _command(usage, command, command.make_context(usage, [], resilient_parsing=True))
    return "\n\n".join(parts) + "\n"


def _command(usage: str, command: Any, context: Any) -> list[str]:
    # The context's name is the whole of the usage: what lies above it must not say it again.
    pieces = " ".join([usage, *command.collect_usage_pieces(context)])
    records = [one.get_help_record(context) for one in command.get_params(context)]
    # A list: in a table a bar between two values would need a backslash, which some readers show.
    rows = [f"- `{flag}`: {_plain(said)}" for flag, said in filter(None, records)]
    return [f"## {usage}", f"```text\n{pieces}\n```", *_paragraphs(command.help), "\n".join(rows)]


def _plain(text: str) -> str:
    return text.replace("<", "&lt;").replace("[", "\\[").replace("*", "\\*")


def _paragraphs(text: str) -> list[str]:
    """Paragraphs as they are; lines after a mark become code if they are indented, a paragraph if not."""
    found = []
    for paragraph in text.split("\n\n"):
        head, *lines = paragraph.removeprefix(f"{BLOCK}\n").split("\n")
        if not paragraph.startswith(BLOCK) or not lines:
            found.append(paragraph.removeprefix(f"{BLOCK}\n"))
            continue
        for indented, group in groupby([head, *lines], lambda line: line.startswith("  ")):
            joined = "\n".join(line.removeprefix("  ") if indented else line for line in group)
            found.append(f"```\n{joined}\n```" if indented else joined)
    return found


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
