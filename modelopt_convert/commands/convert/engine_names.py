"""What engines make of a converted checkpoint, of a model that a preset is for, and its ``ignore``.

``ignore`` has every name under which an engine looks up a module that is not quantized, as that of a build has. Without
these names SGLang takes a module in BF16 for one in FP8 where its own name for it is not the one on disk, and casts it.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from modelopt_convert.checkpoint.header import TensorSpec
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.commands.command import Warned
from modelopt_convert.commands.serving import known_limits
from modelopt_convert.dialects.form import Written
from modelopt_convert.engines.limits import DEFAULT, limits
from modelopt_convert.formats.format import Format
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.plan.ignore import ignore_list, ignored_layers
from modelopt_convert.plan.keeps import structural_warnings
from modelopt_convert.plan.plan import Step
from modelopt_convert.preset.patterns import PatternMatcher
from modelopt_convert.preset.preset import Preset, load_preset, preset_names
from modelopt_convert.report.report import EngineLimitReport
from modelopt_convert.run.errors import InputError


def with_engine_names(written: Written, packed: Collection[str]) -> tuple[Written, tuple[Warned, ...]]:
    """A checkpoint of ModelOpt whose ``ignore`` has the names of engines too, and what is to be told.

    Args:
        written: In ModelOpt's dialect.
        packed: Its quantized modules.
    """
    config = written.config
    said = config.get("quantization_config") if config is not None else None
    if config is None or not isinstance(said, dict):
        return written, ()
    target, preset = _format_of(said), _preset_of(config)
    if target is None:
        return written, ()
    specs = (TensorSpec(one.name, one.dtype, one.shape) for one in written.tensors.values())
    steps = {spec.name: Step(spec, "export", "copy") for spec in specs}
    warned: tuple[Warned, ...] = ()
    ignore = said["ignore"]
    try:
        ignore = ignore_list(steps, target, packed, preset, config) if preset is not None else ignore
    except InputError as error:
        message = f"{error.message}: SGLang misreads that, so `ignore` has the names on disk alone"
        warned = (("convert.engine_names", message),)
    layers = {"ignored_layers": ignored_layers(ignore, packed, preset, config)} if "activation_scheme" in said else {}
    return replace(written, config={**config, "quantization_config": {**said, "ignore": ignore, **layers}}), warned


def known_of_engines(
    config: Mapping[str, Any], tensors: Collection[str], packed: Collection[str]
) -> tuple[list[EngineLimitReport], list[Warned]] | None:
    """What is known of engines and a checkpoint in ModelOpt's form; None of a model that no preset is for.

    Args:
        config: Its config.json.
        tensors: The names of its tensors.
        packed: Its quantized modules, under diffusers' names.
    """
    target, preset = _format_of(config.get("quantization_config")), _preset_of(config)
    if target is None or preset is None or not all(f"{name}.weight" in tensors for name in packed):
        return None
    matcher = PatternMatcher({module_of(name) for name in tensors})
    against = structural_warnings(preset, target, matcher, packed, config)
    words = [(code, f"{message}, in a build with this as --export") for code, message in against]
    return known_limits([config], target.algorithm), words


def limit_warnings(config: Mapping[str, Any]) -> list[Warned]:
    """What is known of the default engine and a checkpoint in ModelOpt's form, as ``verify`` says it."""
    target = _format_of(config.get("quantization_config"))
    if target is None:
        return []
    found = limits(config, target.algorithm)
    return [(f"engine.{one.grade}", one.words) for one in found if one.engine == DEFAULT]


def _format_of(said: object) -> Format | None:
    algorithm = said.get("quant_algo") if isinstance(said, dict) else None
    return next((one for one in FORMATS.values() if one.quant_algo == algorithm), None)


def _preset_of(config: Mapping[str, Any]) -> Preset | None:
    """What says more of the model fits better; else presets of one class have the same names."""
    presets = [load_preset(name).preset for name in preset_names()]
    return max((one for one in presets if one.fits(config)), key=lambda one: len(one.config), default=None)
