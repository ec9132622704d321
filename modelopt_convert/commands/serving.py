"""What is known of engines and a checkpoint: refused without consent where it is of no use there, told otherwise."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from modelopt_convert.commands.command import Warned
from modelopt_convert.engines.limits import DEFAULT, EngineName, limits
from modelopt_convert.formats.format import Algorithm
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.report.report import EngineLimitReport, InputReport
from modelopt_convert.run.errors import InputError


class Serving(Protocol):
    """The part of a request that says whom a checkpoint is for."""

    @property
    def engine(self) -> EngineName:
        """Which engine."""

    @property
    def allow_known_broken(self) -> bool:
        """Whether it may be of no use there."""


def refuse_broken(
    config: Mapping[str, Any], algorithm: Algorithm, path: str, request: Serving, repos: Collection[str] = ()
) -> list[Warned]:
    """Refuse, without consent, what the engine is known not to load right.

    Args:
        config: config.json of the transformer.
        algorithm: The format of its packed modules.
        path: Where it lies, for the message.
        request: Whom it is for.
        repos: Hub ids of the base, as far as they are known.

    Returns:
        What is known of that engine.

    Raises:
        InputError: ``engine.known_broken``.
    """
    known = [one for one in limits(config, algorithm, repos) if one.engine == request.engine]
    for one in known:
        if one.is_broken and not request.allow_known_broken:
            raise InputError(
                f"{path}: {one.words}",
                code="engine.known_broken",
                path=path,
                hint=f"{'give a calibrated --export or a --calibration, ' * one.dynamic}name another engine with "
                "--engine, or go on with --allow-known-broken",
            )
    return [("engine.known_broken" if one.is_broken else "engine.loss", one.words) for one in known]


def servable(config: Mapping[str, Any], algorithms: Collection[Algorithm]) -> tuple[Algorithm, list[str], str | None]:
    """How a base is built so that an engine loads the result: in which format, and with which flags.

    Args:
        config: config.json of the base.
        algorithms: The formats that there are, the first one being the one wished for.

    Returns:
        The format; flags; and what is known of the default engine and the first format, where that is not the choice.
    """
    known = {one: limits({**config, "quantization_config": FORMATS[one].dynamic}, one) for one in algorithms}
    broken = {(name, one.engine): one.words for name, facts in known.items() for one in facts if one.is_broken}
    first = next(iter(algorithms))
    why = broken.get((first, DEFAULT))
    plain = next((name for name in algorithms if (name, DEFAULT) not in broken), None)
    if plain is not None:
        return plain, [], why
    # Of another engine a fact has to say that it loads the checkpoint: no fact may mean that nobody looked.
    loads = [(name, one.engine) for name, facts in known.items() for one in facts if (name, one.engine) not in broken]
    for name, engine in loads:
        return name, ["--engine", engine], why
    return first, ["--allow-known-broken"], why


def known_limits(
    configs: Sequence[Mapping[str, Any]], algorithm: Algorithm, repos: Collection[str] = ()
) -> list[EngineLimitReport]:
    """What is known of every engine, for a report; each fact once."""
    found = dict.fromkeys(one for config in configs for one in limits(config, algorithm, repos))
    return [
        EngineLimitReport(engine=one.engine, version=one.version, grade=one.grade, what=one.what, figure=one.figure)
        for one in found
    ]


def loads_right(known: Sequence[EngineLimitReport], engine: EngineName | None) -> bool:
    """Whether the command of SGLang that loads a checkpoint may be named: it is for SGLang, and not broken there."""
    broken = any(one.engine == engine and one.grade != "loss" for one in known)
    return engine == "sglang" and not broken


def model_of(inputs: Mapping[str, InputReport], base: str | Path | None) -> str | None:
    """The pipeline that a base is the transformer of, as a command takes it: its repo, or its folder; None if unknown.

    Args:
        inputs: What was opened, of a report.
        base: The base, as it was given.
    """
    bases = [one for name, one in inputs.items() if name.rpartition("/")[2] == "base"]
    repo = next((one.identity["repo"] for one in bases if "repo" in one.identity), None)
    if repo is not None or base is None:
        return repo
    pipelines = (one for one in (Path(base), Path(base).parent) if (one / "model_index.json").is_file())
    return next((shlex.quote(str(one)) for one in pipelines), None)
