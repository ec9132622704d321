"""The few kinds of elements of the page. All that they are given as text is escaped; ``Cell`` and content are HTML."""

import html
from collections.abc import Iterable, Mapping, Sequence

from modelopt_convert.verification.page.excerpt import show_number, tone, visible

MARKS = {"pass": "\u2713", "part": "\u2713", "warn": "!", "fail": "\u2715", "other": "\u25cb"}
_TEXT_LIMIT = 2000


def text(value: object, limit: int = _TEXT_LIMIT) -> str:
    """Text as HTML."""
    return html.escape(visible(value, limit))


def value_text(value: object) -> str:
    """A value of any kind as HTML."""
    if isinstance(value, Mapping):
        return text(", ".join(f"{visible(name, 80)} {show_number(part)}" for name, part in value.items()))
    if isinstance(value, list | tuple):
        return text(", ".join(show_number(part) for part in value))
    return text(show_number(value))


def badge(status: object, kind: str | None = None) -> str:
    """A status with its mark; nothing is told by color alone."""
    if status is None:
        return ""
    kind = kind or tone(status)
    return f"<b class={kind}>{MARKS[kind]} {text(status, 40)}</b>"


def table(name: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML cells; the stylesheet makes it a list on a narrow screen, by its name."""
    lines = ["".join(f"<td>{cell}" for cell in row) for row in rows]
    if not lines:
        return ""
    head = "".join(f'<th scope="col">{text(one)}' for one in heads)
    return f'<table class="{name}">\n<thead><tr>{head}</thead>\n<tbody><tr>\n' + "<tr>\n".join(lines) + "</table>"


def section(title: str, content: str, note: str = "") -> str:
    """A part of the page; nothing where there is no content."""
    if not content:
        return ""
    said = f'<p class="soft">{text(note)}</p>\n' if note else ""
    return f"<section>\n<h2>{text(title)}</h2>\n{said}{content}\n</section>"


def pairs(values: Mapping[str, object], kind: str = "facts") -> str:
    """Names and values, without those that are None or empty."""
    known = {name: value for name, value in values.items() if value not in (None, "")}
    items = "".join(
        f"<div><dt>{text(name, 80)}</dt><dd>{value_text(value)}</dd></div>\n" for name, value in known.items()
    )
    return f'<dl class="{kind}">\n{items}</dl>' if items else ""


def listed(words: Sequence[object], limit: int = 20) -> str:
    """Lines, and how many more there are."""
    items = "".join(f"<li>{text(one)}</li>" for one in words[:limit])
    more = len(words) - limit
    return f"<ul>{items}{f'<li>and {more} more</li>' if more > 0 else ''}</ul>" if items else ""
