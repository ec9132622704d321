"""Lists of blocks in a model's module names, and patterns with a ``*`` in place of the block's number. Pure.

The names of a header need not be those of a model: any text is taken, and a pattern says no more than the names do.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

# As deep as patterns count blocks.
_LEVELS = 32
_INDEX = re.compile(r"[0-9]{1,6}")
_LEAST_ALIKE = 3  # modules in a list without blocks: two may be the two Linears of a Sequential


@dataclass(slots=True)
class _Children:
    """The numbered children of one prefix: those that are modules themselves, and those with modules below."""

    leaves: set[str] = field(default_factory=set)
    blocks: set[str] = field(default_factory=set)

    def are_blocks(self) -> bool:
        return len(self.blocks) > len(self.leaves - self.blocks)

    def are_alike(self) -> bool:
        count = len(self.leaves)
        return not self.blocks and count >= _LEAST_ALIKE and self.leaves == {str(number) for number in range(count)}


class BlockLists:
    """The block lists of a model.

    A list is a prefix whose numbered children have modules below them, most of them at least. ``net.0.proj`` beside
    ``net.2`` is none.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        """Find the lists.

        Args:
            modules: Names of the modules that have a weight.
        """
        found: dict[str, _Children] = {}
        for module in modules:
            parts = module.split(".")
            for position in _numbers(parts):
                children = found.setdefault(".".join(parts[:position]), _Children())
                (children.blocks if position + 1 < len(parts) else children.leaves).add(parts[position])
        self._found: Mapping[str, _Children] = found

    def outermost(self, module: str) -> tuple[str, int] | None:
        """The prefix of the first block list that a module lies in, and the block's number; None outside of all."""
        parts = module.split(".")
        for position in _numbers(parts):
            prefix = ".".join(parts[:position])
            if position + 1 < len(parts) and self._found[prefix].are_blocks():
                return prefix, int(parts[position])
        return None

    def depth(self, prefix: str) -> int:
        """The number of blocks of a list, as patterns count them."""
        return max(map(int, self._found[prefix].blocks)) + 1

    def pattern(self, module: str) -> str:
        """The module's name as a pattern: ``*`` for the number of a block, and for what no pattern can spell."""
        parts = module.split(".")
        spelled = literal(module).split(".")
        for position in _numbers(parts):
            children = self._found[".".join(parts[:position])]
            if children.are_blocks() if position + 1 < len(parts) else children.are_alike():
                spelled[position] = "*"
        return ".".join(spelled)


def literal(module: str) -> str:
    """The pattern that is nearest to a name: patterns cannot spell brackets, stars and empty parts."""
    return ".".join(re.sub(r"[*\[\]]+", "*", part) or "*" for part in module.split("."))


def _numbers(parts: list[str]) -> list[int]:
    return [position for position, part in enumerate(parts[:_LEVELS]) if part.isascii() and _INDEX.fullmatch(part)]
