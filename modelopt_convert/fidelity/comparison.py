"""Base and checkpoints, drawn from the same prompts and the same noise, or run on the same inputs."""

import gc
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_convert.fidelity.checkpoint import Quantized, put_layers
from modelopt_convert.fidelity.emulation import Emulated
from modelopt_convert.fidelity.observe import (
    NotFiniteError,
    Ran,
    Sums,
    beside,
    block_cosines,
    first_outputs,
    refuse_not_finite,
    weigh,
)
from modelopt_convert.fidelity.pipeline import Drawing, Drawn, Offload, draw, gpu_memory, load_pipeline, longest_text
from modelopt_convert.run.errors import InputError, first_line
from modelopt_convert.run.text import few

# Of the difference of a decoded weight, over the base's: no quantization of these weights is that far from them.
_OTHER = 0.5


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt with one seed."""

    prompt: str
    seed: int


@dataclass(frozen=True, slots=True)
class Made:
    """One checkpoint, ready to run.

    Attributes:
        path: As it was given.
        parts: What is quantized, by the transformer's name.
        models: Its transformers, whose quantized layers are empty, by the same names.
        keep: Whether decoded weights are kept.
        compiled: As for ``Emulated``.
    """

    path: str
    parts: Mapping[str, Quantized]
    models: dict[str, nn.Module]
    keep: bool = False
    compiled: bool = False

    def layers(self, name: str, *, keep: bool) -> dict[str, Emulated]:
        """New emulated layers of a transformer."""
        return self.parts[name].layers(keep=keep, compiled=self.compiled)


@dataclass(slots=True)
class Seen:
    """What was found of one checkpoint, by module and by run.

    Attributes:
        modules: By prefix and name.
        blocks: Cosine of each block's output in the first call.
        runs: What each pair, or each input, gave: latents after each step, and pictures.
    """

    modules: dict[str, Sums] = field(default_factory=dict)
    blocks: dict[str, float] = field(default_factory=dict)
    runs: list[Drawn] = field(default_factory=list)


Start = Callable[[Mapping[str, nn.Module]], Callable[[int], Drawn]]
"""Puts transformers where they run; what it returns runs them on the pair, or the input, of a number."""


def compare(
    base: dict[str, nn.Module],
    made: Sequence[Made],
    count: int,
    start: Start,
    tell: Callable[[str], None],
    *,
    device: torch.device,
) -> tuple[list[Drawn], list[Seen]]:
    """Run the base, and then every checkpoint, on the same.

    Args:
        base: Its transformers by name; emptied, so that their memory is free for the next.
        made: The checkpoints; their transformers get emulated layers, and are given up after they ran.
        count: How many runs there are.
        start: Puts transformers where they run, and returns what runs them.
        device: Where weights are compared.
        tell: Told after each run, with what ran.

    Returns:
        What the base gave, and what was found of each checkpoint.

    Raises:
        InputError: ``fidelity.never_ran``, ``fidelity.not_finite`` or ``fidelity.other_base``.
    """
    found, ran = [Seen() for _ in made], Ran()
    prefixes = {name: f"{name}/" if len(base) > 1 else "" for name in base}
    for one, seen in zip(made, found, strict=True):
        for name, prefix in prefixes.items():
            for module, layer in one.layers(name, keep=False).items():
                weight = base[name].get_parameter(f"{module}.weight")
                seen.modules[f"{prefix}{module}"] = weigh(weight, layer, device)
        _check_base(one.path, seen)
    drawn, outputs = _run_base(base, made, found, ran, prefixes, count, start, tell)
    base.clear()
    _free()
    for one, seen in zip(made, found, strict=True):
        _run_made(one, seen, outputs, prefixes, count, start, tell)
        one.models.clear()
        _free()
    return drawn, found


def _run_made(
    one: Made,
    seen: Seen,
    base: Mapping[str, Mapping[str, tuple[Tensor, ...]]],
    prefixes: Mapping[str, str],
    count: int,
    start: Start,
    tell: Callable[[str], None],
) -> None:
    """All runs of a checkpoint; the first gives the outputs of its blocks, beside the base's."""
    for name, model in one.models.items():
        put_layers(model, one.layers(name, keep=one.keep))
    run = start(one.models)
    with ExitStack() as stack:
        watched = {name: stack.enter_context(first_outputs(model)) for name, model in one.models.items()}
        seen.runs.append(_finite(run, 0, one.models, prefixes, one.path))
    tell(one.path)
    for name, got in watched.items():
        ours = block_cosines(base[name], got)
        seen.blocks |= {f"{prefixes[name]}{block}": value for block, value in ours.items()}
    for number in range(1, count):
        seen.runs.append(_finite(run, number, one.models, prefixes, one.path))
        tell(one.path)


def _run_base(
    base: Mapping[str, nn.Module],
    made: Sequence[Made],
    found: Sequence[Seen],
    ran: Ran,
    prefixes: Mapping[str, str],
    count: int,
    start: Start,
    tell: Callable[[str], None],
) -> tuple[list[Drawn], dict[str, dict[str, tuple[Tensor, ...]]]]:
    """All runs of the base; in the first, emulated layers run beside its own."""
    drawn: list[Drawn] = []
    run = start(base)
    for number in range(count):
        with ExitStack() as stack:
            for name, model in base.items():
                names = sorted({module for one in made for module in one.parts[name].weights})
                stack.enter_context(ran.over(model, prefixes[name], names))
            if not number:
                outputs = {name: stack.enter_context(first_outputs(model)) for name, model in base.items()}
                for one, seen in zip(made, found, strict=True):
                    for name, model in base.items():
                        layers = one.layers(name, keep=False)
                        sums = {module: seen.modules[f"{prefixes[name]}{module}"] for module in layers}
                        stack.enter_context(beside(model, layers, sums))
            drawn.append(_finite(run, number, base, prefixes, "the base"))
        tell("base")
    for one, seen in zip(made, found, strict=True):
        idle = sorted(seen.modules.keys() - ran.names)
        if idle:
            raise InputError(
                f"{one.path}: {idle[0]}: the base never ran this quantized module; {len(idle)} such modules",
                code="fidelity.never_ran",
                path=one.path,
                hint="give a pipeline, prompts or inputs that use it",
            ).at(idle)
    return drawn, outputs


def _check_base(path: str, seen: Seen) -> None:
    """Most weights of a checkpoint that is the base's are near the base's."""
    far = [name for name, sums in seen.modules.items() if not sums.weight_error < _OTHER]
    if 2 * len(far) > len(seen.modules):
        raise InputError(
            f"{path}: {len(far)} of {len(seen.modules)} decoded weights are nothing like the base's: {far[0]}: "
            f"relative error {seen.modules[far[0]].weight_error:.3g}",
            code="fidelity.other_base",
            path=path,
            hint="give the base that the checkpoint was made from; `mopt verify` says whether its layout is wrong",
        )


def _finite(
    run: Callable[[int], Drawn],
    number: int,
    models: Mapping[str, nn.Module],
    prefixes: Mapping[str, str],
    what: str,
) -> Drawn:
    """One run; where it gives what is no number, it runs again to find the module that is the first to do so."""
    with suppress(NotFiniteError):
        drawn = run(number)
        if all(bool(one.isfinite().all()) for one in (drawn.latents[-1], drawn.frames)):
            return drawn
    with ExitStack() as stack:
        for name, model in models.items():
            stack.enter_context(refuse_not_finite(model, prefixes[name], what))
        run(number)
    raise InputError(
        f"{what}: expected finite pictures, found NaN or infinity that no module of the transformer gave",
        code="fidelity.not_finite",
        hint="the pipeline is damaged, or its VAE overflows in BF16; draw a picture with it first",
    )


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def drawing(
    reference: str,
    pairs: Sequence[Pair],
    how: Drawing,
    *,
    device: str,
    offload: Offload,
    tell_tokens: Callable[[int | None], None],
) -> Start:
    """``start`` for a pipeline: run N draws pair N; ``tell_tokens`` is told to how many tokens prompts are padded."""

    def start(models: Mapping[str, nn.Module]) -> Callable[[int], Drawn]:
        pipeline = load_pipeline(reference, models, device=device, offload=offload)
        tell_tokens(longest_text(pipeline))
        return lambda number: draw(pipeline, pairs[number].prompt, pairs[number].seed, how)

    return start


def feeding(inputs: Sequence[Mapping[str, Any]], *, device: torch.device) -> Start:
    """``start`` for a transformer alone: run N is one call with inputs N, and its output stands for latents."""

    def start(models: Mapping[str, nn.Module]) -> Callable[[int], Drawn]:
        ((_, model),) = models.items()
        takes = inspect.signature(model.forward).parameters
        with gpu_memory(is_alone=True):
            model.to(device)

        def run(number: int) -> Drawn:
            given = {name: _placed(value, device) for name, value in inputs[number].items()}
            unknown = [name for name in given if name not in takes]
            if unknown and not any(one.kind is one.VAR_KEYWORD for one in takes.values()):
                raise InputError(
                    f"inputs {number}: {type(model).__name__} has no argument {few(unknown)}; it takes "
                    f"{', '.join(takes)}",
                    code="fidelity.inputs",
                    hint="give what its forward() takes, by the names of its arguments",
                )
            try:
                with torch.inference_mode(), gpu_memory(is_alone=True):
                    output = model(**given, return_dict=False)[0]
            except (ValueError, TypeError, RuntimeError, AttributeError) as error:
                absent = [name for name in takes if name not in given and name != "return_dict"]
                raise InputError(
                    f"the transformer fails on inputs {number}: {first_line(error)}; arguments that are not among "
                    f"them: {', '.join(absent) or 'none'}",
                    code="fidelity.inputs",
                    hint="give what its forward() takes, by the names of its arguments",
                ) from error
            parts = output if isinstance(output, list) else [output]
            whole = torch.cat([one.detach().to("cpu", torch.float32).flatten() for one in parts])
            return Drawn((whole,), torch.empty(0))

        return run

    return start


def _placed(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def pairs_of(prompts: Sequence[str], seeds: int) -> Iterator[Pair]:
    """Every prompt with every seed from 0."""
    return (Pair(prompt, seed) for prompt in prompts for seed in range(seeds))
