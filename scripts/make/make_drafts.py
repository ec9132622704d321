"""Write the figures of docs/presets.md: what `mopt presets new` makes of every transformer class of diffusers.

    python scripts/make/make_drafts.py

Each class is made on the meta device, and the headers of its weights are drafted and planned: NVFP4 as ``build-nvfp4``
plans a base, FP8 as ``convert-fp8`` plans the export that ModelOpt would make. No weight exists. Needs the ``modelopt``
extra. Below that stands where the rules alone, without a preset of the class, differ from the presets that come with
mopt.
"""

import inspect
import json
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from textwrap import wrap
from typing import Any

from make_headers import TARGET as HEADERS
from make_headers import expand

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.formats.dtypes import num_bytes
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.plan.from_base import plan_quantized
from modelopt_convert.plan.from_export import plan_mixed
from modelopt_convert.plan.plan import BuildPlan, Keeps
from modelopt_convert.preset.draft import draft_preset
from modelopt_convert.preset.draft_text import draft_text
from modelopt_convert.preset.patterns import PatternMatcher
from modelopt_convert.preset.preset import Preset, load_preset, parse_preset, preset_names
from modelopt_convert.run.errors import Faults, MoptError

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "presets.md"
MARK = "<!-- What follows is made by scripts/make/make_drafts.py; do not edit. -->\n"
_SHARD = 5 * 10**9
_GROUP = {"input_activations": {"dynamic": False, "num_bits": 8, "type": "float"}, "targets": ["Linear"]}
_DECLARED = {
    "config_groups": {"group_0": _GROUP | {"weights": _GROUP["input_activations"]}},
    "ignore": [],
    "quant_algo": "FP8",
    "producer": {"name": "modelopt", "version": "0.47.0"},
    "quant_method": "modelopt",
}

# Classes whose constructor has no default for what it needs: the values of a published config.json that matter.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "DreamLiteTransformer2DModel": {"in_channels": 320, "cross_attention_dim": 2048},
    "EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 16,
        "caption_channels": [4096, 4096],
        "llama_layers": [*range(32)],
    },
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2, "hidden_size": 1408, "num_layers": 40},
    "LatteTransformer3DModel": {
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "attention_head_dim": 72,
        "patch_size": 2,
        "caption_channels": 4096,
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "attention_bias": True,
    },
    "LuminaNextDiT2DModel": {"num_layers": 24, "num_kv_heads": 8},
    "OmniGenTransformer2DModel": {
        "rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48, "type": "su"}
    },
    "Transformer2DModel": {
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "attention_head_dim": 72,
        "patch_size": 2,
        "sample_size": 64,
        "caption_channels": 4096,
        "cross_attention_dim": 1152,
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "attention_bias": True,
    },
    "TransformerTemporalModel": {"in_channels": 320, "num_attention_heads": 8, "attention_head_dim": 40},
}


@dataclass(frozen=True)
class Headers:
    """A checkpoint that has no weights: what a plan needs of one."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """The folder of its files."""
        return self.path

    @property
    def config_place(self) -> str:
        """Where its config is, for messages."""
        return f"{self.path}: config.json"


@dataclass(frozen=True)
class Tried:
    """What became of one class.

    Attributes:
        name: The class.
        linears: How many it has, as diffusers makes them.
        quantized: How many of them a plan quantizes, by format.
        share: Of the bytes of all weights, those of the modules that are quantized to NVFP4.
        others: Modules that would be quantized and are no Linears.
        fault: Why there is no plan; empty if there are plans in all formats.
    """

    name: str
    linears: int
    quantized: Mapping[str, int]
    share: float
    others: tuple[str, ...]
    fault: str

    def row(self) -> str:
        """The class as a row of the page."""
        counts = " | ".join(str(self.quantized.get(one, "")) for one in FORMATS)
        return f"| `{self.name}` | {self.linears} | {counts} | {self.fault or f'{self.share:.0%}'} |"


@cache
def classes() -> dict[str, Any]:
    """Every model that a module of diffusers' transformers defines, sorted by name."""
    import diffusers.models.transformers as room
    from diffusers import ModelMixin

    found: dict[str, Any] = {}
    for one in pkgutil.iter_modules(room.__path__):
        module = import_module(f"{room.__name__}.{one.name}")
        found |= {
            name: kind
            for name, kind in vars(module).items()
            if inspect.isclass(kind) and issubclass(kind, ModelMixin) and kind.__module__ == module.__name__
        }
    return dict(sorted(found.items()))


def headers_of(name: str) -> tuple[Headers, frozenset[str]]:
    """The headers of a class in BF16, and the names of its Linears."""
    import torch

    with torch.device("meta"):
        model = classes()[name](**CONFIGS.get(name, {}))
    linears = frozenset(module for module, kind in model.named_modules() if isinstance(kind, torch.nn.Linear))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    config = json.loads(model.to_json_string())
    return headers(name, shapes, config | {"_class_name": name}), linears


def headers(name: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Headers:
    """A checkpoint in BF16 that has no weights."""
    tensors = {
        tensor: TensorInfo(tensor, "BF16", shape, "model.safetensors", 0, num_bytes("BF16", shape))
        for tensor, shape in shapes.items()
    }
    return Headers(Path(name), tensors, config)


def drafted(base: Headers, known: Preset | None = None) -> Preset:
    """The preset that is drafted for a base, read as a user's file is."""
    text = draft_text(draft_preset(base.tensors, base.config, known, str(base.path)))
    return parse_preset(text, path=f"{base.path}.toml").preset


def plans(base: Headers, preset: Preset, linears: frozenset[str]) -> Iterator[BuildPlan]:
    """What ``build-nvfp4`` makes of the base, and ``convert-fp8`` of the export that quantizes all its Linears."""
    for algorithm, target in FORMATS.items():
        keeps = Keeps(preset, preset.rules(algorithm), ())
        if target.block_size is not None:
            yield plan_quantized(target, base, keeps, max_shard_size=_SHARD)
            continue
        tensors = dict(base.tensors)
        for module in linears:
            weight = tensors[f"{module}.weight"]
            size = num_bytes(target.packed_dtype, weight.shape)
            tensors[weight.name] = replace(weight, dtype=target.packed_dtype, num_bytes=size)
            for role in target.scales:
                tensors[f"{module}.{role}"] = TensorInfo(f"{module}.{role}", "F32", (), weight.file, 0, 4)
        export = Headers(Path("export"), tensors, {**base.config, "quantization_config": _DECLARED})
        faults = Faults()
        plan = plan_mixed(target, export, base, keeps, faults, max_shard_size=_SHARD)
        faults.refuse()
        assert plan is not None  # or there were faults
        yield plan


def tried(name: str) -> Tried:
    """Draft a preset of a class and plan with it."""
    base, linears = headers_of(name)
    total = sum(one.num_bytes for one in base.tensors.values())
    try:
        planned = {plan.format.algorithm: plan for plan in plans(base, drafted(base), linears)}
    except MoptError as error:
        return Tried(name, len(linears), {}, 0.0, (), f"{error.message} [{error.code}]")
    first = planned[next(iter(FORMATS))]
    return Tried(
        name,
        len(linears),
        {algorithm: len(plan.packed) for algorithm, plan in planned.items()},
        sum(base.tensors[f"{module}.weight"].num_bytes for module in first.packed) / total,
        tuple(module for plan in planned.values() for module in plan.packed if module not in linears),
        "",
    )


def against_shipped(name: str) -> dict[str, tuple[str, ...]]:
    """By format, the places of Linears that the rules alone would quantize and a shipped preset calls structural."""
    read = json.loads((HEADERS / f"{name}.json").read_text())
    base = headers(name, {tensor: shape for tensor, (_, shape) in expand(read["tensors"]).items()}, read["config"])
    shipped, draft = load_preset(name).preset, drafted(base)
    matcher = PatternMatcher(dict.fromkeys(map(module_of, base.tensors)))
    linears = {module_of(one) for one, info in base.tensors.items() if one.endswith(".weight") and len(info.shape) == 2}
    found: dict[str, tuple[str, ...]] = {}
    for algorithm, rules in shipped.sets().items():
        mine = draft.rules(algorithm)
        kept = {module for pattern in (*mine.structural, *mine.quality) for module in matcher.find(pattern)}
        lost = {
            pattern
            for pattern in rules.structural
            for module in matcher.find(pattern)
            if module in linears and module not in kept
        }
        found[algorithm] = tuple(sorted(lost))
    return found


def render(results: list[Tried]) -> str:
    """The part of the page that is made here."""
    planned = [one for one in results if not one.fault]
    lost = {name: against_shipped(name) for name in preset_names()}
    same = [name for name, found in lost.items() if not any(found.values())]
    rows = [
        f"| `{name}` | {', '.join(algorithms)} | {', '.join(f'`{one}`' for one in patterns)} |"
        for name, found in lost.items()
        for patterns in dict.fromkeys(one for one in found.values() if one)
        for algorithms in [[one.upper() for one in found if found[one] == patterns]]
    ]
    import diffusers

    figure = (
        f"Of the {len(results)} transformer classes of diffusers {diffusers.__version__}, {len(planned)} give a draft "
        f"with which both formats plan: {len(planned) / len(results):.0%}. No draft quantizes a module that is no "
        f"Linear. A class is as large as its default config makes it; {len(CONFIGS)} have none, and are made from "
        "values of a published one."
    )
    compared = (
        "A draft keeps what a preset of the same class calls structural. The rules alone do so for "
        f"{len(same)} of {len(lost)} presets. No name tells what an engine's code cannot load packed: of the others, "
        "the rules would quantize these."
    )
    columns = ["class", "Linears", *(f"in {one.quant_algo}" for one in FORMATS.values()), "of the weights' bytes"]
    return "\n".join(
        [
            MARK,
            "## What drafts come to",
            "",
            *wrap(figure, 120),
            "",
            f"| {' | '.join(columns)} |",
            "|---" * len(columns) + "|",
            *(one.row() for one in results),
            "",
            *wrap(compared, 120),
            "",
            "| preset | formats | structural there, quantized by the rules alone |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def page(results: list[Tried]) -> str:
    """The whole page, with its own part replaced."""
    return PAGE.read_text(encoding="utf-8").partition(MARK)[0] + render(results)


if __name__ == "__main__":
    PAGE.write_text(page([tried(name) for name in classes()]), encoding="utf-8")
