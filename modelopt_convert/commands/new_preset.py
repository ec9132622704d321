"""``mopt presets new``: open the base as a build does, refuse what is no base, and draft a preset from its headers."""

from importlib.util import find_spec

from modelopt_convert import plan
from modelopt_convert.checkpoint.location import Location
from modelopt_convert.checkpoint.pipeline import resolve_components
from modelopt_convert.commands.build.inputs import Opened, open_all
from modelopt_convert.commands.command import Clock, Inputs, Warned
from modelopt_convert.commands.serving import servable
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.plan.from_base import plan_quantized
from modelopt_convert.plan.inputs import check_merged, check_unquantized
from modelopt_convert.plan.plan import Keeps, Source
from modelopt_convert.preset.draft import draft_preset
from modelopt_convert.preset.draft_text import draft_text
from modelopt_convert.preset.preset import LoadedPreset, Preset, parse_preset, preset_of_class, refuse_other_kind
from modelopt_convert.run.errors import InputError

_SHARD = 5 * 10**9  # how it would be written does not matter here


def drafted(base: Location, config: Location | None, variant: str | None) -> LoadedPreset:
    """A preset for a base; of a pipeline, for all its transformers.

    Args:
        base: The unquantized transformer: its folder, file or pipeline.
        config: Stands in for a config.json that the base has not.
        variant: Which weights of a folder are read.

    Returns:
        The preset, with what there is to say of the base's files and of engines as its warnings.

    Raises:
        InputError: It is no unquantized transformer; ``preset.draft``; or ``input.ambiguous``: a pipeline with two
            transformers that one preset does not fit.
    """
    components = resolve_components(None, base, ())
    warned: list[Warned] = []
    with Inputs(config, variant) as inputs:
        parts: list[Opened] = []
        for part, words in open_all(components, [str(one.name or "") for one in components], None, inputs, Clock()):
            parts.append(part)
            warned += words
        warned += inputs.left_aside()
        models = [part.model for part in parts]
        first = models[0]
        common = {
            key: value for key, value in first.config.items() if all(value == one.config.get(key) for one in models)
        }
        texts: list[str] = []
        for model in models:
            refuse_other_kind(model.config, str(model.path))
            check_unquantized(model)
            check_merged(model, "base")
            known = preset_of_class(model.config)
            texts.append(draft_text(draft_preset(model.tensors, common, known, str(model.path))))
    if len(set(texts)) > 1:
        raise InputError(
            f"base {base}: its transformers differ, so that no one preset fits: "
            + " and ".join(str(one.path) for one in models),
            code="input.ambiguous",
            path=str(base),
            hint=f"name the one you mean: {first.path}",
        )
    found = parse_preset(texts[0], path=str(base))
    for model in models:
        _check_plans(model, found.preset)
    algorithm, flags, why = servable(first.config, found.preset.sets())
    warned += [("engine.known_broken", why)] if why is not None else []
    told = {"warnings": [f"{message} [{code}]" for code, message in warned]}
    return found.model_copy(update=told | {"build": [FORMATS[algorithm].command, *flags]})


def _check_plans(base: Source, preset: Preset) -> None:
    """Plan with a draft before it is given away, in every format that can be made of a base.

    Raises:
        InputError: What a build would be refused for.
    """
    for algorithm, rules in preset.sets().items():
        if find_spec(f"{plan.__name__}.{algorithm}") is not None:
            plan_quantized(FORMATS[algorithm], base, Keeps(preset, rules, ()), max_shard_size=_SHARD)
