"""From what ran to what the report says of a checkpoint. Pure."""

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from modelopt_convert.fidelity.comparison import Made, Pair, Seen
from modelopt_convert.fidelity.metrics import cosine, psnr_db, rmse, spread, sqnr_db, ssim
from modelopt_convert.fidelity.observe import Sums
from modelopt_convert.fidelity.pipeline import Drawn
from modelopt_convert.fidelity.thresholds import METRICS, Threshold
from modelopt_convert.report.fidelity import (
    AggregateFidelity,
    CheckpointFidelity,
    EmulationReport,
    ImageFidelity,
    ModuleFidelity,
    RequiredReport,
    StepFidelity,
)

Measure = Callable[[Tensor, Tensor], float]


def checkpoint_figures(
    made: Made,
    seen: Seen,
    base: Sequence[Drawn],
    pairs: Sequence[Pair],
    required: Sequence[Threshold],
    lpips: Measure | None,
) -> CheckpointFidelity:
    """The figures of one checkpoint.

    Args:
        made: The checkpoint.
        seen: What was found of it.
        base: What the base gave, run by run.
        pairs: Prompt and seed of each run; of inputs, none and their number.
        required: What is asked of the figures.
        lpips: Measures LPIPS, where it can.
    """
    part = next(iter(made.parts.values()))
    runs = [*zip(base, seen.runs, strict=True)]
    # Each figure is kept as it is here: the report has null where one is infinite.
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    images = [_image(pair, one, other, values, lpips) for pair, (one, other) in zip(pairs, runs, strict=True)]
    spreads = {name: spread(found) for name, found in values.items() if len(found) == len(runs)}
    bounds = {name: (one.lower95, one.upper95) for name, one in spreads.items()}
    return CheckpointFidelity(
        path=made.path,
        emulation=EmulationReport(
            format=part.format.quant_algo,
            rule=part.words,
            activations=part.rule,
            weights="kept decoded" if made.keep else "decoded per call",
            compiled=made.compiled,
        ),
        unquantized=sum(one.unquantized for one in made.parts.values()),
        modules={name: _module(sums) for name, sums in seen.modules.items()},
        blocks=seen.blocks,
        steps=_steps(runs),
        images=images,
        aggregate={
            name: AggregateFidelity(
                mean=_finite(one.mean),
                std=one.std,
                lower95=_finite(one.lower95),
                upper95=_finite(one.upper95),
                n=one.n,
            )
            for name, one in spreads.items()
        },
        required=[_required(one, bounds) for one in required],
    )


def _image(
    pair: Pair, base: Drawn, made: Drawn, values: Mapping[str, list[float]], lpips: Measure | None
) -> ImageFidelity:
    exact, got = base.latents[-1].double(), made.latents[-1].double()
    found: dict[str, float | None] = {
        "cosine": cosine(exact, got),
        "rmse": rmse(exact, got),
        "sqnr_db": sqnr_db(float(exact.square().sum()), float((exact - got).square().sum())),
    }
    if base.frames.numel():
        found["psnr"] = psnr_db(base.frames, made.frames)
        found["ssim"] = ssim(base.frames, made.frames)
        found["lpips"] = lpips(base.frames, made.frames) if lpips is not None else None
    for name, value in found.items():
        if value is not None:
            values[name].append(value)
    return ImageFidelity.model_validate(
        {"prompt": pair.prompt or None, "seed": pair.seed} | {name: _finite(value) for name, value in found.items()}
    )


def _steps(runs: Sequence[tuple[Drawn, Drawn]]) -> list[StepFidelity]:
    count = min(len(one.latents) for pair in runs for one in pair)
    found = []
    for step in range(count):
        each = [(base.latents[step], made.latents[step]) for base, made in runs]
        near = sum(cosine(*pair) for pair in each) / len(each)
        found.append(StepFidelity(cosine=near, rmse=sum(rmse(*pair) for pair in each) / len(each)))
    return found


def _module(sums: Sums) -> ModuleFidelity:
    return ModuleFidelity(
        calls=sums.calls,
        input_sqnr_db=_finite(sums.input_sqnr_db),
        weight_sqnr_db=_finite(sums.weight_sqnr_db),
        output_sqnr_db=_finite(sums.output_sqnr_db),
        clipped=sums.clipped / sums.values if sums.values else 0.0,
        zero_blocks=sums.zeros / sums.blocks if sums.blocks else None,
    )


def _required(one: Threshold, bounds: Mapping[str, tuple[float | None, float | None]]) -> RequiredReport:
    lower, upper = bounds.get(one.metric, (None, None))
    bound = lower if one.is_least else upper
    return RequiredReport(condition=one.words, bound=_finite(bound), met=one.holds(bound))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
