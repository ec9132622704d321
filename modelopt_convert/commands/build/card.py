"""The model card (README.md) of an output. Pure: no paths, no times, the same text for the same input."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from modelopt_convert.commands.build.error_table import error_table
from modelopt_convert.commands.build.proof import verdict_counts
from modelopt_convert.commands.requests import TargetName
from modelopt_convert.engines.limits import DEFAULT, Limit, limits
from modelopt_convert.engines.sglang import dynamic_words, load_command, pipeline_command
from modelopt_convert.formats.format import WEIGHTS_WORDS, Algorithm, Weights
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.plan.plan import BuildPlan
from modelopt_convert.preset.preset import ChosenPreset, Preset
from modelopt_convert.report.report import ProofReport
from modelopt_convert.report.words import NEAR_WORDS, QUANTIZED_HERE, SAMPLED_WORDS

_NOT_CALIBRATED = "**NOT calibrated**: quantized by mopt from the base, weights by {}, inputs dynamic."
_FOR = "For serving engines, SGLang Diffusion first. diffusers itself cannot load packed ModelOpt weights."
_LOADED: dict[TargetName, str] = {
    "comfyui": "For ComfyUI: copy the `.safetensors` file into its folder `models/diffusion_models`.",
    "bfl-diffusers": "In the form of Black Forest Labs' NVFP4 repositories: for engines that load these.",
    "torchao": "With diffusers and torchao: `from_pretrained` of the model's class takes this folder.",
    "compressed-tensors": "For engines that load compressed-tensors.",
    "bf16": "In BF16, with the values that the quantized weights decode to: `from_pretrained` takes this folder.",
}
_CHOSEN: dict[Weights, str] = {
    "max": "by max calibration",
    "sweep": "by max calibration for each weight, and for each block the best of ten scales (`--weights sweep`)",
    "sweep-weighted": "by max calibration for each weight, and for each block the best of ten scales, errors "
    "weighted by the mean square of each input channel in a calibration (`--weights sweep-weighted`)",
    "gptq": "by max calibration for each weight, for each block the best of ten scales, errors weighted by the mean "
    "square of each input channel in a calibration, and codes by GPTQ with the same calibration (`--weights gptq`)",
}
_WHY = {
    NEAR_WORDS: "some weights or other tensors are near the base's, and are not what the base itself gives",
    SAMPLED_WORDS: "a sample of the rows was compared with the base, and the others were not",
}


@dataclass(frozen=True, slots=True)
class Made:
    """How a build was asked for, and what is known of its base.

    Attributes:
        command: The name of mopt's command.
        chosen: The preset, if there is one.
        calibration: ``none`` where the base itself is quantized, or what is known of its input scales then.
        base_repo: The base's repo, as it was observed; None where nothing names it.
        base_claimed: The base's repo, as the user names it.
        beside: Folders of the base that are copied beside the transformers; None where these are alone.
        to: The dialect that is published.
    """

    command: str
    chosen: ChosenPreset | None
    calibration: Literal["none"] | Mapping[str, Any] | None
    base_repo: str | None
    base_claimed: str | None
    beside: tuple[str, ...] | None = None
    to: TargetName = "modelopt"

    @property
    def base(self) -> str | None:
        """The base's repo as far as it is known; a preset that fits says nothing of it."""
        return self.base_claimed or self.base_repo

    @property
    def named_by_engine(self) -> str | None:
        """The repo by whose name an engine may know the model: the base's, else that of a preset that the user named.

        SGLang takes no notice of a name that it does not know. By a sibling's it would sample as for the sibling.
        """
        return self.chosen.known_as(self.base) if self.chosen is not None else self.base

    @property
    def repos(self) -> list[str]:
        """Hub ids of the model, where something tells which it is."""
        return self.chosen.repos(self.base) if self.chosen is not None else []

    @property
    def model(self) -> Preset | None:
        """What is known of the base's model: the preset that was made for just this base."""
        return self.chosen.made_for(self.base) if self.chosen is not None else None


def _head(algorithm: Algorithm, made: Made) -> list[str]:
    head = ["---"]
    if made.base is not None:
        head += [f"base_model: {made.base}", "base_model_relation: quantized"]
    if made.model is not None:
        head += _model_fields(made.model)
    tags = ["modelopt", "mopt", "sglang"] if made.to == "modelopt" else ["modelopt", "mopt", made.to]
    return [*head, "library_name: diffusers", "tags:", f"- {algorithm}", *(f"- {tag}" for tag in tags), "---", ""]


def _model_fields(preset: Preset) -> list[str]:
    """What the Hub is told of the base: its license, which binds what is made from it, and what it is for."""
    fields = ("license", "license_name", "license_link", "pipeline_tag")
    return [f"{name}: {value}" for name in fields if (value := getattr(preset, name)) is not None]


def _title(made: Made, otherwise: str) -> str:
    if made.model is not None and made.model.title is not None:
        return made.model.title
    return made.base.rpartition("/")[2] if made.base is not None else otherwise


def _preset_line(chosen: ChosenPreset | None) -> list[str]:
    if chosen is None:
        return []
    if chosen.also:
        names = ", ".join(f"`{name}`" for name in (chosen.loaded.preset.name, *chosen.also))
        return [f"Built with the sets that presets {names} have in common."]
    return [f"Built with preset `{chosen.loaded.preset.name}`."]


def _load_section(made: Made, components: Sequence[str], facts: Sequence[Limit]) -> list[str]:
    """How it is loaded; no command that is known to fail."""
    if made.to != "modelopt":
        return ["## Load", "", _LOADED[made.to], ""]
    if broken := [one for one in facts if one.engine == DEFAULT and one.is_broken]:
        return ["## Load", "", f"Not in {broken[0].name}: see known limits.", ""]
    if made.beside is not None:
        command = pipeline_command("REPO_OR_FOLDER", made.named_by_engine)
        return [
            "## Load",
            "",
            f"The whole pipeline{', one folder up' * (not components)}:",
            "",
            "```",
            command,
            "```",
            "",
        ]
    flag = made.chosen.loaded.preset.load_flag if made.chosen else "--transformer-path"
    return ["## Load", "", "```", load_command("<this repo>", made.base or "BASE_MODEL", components, flag), "```", ""]


def model_card(plan: BuildPlan, made: Made, proof: ProofReport, producer: str) -> str:
    """Text of the card of one transformer.

    Args:
        plan: What was built.
        made: How it was asked for.
        proof: Verdicts and their counts.
        producer: Who packed the weights, such as ``modelopt 0.47.0``.
    """
    target, chosen, command = plan.format, made.chosen, made.command
    title = _title(made, str(plan.config.get("_class_name", "transformer")))
    packed, total = len(plan.packed), len(plan.modules)
    written = {name: proof.modules[name] for name in plan.packed}
    proven = ", ".join(f"{count} {verdict}" for verdict, count in verdict_counts(written).items())
    here = proof.status == QUANTIZED_HERE
    how = [
        f"{producer} quantized {total} modules; `mopt {command}` kept their bytes and put {total - packed} of them",
        "back to BF16, as below.",
    ]
    if here:
        how = [
            f"`mopt {command}` quantized {packed} modules from the base itself, and kept {total - packed} in BF16.",
            *_how_quantized(plan, made),
        ]
    elif proof.status == "not proven":
        why = _WHY.get(proof.words, "no base was given to compare the weights with")
        how += [f"**{proof.words.capitalize()}**: {why}."]
    else:
        how += ["Before publishing, every code and scale that is packed here was compared with the", f"base: {proven}."]
    facts = limits(plan.config, target.algorithm, made.repos)
    body = [
        f"# {title}, {target.quant_algo}",
        "",
        f"The transformer alone: {packed} modules in {target.quant_algo} ({target.words}), the rest in BF16. Text "
        "encoders,",
        f"VAE and scheduler {'come from' if made.beside is None else 'stand beside it, copied from'} the base model.",
        "",
        *_load_section(made, [], facts),
        *([_FOR, ""] if made.to == "modelopt" else []),
        "## How it was made",
        "",
        *how,
        *_preset_line(chosen),
        "",
        f"| kept in BF16 | modules | {'of them Linears' if here else 'replaced'} | why |",
        "|---|---|---|---|",
        *(f"| `{rule.pattern}` | {rule.matched} | {rule.replaced} | {rule.kind} |" for rule in plan.rules),
        "",
        *([target.stored] if made.to == "modelopt" else []),
        "`mopt.json` lists the digest of every tensor.",
        "",
        *_errors_section(plan, proof),
    ]
    if made.to == "modelopt":  # what is known of engines is known of this dialect
        lost = dynamic_words(plan.config)
        known = chosen.limits(target.algorithm, exported=not here) if chosen else []
        known += [lost] if made.calibration == "none" and lost is not None else []
        known += [one.words for one in facts]
        body += ["## Known limits", "", *(f"- {limit}" for limit in known), ""]
    return "\n".join(_head(target.algorithm, made) + body)


def _how_quantized(plan: BuildPlan, made: Made) -> list[str]:
    """What was done with weights and activations, where the base itself is quantized."""
    weights = f"Weights: {_CHOSEN[plan.weights or 'max']}."
    if not isinstance(made.calibration, Mapping):
        return [
            f"{weights} Inputs: dynamic (`dynamic_input_scale`, no `input_scale`).",
            "**NOT calibrated**: no activations were looked at.",
        ]
    one = made.calibration
    return [
        weights,
        f"Inputs: calibrated by `mopt calibrate`, {one['runs']} runs of {one['steps']} steps, amax times "
        f"{one['headroom']:g}.",
    ]


def _errors_section(plan: BuildPlan, proof: ProofReport) -> list[str]:
    table = error_table(proof.modules, plan.packed)
    if not table:
        return []
    words = [
        "Relative error of the decoded weights against the base, on the rows that were looked at (Frobenius norm of",
        "the difference, divided by that of the base):",
    ]
    return ["## Error by kind of module", "", *words, "", *table, ""]


def converted_card(card: str, to: TargetName, in_bf16: Sequence[tuple[str, str]]) -> str:
    """The card of a checkpoint that was built and then converted.

    Args:
        card: Of the checkpoint that was built.
        to: The dialect that is published.
        in_bf16: Modules that the build quantized and that are in BF16 in the target, each with the reason.
    """
    body = [
        "## Converted",
        "",
        f"The checkpoint described above was converted to {to}. The result was read back and compared by all bytes.",
        "",
    ]
    if in_bf16:
        body += [f"{len(in_bf16)} modules are in BF16 here:", "", *(f"- `{name}`: {why}" for name, why in in_bf16), ""]
    return "\n".join([card, *body])


def pipeline_card(plans: Mapping[str, BuildPlan], made: Made) -> str:
    """Text of the card above several transformers of one model, or of a whole pipeline.

    Args:
        plans: What was built, by its folder.
        made: How they were asked for.
    """
    components = list(plans)
    algorithm = next(one.algorithm for one in FORMATS.values() if one.command == made.command)
    facts = list(dict.fromkeys(one for plan in plans.values() for one in limits(plan.config, algorithm, made.repos)))
    title = _title(made, "Transformers")
    chosen = {plan.weights for plan in plans.values() if plan.weights is not None}
    body = [
        f"# {title}, {FORMATS[algorithm].quant_algo}",
        "",
        *_contents(components, made.beside),
        "",
        *_load_section(made, components, facts),
        *_preset_line(made.chosen),
        *(_NOT_CALIBRATED.format(WEIGHTS_WORDS[one]) for one in chosen if made.calibration == "none"),
        "Each folder's README.md says what is quantized in it and how.",
        "",
        *(["## Known limits", "", *(f"- {one.words}" for one in facts), ""] if facts else []),
    ]
    return "\n".join(_head(algorithm, made) + body)


def _contents(components: Sequence[str], beside: Sequence[str] | None) -> list[str]:
    built, copied = (", ".join(f"`{name}`" for name in names) for names in (components, beside or ()))
    if beside is None:
        return [
            f"The transformers alone, each in a folder of its own: {built}.",
            "Text encoders, VAE and scheduler come from the base model.",
        ]
    return [f"A whole pipeline. Quantized: {built}. Copied from the base model, byte for byte: {copied}."]
