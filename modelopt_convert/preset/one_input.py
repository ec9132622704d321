"""Which sibling Linears have the same input, as far as names and shapes tell. Pure.

The result is groups of names as presets have them: each name stands under one parent with the others of its group.
"""

from collections.abc import Iterable, Mapping, Sequence

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.preset.rules import has_words, rules

Linears = Mapping[str, TensorInfo]


def groups_with_one_input(linears: Linears, sets: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """The groups of a model.

    The query of an attention to something else has another input than keys and values. Where that is so under some
    parents only, the names of a group begin with the parent's.

    Args:
        linears: Weights by module.
        sets: Names that may belong together, a query first.
    """
    found: list[tuple[str, ...]] = []
    for names in sets:
        present: dict[str, tuple[str, ...]] = {}
        for parent in dict.fromkeys(name.rpartition(".")[0] for name in linears if "." in name):
            if have := tuple(name for name in names if f"{parent}.{name}" in linears):
                present[parent] = have
        joined = {parent: _with_one_input(parent, have, names[0], linears) for parent, have in present.items()}
        plain = tuple(name for name in names if any(name in one for one in joined.values()))
        if plain and _agrees(plain, present, joined):
            found.append(plain)
            continue
        for tail in dict.fromkeys(parent.rpartition(".")[2] for parent in joined):
            below = {parent: have for parent, have in present.items() if parent.endswith(f".{tail}")}
            group = tuple(name for name in names if any(name in joined[parent] for parent in below))
            if len(group) > 1 and not tail.isdecimal() and _agrees(group, below, joined):
                found.append(tuple(f"{tail}.{name}" for name in group))
    return found


def _with_one_input(parent: str, have: Sequence[str], query: str, linears: Linears) -> tuple[str, ...]:
    part = next((one for one in reversed(parent.split(".")) if not one.isdecimal()), "")
    if part in rules().cross_names or has_words(part, rules().cross_words):
        have = [name for name in have if name != query]
    columns = {linears[f"{parent}.{name}"].shape[1] for name in have}
    return tuple(have) if len(have) > 1 and len(columns) == 1 else ()


def _agrees(group: Sequence[str], present: Mapping[str, Sequence[str]], joined: Mapping[str, Sequence[str]]) -> bool:
    """Whether a group of names stands under every parent for what has one input there, or for one module alone."""
    meant = {parent: tuple(name for name in group if name in have) for parent, have in present.items()}
    return all(len(names) < 2 or names == tuple(joined[parent]) for parent, names in meant.items())
