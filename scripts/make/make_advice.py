"""Write tests/data/tiny_flux1_advice.json: what advice on the small trained pipeline is worth.

python scripts/make/make_advice.py (five minutes on one core)

Every choice is made on one set of pictures, and judged on another. Pictures are drawn by diffusers itself, in batches;
input scales are calibrated, so that a batch does not change them.
"""

import json
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.fidelity.emulation import emulated
from modelopt_convert.fidelity.frontier import Item, best_within
from modelopt_convert.fidelity.pipeline import Drawing, load_pipeline
from modelopt_convert.fidelity.quantized_here import packed_weight
from modelopt_convert.fidelity.transformer import load_transformer
from modelopt_convert.fidelity.trials import Trials
from modelopt_convert.fidelity.units import Choices, choices_of
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.preset.preset import parse_preset
from modelopt_convert.write.measure import measure

ROOT = Path(__file__).resolve().parent.parent.parent
BASE = ROOT / "tests" / "data" / "tiny_flux1"
FILE = ROOT / "tests" / "data" / "tiny_flux1_advice.json"
# Every Linear of the blocks is free: no engine's code says what cannot be packed.
PRESET = """
extends = "flux1-dev"
name = "tiny"
[nvfp4]
status = "candidate"
source = "the tests"
min_gpu = "none"
known_limits = []
structural = ["x_embedder", "context_embedder", "time_text_embed.**", "norm_out.linear", "proj_out"]
quality = []
"""
DIGITS, COLOURS = ("zero", "three", "six", "seven"), ("red", "green", "blue", "yellow")
PROMPTS = tuple(f"a {colour} {digit}" for digit in DIGITS for colour in COLOURS)
STEPS, HEADROOM, CALLS = 6, 2.0, 16
CHOOSING, JUDGING = (0,), (1, 2)  # seeds
SHARES = (0.1, 0.25, 0.5)
RANDOM = 12


class Tiny:
    """The pipeline with everything that is measured of it."""

    def __init__(self) -> None:
        """Load, calibrate, and draw what there is to compare with."""
        self.reader = CheckpointReader(BASE / "transformer").__enter__()
        self.choices: Choices = choices_of(FORMATS["nvfp4"], self.reader, parse_preset(PRESET, path="tiny").preset)
        plan = self.choices.plan
        plan = plan.with_scales(measure(self.reader, plan, 1, lambda _: None))
        self.weights = {name: packed_weight(self.reader, plan, name) for name in plan.packed}
        self.transformer = load_transformer(self.reader)
        self.pipeline = load_pipeline(str(BASE), {"transformer": self.transformer}, device="cpu", offload="none")
        self.scales = self._calibrated()
        self.pictures = {seed: self.draw(seed) for seed in (*CHOOSING, *JUDGING)}
        self.known: dict[tuple[frozenset[str], int], list[float]] = {}

    def draw(self, seed: int) -> torch.Tensor:
        """Pictures float32 [N, H, W, 3] of one seed: of every second prompt to choose, of all to judge."""
        prompts = PROMPTS[::2] if seed in CHOOSING else PROMPTS
        with torch.inference_mode():
            return torch.from_numpy(
                self.pipeline(
                    list(prompts),
                    height=32,
                    width=32,
                    num_inference_steps=STEPS,
                    max_sequence_length=self.pipeline.tokenizer_2.model_max_length,
                    generator=[torch.Generator().manual_seed(100 * seed + number) for number in range(len(prompts))],
                    output_type="np",
                ).images
            )

    def errors(self, keeps: Iterable[str], seed: int) -> list[float]:
        """Mean squared error of each picture with these units kept, and the others packed."""
        kept = frozenset(keeps)
        if (kept, seed) not in self.known:
            packed = [name for unit in self.choices.units if unit.name not in kept for name in unit.members]
            with emulated(
                self.transformer, {name: self.weights[name] for name in packed}, "static", self.scales, keep=True
            ):
                found = self.draw(seed)
            squares = (found.double() - self.pictures[seed].double()).square()
            self.known[kept, seed] = squares.mean(dim=(1, 2, 3)).tolist()
        return self.known[kept, seed]

    def psnr(self, keeps: Iterable[str], seeds: Sequence[int]) -> float:
        """Mean PSNR of all pictures, in dB."""
        kept = list(keeps)
        errors = torch.tensor([one for seed in seeds for one in self.errors(kept, seed)], dtype=torch.float64)
        return float((-10 * errors.log10()).mean())

    def _calibrated(self) -> dict[str, float]:
        """Input scales by ModelOpt's rule, of the pictures that choices are made on, the largest of each unit."""
        amax = dict.fromkeys(self.weights, 0.0)

        def seen(name: str) -> Any:
            def hook(_: torch.nn.Module, words: tuple[torch.Tensor, ...]) -> None:
                amax[name] = max(amax[name], float(words[0].abs().max()))

            return hook

        hooks = [self.transformer.get_submodule(name).register_forward_pre_hook(seen(name)) for name in self.weights]
        for seed in CHOOSING:
            self.draw(seed)
        for hook in hooks:
            hook.remove()
        largest = {name: max(amax[one] for one in unit.members) for unit in self.choices.units for name in unit.members}
        return {name: HEADROOM * one / (6 * 448) for name, one in largest.items()}


def main() -> None:
    """Measure, and write."""
    torch.set_num_threads(1)
    tiny = Tiny()
    units = tiny.choices.units
    costs = {unit.name: unit.bytes_kept - unit.bytes_packed for unit in units}
    every = [unit.name for unit in units]
    trials = Trials(
        tiny.pipeline,
        tiny.transformer,
        tiny.weights,
        "static",
        tiny.scales,
        Drawing(STEPS, 32, 1),
        [(prompt, 0) for prompt in PROMPTS[::2]],
    )
    for _ in trials.draw_unquantized(CALLS):
        pass
    scores = {unit.name: trials.moved_by(unit.members) for unit in units}
    drawn: dict[str, float] = {}
    effect: dict[str, float] = {}
    for unit in units:
        others = [name for name in every if name != unit.name]
        drawn[unit.name] = total(tiny, others, CHOOSING)
        effect[unit.name] = total(tiny, others, JUDGING)
    weight = {unit.name: weight_error(tiny, unit.members) for unit in units}
    for name, one in {"pictures": drawn, "one forward": scores, "weight error": weight}.items():
        print("spearman of", name, round(spearman(one, effect), 3), flush=True)
    found: dict[str, Any] = {}
    for share in SHARES:
        room = int(share * sum(costs.values()))
        chosen = {
            "one forward": choose(scores, costs, room),
            "pictures": choose(drawn, costs, room),
            "weight error": choose(weight, costs, room),
            "truth": choose(effect, costs, room),
        }
        chosen |= {f"random {number}": shuffled(every, costs, room, number) for number in range(RANDOM)}
        found[str(share)] = {
            name: {"keeps": sorted(keeps), "psnr": round(tiny.psnr(keeps, JUDGING), 3)}
            for name, keeps in chosen.items()
        }
        print(share, {name: one["psnr"] for name, one in found[str(share)].items()}, flush=True)
    said = {
        "pictures": len(PROMPTS) * len(JUDGING),
        "packed": round(tiny.psnr((), JUDGING), 3),
        "units": [
            {
                "name": unit.name,
                "cost": costs[unit.name],
                "score": scores[unit.name],
                "drawn": drawn[unit.name],
                "weight_error": weight[unit.name],
                "effect": effect[unit.name],
            }
            for unit in units
        ],
        "shares": found,
    }
    FILE.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def weight_error(tiny: Tiny, members: Collection[str]) -> float:
    """Squared error of a unit's weights as decoded, relative to their squares."""
    noise = energy = 0.0
    for name in members:
        exact = tiny.transformer.get_submodule(name).weight.double()
        decoded = tiny.weights[name].decode(0, len(exact)) * tiny.weights[name].tensor_scale
        noise, energy = noise + float((decoded - exact).square().sum()), energy + float(exact.square().sum())
    return noise / energy


def choose(errors: Mapping[str, float], costs: Mapping[str, int], room: int) -> list[str]:
    """What the knapsack keeps."""
    best = best_within([Item(name, error, costs[name]) for name, error in errors.items()], room)
    assert best is not None
    return list(best.keeps)


def total(tiny: Tiny, keeps: Sequence[str], seeds: Sequence[int]) -> float:
    """Error of all pictures of some seeds."""
    return sum(sum(tiny.errors(keeps, seed)) for seed in seeds)


def shuffled(every: Sequence[str], costs: Mapping[str, int], room: int, seed: int) -> list[str]:
    """Units in a random order, as far as they fit."""
    kept: list[str] = []
    for name in random.Random(seed).sample(every, len(every)):
        if sum(costs[one] for one in kept) + costs[name] <= room:
            kept.append(name)
    return kept


def spearman(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Correlation of the ranks."""
    names = list(one)
    ranks = [torch.tensor([each[name] for name in names]).argsort().argsort().double() for each in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


if __name__ == "__main__":
    main()
