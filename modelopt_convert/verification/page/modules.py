"""What the page draws of modules: how many were compared, a cell for each, and tables. Pure."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from modelopt_convert.verification.page.excerpt import Module, entries, mapping, natural, number, show_number, tone
from modelopt_convert.verification.page.markup import badge, section, table, text, value_text

_BLOCK = re.compile(r"(?P<family>.+?)\.(?P<number>[0-9]{1,9})(?:\.(?P<role>.+))?", re.DOTALL)
_OTHER = "other modules"
_WORST = 12
_MAX_SHOWN = 2000
_MAX_PROBES = 100
_SHADES = 5
_NAME_LIMIT = 160

_COUNTED = (
    ("pass", "compared whole"),
    ("part", "sampled rows compared"),
    ("warn", "warn"),
    ("fail", "fail"),
    ("other", "not compared with a base"),
)
_HEADS = ("module", "status", "shape", "decode error", "gain", "worst row", "worst column", "SQNR dB", "kernel error")
_KEYS = ("relative_error", "gain", "worst_row", "worst_column", "sqnr_db")


def compared(modules: Sequence[Module], misplaced: int) -> str:
    """How many modules were compared, as one bar, and what was equal in them.

    Args:
        modules: All of them.
        misplaced: How many fail for their layout alone.
    """
    if not modules:
        return ""
    counts = Counter(module.tone for module in modules)
    bars, items, at = [], [], 0.0
    for kind, words in _COUNTED:
        if counts[kind]:
            wide = 100 * counts[kind] / len(modules)
            bars.append(f'<rect class={kind} x="{at:.2f}%" width="{wide:.2f}%" height="100%"/>')
            items.append(f"<li><i class={kind}></i> <b>{counts[kind]}</b> {words}</li>")
            at += wide
    said = ", ".join(f"{counts[kind]} {words}" for kind, words in _COUNTED if counts[kind])
    known = sum(module.data.get("compared") is not None for module in modules)
    whole = f"{known} of {len(modules)} modules were compared with a base"
    equal = [_equal(modules, kind, words) for kind, words in (("codes", "codes"), ("scales", "block scales"))]
    layout = f"of {misplaced} modules the layout is what fails: the values are the base's, and lie in another order"
    sentence = "; ".join([whole, *filter(None, equal), *([layout] if misplaced else [])])
    bar = f'<svg class="bar" role="img" aria-label="{text(said)}">{"".join(bars)}</svg>'
    return section("What was compared", f'<p>{text(sentence)}.</p>\n{bar}\n<ul class="key">{"".join(items)}</ul>')


def _equal(modules: Sequence[Module], key: str, words: str) -> str:
    total, same = (sum(int(number(module.data.get(name)) or 0) for module in modules) for name in (key, f"{key}_equal"))
    return f"{same:,} of {total:,} {words} are the base's" if total else ""


def drawn(modules: Sequence[Module]) -> str:
    """A cell for each module, a line for each role; colored by status or by an error, as the reader chooses."""
    if not modules:
        return section("Modules", '<p class="soft">No module was looked at.</p>')
    shown = modules[:_MAX_SHOWN]
    scales = {"d": _scale([one.decode_error for one in shown]), "k": _scale([one.kernel_error for one in shown])}
    parts = []
    for family, roles in _families(shown).items():
        lines = "\n".join(
            _line(role, sorted(members, key=lambda one: natural(one.name)), scales) for role, members in roles.items()
        )
        parts.append(f'<h3>{text(family, 80)}</h3>\n<div class="map">\n{lines}\n</div>')
    more = f" Of {len(modules)} modules these are the worst {_MAX_SHOWN}." if len(modules) > len(shown) else ""
    note = f"One cell for each module, with the number of its block. Grey cells were not compared with a base.{more}"
    return section("Modules by layer", f'{_choice(shown, scales)}\n<div class="maps">\n{"".join(parts)}</div>', note)


def _choice(shown: Sequence[Module], scales: Mapping[str, tuple[float, float] | None]) -> str:
    """The switch between what colors show, where there is more than one thing, and what they mean."""
    there = {module.tone for module in shown}
    words = " ".join(f"<span><i class={kind}></i> {words}</span>" for kind, words in _COUNTED if kind in there)
    legend = f'<p class="legend of-s">{words}</p>'
    known = {kind: scale for kind, scale in scales.items() if scale is not None}
    if not known:
        return legend
    names = {"s": "status", "d": "decode error", "k": "kernel error"}
    radios = "".join(
        f'<input type="radio" name="show" id="show-{kind}"{" checked" if kind == "s" else ""} '
        f'aria-label="Color shows {names[kind]}">'
        f'<label for="show-{kind}">{names[kind]}</label>'
        for kind in ("s", *known)
    )
    ramp = "".join(f"<i class=r{shade}></i>" for shade in range(1, _SHADES + 1))
    ramps = "".join(
        f'<p class="legend of-{kind}">{10**low:.2g} {ramp} {10**high:.2g}; empty: no figure</p>'
        for kind, (low, high) in known.items()
    )
    return f'<span class="soft">Color shows</span> {radios}\n{legend}{ramps}'


def _scale(errors: Sequence[float | None]) -> tuple[float, float] | None:
    logs = [_log(error) for error in errors if error is not None]
    if not logs:
        return None
    # Values that all but agree should look so.
    middle, half = (min(logs) + max(logs)) / 2, max((max(logs) - min(logs)) / 2, 0.1)
    return middle - half, middle + half


def _log(value: float) -> float:
    return min(max(math.log10(abs(value)), -12.0), 12.0) if value else -12.0


def _families(modules: Sequence[Module]) -> dict[str, dict[str, list[Module]]]:
    """Family of blocks: role: modules. A family of one block goes with the rest."""
    found: dict[str, dict[str, list[Module]]] = {}
    for module in modules:
        match = _BLOCK.fullmatch(module.name)
        family, role = (match["family"], match["role"] or "(the block itself)") if match else (_OTHER, module.name)
        found.setdefault(family, {}).setdefault(role, []).append(module)
    for family in [name for name, roles in found.items() if name != _OTHER and max(map(len, roles.values())) == 1]:
        rest = found.setdefault(_OTHER, {})
        rest.update({module.name: [module] for members in found.pop(family).values() for module in members})
    ordered = sorted(found, key=lambda name: (name == _OTHER, natural(name), name))
    return {name: {role: found[name][role] for role in sorted(found[name], key=natural)} for name in ordered}


def _line(role: str, members: Sequence[Module], scales: Mapping[str, tuple[float, float] | None]) -> str:
    counts = Counter(module.status for module in members)
    said = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    cells = "".join(_cell(module, scales) for module in members)
    label = f"{text(role, 80)}: {text(said, 200)}"
    return f'<p><span>{text(role, 48)}</span><span role="img" aria-label="{label}">{cells}</span></p>'


def _cell(module: Module, scales: Mapping[str, tuple[float, float] | None]) -> str:
    kinds = [module.tone]
    for kind, error in (("d", module.decode_error), ("k", module.kernel_error)):
        scale = scales[kind]
        if scale is not None and error is not None:
            low, high = scale
            kinds.append(f"{kind}{1 + min(int(_SHADES * (_log(error) - low) / (high - low)), _SHADES - 1)}")
    match = _BLOCK.fullmatch(module.name)
    number_words = match["number"][-4:] if match else ""
    error_words = f", error {show_number(module.decode_error)}" if module.decode_error is not None else ""
    title = f"{text(module.name, _NAME_LIMIT)}: {text(module.status, 40)}{text(error_words)}"
    return f'<i class="{" ".join(kinds)}" title="{title}">{number_words}</i>'


def _table(modules: Sequence[Module]) -> str:
    is_run = any(module.kernel_error is not None for module in modules)
    is_measured = is_run or any(module.decode_error is not None for module in modules)
    rows = []
    for module in modules:
        shape = "\u00d7".join(show_number(size) for size in entries(module.data.get("shape")))
        figures = [module.data.get(key) for key in _KEYS] if is_measured else []
        figures += [module.kernel_error] if is_run else []
        cells = [text(module.name, _NAME_LIMIT), badge(module.status, module.tone), text(shape, 40)]
        rows.append([*cells, *("" if figure is None else value_text(figure) for figure in figures)])
    return table("modules", _HEADS if is_run else _HEADS[:-1] if is_measured else _HEADS[:3], rows)


def worst(modules: Sequence[Module]) -> str:
    """The worst modules with their figures, and all of them behind a click."""
    note = "By status, then by decode error, then by kernel error."
    parts = [section("Worst modules" if len(modules) > _WORST else "Figures", _table(modules[:_WORST]), note)]
    if len(modules) > _WORST:
        few = len(modules) <= _MAX_SHOWN
        words = f"all {len(modules)} modules" if few else f"the worst {_MAX_SHOWN} of {len(modules)}"
        inside = _table(modules[:_MAX_SHOWN])
        parts.append(f"<details>\n<summary>Table of {words}</summary>\n{inside}\n</details>")
    return "\n".join(parts)


def probes(modules: Sequence[Module]) -> str:
    """Probes of kernels that did not pass."""
    rows = [row for module in modules for row in _probe_rows(module)]
    note = f"The first {_MAX_PROBES} of {len(rows)}, of the worst modules." if len(rows) > _MAX_PROBES else ""
    heads = ["module", "probe", "status", "calc_diff", "what was found"]
    return section("Probes that did not pass", table("probes", heads, rows[:_MAX_PROBES]), note)


def _probe_rows(module: Module) -> list[list[str]]:
    rows = []
    for backend, each in mapping(module.data.get("probes")).items():
        for name, result in mapping(each).items():
            probe: Mapping[str, Any] = mapping(result)
            if tone(probe.get("status")) not in ("fail", "warn"):
                continue
            where = [
                f"{key} {', '.join(show_number(place) for place in entries(probe[key])[:20])}"
                for key in ("rows", "columns")
                if entries(probe.get(key))
            ]
            said = "; ".join(str(part) for part in [probe.get("detail"), *where] if part)
            calc = "" if probe.get("calc_diff") is None else value_text(probe["calc_diff"])
            named = f"{text(backend, 80)} {text(name, 40)}"
            rows.append([text(module.name, _NAME_LIMIT), named, badge(probe.get("status")), calc, text(said)])
    return rows
