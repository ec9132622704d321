"""What packing some modules does to pictures, or to the transformer's output on recorded inputs."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from modelopt_convert.fidelity.emulation import Rule, emulated
from modelopt_convert.fidelity.metrics import rmse
from modelopt_convert.fidelity.pipeline import Drawing, draw
from modelopt_convert.fidelity.sensitivity import Call, moved_by, recorded, spread_over
from modelopt_convert.verification.gemm.operands import Weight


@dataclass(slots=True)
class Trials:
    """A pipeline, and what it drew before anything was packed.

    Attributes:
        pipeline: Runs the transformer.
        transformer: Unquantized.
        weights: Of every module that may be packed.
        rule: How their inputs are quantized.
        input_scales: By module, for a static rule.
        how: How pictures are drawn.
        pairs: Prompts and seeds.
        keep: Whether decoded weights are kept for a trial.
        compiled: As for ``Emulated``.
        pictures: Of the unquantized transformer, float32 [F, H, W, 3] in 0..1, one a pair.
        calls: Calls of the unquantized transformer.
        ran: Modules that ran.
    """

    pipeline: Any
    transformer: nn.Module
    weights: Mapping[str, Weight]
    rule: Rule
    input_scales: Mapping[str, float]
    how: Drawing
    pairs: Sequence[tuple[str, int]]
    keep: bool = False
    compiled: bool = False
    pictures: list[Tensor] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    ran: set[str] = field(default_factory=set)

    def draw_unquantized(self, count: int) -> Iterator[int]:
        """Draw every pair, and keep so many calls, evenly of each run, and at least one.

        Yields:
            The number of the picture that is done.
        """
        for number, (prompt, seed) in enumerate(self.pairs):
            with recorded(self.transformer, self.weights) as found:
                self.pictures.append(draw(self.pipeline, prompt, seed, self.how).frames)
            share = count * (number + 1) // len(self.pairs) - count * number // len(self.pairs)
            self.calls += spread_over(found.calls, share)
            self.ran |= found.ran
            yield number

    def moved_by(self, packed: Collection[str]) -> float:
        """Mean squared difference that packing these modules makes to the transformer's output in recorded calls."""
        with self._packed(packed):
            return moved_by(self.transformer, self.calls)

    def errors(self, packed: Collection[str], numbers: Sequence[int]) -> Iterator[float]:
        """Mean squared error of the pictures of some pairs with these modules packed; infinite of what is no number."""
        with self._packed(packed):
            for number in numbers:
                prompt, seed = self.pairs[number]
                found = rmse(draw(self.pipeline, prompt, seed, self.how).frames, self.pictures[number]) ** 2
                yield found if found < float("inf") else float("inf")

    @contextmanager
    def _packed(self, modules: Collection[str]) -> Iterator[None]:
        weights, how = {name: self.weights[name] for name in modules}, {"keep": self.keep, "compiled": self.compiled}
        with emulated(self.transformer, weights, self.rule, self.input_scales, **how):
            yield
