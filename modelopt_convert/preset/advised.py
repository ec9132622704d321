"""The preset of a choice: another preset's, with the modules that were chosen in place of its quality set. Pure."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from modelopt_convert.checkpoint.names import natural_key
from modelopt_convert.formats.format import Algorithm
from modelopt_convert.preset.block_lists import BlockLists, literal
from modelopt_convert.preset.draft_text import basic_string
from modelopt_convert.preset.patterns import PatternMatcher
from modelopt_convert.preset.preset import LoadedPreset
from modelopt_convert.run.errors import InputError


def patterns_of(kept: Collection[str], free: Collection[str], modules: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Patterns that match what is kept, and nothing else that is free to be packed.

    All blocks of a list are a ``*``, blocks in a row a range, and other modules their names.

    Args:
        kept: Module names, some of ``free``.
        free: Modules that could be packed.
        modules: All of the model.

    Returns:
        By pattern what it stands for, in natural order.

    Raises:
        InputError: ``preset.draft``: a name cannot be told from others by a pattern.
    """
    lists, matcher = BlockLists(free), PatternMatcher(modules)
    wanted, could = frozenset(kept), frozenset(free)
    found: dict[str, tuple[str, ...]] = {}
    by_place: dict[str, list[str]] = {}
    for name in sorted(kept, key=natural_key):
        by_place.setdefault(lists.pattern(name), []).append(name)
    for place, members in by_place.items():
        for pattern in (place, *_runs(members, lists), *map(literal, members)):
            matched = tuple(name for name in matcher.modules if name in could and matcher.matches(pattern, name))
            done = {name for names in found.values() for name in names}
            if wanted.issuperset(matched) and not done.issuperset(matched):
                found[pattern] = matched
    missing = wanted.difference(*found.values())
    if missing:
        raise InputError(
            f"module {min(missing)[:200]!r}: no pattern tells it from others, since patterns spell no brackets "
            "and stars",
            code="preset.draft",
            hint="keep modules like it by a preset of your own",
        )
    return found


def _runs(members: Sequence[str], lists: BlockLists) -> Iterator[str]:
    """A pattern for each run of blocks with the same module in them."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in members:
        place = lists.outermost(name)
        if place is not None:
            prefix, number = place
            rest = name.removeprefix(f"{prefix}." if prefix else "").partition(".")[2]
            numbers.setdefault((prefix, rest), []).append(number)
    for (prefix, rest), found in numbers.items():
        for _, run in groupby(enumerate(sorted(found)), key=lambda one: one[1] - one[0]):
            blocks = [number for _, number in run]
            if len(blocks) > 1:
                start = f"{literal(prefix)}." if prefix else ""
                yield f"{start}[{blocks[0]}:{blocks[-1] + 1}].{literal(rest)}"


def advised_text(
    of: LoadedPreset, algorithm: Algorithm, source: str, patterns: Mapping[str, str], told: Sequence[str], place: Path
) -> str:
    """The TOML, ready for ``--preset ./FILE.toml``.

    Args:
        of: The preset that all else is taken from.
        algorithm: Whose sets are written.
        source: What they rest on.
        patterns: What is kept, with what there is to say of each.
        told: Lines for people, for its head.
        place: Where it is to lie.
    """
    preset, parent = of.preset, of.path
    if os.sep in parent or parent.endswith(".toml"):
        parent = f"{os.curdir}{os.sep}{os.path.relpath(parent, place.parent)}"
    licenses = {key: getattr(preset, key) for key in ("license", "license_name", "license_link")}
    lines = [
        *(f"# {line}" for line in told),
        f"extends = {basic_string(parent)}",
        f"name = {basic_string(f'{preset.name}-advised')}",
        *(f"{key} = {basic_string(value)}" for key, value in licenses.items() if value is not None),
        "",
        f"[{algorithm}]",
        'status = "candidate"',
        f"source = {basic_string(source)}",
        "# These would load packed; they are kept for what packing them does to the model's output.",
        "quality = [",
        *(f"  {basic_string(pattern)},  # {words}" for pattern, words in patterns.items()),
        "]",
        "",
    ]
    return "\n".join(lines)
