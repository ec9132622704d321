"""Module globs: the pattern language of presets and ``--keep-bf16``. Pure, no regular expressions.

A pattern is segments with dots between them. ``*`` stands for any characters but a dot. ``**``, alone in a segment,
stands for any number of segments, none included. ``[a:b]`` stands for the indices ``range(depth)[a:b]`` of a block list
of depth blocks: ``blocks.[:3].**`` is the first three, ``blocks.[-3:].**`` the last three. All else is literal.
Matching is by table, not by regular expression: a hostile name costs at most len(pattern) x len(name) steps.
"""

import difflib
import heapq
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from modelopt_convert.checkpoint.names import natural_key
from modelopt_convert.run.errors import InputError

_RANGE = re.compile(r"\[(-?[0-9]{1,6})?:(-?[0-9]{1,6})?\]")
# No model has a block list deeper than this. A hostile name of thousands of parts would make a table of as many.
_LEVELS = 32
# difflib compares character by character, which takes a millisecond for each name that a message may offer.
_COMPARED, _COMPARED_CHARS = 200, 200
# How many steps of globs over names are taken; a step takes a microsecond at worst.
_MAX_STEPS = 20_000_000
_MAX_NAME = 4096  # characters, as many as the header allows bytes


def check_pattern(pattern: str) -> str:
    """The same pattern; what cannot be meant is refused.

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
    return pattern


class PatternMatcher:
    """Matches patterns against the modules of one model, whose block lists give the depths.

    Args:
        modules: All module names of the model.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        """Keep the names; blocks are counted when a pattern asks for them."""
        self.modules = tuple(modules)
        # The number of each prefix, by the number of the prefix without its last part, and that part; 0 is the empty
        # prefix. The text of all prefixes of a name would take the square of the name's length.
        self._children: dict[tuple[int, str], int] = {}
        self._depths: dict[int, int] | None = None

    def matches(self, pattern: str, name: str) -> bool:
        """Whether the whole ``name`` matches ``pattern``."""
        parts = name.split(".") if name else []
        numbers: list[int] | None = None
        # How many of the name's first parts the segments so far can stand for: every possible count.
        reached: Sequence[int] = (0,)
        for segment in pattern.split("."):
            if segment == "**":
                reached = range(min(reached), len(parts) + 1)
            elif bounds := _RANGE.fullmatch(segment):
                if numbers is None:
                    numbers = self._numbers(parts)
                first, last = (int(bound) if bound else None for bound in bounds.groups())
                reached = [
                    j + 1 for j in reached if j < len(numbers) and self._within(parts[j], numbers[j], first, last)
                ]
            else:
                reached = [j + 1 for j in reached if j < len(parts) and _wildcard(segment, parts[j])]
            if not reached:
                return False
        return reached[-1] == len(parts)

    def find(self, pattern: str) -> list[str]:
        """The modules that match, in their order.

        Raises:
            InputError: ``preset.no_match``: none does; the message shows the three nearest names.
        """
        found = [module for module in self.modules if self.matches(pattern, module)]
        if not found:
            near = ", ".join(nearest(pattern, self.modules)) or "too long to be shown"
            raise InputError(
                f"pattern {pattern!r} matches no module of the export or the base",
                code="preset.no_match",
                hint=f"the nearest names are {near}",
            )
        return found

    def _numbers(self, parts: list[str]) -> list[int]:
        """The number of the prefix before each part, up to the last prefix that the model's block lists have."""
        if self._depths is None:
            self._depths = self._count()
        numbers = [0]
        for part in parts[: min(_LEVELS, len(parts)) - 1]:
            number = self._children.get((numbers[-1], part))
            if number is None:
                break
            numbers.append(number)
        return numbers if parts else []

    def _count(self) -> dict[int, int]:
        """How many blocks there are behind each prefix."""
        depths: dict[int, int] = {}
        for module in self.modules:
            parts = module.split(".", _LEVELS)[:_LEVELS]
            blocks = [position for position, part in enumerate(parts) if _is_block(part)]
            number = 0
            for position, part in enumerate(parts[: blocks[-1] + 1] if blocks else ()):
                if _is_block(part):
                    depths[number] = max(depths.get(number, 0), int(part) + 1)
                if position < blocks[-1]:
                    number = self._children.setdefault((number, part), len(self._children) + 1)
        return depths

    def _within(self, part: str, number: int, first: int | None, last: int | None) -> bool:
        depth = self._depths.get(number, 0) if self._depths is not None else 0
        return _is_block(part) and int(part) in range(depth)[first:last]


def ignored(entries: object, names: Collection[str], *, path: str) -> set[str]:
    """The names that an ``ignore`` of a config.json covers; in ``ignore``, ``*`` crosses dots.

    Args:
        entries: What config.json has; anything but a list of strings covers nothing.
        names: Module names.
        path: The config, for the message.

    Raises:
        InputError: ``config.ignore``: so many globs and names that comparing them would take minutes or hours.
    """
    listed = {entry for entry in entries if isinstance(entry, str)} if isinstance(entries, list) else set()
    found = listed.intersection(names)
    # A glob with more characters than the longest name that may occur covers no name.
    globs = [glob for glob in listed if "*" in glob and len(glob) - glob.count("*") <= _MAX_NAME]
    # Stars side by side count as one.
    pieces = [_split(glob) for glob in globs]
    steps = sum(map(len, pieces)) * len(names)
    if steps > _MAX_STEPS:
        raise InputError(
            f"{path}: expected an `ignore` of a few hundred patterns, found {len(globs)} for {len(names)} modules",
            code="config.ignore",
            path=path,
            hint="no exporter writes so many; list modules by name, without *",
        )
    return found | {name for name in names if any(_fits(piece, name) for piece in pieces)}


def _is_block(part: str) -> bool:
    return len(part) <= 6 and part.isascii() and part.isdecimal()


def nearest(pattern: str, names: Collection[str], count: int = 3) -> list[str]:
    """The ``count`` names most like ``pattern``, at most one for each place in the block structure."""
    places: dict[str, str] = {}
    for name in names:
        if len(name) <= _COMPARED_CHARS:
            places.setdefault(".".join("*" if part.isdecimal() else part for part in name.split(".")), name)
    if len(places) > _COMPARED:
        wanted = set(pattern.split("."))
        likely = heapq.nlargest(_COMPARED, places, key=lambda place: len(wanted.intersection(place.split("."))))
        places = {place: places[place] for place in likely}
    close = difflib.get_close_matches(pattern[:_COMPARED_CHARS], places, n=count, cutoff=0.0)
    return [places[place] for place in close]


def _wildcard(glob: str, text: str) -> bool:
    """Whether a glob matches the text of one segment."""
    return _fits(_split(glob), text) if "*" in glob else glob == text


def _split(glob: str) -> tuple[str, ...]:
    """What stands between the stars: the beginning, the end, and what is not empty between them."""
    head, *middle, tail = glob.split("*")
    return (head, *filter(None, middle), tail)


def _fits(pieces: Sequence[str], text: str) -> bool:
    """Whether the pieces between stars are found in the text, greedily from the left."""
    head, *middle, tail = pieces
    if not text.startswith(head):
        return False
    position = len(head)
    for piece in middle:
        found = text.find(piece, position)
        if found < 0:
            return False
        position = found + len(piece)
    return len(text) - len(tail) >= position and text.endswith(tail)


def siblings(groups: Sequence[Sequence[str]], modules: Collection[str]) -> Iterator[tuple[str, ...]]:
    """For each group of names, and each parent that has some of them, the modules of that name."""
    for group in groups:
        ends = tuple(f".{leaf}" for leaf in group)
        parents = {name.removesuffix(end) for name in modules for end in ends if name.endswith(end)}
        for parent in sorted(parents, key=natural_key):
            yield tuple(f"{parent}.{leaf}" for leaf in group if f"{parent}.{leaf}" in modules)


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
            if not _is_block(value) or type(offset) is not int:
                return None
            renamed.append(str(int(value) + offset))
        else:
            renamed.append(segment)
    return ".".join(renamed)
