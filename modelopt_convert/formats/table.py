"""All quantization formats, by what their folders say. Pure, no torch.

A format is a folder beside this file; ``FORMAT`` in the folder's ``format.py`` describes it. What another room knows of
a format lies in that room, in a module with the format's name; the module's ``ENTRY`` keeps the room's contract.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from modelopt_convert.formats.format import Algorithm, Format


def _found() -> dict[Algorithm, Format]:
    folders = (path.parent.name for path in Path(__file__).parent.glob("*/format.py"))
    formats: list[Format] = [import_module(f"{__package__}.{name}.format").FORMAT for name in folders]
    return {one.algorithm: one for one in sorted(formats, key=lambda one: (one.bits, one.algorithm))}


FORMATS: Mapping[Algorithm, Format] = _found()


def declares_dynamic_inputs(config: Mapping[str, object]) -> bool:
    """Whether a config.json says that input scales are taken from the activations."""
    found = config.get("quantization_config")
    return isinstance(found, dict) and found.get("dynamic_input_scale") is True


def is_modelopts(keys: Mapping[str, object]) -> bool:
    """Whether a ``quantization_config`` is of ModelOpt's dialect: by its method, or by all that says dynamic inputs."""
    method = keys.get("quant_method")
    return method == "modelopt" or any(
        keys.get("quant_algo") == one.quant_algo
        and all(key in keys and keys[key] == value for key, value in one.dynamic.items())
        for one in FORMATS.values()
    )
