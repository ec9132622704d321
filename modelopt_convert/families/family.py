"""A model family: one table of rows, asked both ways. Pure, no torch."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from modelopt_convert.families.rows import Row
from modelopt_convert.run.errors import InputError

Spelling = Literal["diffusers", "comfyui", "original"]
SPELLINGS: tuple[Spelling, ...] = ("diffusers", "comfyui", "original")
# A number as names have it. Another spelling of it would not come back.
_NUMBER = re.compile(r"(0|[1-9][0-9]{0,8})")
# Roles with dots in them: ModelOpt's calibration state, bitsandbytes' companions. Other dots are an unknown module's.
_DOTTED = ("input_quantizer.", "weight_quantizer.", "output_quantizer.", "weight.")


class Member(NamedTuple):
    """Rows of one native module that are one diffusers module.

    Attributes:
        module: The name in diffusers, such as ``transformer_blocks.0.attn.to_q``.
        first: The first of its rows in the native module.
        rows: How many rows it has.
    """

    module: str
    first: int
    rows: int


class _Place(NamedTuple):
    row: Row
    which: int = 0


@dataclass(frozen=True, slots=True)
class Family:
    """The names of one architecture.

    Every name is without a prefix. *Native* names are those of ComfyUI's model or of the model's own repository, which
    mostly are the same; both are understood.

    Attributes:
        name: For reports, such as ``flux1``.
        title: For people, such as ``FLUX.1``.
        class_names: diffusers' classes with these names.
        rows: The table.
        marks: Modules by diffusers' names that all of the family's checkpoints have, and together no other family's.
        spellings: Whose names there are; without ``original`` the model's own repository has diffusers' names.
        original_norm: What the model's own repository calls the tensor of a norm.
        beside: Names, by their start, of what lies beside the transformer under its prefix: and what it is.
        blocks: The number of blocks, where a row is another in the last one; ``recognise`` finds it.
    """

    name: str
    title: str
    class_names: tuple[str, ...]
    rows: tuple[Row, ...]
    marks: tuple[str, ...]
    spellings: tuple[Spelling, ...] = SPELLINGS
    original_norm: Literal["weight", "scale"] = "weight"
    beside: Mapping[str, str] = field(default_factory=dict)
    blocks: int | None = None
    _natives: dict[str, _Place] = field(init=False, repr=False, compare=False)
    _members: dict[str, _Place] = field(init=False, repr=False, compare=False)
    _stacks: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Index the table by every name."""
        natives = {name: _Place(row) for row in self.rows for name in (row.native, row.original)}
        members = {name: _Place(row, index) for row in self.rows for index, name in enumerate(row.members)}
        stacks = {name.partition("{}")[0] for name in (*natives, *members) if "{}" in name}
        object.__setattr__(self, "_natives", natives)
        object.__setattr__(self, "_members", members)
        object.__setattr__(self, "_stacks", tuple(sorted(stacks)))

    @property
    def stacks(self) -> tuple[str, ...]:
        """What stands in front of the numbers of blocks, in all spellings."""
        return self._stacks

    @property
    def needs_blocks(self) -> bool:
        """Whether ``swapped`` has to know the number of blocks."""
        return any(row.swap == "last block" for row in self.rows)

    def members(self, native: str, rows: int, columns: int) -> tuple[Member, ...] | None:
        """What a native module holds.

        Args:
            native: The native module.
            rows: The rows of its weight, without padding.
            columns: The columns of its weight: values, not bytes, and without padding.

        Returns:
            diffusers' modules in the order of their rows, which together are all rows; None if the name is unknown.

        Raises:
            InputError: ``family.rows``: no module of this name has so many rows.
        """
        place, number = self._find(self._natives, native)
        if place is None or place.row.parameter:
            return None
        row = place.row
        sizes = [rows]
        if row.split == "thirds":
            sizes = [rows // 3] * 3
        elif row.split == "columns and rest":
            sizes = [columns] * 3 + [rows - 3 * columns]
        halves = row.swap != "never" and self.swapped(native)
        if sum(sizes) != rows or min(sizes) <= 0 or (halves and rows % 2):
            parts = "an even number of them" if halves else f"{' + '.join(row.members)} in them"
            if row.split == "columns and rest":
                parts = f"more than 3 x {columns}, and {parts}"
            raise InputError(
                f"module {native!r}: expected rows of {self.title} ({parts.replace('{}', number)}), found {rows}",
                code="family.rows",
                hint=f"the file is damaged, or another model with names of {self.title}",
            )
        firsts = [sum(sizes[:index]) for index in range(len(sizes))]
        return tuple(map(Member, self.fused(native), firsts, sizes))

    def swapped(self, native: str) -> bool:
        """Whether the two halves of a native module's rows are the other way round than in diffusers' module.

        Raises:
            ValueError: The answer depends on the number of blocks, and this family came without it.
        """
        place, number = self._find(self._natives, native)
        if place is None or place.row.swap == "never":
            return False
        if place.row.swap == "always":
            return True
        if self.blocks is None:
            raise ValueError(f"{native}: take the family from recognise(), which counts the blocks")
        return int(number) == self.blocks - 1

    def fused(self, native: str) -> tuple[str, ...]:
        """The names of what a native module holds, in the order of rows; none if its own name is unknown."""
        place, number = self._find(self._natives, native)
        if place is None or place.row.parameter:
            return ()
        return tuple(name.replace("{}", number) for name in place.row.members)

    def native(self, module: str, spelling: Spelling) -> tuple[str, int] | None:
        """Where a diffusers module is.

        Args:
            module: Its name in diffusers.
            spelling: Whose names are asked for. Those of ``diffusers`` are the module's own.

        Returns:
            The native module, and which of its members this is; None if the name is unknown.
        """
        place, number = self._find(self._members, module)
        if place is None or place.row.parameter:
            return None
        return self._spelled(place, number, module, spelling)

    def tensor(self, native_tensor: str) -> tuple[str, ...] | None:
        """The names that diffusers has for a native tensor: one for each member of its module, in the order of rows.

        The last part is any role that a module's tensor can have, such as ``.bias`` or ``.weight_scale_2``.

        Returns:
            The names; None if the module is unknown.
        """
        for module, role in _cuts(native_tensor):
            place, number = self._find(self._natives, module)
            if place is not None and place.row.parameter == (not role):
                role = "weight" if place.row.norm and role == "scale" else role
                return tuple(_joined(name.replace("{}", number), role) for name in place.row.members)
        return None

    def native_tensor(self, diffusers_tensor: str, spelling: Spelling) -> tuple[str, int] | None:
        """The native name of a diffusers tensor, the reverse of ``tensor``.

        Returns:
            The name, and which member of the native module the tensor's rows are; None if the module is unknown.
        """
        for module, role in _cuts(diffusers_tensor):
            place, number = self._find(self._members, module)
            if place is not None and place.row.parameter == (not role):
                name, index = self._spelled(place, number, module, spelling)
                if place.row.norm and spelling == "original" and role == "weight":
                    role = self.original_norm
                return _joined(name, role), index
        return None

    def count(self, module: str, spelling: Spelling) -> tuple[str, str] | None:
        """The stack of blocks and the number in it that a module's name has, in one spelling; None without either."""
        names = self._members if spelling == "diffusers" else self._natives
        place, number = self._find(names, module)
        if place is None or not number:
            return None
        stack = next(one for one in self._stacks if module.startswith(f"{one}{number}"))
        return stack.removesuffix("."), number

    def _spelled(self, place: _Place, number: str, module: str, spelling: Spelling) -> tuple[str, int]:
        if spelling == "diffusers":
            return module, 0
        name = place.row.original if spelling == "original" else place.row.native
        return name.replace("{}", number), place.which

    def _find(self, table: Mapping[str, _Place], name: str) -> tuple[_Place | None, str]:
        """The row of a name, and the number of the block in it."""
        if "{" in name:
            return None, ""
        for stack in self._stacks:
            if name.startswith(stack):
                number, dot, rest = name.removeprefix(stack).partition(".")
                if _NUMBER.fullmatch(number) and (place := table.get(f"{stack}{{}}{dot}{rest}")):
                    return place, number
        return table.get(name), ""


def _cuts(tensor: str) -> Iterator[tuple[str, str]]:
    """What may be module and role in a tensor's name, from the longest module to the shortest."""
    yield tensor, ""
    at = tensor.rfind(".")
    while at > 0:
        role = tensor[at + 1 :]
        if "." not in role or role.startswith(_DOTTED):
            yield tensor[:at], role
        at = tensor.rfind(".", 0, at)


def _joined(module: str, role: str) -> str:
    return f"{module}.{role}" if role else module
