"""Text of others, made fit for a terminal or for a report: file names need not be UTF-8. No torch."""

import itertools
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence

# Of a line: a value of a config.json may have millions.
_LINE_CHARS = 4000
# What differs between faults of one kind: shapes, what stands in parentheses, numbers.
_PARTICULAR = re.compile(r"\[[^\]]*\]|\(.*\)|[0-9][0-9.e+-]*")

_NUMBER = re.compile(r"[1-9][0-9]{0,5}")  # of a block


def unicode_text(text: str) -> str:
    """Text that any encoding of Unicode takes: bytes of a file name that are not UTF-8 are escaped."""
    return text.encode(errors="backslashreplace").decode()


def shown(value: object) -> str:
    """A value that a caller gave, for a message; some cannot show themselves, such as integers of 5,000 digits."""
    try:
        return repr(value)[:_LINE_CHARS]
    except Exception:  # whatever a class of the caller's raises
        return f"a value of type {type(value).__name__}"


def runnable(text: str) -> str:
    """Text with the commands ``hf ...`` in it as they run here: an installed tool has no ``hf`` on PATH."""
    if "`hf " not in text or shutil.which("hf") is not None:
        return text
    return text.replace("`hf ", f"`{shlex.quote(sys.executable)} -m huggingface_hub.cli.hf ")


def few(names: Sequence[str], most: int = 3) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def in_ranges(modules: Iterable[str]) -> list[str]:
    """Patterns of the language of ``--keep-bf16`` that match these modules and no other: ``blocks.[3:6].proj``.

    Args:
        modules: Names. Those that differ only in their first number, and count on, become one pattern.
    """
    found: dict[tuple[str, str], dict[int, str]] = {}
    for name in modules:
        parts = name.split(".")
        at = next((at for at, part in enumerate(parts) if part == "0" or _NUMBER.fullmatch(part)), len(parts))
        number = int(parts[at]) if at < len(parts) else 0
        found.setdefault((".".join(parts[:at]), ".".join(parts[at + 1 :])), {})[number] = name
    patterns = []
    for (before, behind), names in found.items():
        starts = [number for number in sorted(names) if number - 1 not in names]
        for start in starts:
            end = next(number for number in itertools.count(start) if number not in names)
            segments = [before, f"[{start}:{end}]", behind]
            patterns.append(names[start] if end == start + 1 else ".".join(filter(None, segments)))
    return patterns


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of the known words that somebody who wrote another may have meant; None if none is like it."""
    from difflib import get_close_matches  # only where something was misspelt

    found = get_close_matches(word.lower().replace("_", "-"), known, n=1, cutoff=0.7)  # gpu is not cpu
    return found[0] if found else None


def printable(text: str) -> str:
    """Text that a terminal cannot act on: control, bidi and unencodable characters are escaped. No line is endless."""
    rest = len(text) - _LINE_CHARS
    kept = text[:_LINE_CHARS]
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in kept)
    return f"{shown} ... and {rest} characters more" if rest > 0 else shown


def general(words: str) -> str:
    """Words without what differs between faults of one kind."""
    return _PARTICULAR.sub("#", words)


def by_kind(faults: Sequence[str]) -> list[str]:
    """Faults of the form ``PLACE: WORDS``, one line for each kind, with the count and the first places.

    Args:
        faults: Each in a line; the order of the kinds is that of their first ones.
    """
    kinds: dict[tuple[bool, str], list[tuple[str, str]]] = {}
    for fault in faults:
        place, colon, words = fault.partition(": ")
        kind = bool(colon), general(words.replace(place, "") if colon else fault)
        kinds.setdefault(kind, []).append((place, words if colon else fault))
    lines = []
    for members in kinds.values():
        place, words = members[0]
        if len(members) == 1:
            lines.append(words if words == place else f"{place}: {words}")
            continue
        differ = ", for the first" if len({one for _, one in members}) > 1 else ""
        lines.append(f"{len(members)} places: {words}{differ}: {few([one for one, _ in members])}")
    return lines
