"""What engines are known not to make right of a checkpoint that mopt writes: the facts of limits.toml. No torch."""

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from modelopt_convert.formats.format import Algorithm
from modelopt_convert.formats.table import FORMATS, declares_dynamic_inputs

EngineName = Literal["sglang", "vllm-omni", "tensorrt-llm", "diffusers", "comfyui"]
DEFAULT: EngineName = "sglang"
Grade = Literal["fails", "wrong", "loss"]
_WORDS: Mapping[Grade, str] = {"fails": "fails to load it", "wrong": "loads it wrong", "loss": "loads it with a loss"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One fact about one version of an engine.

    Attributes:
        engine: Which.
        version: The one that was looked at.
        class_name: ``_class_name`` of config.json, or ``*`` for those of which the engine has no fact of their own.
        formats: Formats that it holds for.
        grade: What happens.
        what: How that comes; a sentence that begins with the engine.
        figure: What is off, and by how much.
        having: A key of config.json that must have a value, or none.
        values: What config.json must have under some keys.
        unless: What it must not have under others.
        repos: The bases that it holds for, where config.json cannot tell them; all, if there are none.
        unequal: Whether it holds only where parts of a fused module have global scales of their own, as in exports.
        dynamic: Whether it holds only where no module has an input scale and config.json says so.
        shown: Whether the engine's loader was run, or its code read.
        source: Where in the code.
    """

    engine: EngineName
    version: str
    class_name: str
    formats: tuple[Algorithm, ...]
    grade: Grade
    what: str
    shown: Literal["run", "read"]
    figure: str = ""
    having: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict, hash=False)
    unless: Mapping[str, Any] = field(default_factory=dict, hash=False)
    repos: tuple[str, ...] = ()
    unequal: bool = False
    dynamic: bool = False
    source: str = ""

    @property
    def name(self) -> str:
        """Engine and version."""
        return f"{self.engine}@{self.version}"

    @property
    def nearness(self) -> int:
        """Of several facts of one engine those that say most of the checkpoint count."""
        return 4 * self.dynamic + 2 * (self.class_name != "*") + bool(self.values or self.repos)

    @property
    def is_broken(self) -> bool:
        """Whether what the engine does with the checkpoint is of no use."""
        return self.grade != "loss"

    @property
    def words(self) -> str:
        """The fact in one line."""
        return f"{self.name} {self.verdict}"

    @property
    def verdict(self) -> str:
        """What happens and how, after the name of the engine."""
        figure = f" ({self.figure})" if self.figure else ""
        return f"{_WORDS[self.grade]}: it {self.what}{figure}"


@lru_cache
def all_limits() -> tuple[Limit, ...]:
    """Every fact, in the order of the file."""
    found = tomllib.loads((Path(__file__).parent / "limits.toml").read_text(encoding="utf-8"))
    return tuple(
        Limit(**(one | {"formats": tuple(one["formats"]), "repos": tuple(one.get("repos", ()))}))
        for one in found["limit"]
    )


def declared(config: Mapping[str, Any]) -> Algorithm | None:
    """The format that a config.json declares, if it is one of ours."""
    found = config.get("quantization_config")
    algorithm = found.get("quant_algo") if isinstance(found, dict) else None
    return next((name for name, one in FORMATS.items() if one.quant_algo == algorithm), None)


def limits(config: Mapping[str, Any], algorithm: Algorithm, repos: Collection[str] = ()) -> tuple[Limit, ...]:
    """What is known of a model in one format.

    Args:
        config: config.json of the transformer.
        algorithm: The format.
        repos: Hub ids of the base, as far as they are known.
    """
    found = [
        one
        for one in all_limits()
        if one.class_name in ("*", config.get("_class_name"))
        and algorithm in one.formats
        and (one.having is None or config.get(one.having) is not None)
        and (not one.dynamic or declares_dynamic_inputs(config))
        and all(config.get(key) == value for key, value in one.values.items())
        and not any(config.get(key) == value for key, value in one.unless.items())
        and (not one.repos or any(repo in repos for repo in one.repos))
    ]
    nearest = {one.engine: one.nearness for one in sorted(found, key=lambda one: one.nearness)}
    return tuple(one for one in found if one.nearness == nearest[one.engine])
