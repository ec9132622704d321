"""The model card (README.md) of an output. Pure: no paths, no times, the same text for the same input."""

from collections.abc import Sequence

from modelopt_convert.commands.build.error_table import error_table
from modelopt_convert.engines.sglang import DYNAMIC_INPUTS, load_command
from modelopt_convert.formats.format import Algorithm
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.plan.plan import BuildPlan
from modelopt_convert.preset.preset import ChosenPreset, Preset
from modelopt_convert.report.report import QUANTIZED_HERE, ProofReport


def _head(algorithm: Algorithm, chosen: ChosenPreset | None) -> list[str]:
    head = ["---"]
    if chosen is not None:
        if chosen.base_repo is not None:
            head += [f"base_model: {chosen.base_repo}", "base_model_relation: quantized"]
            head += _license(chosen.loaded.preset)
        head += [f"pipeline_tag: {chosen.loaded.preset.pipeline_tag}"]
    return [*head, "library_name: diffusers", "tags:", f"- {algorithm}", "- modelopt", "- mopt", "- sglang", "---", ""]


def _license(preset: Preset) -> list[str]:
    """The base's license, which binds what is made from it."""
    fields = {"license": preset.license, "license_name": preset.license_name, "license_link": preset.license_link}
    return [f"{name}: {value}" for name, value in fields.items() if value is not None]


def _load_section(chosen: ChosenPreset | None, components: Sequence[str]) -> list[str]:
    base = chosen.base_repo if chosen and chosen.base_repo else "BASE_MODEL"
    flag = chosen.loaded.preset.load_flag if chosen else "--transformer-path"
    return ["## Load", "", "```", load_command("<this repo>", base, components, flag), "```", ""]


def model_card(plan: BuildPlan, chosen: ChosenPreset | None, proof: ProofReport, producer: str, command: str) -> str:
    """Text of the card of one transformer.

    Args:
        plan: What was built.
        chosen: The preset it was built with, if any.
        proof: Verdicts and their counts.
        producer: Who packed the weights, such as ``modelopt 0.47.0``.
        command: Of mopt.
    """
    target = plan.format
    title = chosen.loaded.preset.title if chosen else str(plan.config.get("_class_name", "transformer"))
    packed, total = len(plan.packed), len(plan.modules)
    proven = ", ".join(f"{count} {verdict}" for verdict, count in sorted(proof.counts.items()))
    here = proof.status == QUANTIZED_HERE
    how = [
        f"{producer} quantized {total} modules; `mopt {command}` kept their bytes and put {total - packed} of them",
        "back to BF16, as below.",
    ]
    if here:
        how = [
            f"`mopt {command}` quantized {packed} modules from the base itself, and kept {total - packed} in BF16.",
            "Weights: by max calibration. Inputs: dynamic (`dynamic_input_scale`, no `input_scale`).",
            "**NOT calibrated**: no activations were looked at.",
        ]
    elif proof.status == "not proven":
        how += ["**Not proven**: no base was given to compare the weights with."]
    else:
        how += ["Before publishing, rows of every packed weight were proven against the", f"base: {proven}."]
    body = [
        f"# {title}, {target.quant_algo}",
        "",
        f"The transformer alone: {packed} modules in {target.quant_algo} ({target.words}), the rest in BF16. Text "
        "encoders,",
        "VAE and scheduler come from the base model.",
        "",
        *_load_section(chosen, []),
        "For serving engines, SGLang Diffusion first. diffusers itself cannot load packed ModelOpt weights.",
        "",
        "## How it was made",
        "",
        *how,
        "",
        f"| kept in BF16 | modules | {'of them Linears' if here else 'replaced'} | why |",
        "|---|---|---|---|",
        *(f"| `{rule.pattern}` | {rule.matched} | {rule.replaced} | {rule.kind} |" for rule in plan.rules),
        "",
        target.stored,
        "`mopt.json` lists the digest of every tensor.",
        "",
        *_errors_section(plan, proof),
    ]
    limits = (chosen.limits(target.algorithm) if chosen else []) + ([DYNAMIC_INPUTS] if here else [])
    if limits:
        body += ["## Known limits", "", *(f"- {limit}" for limit in limits), ""]
    return "\n".join(_head(target.algorithm, chosen) + body)


def _errors_section(plan: BuildPlan, proof: ProofReport) -> list[str]:
    table = error_table(proof.modules, plan.packed)
    if not table:
        return []
    words = [
        "Relative error of the decoded weights against the base, on the rows that were proven (Frobenius norm of the",
        "difference over that of the base):",
    ]
    return ["## Error by kind of module", "", *words, "", *table, ""]


def pipeline_card(components: Sequence[str], chosen: ChosenPreset | None, command: str, calibration: str | None) -> str:
    """Text of the card above several transformers of one model.

    Args:
        components: Their folders.
        chosen: The preset they were built with, if any.
        command: Of mopt.
        calibration: ``none`` where mopt quantized the base itself.
    """
    algorithm = next(one.algorithm for one in FORMATS.values() if one.command == command)
    title = chosen.loaded.preset.title if chosen else "Transformers"
    body = [
        f"# {title}, {FORMATS[algorithm].quant_algo}",
        "",
        f"The transformers alone, each in a folder of its own: {', '.join(f'`{name}`' for name in components)}.",
        "Text encoders, VAE and scheduler come from the base model.",
        "",
        *_load_section(chosen, components),
        *(["**NOT calibrated**: quantized by mopt from the base, weights by max, inputs dynamic."] * bool(calibration)),
        "Each folder's README.md says what is quantized in it and how.",
        "",
    ]
    return "\n".join(_head(algorithm, chosen) + body)
