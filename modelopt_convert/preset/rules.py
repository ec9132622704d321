"""The rules of drafted presets, which are data (rules.toml), and how they are compared with names. Pure."""

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, slots=True)
class KeepRule:
    """One reason why a Linear stays in BF16.

    Attributes:
        reason: In words.
        words: What one part of the module's name has.
        names: Else last parts of names, of modules beside ``experts``.
    """

    reason: str
    words: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class JoinedRule:
    """Siblings that engines make one GEMM of.

    Attributes:
        names: Last parts of their names; the first is the query, where ``shared``.
        shared: Whether ModelOpt's exporter gives them one global scale where they have the same input.
    """

    names: tuple[str, ...]
    shared: bool


@dataclass(frozen=True, slots=True)
class Rules:
    """All of rules.toml.

    Attributes:
        least_blocks: Of so many blocks the first and the last are kept.
        keep: In the order in which they are tried.
        final: Words of a final projection.
        joined: In order.
        cross_words: Words of an attention whose query has another input than keys and values.
        cross_names: Names of such.
    """

    least_blocks: int
    keep: tuple[KeepRule, ...]
    final: tuple[str, ...]
    joined: tuple[JoinedRule, ...]
    cross_words: tuple[str, ...]
    cross_names: tuple[str, ...]


@cache
def rules() -> Rules:
    """The rules as the file has them."""
    read = tomllib.loads(Path(__file__).with_name("rules.toml").read_text(encoding="utf-8"))
    return Rules(
        least_blocks=read["least_blocks"],
        keep=tuple(
            KeepRule(one["reason"], tuple(one.get("words", ())), tuple(one.get("names", ()))) for one in read["keep"]
        ),
        final=tuple(read["outside"]["final"]),
        joined=tuple(JoinedRule(tuple(one["names"]), one["shared"]) for one in read["fused"]),
        cross_words=tuple(read["cross"]["words"]),
        cross_names=tuple(read["cross"]["names"]),
    )


def has_words(part: str, wanted: Iterable[str]) -> bool:
    """Whether a part of a name has one of the words, or phrases of words: ``x_embedder`` has x and embedder."""
    words = f" {' '.join(re.findall('[a-z]+', part.lower()))} "
    return any(f" {one} " in words for one in wanted)
