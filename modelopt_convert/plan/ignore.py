"""The ``ignore`` list: every spelling under which a runtime looks up a module that is not quantized. Pure, no torch.

Engines match ``ignore`` against their own module names, which differ from those on disk, and with the tensor-parallel
size; so every spelling is listed. None may be one that a quantized module goes by.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from modelopt_convert.checkpoint.names import module_of, natural_key
from modelopt_convert.engines.sglang import ignored_by
from modelopt_convert.formats.format import Format
from modelopt_convert.plan.plan import Step
from modelopt_convert.preset.patterns import rename
from modelopt_convert.preset.preset import Preset
from modelopt_convert.run.errors import InputError


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
    for name, step in steps.items():
        if name.endswith(".weight") and step.output.dtype != target.packed_dtype and len(step.output.shape) >= 2:
            ignored |= dict.fromkeys(spellings(module_of(name), preset, config), module_of(name))
    for module in packed:
        for spelling in spellings(module, preset, config):
            if (entry := ignored_by(ignored, spelling)) is not None:
                raise InputError(
                    f"{module} (quantized) would be ignored as {spelling}, since {ignored[entry]} stays in BF16",
                    code="preset.fused_group",
                    hint="the runtime makes one module of both: keep both in BF16, or neither",
                )
    return sorted(ignored, key=natural_key)
