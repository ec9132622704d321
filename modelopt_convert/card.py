"""The model card (README.md) of an output. Pure: no paths, no times, the same text for the same input."""

from collections.abc import Mapping

from modelopt_convert.plan import BuildPlan
from modelopt_convert.preset import Preset


def model_card(plan: BuildPlan, preset: Preset | None, proof_counts: Mapping[str, int], producer: str) -> str:
    """Text of the card.

    Args:
        plan: What was built.
        preset: The preset it was built with, if any.
        proof_counts: How many modules met each verdict.
        producer: Who packed the weights, such as ``modelopt 0.47.0``.
    """
    head = ["---"]
    if preset is not None:
        head += [f"base_model: {preset.base_repo}", "base_model_relation: quantized"]
        head += [f"pipeline_tag: {preset.pipeline_tag}"]
    head += ["library_name: diffusers", "tags:", "- nvfp4", "- modelopt", "- mopt", "- sglang", "---", ""]
    title = preset.title if preset else str(plan.config.get("_class_name", "transformer"))
    base = preset.base_repo if preset else "BASE_MODEL"
    flag = preset.load_flag if preset else "--transformer-path"
    packed, total = len(plan.packed), len(plan.modules)
    proven = ", ".join(f"{count} {verdict}" for verdict, count in sorted(proof_counts.items()))
    body = [
        f"# {title}, NVFP4",
        "",
        f"The transformer alone: {packed} modules in NVFP4 (W4A4, blocks of 16), the rest in BF16. Text encoders,",
        "VAE and scheduler come from the base model.",
        "",
        "## Load",
        "",
        "```",
        f"sglang generate --model-path {base} {flag} <this repo> --prompt '...'",
        "```",
        "",
        "For serving engines, SGLang Diffusion first. diffusers itself cannot load packed ModelOpt weights.",
        "",
        "## How it was made",
        "",
        f"{producer} quantized {total} modules; `mopt build-nvfp4` kept their bytes and put {total - packed} of them",
        "back to BF16 from the base, as below. Before publishing, rows of every packed weight were proven against the",
        f"base: {proven}.",
        "",
        "| kept in BF16 | modules | replaced | why |",
        "|---|---|---|---|",
        *(f"| `{rule.pattern}` | {rule.matched} | {rule.replaced} | {rule.kind} |" for rule in plan.rules),
        "",
        "Codes: the low nibble holds the even column. Scales: row-major. Both are declared in `config.json`.",
        "`mopt.json` lists the digest of every tensor.",
        "",
    ]
    if preset is not None and preset.nvfp4 is not None and preset.nvfp4.known_limits:
        body += ["## Known limits", "", *(f"- {limit}" for limit in preset.nvfp4.known_limits), ""]
    return "\n".join(head + body)
