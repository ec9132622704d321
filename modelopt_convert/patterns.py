"""Module globs: the pattern language of presets and ``--keep-bf16``. Pure, no regular expressions.

A pattern is dotted segments. ``*`` stands for any characters but a dot; ``**`` alone in a segment for any number of
segments, none included; ``[a:b]`` for the indices ``range(depth)[a:b]`` of a block list, where depth is how many blocks
the model has there: ``blocks.[:3].**`` the first three, ``blocks.[-3:].**`` the last three. All else is literal.
Matching is by table, not by regular expression: a hostile name costs at most len(pattern) x len(name) steps.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from modelopt_convert.errors import InputError

_RANGE = re.compile(r"\[(-?[0-9]{1,6})?:(-?[0-9]{1,6})?\]")


def module_of(tensor: str) -> str:
    """The module a tensor belongs to: its name less the last part; empty for a parameter of the model itself."""
    return tensor.rpartition(".")[0]


def check_pattern(pattern: str) -> None:
    """Refuse what cannot be meant.

    Raises:
        InputError: ``preset.pattern``: an empty segment, ``**`` inside a segment, or a bracket that is not ``[a:b]``.
    """
    for segment in pattern.split("."):
        bracket = "[" in segment or "]" in segment
        if not segment or (segment != "**" and "**" in segment) or (bracket and not _RANGE.fullmatch(segment)):
            raise InputError(
                f"pattern {pattern!r}: {segment!r} is not a segment",
                code="preset.pattern",
                hint="segments are names with * (within a segment), ** (alone), or a block range such as [:3] or [-3:]",
            )


class PatternMatcher:
    """Matches patterns against the modules of one model, whose block lists give the depths.

    Args:
        modules: All module names of the model.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        """Count the blocks under each prefix."""
        self.modules = tuple(modules)
        self._depths: dict[str, int] = {}
        for module in self.modules:
            parts = module.split(".")
            for position, part in enumerate(parts):
                if part.isascii() and part.isdecimal() and len(part) <= 6:
                    prefix = ".".join(parts[:position])
                    self._depths[prefix] = max(self._depths.get(prefix, 0), int(part) + 1)

    def matches(self, pattern: str, name: str) -> bool:
        """Whether the whole ``name`` matches ``pattern``."""
        parts = name.split(".") if name else []
        # reachable[j]: the segments so far can stand for the first j parts of the name.
        reachable = [True] + [False] * len(parts)
        for segment in pattern.split("."):
            following = [False] * (len(parts) + 1)
            if segment == "**":
                following[0] = reachable[0]
                for j in range(1, len(parts) + 1):
                    following[j] = reachable[j] or following[j - 1]
            else:
                for j, part in enumerate(parts):
                    if reachable[j]:
                        following[j + 1] = self._segment_matches(segment, part, parts[:j])
            reachable = following
        return reachable[-1]

    @staticmethod
    def ignores(entry: str, name: str) -> bool:
        """Whether an ``ignore`` entry of a config.json covers ``name``: there ``*`` crosses dots."""
        return _wildcard(entry, name)

    def find(self, pattern: str) -> list[str]:
        """The modules that match, in their order.

        Raises:
            InputError: ``preset.no_match``: none does; the message shows the three nearest names.
        """
        found = [module for module in self.modules if self.matches(pattern, module)]
        if not found:
            near = ", ".join(nearest(pattern, self.modules))
            raise InputError(
                f"pattern {pattern!r} matches no module of the export or the base",
                code="preset.no_match",
                hint=f"the nearest names are {near}",
            )
        return found

    def _segment_matches(self, segment: str, part: str, before: list[str]) -> bool:
        if bounds := _RANGE.fullmatch(segment):
            if not (part.isascii() and part.isdecimal() and len(part) <= 6):
                return False
            depth = self._depths.get(".".join(before), 0)
            first, last = (int(bound) if bound else None for bound in bounds.groups())
            return int(part) in range(depth)[first:last]
        return _wildcard(segment, part)


def nearest(pattern: str, names: Collection[str], count: int = 3) -> list[str]:
    """The ``count`` names most like ``pattern``, at most one for each place in the block structure."""
    places: dict[str, str] = {}
    for name in names:
        places.setdefault(".".join("*" if part.isdecimal() else part for part in name.split(".")), name)
    close = difflib.get_close_matches(pattern, places, n=count, cutoff=0.0)
    return [places[place] for place in close]


def _wildcard(glob: str, text: str) -> bool:
    """``*`` matching in one segment: pieces between stars are found greedily from the left."""
    head, star, rest = glob.partition("*")
    if not star:
        return glob == text
    if not text.startswith(head):
        return False
    *middle, tail = rest.split("*")
    position = len(head)
    for piece in middle:
        found = text.find(piece, position)
        if found < 0:
            return False
        position = found + len(piece)
    return len(text) - len(tail) >= position and text.endswith(tail)


def stars(spelling: str) -> list[str | None]:
    """The ``*`` segments of a spelling, in order: None for a plain one, the config key of a ``*+key``."""
    segments = [segment for segment in spelling.split(".") if segment == "*" or segment.startswith("*+")]
    return [segment[2:] or None for segment in segments]


def rename(name: str, source: str, target: str, config: Mapping[str, Any]) -> str | None:
    """``name`` in another spelling: ``*`` segments of ``source`` are put in place of those of ``target``, in order.

    A ``*+key`` of ``target`` adds the number that config.json has under ``key``: some runtimes count the blocks of two
    lists through.

    Returns:
        The new name, or None if ``name`` does not match ``source`` segment by segment, or there is no such number.
    """
    parts, wanted = name.split("."), source.split(".")
    if len(parts) != len(wanted):
        return None
    captured: list[str] = []
    for part, segment in zip(parts, wanted, strict=True):
        if segment == "*":
            captured.append(part)
        elif part != segment:
            return None
    values = iter(captured)
    renamed: list[str] = []
    for segment in target.split("."):
        if segment == "*":
            renamed.append(next(values))
        elif segment.startswith("*+"):
            value, offset = next(values), config.get(segment[2:])
            if not value.isdecimal() or type(offset) is not int:
                return None
            renamed.append(str(int(value) + offset))
        else:
            renamed.append(segment)
    return ".".join(renamed)
