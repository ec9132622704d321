"""How text looks on a terminal: tables that fit, and colors that mean something. Pure."""

import textwrap
from collections.abc import Sequence
from typing import Literal

import typer

Tone = Literal["good", "doubt", "bad", "next"]
_COLORS: dict[Tone, str] = {"good": "green", "doubt": "yellow", "bad": "red", "next": "cyan"}
# What a line begins with says what it is.
_TONES: dict[str, Tone] = {
    "error": "bad",
    "fail": "bad",
    "warning": "doubt",
    "warn": "doubt",
    "lint": "doubt",
    "hint": "next",
    "next": "next",
}
_LEAST = 20


def painted(text: str, tone: Tone | None = None) -> str:
    """A line with its first words, up to a colon and a space, in the color of what they mean; without meaning as it is.

    Args:
        text: What is printable.
        tone: What the first words mean, where they alone do not say it.
    """
    first, colon, rest = text.partition(": ")
    tone = tone or (_TONES.get(first) if colon else None)
    return text if tone is None else f"{typer.style(first, fg=_COLORS[tone], bold=True)}{colon}{rest}"


def wrapped(text: str, width: int | None) -> list[str]:
    """A line as lines that fit, broken at spaces alone; a command is left whole, so that it can be copied."""
    if width is None or len(text) <= width or text.startswith(("next: ", "made by: ")):
        return [text]
    return textwrap.wrap(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """A table; the columns but the first and the last hold numbers, and stand to the right.

    Words of the last column are wrapped. No other cell is, since a name that is broken cannot be copied: where a first
    cell leaves no room for the rest, the rest follows on a line of its own.

    Args:
        columns: Their heads.
        rows: As many cells each.
        width: Of the terminal; None where lines may be as long as they come.
    """
    cells = [list(columns), *map(list, rows)]
    widths = [max(len(row[number]) for row in cells) for number in range(len(columns))]
    last = len(columns) - 1
    if width is not None:
        rest = sum(widths[1:-1]) + min(widths[-1], _LEAST) + 2 * last
        widths[0] = min(widths[0], max(width - rest, len(columns[0])))
    room = None if width is None else max(width - sum(widths[:-1]) - 2 * last, _LEAST)
    lines: list[str] = []
    for row in cells:
        first = row[0]
        if len(first) > widths[0]:
            lines.append(first)
            first = ""
        numbers = [cell.rjust(wide) for cell, wide in zip(row[1:-1], widths[1:-1], strict=True)]
        begin = "".join(f"{cell}  " for cell in (first.ljust(widths[0]), *numbers))
        words = (
            [row[last]]
            if room is None
            else textwrap.wrap(row[last], room, break_long_words=False, break_on_hyphens=False) or [""]
        )
        lines += [f"{begin if number == 0 else ' ' * len(begin)}{part}".rstrip() for number, part in enumerate(words)]
    return lines
