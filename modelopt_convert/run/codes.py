"""What every code of an error, a warning or a fault means, and what to do: the table codes.toml. No torch."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from modelopt_convert.run.errors import UsageError
from modelopt_convert.run.text import nearest, shown

_TABLE = Path(__file__).resolve().parent / "codes.toml"


@dataclass(frozen=True, slots=True)
class Explanation:
    """One code in words.

    Attributes:
        code: The code.
        means: What it means.
        todo: What to do.
    """

    code: str
    means: str
    todo: str


def explanations() -> dict[str, Explanation]:
    """Every code that mopt can give, sorted."""
    found: dict[str, list[str]] = tomllib.loads(_TABLE.read_text(encoding="utf-8"))
    return {code: Explanation(code, *words) for code, words in sorted(found.items())}


def explain(code: str) -> Explanation:
    """One code in words.

    Raises:
        UsageError: There is no such code.
    """
    known = explanations()
    if code not in known:
        near = nearest(code.replace("-", "_"), [one.replace("_", "-") for one in known])
        meant = f"did you mean {near.replace('-', '_')}?" if near else "docs/errors.md lists all"
        raise UsageError("CODE", f"{shown(code)} is no code of mopt's; {meant}")
    return known[code]
