"""What engines are known not to make right of a checkpoint that mopt writes: the facts of limits.toml. No torch."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from modelopt_convert.formats.format import Algorithm
from modelopt_convert.formats.table import FORMATS

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
        unequal: Whether it holds only where parts of a fused module have global scales of their own, as in exports.
        shown: Whether the engine's loader was run, or its code read.
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
    unequal: bool = False

    @property
    def name(self) -> str:
        """Engine and version."""
        return f"{self.engine}@{self.version}"

    @property
    def is_broken(self) -> bool:
        """Whether what the engine does with the checkpoint is of no use."""
        return self.grade != "loss"

    @property
    def words(self) -> str:
        """The fact in one line."""
        figure = f" ({self.figure})" if self.figure else ""
        return f"{self.name} {_WORDS[self.grade]}: it {self.what}{figure}"


@lru_cache
def all_limits() -> tuple[Limit, ...]:
    """Every fact, in the order of the file."""
    found = tomllib.loads((Path(__file__).parent / "limits.toml").read_text(encoding="utf-8"))
    return tuple(Limit(**(one | {"formats": tuple(one["formats"])})) for one in found["limit"])


def declared(config: Mapping[str, Any]) -> Algorithm | None:
    """The format that a config.json declares, if it is one of ours."""
    found = config.get("quantization_config")
    algorithm = found.get("quant_algo") if isinstance(found, dict) else None
    return next((name for name, one in FORMATS.items() if one.quant_algo == algorithm), None)


def limits(config: Mapping[str, Any], algorithm: Algorithm) -> tuple[Limit, ...]:
    """What is known of a model in one format.

    Args:
        config: config.json of the transformer.
        algorithm: The format.
    """
    found = [
        one
        for one in all_limits()
        if one.class_name in ("*", config.get("_class_name"))
        and algorithm in one.formats
        and (one.having is None or config.get(one.having) is not None)
        and all(config.get(key) == value for key, value in one.values.items())
    ]
    of_class = {one.engine for one in found if one.class_name != "*"}
    return tuple(one for one in found if one.class_name != "*" or one.engine not in of_class)
