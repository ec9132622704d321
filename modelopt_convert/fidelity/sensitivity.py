"""What a transformer takes and gives while pictures are drawn, and how far that moves with some layers packed."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from modelopt_convert.run.errors import InputError
from modelopt_convert.run.text import few

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the transformer.

    Attributes:
        words: Its arguments, tensors on the CPU.
        named: Its keyword arguments, likewise.
        device: Where its tensors were.
        outputs: Every tensor of its output, on the CPU.
    """

    words: tuple[Any, ...]
    named: Mapping[str, Any]
    device: torch.device
    outputs: tuple[Tensor, ...]


@dataclass(slots=True)
class Recorded:
    """What a transformer did.

    Attributes:
        calls: In their order.
        ran: Names of the layers that ran.
    """

    calls: list[Call] = field(default_factory=list)
    ran: set[str] = field(default_factory=set)


@contextmanager
def recorded(transformer: nn.Module, layers: Collection[str]) -> Iterator[Recorded]:
    """Take down every call of a transformer, and which of these layers run."""
    found = Recorded()
    cpu = torch.device("cpu")
    given: list[tuple[Any, Any, torch.device]] = []

    def before(_: nn.Module, words: tuple[Any, ...], named: dict[str, Any]) -> None:  # it may write into its inputs
        device = next((one.device for one in tensors_of((words, named))), cpu)
        given.append((*_moved((words, named), cpu), device))

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        outputs = tuple(_moved(one, cpu) for one in tensors_of(output))
        found.calls.append(Call(*given.pop(), outputs))

    hooks = [
        transformer.register_forward_pre_hook(before, with_kwargs=True),
        transformer.register_forward_hook(after),
    ]
    for name in layers:
        layer = transformer.get_submodule(name)
        hooks.append(layer.register_forward_hook(lambda *_, name=name: found.ran.add(name)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def spread_over(found: Sequence[T], count: int) -> list[T]:
    """So many, evenly from the first to the last; all if there are no more."""
    if count >= len(found):
        return list(found)
    return [found[(2 * number + 1) * len(found) // (2 * count)] for number in range(count)]


def check_recorded(
    calls: Sequence[Call], pictures: Sequence[Tensor], ran: Collection[str], layers: Collection[str], path: str
) -> None:
    """Require outputs that are numbers, and layers that ran: of others nothing is known.

    Args:
        calls: Of the unquantized transformer.
        pictures: That were drawn with it.
        ran: Layers that ran.
        layers: All that could be packed.
        path: The base, for messages.

    Raises:
        InputError: ``advise.not_finite`` or ``advise.never_ran``.
    """
    outputs = [*pictures, *(one for call in calls for one in call.outputs)]
    if not all(bool(one.isfinite().all()) for one in outputs):
        raise InputError(
            f"{path}: expected finite pictures, found NaN or infinity without anything packed",
            code="advise.not_finite",
            path=path,
            hint="the base is damaged, or overflows in BF16: draw a picture with it first",
        )
    never = [name for name in layers if name not in ran]
    if never:
        raise InputError(
            f"{path}: {len(never)} of {len(layers)} Linears never ran, so nothing is known of them: {few(never)}",
            code="advise.never_ran",
            path=path,
            hint="give prompts that reach them, or a preset that has them as structural",
        )


def moved_by(transformer: nn.Module, calls: Sequence[Call]) -> float:
    """Mean squared difference of a transformer's outputs from recorded ones, each call counting alike.

    Args:
        transformer: As it is now.
        calls: With the outputs of the unquantized transformer.

    Returns:
        The mean over calls; infinite if an output is not finite.
    """
    total = 0.0
    with torch.inference_mode():
        for call in calls:
            outputs = tensors_of(transformer(*_moved(call.words, call.device), **_moved(call.named, call.device)))
            squares = numbers = 0.0
            for one, expected in zip(outputs, call.outputs, strict=True):
                difference = one.to("cpu", torch.float64) - expected.to(torch.float64)
                squares += float(difference.square().sum())
                numbers += difference.numel()
            total += squares / numbers / len(calls)
    return total if total < float("inf") else float("inf")


def tensors_of(value: Any) -> list[Tensor]:
    """Every floating tensor in what a transformer takes or gives: outputs of diffusers are mappings, or tuples."""
    match value:
        case Tensor():
            return [value] if value.is_floating_point() else []
        case Mapping():
            return [one for each in value.values() for one in tensors_of(each)]
        case list() | tuple():
            return [one for each in value for one in tensors_of(each)]
        case _:
            return []


def _moved(value: Any, device: torch.device) -> Any:
    """The same on a device, tensors copied: pipelines write into theirs."""
    match value:
        case Tensor():
            return value.detach().to(device, copy=True)
        case dict():
            return {name: _moved(one, device) for name, one in value.items()}
        case list():
            return [_moved(one, device) for one in value]
        case tuple():
            return tuple(_moved(one, device) for one in value)
        case _:
            return value
