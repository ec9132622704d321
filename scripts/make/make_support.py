"""Write docs/support.md from the presets.

python scripts/make/make_support.py
"""

from pathlib import Path

from modelopt_convert.preset.preset import load_preset, preset_names

TARGET = Path(__file__).resolve().parent.parent.parent / "docs" / "support.md"
HEAD = """# What is supported

Generated from `presets/*.toml` by `scripts/make/make_support.py`; do not edit. *validated*: checkpoints made with this
set are published and served; *candidate*: the set has a source but nobody has shown it yet. Where an engine is known to
be unable to use the result, `mopt` builds it only with `--allow-known-broken`.

| preset | model | base | algorithm | status | load flag | minimum GPU | known broken | known limits |
|---|---|---|---|---|---|---|---|---|
"""


def render() -> str:
    """The page's text."""
    rows: list[str] = []
    for name in preset_names():
        preset = load_preset(name).preset
        for algorithm, rules in preset.sets().items():
            limits = "; ".join(rules.known_limits) or "none known"
            broken = ", ".join(f"`{engine}`" for engine in rules.known_broken) or "no"
            rows.append(
                f"| `{name}` | {preset.title} | {', '.join(preset.repos)} "
                f"| {algorithm.upper()} | {rules.status} | `{preset.load_flag}` "
                f"| {rules.min_gpu} | {broken} | {limits} |"
            )
    sources = [
        f"- `{name}` {algorithm.upper()}: {rules.source}"
        for name in preset_names()
        for algorithm, rules in load_preset(name).preset.sets().items()
    ]
    return HEAD + "\n".join(rows) + "\n\n## Sources\n\n" + "\n".join(sources) + "\n"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
