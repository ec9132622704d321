"""Runs of a calibration as parts that are kept, and their sum, which is the same bytes however it was reached."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from modelopt_convert.checkpoint.header import parse_header
from modelopt_convert.checkpoint.names import natural_key
from modelopt_convert.fidelity.calibration import Seen, Watch
from modelopt_convert.run.errors import OutputRefusedError, StorageError
from modelopt_convert.stage.resumable import Parts

_SCHEMA = "mopt.run/1"
_KEY = "mopt"


@dataclass(frozen=True, slots=True)
class Run:
    """What was seen in one run of the pipeline: of one prompt with one seed.

    Attributes:
        settings: Of the whole calibration.
        device: Where it ran.
        names: All modules.
        seen: Of those that ran.
    """

    settings: Mapping[str, Any]
    device: str
    names: tuple[str, ...]
    seen: Mapping[str, Seen]

    def to_bytes(self) -> bytes:
        """As safetensors, with all else in the metadata."""
        tensors: dict[str, Tensor] = {}
        for name, one in self.seen.items():
            tensors |= {f"{name}.amax": one.amax, f"{name}.squares": one.squares, f"{name}.histogram": one.histogram}
        said = {
            "schema": _SCHEMA,
            "settings": dict(self.settings),
            "device": self.device,
            "names": list(self.names),
            "rows": {name: one.rows for name, one in self.seen.items()},
        }
        return save(tensors, {_KEY: json.dumps(said)})


def run_of(watch: Watch, settings: Mapping[str, Any], device: str) -> Run:
    """What a watch saw, on the CPU."""
    seen = {
        name: Seen(one.rows, one.amax.cpu(), one.squares.cpu(), one.histogram.cpu()) for name, one in watch.seen.items()
    }
    return Run(settings, device, tuple(watch.names), seen)


def read_run(data: bytes) -> Run | None:
    """A run from its bytes, which are whole; None where another version of mopt wrote them."""
    length = int.from_bytes(data[:8], "little")
    header = parse_header(data[8 : 8 + length], file="part", file_bytes=len(data))
    said = json.loads(header.metadata[_KEY])
    if said["schema"] != _SCHEMA:
        return None
    tensors = load(data)
    seen = {
        name: Seen(rows, tensors[f"{name}.amax"], tensors[f"{name}.squares"], tensors[f"{name}.histogram"])
        for name, rows in said["rows"].items()
    }
    return Run(said["settings"], said["device"], tuple(said["names"]), seen)


@dataclass(frozen=True, slots=True)
class Merged:
    """All runs together.

    Attributes:
        devices: Where they ran, sorted.
        names: All modules, in the order of names.
        seen: Of those that ran.
        halves: Largest magnitude in the runs of even and of odd number; None where the module did not run in them.
    """

    devices: tuple[str, ...]
    names: tuple[str, ...]
    seen: Mapping[str, Seen]
    halves: Mapping[str, tuple[float | None, float | None]]

    def tensors(self) -> dict[str, Tensor]:
        """The stored statistics: ``amax`` F32 [], ``mean_square`` F32 [K], ``histogram`` I64 [256] of each module."""
        found: dict[str, Tensor] = {}
        for name, one in self.seen.items():
            found[f"{name}.amax"] = one.amax
            found[f"{name}.mean_square"] = (one.squares / one.rows).float()
            found[f"{name}.histogram"] = one.histogram
        return found

    def half_ratio(self) -> float | None:
        """The mean over modules of the smaller half's amax over that of all; None where there was one run."""
        ratios = [
            min(one, other) / total
            for name, seen in self.seen.items()
            if None not in self.halves[name] and (total := float(seen.amax)) > 0
            for one, other in [self.halves[name]]
            if one is not None and other is not None
        ]
        return sum(ratios) / len(ratios) if ratios else None

    def modules(self, prefix: str, firsts: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """What calibration.json says of the modules with a prefix, under their names without it.

        Args:
            prefix: Of a transformer.
            firsts: The module whose compensation GPTQ takes, by module; empty without any.
        """
        found: dict[str, dict[str, Any]] = {}
        for name in self.names:
            if name.startswith(prefix):
                one = self.seen.get(name)
                found[name.removeprefix(prefix)] = {
                    "n": one.rows if one is not None else 0,
                    "amax": float(one.amax) if one is not None else None,
                    "amax_by_half": list(self.halves[name]),
                    **({"compensation": firsts[name].removeprefix(prefix)} if name in firsts else {}),
                }
        return found


def merged(runs: Iterable[Run]) -> Merged:
    """All runs of a calibration as one.

    Args:
        runs: Every one, in the order of their numbers: sums of float64 are taken in this order and in no other.
    """
    devices, names = set[str](), set[str]()
    seen: dict[str, Seen] = {}
    halves: dict[str, list[float | None]] = {}
    for number, run in enumerate(runs):
        devices.add(run.device)
        names |= set(run.names)
        for name, one in run.seen.items():
            seen[name] = seen[name].plus(one) if name in seen else one
            half = halves.setdefault(name, [None, None])
            half[number % 2] = max(float(one.amax), half[number % 2] or 0.0)
    ordered = sorted(names, key=natural_key)
    return Merged(
        tuple(sorted(devices)),
        tuple(ordered),
        {name: seen[name] for name in ordered if name in seen},
        {name: (halves[name][0], halves[name][1]) if name in halves else (None, None) for name in ordered},
    )


def lost(parts: Parts, what: str) -> StorageError:
    """Of a part that was finished, and is not there any more."""
    return StorageError(
        f"{parts.path}: {what} was finished, and is not whole any more",
        code="calibrate.run_lost",
        path=str(parts.path),
        hint="run the same command again: it does what is missing",
    )


class KeptRuns:
    """The runs of a calibration that are finished: each is a part on disk, by its number.

    Attributes:
        parts: Where they are.
        count: How many there are to be.
    """

    def __init__(self, parts: Parts, prompts: Sequence[str], seeds: int, share: tuple[int, int]) -> None:
        """Look at what is there.

        Args:
            parts: The folder, which is open.
            prompts: What is drawn.
            seeds: How many of each prompt, from 0.
            share: Which of how many shares is to be done here, from 1.
        """
        self.parts = parts
        self.count = len(prompts) * seeds
        self._prompts, self._seeds = prompts, seeds
        mine, shares = share
        self._mine = range(mine - 1, self.count, shares)
        self._settings: Mapping[str, Any] = {}
        self._done = {number: run for number in range(self.count) if (run := self._read(number)) is not None}

    @property
    def done(self) -> int:
        """How many are finished, of all."""
        return len(self._done)

    def missing(self) -> list[int]:
        """Those that are to be done here."""
        return [number for number in self._mine if number not in self._done]

    def of(self, number: int) -> tuple[str, int]:
        """The prompt and the seed of a run."""
        return self._prompts[number // self._seeds], number % self._seeds

    def require(self, settings: Mapping[str, Any]) -> None:
        """Require that what is finished is of this calibration, and go on with it.

        Raises:
            OutputRefusedError: ``calibrate.other_runs``.
        """
        self._settings = settings
        for number, found in self._done.items():
            other = next((key for key in settings if found.get(key) != settings[key]), None)
            if other is not None:
                raise OutputRefusedError(
                    f"{self.parts.path}: run {number} is of another calibration: {other}: expected "
                    f"{settings[other]!r}, found {found.get(other)!r}",
                    code="calibrate.other_runs",
                    path=str(self.parts.path),
                    hint="go on with the same flags and inputs, give another --output, or remove that folder",
                )

    def keep(self, number: int, watch: Watch, device: str) -> None:
        """Keep what a watch saw in one run.

        Raises:
            StorageError: The disk failed.
        """
        self.parts.put(number, run_of(watch, self._settings, device).to_bytes())
        self._done[number] = self._settings

    def merged(self) -> Merged:
        """All runs together; every one is finished.

        Raises:
            StorageError: A run that was finished is not there any more.
        """
        return merged(self._again(number) for number in range(self.count))

    def _again(self, number: int) -> Run:
        data = self.parts.read(number)
        run = read_run(data) if data is not None else None
        if run is None or run.settings != self._settings:
            raise lost(self.parts, f"run {number}")
        return run

    def _read(self, number: int) -> Mapping[str, Any] | None:
        data = self.parts.read(number)
        run = read_run(data) if data is not None else None
        return run.settings if run is not None else None
