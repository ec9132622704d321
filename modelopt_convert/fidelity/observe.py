"""What happens inside a transformer while it runs: its layers beside emulated ones, and the outputs of its blocks."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_convert.fidelity.emulation import Emulated
from modelopt_convert.fidelity.metrics import cosine, sqnr_db
from modelopt_convert.fidelity.sensitivity import tensors_of
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.run.errors import InputError

# A scale made of the largest value may be less than it by a rounding.
_CLIPPED = 1 + 1e-5


@dataclass(slots=True)
class Sums:
    """Sums over the calls of one layer, from which its figures are made.

    Attributes:
        calls: How many there were.
        input: Energy of the activations, and of what quantization changed.
        output: Energy of the base's outputs, and of the difference of the emulated layer's.
        weight: Energy of the base's weight, and of what quantization changed.
        values: Activations seen.
        clipped: Of these larger than the scale can hold.
        blocks: Blocks of activations that are not all zero.
        zeros: Of these, how many became all zero.
    """

    calls: int = 0
    input: tuple[float, float] = (0.0, 0.0)
    output: tuple[float, float] = (0.0, 0.0)
    weight: tuple[float, float] = (0.0, 0.0)
    values: int = 0
    clipped: int = 0
    blocks: int = 0
    zeros: int = 0

    @property
    def input_sqnr_db(self) -> float | None:
        """Of quantized activations; None where they are not quantized."""
        return sqnr_db(*self.input) if self.values else None

    @property
    def output_sqnr_db(self) -> float:
        """Of the emulated layer, given the base's activations."""
        return sqnr_db(*self.output)

    @property
    def weight_sqnr_db(self) -> float:
        """Of the decoded weight."""
        return sqnr_db(*self.weight)

    @property
    def weight_error(self) -> float:
        """Norm of the weight's difference over that of the weight."""
        energy, noise = self.weight
        return math.sqrt(noise / energy) if energy else 0.0 if not noise else math.inf


def _plus(before: tuple[float, float], exact: Tensor, got: Tensor) -> tuple[float, float]:
    """Energies of exact values, and of their differences, in float32 parts that float64 adds."""
    exact = exact.to(torch.float32)
    noise = (exact - got).square().sum(dtype=torch.float64)
    return before[0] + float(exact.square().sum(dtype=torch.float64)), before[1] + float(noise)


def weigh(weight: Tensor, layer: Emulated, device: torch.device) -> Sums:
    """Sums of a layer that did not run yet: of the base's weight [N, K] and the decoded one, on a device."""
    decoded = layer.decoded(device).to(torch.float32)
    exact = decoded if layer.rule == "weight-only" else decoded * layer.packed.tensor_scale
    return Sums(weight=_plus((0.0, 0.0), weight.to(device), exact))


def watch(sums: Sums, layer: Emulated, values: Tensor, output: Tensor) -> None:
    """Add one call of the base's layer.

    Args:
        sums: Gets it.
        layer: The emulated layer beside the one that ran.
        values: Its activations [..., K].
        output: What it returned, [..., N].
    """
    rows = values.reshape(-1, layer.in_features)
    sums.calls += 1
    if layer.rule != "weight-only":
        made = layer.quantized(rows)
        sums.input = _plus(sums.input, rows, made.operand.to(torch.float32) * made.scale)
        sums.values += rows.numel()
        sums.clipped += int((rows.abs() > made.limit * _CLIPPED).sum())
        size = FORMATS[layer.packed.algorithm].block_size
        if size is not None:
            there = (rows != 0).view(len(rows), -1, size).any(dim=-1)
            kept = (made.operand != 0).view(len(rows), -1, size).any(dim=-1)
            sums.blocks += int(there.sum())
            sums.zeros += int((there & ~kept).sum())
    sums.output = _plus(sums.output, output, layer(values).to(torch.float32))


class NotFiniteError(Exception):
    """Activations are NaN or infinite; where that began is not known yet."""


@contextmanager
def refuse_not_finite(model: nn.Module, prefix: str, what: str) -> Iterator[None]:
    """Look at the output of every module, in the order in which they end, and refuse the first that is not finite.

    Args:
        model: The transformer.
        prefix: Of its modules' names.
        what: Whose modules they are.

    Raises:
        InputError: ``fidelity.not_finite``, from within the call.
    """

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if not all(bool(one.isfinite().all()) for one in tensors_of(output)):
                raise InputError(
                    f"{what}: module {f'{prefix}{name}'!r}: expected finite outputs, found NaN or infinity; it is the "
                    "first to give any",
                    code="fidelity.not_finite",
                    hint="`mopt verify` looks for damage in the weights; else the model overflows in its dtype",
                ).at([f"{prefix}{name}"])

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Ran:
    """Which modules of a transformer ran, and whether their activations were numbers."""

    def __init__(self) -> None:
        """Nothing ran yet."""
        self.names: set[str] = set()

    @contextmanager
    def over(self, model: nn.Module, prefix: str, names: Sequence[str]) -> Iterator[None]:
        """Look at some linear layers while they run.

        Raises:
            NotFiniteError: From within the call.
        """
        layers = dict(model.named_modules())
        handles = [layers[name].register_forward_pre_hook(self._seen(f"{prefix}{name}")) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _seen(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.names.add(name)
            if not bool(inputs[0].isfinite().all()):
                raise NotFiniteError

        return hook


@contextmanager
def beside(model: nn.Module, layers: Mapping[str, Emulated], sums: Mapping[str, Sums]) -> Iterator[None]:
    """Run emulated layers beside the base's, on the base's activations, and add up what they change."""
    known = dict(model.named_modules())

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            watch(sums[name], layers[name], inputs[0], output)

        return hook

    handles = [known[name].register_forward_hook(hook_of(name)) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a transformer: what stands in its lists of modules, by name."""
    return {
        f"{name}.{number}": block
        for name, child in model.named_children()
        if isinstance(child, nn.ModuleList)
        for number, block in enumerate(child)
    }


@contextmanager
def first_outputs(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, ...]]]:
    """The tensors that each block returns in its first call, on the CPU."""
    found: dict[str, tuple[Tensor, ...]] = {}

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if name not in found:
                parts = output if isinstance(output, tuple | list) else (output,)
                found[name] = tuple(one.detach().to("cpu") for one in parts if isinstance(one, Tensor))

        return hook

    handles = [block.register_forward_hook(hook_of(name)) for name, block in blocks_of(model).items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def block_cosines(base: Mapping[str, tuple[Tensor, ...]], made: Mapping[str, tuple[Tensor, ...]]) -> dict[str, float]:
    """Cosine of what each block returned in two runs, all its tensors together."""
    return {name: cosine(_flat(base[name]), _flat(made[name])) for name in base if name in made and len(base[name])}


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([one.to(torch.float32).flatten() for one in parts])
