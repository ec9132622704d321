"""What the page takes out of a report, with whatever is missing or odd left out. Pure.

Names come from the checkpoint and may be hostile: all that a page shows of them goes through ``visible``.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelopt_convert.report.words import UNCHANGED_WORDS

_DIGITS = re.compile(r"([0-9]+)")
_NAME_LIMIT = 300
_RANKS = {"fail": 0, "warn": 1, "other": 2, "part": 3, "pass": 4}


@dataclass(frozen=True, slots=True)
class Module:
    """One entry of the report's ``modules``, as far as it could be read.

    Attributes:
        name: As in the checkpoint, unescaped.
        data: The entry.
        status: What is said of it.
        tone: ``pass``, ``part`` (of sampled rows), ``warn``, ``fail`` or ``other``, which is grey.
        decode_error: Relative error against the base.
        kernel_error: Largest ``calc_diff`` of all probes of all backends.
    """

    name: str
    data: Mapping[str, Any]
    status: str
    tone: str
    decode_error: float | None
    kernel_error: float | None


def mapping(value: object) -> Mapping[str, Any]:
    """The value, or nothing where it is no object."""
    return value if isinstance(value, Mapping) else {}


def entries(value: object) -> Sequence[Any]:
    """The value, or nothing where it is no list."""
    return value if isinstance(value, list | tuple) else ()


def number(value: object) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def visible(value: object, limit: int = _NAME_LIMIT) -> str:
    """Text in which control, bidi and unencodable characters are spelled out; cut in the middle where too long."""
    words = str(value)
    if len(words) > limit:
        words = f"{words[: limit // 2]}\u2026{words[len(words) - limit // 2 :]}"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in words)


def show_number(value: object) -> str:
    """A number as people read it; a dash for none."""
    if value is None:
        return "\u2013"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else {math.inf: "\u221e", -math.inf: "-\u221e"}.get(value, "NaN")
    return visible(value)


def tone(status: object) -> str:
    """``pass``, ``warn``, ``fail`` or ``other``: what a status looks like."""
    word = str(status).lower()
    if word in ("fail", "failed", "broken", "error", "mismatch", "backend broken", "backends disagree"):
        return "fail"
    return word if word in ("pass", "warn") else "other"


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key under which block 10 comes after block 9."""
    parts = _DIGITS.split(name)
    # Compared as text where a hostile run of digits is too long to be a number.
    return tuple((0, int(part), "") if part.isdecimal() and len(part) < 19 else (1, 0, part) for part in parts)


def read_modules(found: Mapping[str, Any]) -> list[Module]:
    """Every module, the worst first.

    Args:
        found: What stands under ``verify`` in the report.
    """
    unseen = "as recorded" if found.get("proof") == UNCHANGED_WORDS else "not compared"
    # What is wrong with the layout of a module stands at its level alone: decoded as it is stored, it fits.
    levels = map(mapping, entries(found.get("levels")))
    failed = {str(words).partition(": ")[0] for level in levels for words in entries(level.get("failures"))}
    modules = [
        _read_module(str(name), mapping(data), unseen, is_failed=str(name) in failed)
        for name, data in mapping(found.get("modules")).items()
    ]
    return sorted(modules, key=badness)


def _read_module(name: str, data: Mapping[str, Any], unseen: str, *, is_failed: bool) -> Module:
    status = "fail" if is_failed else data.get("status")
    kind, word = tone(status), "not checked" if status is None else str(status)
    if kind == "pass":  # the status of a module that nothing was found against; it may be that nothing looked
        compared = str(data.get("compared"))
        kind, word = {"all": ("pass", "pass"), "sampled rows": ("part", "pass, sampled")}.get(
            compared, ("other", unseen)
        )
    probes = [mapping(probe) for each in mapping(data.get("probes")).values() for probe in mapping(each).values()]
    errors = [abs(value) for value in (number(probe.get("calc_diff")) for probe in probes) if value is not None]
    return Module(name, data, word, kind, number(data.get("relative_error")), max(errors, default=None))


def badness(module: Module) -> tuple[int, float, float, tuple[tuple[int, int, str], ...], str]:
    """A sort key: by status, then by decode error, then by kernel error, then by name."""
    decode, kernel = module.decode_error or 0.0, module.kernel_error or 0.0
    return _RANKS[module.tone], -decode, -kernel, natural(module.name), module.name
