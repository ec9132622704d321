"""What goes into the Linears of a transformer while a pipeline runs: the statistics that calibration rests on.

ModelOpt's max calibration keeps the largest magnitude that an input quantizer ever saw (``MaxCalibrator.collect`` in
calib/max.py). A hook before each Linear sees the same tensors.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.run.errors import InputError

BINS = 256
"""Bins of a histogram: bin b counts blocks whose amax is in [2^(b-127), 2^(b-126)); bin 0 also zeros and subnormals."""
_PIECE = 1 << 23  # values at a time: their squares are float64


@dataclass(slots=True)
class Seen:
    """What a module's input was, in one run or in several.

    Attributes:
        rows: Vectors of length K that came in.
        amax: Largest magnitude, float32 [].
        squares: Sum of squares of each channel, float64 [K].
        histogram: Blocks of 16 channels by the exponent of their amax, int64 [256].
    """

    rows: int
    amax: Tensor
    squares: Tensor
    histogram: Tensor

    def add(self, inputs: Tensor) -> None:
        """Take note of an input [..., K]; NaN and infinity stay in ``amax``."""
        values = inputs.flatten(0, -2).to(self.amax.device)
        for piece in torch.split(values, max(1, _PIECE // values.shape[1])):
            self.rows += len(piece)
            blocks = nn.functional.pad(piece.float().abs(), (0, -piece.shape[1] % BLOCK_SIZE))
            largest = blocks.reshape(len(piece), -1, BLOCK_SIZE).amax(2)
            self.amax = torch.maximum(self.amax, largest.amax())
            self.squares += piece.double().square_().sum(0)
            # The exponent's bits of a float32 that is not negative.
            self.histogram += torch.bincount(largest.view(torch.int32).flatten() >> 23, minlength=BINS)

    def plus(self, other: "Seen") -> "Seen":
        """Both together; the sum of float64 depends on which of the two is the first."""
        return Seen(
            self.rows + other.rows,
            torch.maximum(self.amax, other.amax),
            self.squares + other.squares,
            self.histogram + other.histogram,
        )


def linears(transformers: Mapping[str, nn.Module]) -> dict[str, nn.Linear]:
    """Every Linear of some transformers, by its name with the prefix of its transformer.

    Args:
        transformers: By prefix.
    """
    return {
        f"{prefix}{name}": module
        for prefix, model in transformers.items()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


class Inputs(ABC):
    """Hooks before some Linears; a context manager."""

    def __init__(self, modules: Mapping[str, nn.Linear]) -> None:
        """Watch nothing yet.

        Args:
            modules: By name.
        """
        self._modules = modules
        self._hooks: list[RemovableHandle] = []

    @abstractmethod
    def see(self, name: str, inputs: Tensor) -> None:
        """Take note of an input [..., K] that is not empty."""

    def __enter__(self) -> Self:
        """Begin."""
        for name, module in self._modules.items():
            self._hooks.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Any:
        def hook(_: nn.Linear, words: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            inputs = words[0] if words else named["input"]
            if inputs.numel():
                self.see(name, inputs.detach())

        return hook


class Watch(Inputs):
    """Statistics of the inputs of every Linear of some transformers.

    Attributes:
        names: Of all Linears, with the prefix of their transformer.
        seen: By name, in the order in which modules ran first; without those that did not run.
    """

    def __init__(self, transformers: Mapping[str, nn.Module]) -> None:
        """Watch nothing yet.

        Args:
            transformers: By the prefix of their modules' names.
        """
        super().__init__(linears(transformers))
        self.names = list(self._modules)
        self.seen: dict[str, Seen] = {}

    def see(self, name: str, inputs: Tensor) -> None:
        """See ``Seen.add``."""
        if name not in self.seen:
            self.seen[name] = Seen(
                0,
                torch.zeros((), device=inputs.device),
                torch.zeros(inputs.shape[-1], dtype=torch.float64, device=inputs.device),
                torch.zeros(BINS, dtype=torch.int64, device=inputs.device),
            )
        self.seen[name].add(inputs)

    def refuse_not_finite(self, words: str) -> None:
        """Require that all that was seen so far is finite.

        Args:
            words: When it was seen.

        Raises:
            InputError: ``calibrate.not_finite``.
        """
        finite = torch.stack([one.amax.cpu() for one in self.seen.values()]).isfinite() if self.seen else None
        if finite is not None and not finite.all():
            name = list(self.seen)[int(finite.logical_not().nonzero()[0])]
            raise InputError(
                f"module {name!r}: expected a finite input, found {float(self.seen[name].amax)} {words}; "
                f"{int(finite.logical_not().sum())} modules have such an input",
                code="calibrate.not_finite",
                hint="check the base, the pipeline and the prompt; this module is the first to run of those",
            )
