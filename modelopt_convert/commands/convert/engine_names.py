"""``ignore`` of a converted checkpoint: every name under which an engine looks up a module that is not quantized.

A build does the same. Without these names SGLang takes a module in BF16 for one in FP8 where its own name for it is not
the one on disk, and casts it.
"""

from collections.abc import Collection
from dataclasses import replace

from modelopt_convert.checkpoint.header import TensorSpec
from modelopt_convert.commands.command import Warned
from modelopt_convert.dialects.form import Written
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.plan.ignore import ignore_list, ignored_layers
from modelopt_convert.plan.plan import Step
from modelopt_convert.preset.preset import load_preset, preset_names
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
    target = next((one for one in FORMATS.values() if one.quant_algo == said.get("quant_algo")), None)
    presets = [load_preset(name).preset for name in preset_names()]
    fitting = [one for one in presets if one.fits(config)]
    if target is None:
        return written, ()
    # What says more of the model fits better; else presets of one class have the same names.
    preset = max(fitting, key=lambda one: len(one.config), default=None)
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
