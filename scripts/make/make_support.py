"""Write docs/support.md from the presets.

python scripts/make/make_support.py
"""

from collections.abc import Sequence
from pathlib import Path

from modelopt_convert.engines.limits import Limit, all_limits, limits
from modelopt_convert.preset.preset import load_preset, preset_names

TARGET = Path(__file__).resolve().parent.parent.parent / "docs" / "support.md"
HEAD = """# What is supported

Generated from `presets/*.toml` by `scripts/make/make_support.py`; do not edit. *validated*: checkpoints made with this
set are published and served; *candidate*: the set has a source but nobody has shown it yet. The engines' columns are
those of `modelopt_convert/engines/limits.toml`: an engine *fails* to load, loads *wrong* values or loads with a *loss*.
What fails or is wrong in the engine that a checkpoint is built for (`--engine`, SGLang unless said otherwise) is built
only with `--allow-known-broken`. What the engines' own loaders were seen to do is in [engines.md](engines.md).
diffusers and ComfyUI load none of these. What is known of them, and of TensorRT-LLM, which was read and not run, stands
below the table.

| preset | model | base | algorithm | status | load flag | minimum GPU | SGLang | vLLM-omni | known limits |
|---|---|---|---|---|---|---|---|---|---|
"""


def render() -> str:
    """The page's text."""
    rows: list[str] = []
    for name in preset_names():
        preset = load_preset(name).preset
        for algorithm, rules in preset.sets().items():
            more = "; ".join(rules.known_limits) or "none known"
            config = {"_class_name": preset.class_name} | {key: True for key, there in preset.having.items() if there}
            known = limits(config, algorithm)
            sglang, omni = (_grade(known, engine) for engine in ("sglang", "vllm-omni"))
            rows.append(
                f"| `{name}` | {preset.title} | {', '.join(preset.repos)} "
                f"| {algorithm.upper()} | {rules.status} | `{preset.load_flag}` "
                f"| {rules.min_gpu} | {sglang} | {omni} | {more} |"
            )
    sources = [
        f"- `{name}` {algorithm.upper()}: {rules.source}"
        for name in preset_names()
        for algorithm, rules in load_preset(name).preset.sets().items()
    ]
    others = [
        f"- {one.name}, {'every class not named here' if one.class_name == '*' else f'`{one.class_name}`'} in "
        f"{' and '.join(map(str.upper, one.formats))}, {one.grade}: it {one.what}"
        for one in all_limits()
        if one.engine not in ("sglang", "vllm-omni")
    ]
    parts = [HEAD + "\n".join(rows), "## Other engines", "\n".join(others), "## Sources", "\n".join(sources)]
    return "\n\n".join(parts) + "\n"


def _grade(known: Sequence[Limit], engine: str) -> str:
    return "; ".join(f"{one.grade}: it {one.what}" for one in known if one.engine == engine) or "right"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
