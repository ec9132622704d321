"""Second moments of the inputs of Linears while a pipeline runs, and what GPTQ needs of them.

A [K, K] matrix for each input takes more memory than most cards have for all at once. So pipelines run again, and each
time as many inputs are watched as there is room for; what came of one is kept on disk, and its moments are not.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from modelopt_convert.checkpoint.header import TensorSpec, parse_header
from modelopt_convert.fidelity.calibration import Inputs, Seen
from modelopt_convert.fidelity.memory import free_bytes
from modelopt_convert.fidelity.runs import lost
from modelopt_convert.formats.nvfp4.codes import block_scales, decode_e2m1, shared_global_scale, unpack_e2m1
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE, FORMAT
from modelopt_convert.formats.nvfp4.gptq import DAMPING, VALUES, Compensation, compensation, gptq_codes
from modelopt_convert.formats.nvfp4.shapes import ROW_TILE
from modelopt_convert.formats.nvfp4.sweep import sweep
from modelopt_convert.proof.closeness import TiledNearness
from modelopt_convert.run.errors import InputError, OutputRefusedError
from modelopt_convert.stage.resumable import Parts

_SCHEMA, _KEY = "mopt.compensation/1", "mopt"
_MARGIN = 0.95
_ENDINGS = ("compensation", "compensation_exponents")
_ROWS = 1 << 13  # vectors at a time: their float32 copies are no larger than the moments


def first_with_input(seen: Mapping[str, Seen]) -> dict[str, str]:
    """For each module the first one that had the same input.

    Inputs are held for the same where every statistic of theirs is, to the last bit: the sums of squares of all
    channels among them. Were two not the same, one would get the other's moments, which is a worse choice of codes and
    no false one: proofs run the choice again.
    """
    firsts: dict[tuple[int, bytes, bytes], str] = {}
    keys = {
        name: (one.rows, one.squares.numpy().tobytes(), one.histogram.numpy().tobytes()) for name, one in seen.items()
    }
    return {name: firsts.setdefault(key, name) for name, key in keys.items()}


class Moments(Inputs):
    """Sums of the products of each two channels.

    Attributes:
        sums: float32 [K, K] by module, on the device of the inputs.
    """

    def __init__(self, modules: Mapping[str, nn.Linear]) -> None:
        """Watch nothing yet; see ``Inputs``."""
        super().__init__(modules)
        self.sums: dict[str, Tensor] = {}

    def see(self, name: str, inputs: Tensor) -> None:
        """Add an input [..., K]."""
        columns = inputs.shape[-1]
        if name not in self.sums:
            self.sums[name] = torch.zeros(columns, columns, device=inputs.device)
        for piece in torch.split(inputs.flatten(0, -2).float(), _ROWS):
            with _tensor_cores():
                self.sums[name].addmm_(piece.T, piece)


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Products of float32 on a GPU's tensor cores, which take BF16 whole, and other values to 11 bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@dataclass(frozen=True, slots=True)
class Kept:
    """What GPTQ needs of one input.

    Attributes:
        found: On the CPU.
        damping: The share of the diagonal's mean that was added to it.
    """

    found: Compensation
    damping: float

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As a CALIB stores it, by the ending of the name."""
        return dict(zip(_ENDINGS, (self.found.panels, self.found.exponents), strict=True))


class KeptCompensations:
    """What is finished: each input is a part on disk, behind the runs.

    Attributes:
        names: Of the inputs.
    """

    def __init__(self, parts: Parts, first: int, inputs: Sequence[str], settings: Mapping[str, Any]) -> None:
        """Look at nothing yet.

        Args:
            parts: The folder, which is open.
            first: The number of the first input's part.
            inputs: The modules that they are named after.
            settings: Of the whole calibration.
        """
        self.names = tuple(inputs)
        self._parts, self._settings = parts, settings
        self._numbers = {name: number for number, name in enumerate(inputs, first)}
        self._damping: dict[str, float] = {}
        self._lengths: dict[str, tuple[int, int]] = {}

    def missing(self, share: tuple[int, int]) -> list[str]:
        """Those of a share that are not finished; of all with (1, 1)."""
        mine, shares = share
        return [name for name in list(self._numbers)[mine - 1 :: shares] if self.read(name) is None]

    def keep(self, name: str, moments: Tensor, weights: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> None:
        """Keep what comes of an input's moments.

        Where inputs are few or alike, GPTQ may move weights so far that they cannot be told from damaged ones without
        CALIB. So the moments are damped until all weights of this input stay near.

        Args:
            name: Of the input.
            moments: float32 [K, K].
            weights: Gives those of the modules with this input, with the mean square of each channel; on the device of
                the moments, each for as long as it is looked at.

        Raises:
            InputError: ``calibrate.moments``.
            StorageError: The disk failed.
        """
        damping = 0.0
        try:
            for least in DAMPING:
                if least <= damping:  # of a matrix that is singular by rounding: it was tried
                    continue
                found, damping = compensation(moments.double(), least)
                here = found.to(moments.device)
                if all(stays_near(*one, here) for one in weights()):
                    break
        except ValueError as error:
            raise InputError(
                f"module {name!r}: GPTQ cannot take its inputs: {error}",
                code="calibrate.moments",
                hint="leave --gptq out",
            ) from error
        kept = Kept(found, damping)
        said = {"schema": _SCHEMA, "settings": self._settings, "name": name, "damping": damping}
        self._parts.put(self._numbers[name], save(kept.tensors, {_KEY: json.dumps(said)}))

    def read(self, name: str) -> Kept | None:
        """What is kept of an input; None where it is not finished, or another version of mopt wrote it.

        Raises:
            OutputRefusedError: ``calibrate.other_runs``.
        """
        data = self._parts.read(self._numbers[name])
        if data is None:
            return None
        length = int.from_bytes(data[:8], "little")
        said = json.loads(parse_header(data[8 : 8 + length], file="part", file_bytes=len(data)).metadata[_KEY])
        if said["schema"] != _SCHEMA:
            return None
        if said["settings"] != self._settings or said["name"] != name:
            raise OutputRefusedError(
                f"{self._parts.path}: what is kept of {name!r} is of another calibration",
                code="calibrate.other_runs",
                path=str(self._parts.path),
                hint="go on with the same flags and inputs, give another --output, or remove that folder",
            )
        tensors = load(data)
        self._damping[name] = said["damping"]
        self._lengths[name] = len(tensors[_ENDINGS[0]]), len(tensors[_ENDINGS[1]])
        return Kept(Compensation(*(tensors[ending] for ending in _ENDINGS)), said["damping"])

    def specs(self) -> Iterator[TensorSpec]:
        """What is kept of all inputs, which are finished: nothing is ``missing``."""
        for name, lengths in self._lengths.items():
            for ending, length in zip(_ENDINGS, lengths, strict=True):
                yield TensorSpec(f"{name}.{ending}", "I16", (length,))

    def tensor(self, name: str) -> Tensor:
        """The tensor of one of ``specs``.

        Raises:
            StorageError: ``calibrate.run_lost``.
        """
        module, _, ending = name.rpartition(".")
        found = self.read(module)
        if found is None:
            raise lost(self._parts, f"what GPTQ needs of {module!r}")
        return found.tensors[ending]

    def said(self, digests: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """What ``calibration.json`` says of each input.

        Args:
            digests: Of the tensors of ``specs``, as they were written.
        """
        return {
            name: {
                "damping": damping,
                "panels": digests[f"{name}.{_ENDINGS[0]}"],
                "exponents": digests[f"{name}.{_ENDINGS[1]}"],
            }
            for name, damping in self._damping.items()
        }


def stays_near(weight: Tensor, importance: Tensor, found: Compensation) -> bool:
    """Whether a proof without CALIB will call a weight near; a little less is asked for than it asks.

    A build may give the weight the larger scale of a group.

    Args:
        weight: BF16 [N, K]; one without whole blocks is never quantized, and near.
        importance: float32 [K].
        found: What GPTQ needs of the input.
    """
    if weight.shape[1] % BLOCK_SIZE or not bool(weight.any()):
        return True
    sums = TiledNearness(weight.shape[1], ROW_TILE)
    global_scale = shared_global_scale([weight])
    for rows in torch.split(weight, max(1, VALUES // weight.shape[1])):
        packed, scale = sweep(rows, global_scale, importance)
        factors = block_scales(scale, global_scale)
        nearest, chosen = (
            (decode_e2m1(unpack_e2m1(codes)) * factors).double()
            for codes in (packed, gptq_codes(rows, scale, global_scale, found))
        )
        sums.add(rows.double(), chosen, nearest)
    most = _MARGIN * FORMAT.max_error
    return sums.whole.closeness().within(most) and sums.worst_strip() <= most


def windows(columns: Mapping[str, int], device: torch.device) -> Iterator[list[str]]:
    """Inputs as many at a time as half of the free memory holds the moments of; the other half is for the model's work.

    Args:
        columns: K by the name of the input.
        device: Where the moments are.
    """
    waiting = list(columns)
    while waiting:
        room, window = free_bytes(device) // 2, list[str]()
        for name in waiting:
            room -= 4 * columns[name] ** 2
            if room < 0 and window:
                break
            window.append(name)
        yield window
        del waiting[: len(window)]
