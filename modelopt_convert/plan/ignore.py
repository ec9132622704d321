"""The ``ignore`` list: every spelling under which a runtime looks up a module that is not quantized. Pure, no torch.

Engines match ``ignore`` against their own module names, which differ from those on disk, and with the tensor-parallel
size; so every spelling is listed. A block of which nothing is quantized is also listed by a pattern, as ModelOpt does:
that covers the names of engines that no preset knows. No entry may be one that a quantized module goes by, under any
engine's way of matching: SGLang takes names, first segments and patterns, vLLM parts of names too, TensorRT-LLM
patterns, and names of parents.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from modelopt_convert.checkpoint.names import module_of, natural_key
from modelopt_convert.engines.sglang import ignored_by
from modelopt_convert.engines.tensorrt_llm import other_names
from modelopt_convert.engines.vllm_omni import begins_one, widened
from modelopt_convert.formats.format import Format
from modelopt_convert.plan.plan import Step
from modelopt_convert.preset.patterns import rename
from modelopt_convert.preset.preset import Preset
from modelopt_convert.run.errors import InputError

_BLOCK = re.compile(r"((?:[^.]+\.)+?\d+\.)")  # up to the first number: blocks.0.
_MOST_BLOCKS = 256  # no model has more, and readers of so many patterns give up


def spellings(module: str, preset: Preset | None, config: Mapping[str, Any]) -> set[str]:
    """A module's name on disk, and those that the preset says a runtime has for it."""
    runtime = preset.runtime_names if preset else {}
    found = {rename(module, disk, spelling, config) for disk, names in runtime.items() for spelling in names}
    return {module} | {name for name in found if name is not None}


def merged_modules(modules: Iterable[str], preset: Preset | None, config: Mapping[str, Any]) -> frozenset[str]:
    """Modules that the runtime loads into one with others: those that share one of its names."""
    by_name: dict[str, list[str]] = {}
    for module in modules:
        for spelling in spellings(module, preset, config) - {module}:
            by_name.setdefault(spelling, []).append(module)
    return frozenset(module for members in by_name.values() if len(members) > 1 for module in members)


def ignore_list(
    steps: Mapping[str, Step],
    target: Format,
    packed: Collection[str],
    preset: Preset | None,
    config: Mapping[str, Any],
) -> list[str]:
    """What ``ignore`` must list of the output's steps, in natural order.

    Raises:
        InputError: ``preset.fused_group``: a runtime would take a quantized module for one that is ignored.
    """
    ignored: dict[str, str] = {}
    kept: set[str] = set()
    for name, step in steps.items():
        if name.endswith(".weight") and step.output.dtype != target.packed_dtype and len(step.output.shape) >= 2:
            kept.add(module_of(name))
            ignored |= dict.fromkeys(spellings(module_of(name), preset, config), module_of(name))
    taken = [spelling for module in packed for spelling in spellings(module, preset, config)]
    for module in sorted(packed, key=natural_key):
        for spelling in spellings(module, preset, config):
            if (entry := ignored_by(ignored, spelling)) is not None:
                raise InputError(
                    f"{module} (quantized) would be ignored as {spelling}, since {ignored[entry]} stays in BF16",
                    code="preset.fused_group",
                    hint="the runtime has one module or one name for both: keep both in BF16, or neither",
                )
    taken = sorted({*taken, *other_names(packed)})
    whole = _whole_blocks(ignored, taken)
    # Names of TensorRT-LLM in such a block are covered by the pattern.
    blocks = tuple(pattern.removesuffix("*") for pattern in whole)
    entries = {*ignored, *(name for name in other_names(kept) if not name.startswith(blocks))}
    # A star at the end keeps an entry from being taken for a part of another name; patterns fit the whole name.
    starred = {entry for entry in widened(entries, taken) if not begins_one(taken, entry)}
    names = (f"{entry}*" if entry in starred else entry for entry in entries)
    return sorted({*names, *whole}, key=natural_key)


def ignored_layers(
    ignore: Iterable[str], packed: Collection[str], preset: Preset | None, config: Mapping[str, Any]
) -> list[str]:
    """What SGLang's method ``fp8`` reads in place of ``ignore``: names, and no patterns.

    ``_module_path_match`` of SGLang 0.5.23 (srt/layers/quantization/utils.py) takes an entry for every module whose
    name has it as whole segments in a row. So an entry that a quantized module's name has, too, is left out.

    Args:
        ignore: By ``ignore_list``.
        packed: The quantized modules.
        preset: The model's.
        config: Its config.json.
    """
    taken = {part for module in packed for spelling in spellings(module, preset, config) for part in _parts(spelling)}
    names = {entry.removesuffix("*") for entry in ignore if not entry.endswith(".*")}
    return sorted(names - taken, key=natural_key)


def not_left(
    modules: Iterable[str], layers: Iterable[str], preset: Preset | None, config: Mapping[str, Any]
) -> list[str]:
    """Modules that no entry of ``ignored_layers`` leaves unquantized, under whichever of their names."""
    listed = set(layers)
    return [
        module
        for module in modules
        if all(listed.isdisjoint(_parts(spelling)) for spelling in spellings(module, preset, config))
    ]


def _parts(name: str) -> set[str]:
    """All runs of a name's segments."""
    segments = name.split(".")
    ends = range(1, len(segments) + 1)
    return {".".join(segments[start:end]) for end in ends for start in range(end)}


def _whole_blocks(ignored: Iterable[str], taken: Sequence[str]) -> list[str]:
    """A pattern for each block of which every module is ignored; ``taken`` are the quantized ones, in order."""
    blocks = {found[1] for entry in ignored if (found := _BLOCK.match(entry))}
    whole = [block for block in blocks if not begins_one(taken, block)]
    return [f"{block}*" for block in whole] if len(whole) <= _MOST_BLOCKS else []
