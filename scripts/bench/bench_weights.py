"""What rules for NVFP4 block scales are worth, on weights and in pictures of a small trained model; and their time.

    mopt calibrate tests/data/tiny_flux1 --pipeline tests/data/tiny_flux1 --prompts PROMPTS --size 32 --output CALIB
    python scripts/bench/bench_weights.py [--shuffles 16] [--pictures 4] [--calibration CALIB]

Rules: max calibration; four-over-six, which has the better of two scales, for a largest value that comes out at 6 or at
4; mopt's sweep of ten scales; the best of all 126 positive scales, the bound of all three; and, with a calibration, the
sweep of which it weighs the errors. Weights: Gaussian,
Student t with 4 and with 2 degrees of freedom, and the packed weights of the trained FLUX.1 of ``tests/data``. SQNR is
the sum of squares over that of the errors, in dB. Pictures are drawn by that model with its weights quantized and
decoded, activations untouched (W4A16), and compared with its own, seed by seed. One set of weights has one error, whose
direction is chance: so the columns of each weight are shuffled before it is cut into blocks, and moved back, in several
ways. The spread is that of the mean over these.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from modelopt_convert.checkpoint.calibration import Calibrated, read_calibration
from modelopt_convert.formats.nvfp4.codes import (
    decode_e2m1,
    dequantize_nvfp4,
    e4m3_values,
    encode_e2m1,
    max_scales,
    pack_e2m1,
    quantize_nvfp4,
    shared_global_scale,
)
from modelopt_convert.formats.nvfp4.sweep import sweep

_PIPELINE = Path(__file__).parents[2] / "tests" / "data" / "tiny_flux1"
_PROMPTS = ["a red zero", "a green three", "a blue five", "a red eight"]  # such as it was trained on
_KEPT = ("proj_mlp", "embedder", "norm", "proj_out", "context")
Rule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
WeightedRule = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def tried(weight: Tensor, factor: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [M, 16] under scale bytes [M], and the squared error of each block in float64."""
    blocks = weight.reshape(-1, 16).to(torch.float32)
    divisor = (e4m3_values(weight.device)[scales.int()] * factor).unsqueeze(1)
    codes = encode_e2m1(blocks / divisor)
    error = decode_e2m1(codes).to(torch.float64) * divisor.to(torch.float64) - blocks.to(torch.float64)
    return codes, error.square().sum(dim=1)


def best_of(weight: Tensor, factor: Tensor, candidates: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Codes and scales, of each block the best of the candidates."""
    chosen, least = candidates[0], tried(weight, factor, candidates[0])[1]
    for scales in candidates[1:]:
        error = tried(weight, factor, scales)[1]
        chosen = torch.where(error < least, scales, chosen)
        least = torch.minimum(error, least)
    shape = (*weight.shape[:-1], -1)
    codes = pack_e2m1(tried(weight, factor, chosen)[0])
    return codes.reshape(shape), chosen.view(torch.float8_e4m3fn).reshape(shape)


def largest(weight: Tensor) -> Tensor:
    """Of each block, [M]."""
    return weight.reshape(-1, 16).abs().amax(dim=1)


def four_over_six(weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """A largest value that comes out at 6, or at 4."""
    both = [max_scales(one, factor).view(torch.uint8) for one in (largest(weight), largest(weight).float() * 1.5)]
    return best_of(weight, factor, both)


def best_of_all(weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The best positive scale."""
    blocks = len(largest(weight))
    return best_of(weight, factor, [torch.full((blocks,), byte, dtype=torch.uint8) for byte in range(1, 127)])


RULES: dict[str, Rule] = {
    "max": quantize_nvfp4,
    "four-over-six": four_over_six,
    "sweep": sweep,
    "best of 126": best_of_all,
}


def packed_weights() -> dict[str, Tensor]:
    """Of the trained model: what the preset for FLUX.1 packs, without the groups that share a scale."""
    found = load_file(_PIPELINE / "transformer" / "diffusion_pytorch_model.safetensors")
    names = [name for name in found if "blocks." in name and name.endswith(".weight") and found[name].ndim == 2]
    return {name: found[name].to(torch.bfloat16) for name in names if not any(kept in name for kept in _KEPT)}


def sqnr(weights: list[Tensor], rule: Rule) -> float:
    """In dB, over all weights."""
    signal = noise = 0.0
    for weight in weights:
        factor = shared_global_scale([weight])
        error = dequantize_nvfp4(*rule(weight, factor), factor).double() - weight.double()
        signal += float(weight.double().square().sum())
        noise += float(error.square().sum())
    return 10 * float(torch.tensor(signal / noise).log10())


def shuffled(weight: Tensor, rule: Rule | WeightedRule, seed: int, importance: Tensor | None = None) -> Tensor:
    """A weight, quantized and decoded with other columns in a block; as it lies with seed 0."""
    order = torch.arange(weight.shape[1])
    if seed:
        order = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))
    factor = shared_global_scale([weight])
    more = () if importance is None else (importance[order],)
    return dequantize_nvfp4(*rule(weight[:, order].contiguous(), factor, *more), factor)[:, order.argsort()]


class Painter:
    """The trained model, and its pictures, one a prompt."""

    def __init__(self, count: int) -> None:
        """Load it, and draw what the others are compared with."""
        from diffusers import FluxPipeline

        self._pipe: Any = FluxPipeline.from_pretrained(_PIPELINE, torch_dtype=torch.float32)  # type: ignore[no-untyped-call]
        self._pipe.set_progress_bar_config(disable=True)
        self._state, self._weights = self._pipe.transformer.state_dict(), packed_weights()
        for name, weight in self._weights.items():
            self._state[name].copy_(weight)
        self._count = count
        self._own = self._draw()

    def psnr(self, rule: Rule | WeightedRule, seed: int, calibrated: Calibrated | None = None) -> float:
        """Mean over the pictures, in dB."""
        for name, weight in self._weights.items():
            importance = None
            if calibrated is not None:
                raw = calibrated.importance(name.removesuffix(".weight"), weight.shape[1])
                importance = torch.frombuffer(bytearray(raw), dtype=torch.float32)
            self._state[name].copy_(shuffled(weight, rule, seed, importance))
        noise = (self._draw() - self._own).square().flatten(1).mean(dim=1)
        return float(-10 * noise.log10().mean())

    def _draw(self) -> Tensor:
        made = self._pipe(
            _PROMPTS[: self._count],
            height=32,
            width=32,
            num_inference_steps=8,
            max_sequence_length=16,
            generator=[torch.Generator().manual_seed(seed) for seed in range(self._count)],
            output_type="pt",
        )
        found: Tensor = made.images
        return found


def told(painter: Painter, rule: Rule | WeightedRule, shuffles: int, calibrated: Calibrated | None = None) -> str:
    """PSNR over the ways of shuffling: the mean, and its standard error."""
    psnr = [painter.psnr(rule, seed, calibrated) for seed in range(shuffles)]
    return f"{statistics.mean(psnr):.2f} +- {statistics.stdev(psnr) / len(psnr) ** 0.5:.2f}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shuffles", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=4, choices=range(2, 5))
    parser.add_argument("--calibration", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    students = {f"Student t, {df:.0f}": torch.distributions.StudentT(df).sample((1024, 1024)) for df in (4.0, 2.0)}
    drawn = {"Gaussian": torch.randn(1024, 1024), **students}
    sets = {name: [one.to(torch.bfloat16)] for name, one in drawn.items()} | {
        "trained FLUX.1": list(packed_weights().values())
    }
    print(f"| rule | {' | '.join(sets)} | pictures, PSNR |\n|---|{'---|' * (len(sets) + 1)}")
    painter = Painter(options.pictures)
    for name, rule in RULES.items():
        cells = [f"{sqnr(weights, rule):.2f}" for weights in sets.values()]
        print(f"| {name} | {' | '.join(cells)} | {told(painter, rule, options.shuffles)} |", flush=True)
    if options.calibration is not None:
        calibrated = read_calibration(options.calibration).of(None)
        pictures = told(painter, sweep, options.shuffles, calibrated)
        print(f"| sweep-weighted | {' | '.join('' for _ in sets)} | {pictures} |", flush=True)
    for name, rule in (("max", quantize_nvfp4), ("sweep", sweep)):
        weight, seconds = torch.randn(4096, 16384).to(torch.bfloat16), []
        factor = shared_global_scale([weight])
        for _ in range(5):
            begun = time.thread_time()
            rule(weight, factor)
            seconds.append(time.thread_time() - begun)
        print(f"{name}: {statistics.median(seconds) / (weight.numel() * 2e-9):.2f} s of a core per GB of BF16")


if __name__ == "__main__":
    main()
