"""The proof's numbers by kind of module, for the model card. Pure; the same text on every machine."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from modelopt_convert.report.report import ModuleReport

_DIGITS = 10_000  # as many as mopt.json keeps; summed as integers, so that the order does not matter


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """The modules of one kind, such as every block's ``attn.to_q``.

    Attributes:
        kind: Their name, block numbers replaced by ``*``.
        modules: How many there are.
        codes: Sampled codes in all.
        codes_equal: Those that the base reproduces.
        mean_error: Mean relative error of the modules, in ten-thousandths.
        max_error: The largest, likewise.
    """

    kind: str
    modules: int
    codes: int
    codes_equal: int
    mean_error: int
    max_error: int


def kind_of(module: str) -> str:
    """A module's name with its block numbers replaced by ``*``: those after ``blocks``, and not ``net.0``."""
    return re.sub(r"(blocks\.)[0-9]+(?=\.|$)", r"\1*", module)


def error_rows(modules: Mapping[str, ModuleReport], packed: Collection[str]) -> list[ErrorRow]:
    """One row per kind of packed module that has numbers, sorted by kind."""
    kinds: dict[str, list[tuple[ModuleReport, int]]] = {}
    for name in packed:
        one = modules.get(name)
        if one is not None and one.relative_error is not None:
            kinds.setdefault(kind_of(name), []).append((one, round(one.relative_error * _DIGITS)))
    return [
        ErrorRow(
            kind=kind,
            modules=len(members),
            codes=sum(one.codes for one, _ in members),
            codes_equal=sum(one.codes_equal for one, _ in members),
            mean_error=round(sum(error for _, error in members) / len(members)),
            max_error=max(error for _, error in members),
        )
        for kind, members in sorted(kinds.items())
    ]


def error_table(modules: Mapping[str, ModuleReport], packed: Collection[str]) -> list[str]:
    """The rows as lines of Markdown; none where nothing was measured."""
    rows = error_rows(modules, packed)
    if not rows:
        return []
    lines = ["| packed modules | count | codes reproduced | mean error | largest error |", "|---|---|---|---|---|"]
    for row in rows:
        # Rounded down, so that 100.00% means all.
        share = f"{row.codes_equal * 10_000 // row.codes / 100:.2f}%" if row.codes else "-"
        lines.append(
            f"| `{row.kind}` | {row.modules} | {share} | {row.mean_error / _DIGITS:.4f} | "
            f"{row.max_error / _DIGITS:.4f} |"
        )
    return lines
