"""The rows of a family's table, and the helpers that the tables are written with. Pure, no torch."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

Swap = Literal["never", "always", "last block"]
Split = Literal["whole", "thirds", "columns and rest"]


class Row(NamedTuple):
    """One native module or parameter, and the diffusers modules whose rows it holds.

    ``{}`` stands for the number of a block, once in every name of a row or in none.

    Attributes:
        native: The name in ComfyUI's model, without a prefix.
        members: diffusers' modules in the order of their rows.
        original: The name in the model's own repository; mostly the same.
        split: Who holds which rows. ``thirds``: three equal parts. ``columns and rest``: three parts with as many rows
            as the module has columns, then what is left.
        swap: Whether the two halves of the rows change places: the native module makes shift and scale, diffusers'
            makes scale and shift.
        norm: A norm, whose one tensor is also known as ``.scale``.
        parameter: A tensor by its whole name, without a module.
    """

    native: str
    members: tuple[str, ...]
    original: str
    split: Split = "whole"
    swap: Swap = "never"
    norm: bool = False
    parameter: bool = False


def module(native: str, name: str, original: str | None = None, *, swap: Swap = "never") -> Row:
    """A native module that is one of diffusers'."""
    return Row(native, (name,), original or native, swap=swap)


def norm(native: str, name: str, original: str | None = None) -> Row:
    """A norm."""
    return Row(native, (name,), original or native, norm=True)


def parameter(native: str, name: str | None = None) -> Row:
    """A parameter that is no module's ``.weight``; without another name diffusers calls it the same."""
    return Row(native, (name or native,), native, parameter=True)


def thirds(native: str, names: tuple[str, str, str], original: str | None = None) -> Row:
    """A native module that holds three of diffusers', one after the other: q, k and v."""
    return Row(native, names, original or native, split="thirds")


def columns_and_rest(native: str, names: tuple[str, str, str, str]) -> Row:
    """A native module that holds q, k and v, each as high as the module is wide, and one more with the other rows."""
    return Row(native, names, native, split="columns and rest")


def same(*names: str) -> list[Row]:
    """Modules that both namings call the same."""
    return [module(name, name) for name in names]


def within(native: str, name: str, rows: Iterable[Row], original: str | None = None) -> list[Row]:
    """The same rows in a part of the model: with its names in front of theirs."""
    return [
        row._replace(
            native=f"{native}.{row.native}",
            members=tuple(f"{name}.{member}" for member in row.members),
            original=f"{original or native}.{row.original}",
        )
        for row in rows
    ]


def embedder(native: str, name: str) -> list[Row]:
    """The two layers that embed a number or a vector, as Black Forest Labs and diffusers call them."""
    return [module(f"{native}.in_layer", f"{name}.linear_1"), module(f"{native}.out_layer", f"{name}.linear_2")]
