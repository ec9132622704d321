"""The heatmaps of the HTML report as plotly's own JSON: modules by block and role, one figure per kind of block. Pure.

Names come from the checkpoint and may be hostile: all that a page shows of them goes through ``visible``.
"""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_BLOCK = re.compile(r"(?P<family>.+?)\.(?P<number>[0-9]{1,9})(?:\.(?P<role>.+))?", re.DOTALL)
_DIGITS = re.compile(r"([0-9]+)")
_NAME_LIMIT = 300
_LABEL_LIMIT = 34
_MAX_ROWS = 60
_MAX_COLUMNS = 400
_CELL_HEIGHT = 22
_PAGE_WIDTH = 1030
# Plotly shows no label that its figure has no room for.
_MIN_WIDTH = 780
_MIN_HEIGHT = 160
_HOVER_WIDTH = 46
_HOVER_LINES = 8
_OTHER = "other modules"
_RANKS = {"fail": 0, "warn": 1, "other": 2, "pass": 3}
_STATUS_VALUES = {"pass": 0, "other": 1, "warn": 2, "fail": 3}


@dataclass(frozen=True, slots=True)
class Module:
    """One entry of the report's ``modules``, as far as it could be read.

    Attributes:
        name: As in the checkpoint, unescaped.
        data: The entry.
        status: The word given for it.
        tone: ``pass``, ``warn``, ``fail`` or ``other``.
        decode_error: Relative error against the base.
        kernel_errors: Largest ``calc_diff`` of all probes, by backend.
    """

    name: str
    data: Mapping[str, Any]
    status: str
    tone: str
    decode_error: float | None
    kernel_errors: Mapping[str, float]

    @property
    def kernel_error(self) -> float | None:
        """The largest of all backends."""
        return max(self.kernel_errors.values(), default=None)


@dataclass(frozen=True, slots=True)
class _Metric:
    label: str
    values: Mapping[str, float]
    low: float
    high: float
    legend: tuple[str, str]
    is_status: bool = False


def mapping(value: object) -> Mapping[str, Any]:
    """The value, or nothing where it is no object."""
    return value if isinstance(value, Mapping) else {}


def entries(value: object) -> Sequence[Any]:
    """The value, or nothing where it is no list."""
    return value if isinstance(value, list | tuple) else ()


def number(value: object) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def visible(value: object, limit: int = _NAME_LIMIT) -> str:
    """Text in which control, bidi and unencodable characters are spelled out; cut in the middle where too long."""
    words = str(value)
    if len(words) > limit:
        words = f"{words[: limit // 2]}\u2026{words[len(words) - limit // 2 :]}"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in words)


def show_number(value: object) -> str:
    """A number as people read it; a dash for none."""
    if value is None:
        return "\u2013"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else {math.inf: "\u221e", -math.inf: "-\u221e"}.get(value, "NaN")
    return visible(value)


def tone(status: object) -> str:
    """``pass``, ``warn``, ``fail`` or ``other``: what a status looks like."""
    word = str(status).lower()
    if word in ("fail", "failed", "broken", "error", "mismatch"):
        return "fail"
    return word if word in ("pass", "warn") else "other"


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key under which block 10 comes after block 9."""
    parts = _DIGITS.split(name)
    # Compared as text where a hostile run of digits is too long to be a number.
    return tuple((0, int(part), "") if part.isdecimal() and len(part) < 19 else (1, 0, part) for part in parts)


def read_modules(report: Mapping[str, Any]) -> list[Module]:
    """Every module, the worst first."""
    modules = [_read_module(str(name), mapping(data)) for name, data in mapping(report.get("modules")).items()]
    return sorted(modules, key=_badness)


def _read_module(name: str, data: Mapping[str, Any]) -> Module:
    kernel_errors = {}
    for backend, probes in mapping(data.get("probes")).items():
        found = [number(mapping(probe).get("calc_diff")) for probe in mapping(probes).values()]
        known = [abs(value) for value in found if value is not None]
        if known:
            kernel_errors[str(backend)] = max(known)
    status = data.get("status")
    word = "not checked" if status is None else str(status)
    return Module(name, data, word, tone(word), number(data.get("relative_error")), kernel_errors)


def _badness(module: Module) -> tuple[int, float, float, tuple[tuple[int, int, str], ...], str]:
    decode, kernel = module.decode_error or 0.0, module.kernel_error or 0.0
    return _RANKS[module.tone], -decode, -kernel, natural(module.name), module.name


def build_figures(modules: Sequence[Module]) -> dict[str, Any]:
    """What the page's script draws: ``metrics`` to choose from and ``figures``, each with traces for every metric."""
    metrics = _metrics(modules)
    figures = [_figure(family, members, metrics) for family, members in _families(modules).items()]
    described = [{"label": m.label, "legend": m.legend, "status": m.is_status} for m in metrics]
    return {"metrics": described, "figures": figures}


def _metrics(modules: Sequence[Module]) -> list[_Metric]:
    found = [_logarithmic("Decode: relative error against the base", {m.name: m.decode_error for m in modules})]
    for backend in sorted({backend for module in modules for backend in module.kernel_errors}):
        values = {module.name: module.kernel_errors.get(backend) for module in modules}
        found.append(_logarithmic(f"Kernel {visible(backend, 60)}: calc_diff, worst probe", values))
    status = {module.name: float(_STATUS_VALUES[module.tone]) for module in modules}
    return [metric for metric in found if metric] + [_Metric("Status", status, 0.0, 3.0, ("pass", "fail"), True)]


def _logarithmic(label: str, values: Mapping[str, float | None]) -> _Metric | None:
    known = {name: abs(value) for name, value in values.items() if value is not None}
    if not known:
        return None
    positive = [value for value in known.values() if value > 0]
    low, high = _log(min(positive, default=1e-6)), _log(max(positive, default=1e-6))
    # Values that all but agree should look so.
    middle, half = (low + high) / 2, max((high - low) / 2, 0.1)
    low, high = middle - half, middle + half
    logs = {name: _log(value) if value > 0 else low for name, value in known.items()}
    return _Metric(label, logs, low, high, (f"{10**low:.2g}", f"{10**high:.2g}"))


def _log(value: float) -> float:
    return min(max(math.log10(value), -20.0), 20.0)


def _families(modules: Sequence[Module]) -> dict[str, dict[tuple[str, str], Module]]:
    """Family of blocks: (block, role): module. A family of one block is no picture and goes with the rest."""
    found: dict[str, dict[tuple[str, str], Module]] = {}
    for module in modules:
        match = _BLOCK.fullmatch(module.name)
        if match:
            key = match["number"], match["role"] or "(the block itself)"
            found.setdefault(match["family"], {})[key] = module
        else:
            found.setdefault(_OTHER, {})["", module.name] = module
    for family in [name for name in found if name != _OTHER]:
        if len({block for block, _ in found[family]}) == 1:
            rest = found.setdefault(_OTHER, {})
            rest.update({("", module.name): module for module in found.pop(family).values()})
    return {family: found[family] for family in sorted(found, key=lambda name: (name == _OTHER, natural(name)))}


def _worst_first(names: Iterable[str], limit: int) -> list[str]:
    """Distinct names in natural order, of too many the first ones, which are the worst."""
    return sorted(list(dict.fromkeys(names))[:limit], key=lambda name: (natural(name), name))


def _figure(family: str, members: Mapping[tuple[str, str], Module], metrics: Sequence[_Metric]) -> dict[str, Any]:
    ordered = sorted(members, key=lambda key: _badness(members[key]))
    rows, columns = (
        _worst_first((r for _, r in ordered), _MAX_ROWS),
        _worst_first((c for c, _ in ordered), _MAX_COLUMNS),
    )
    cells = [[members.get((column, row)) for column in columns] for row in rows]
    hover = [["" if cell is None else _hover(cell) for cell in line] for line in cells]
    shown = sum(cell is not None for line in cells for cell in line)
    return {
        "title": visible(family, 80),
        "left_out": len(members) - shown,
        "shared": {"hovertext": hover},
        "metrics": [_traces(cells, metric) for metric in metrics],
        "layout": _layout(rows, columns),
    }


def _traces(cells: Sequence[Sequence[Module | None]], metric: _Metric) -> list[dict[str, Any]]:
    """A heatmap, and marks over it, so that nothing is told by color alone."""
    z = [[_rounded(metric.values.get(cell.name)) if cell else None for cell in line] for line in cells]
    points = [(x, y, cell) for y, line in enumerate(cells) for x, cell in enumerate(line) if cell]
    unmeasured = [(x, y) for x, y, cell in points if cell.name not in metric.values and cell.tone in ("pass", "other")]
    heat = {"type": "heatmap", "z": z, "zmin": metric.low, "zmax": metric.high, "xgap": 1, "ygap": 1}
    return [
        heat | {"showscale": False, "hoverinfo": "text"},
        _marks("fail", "x", [(x, y) for x, y, cell in points if cell.tone == "fail"]),
        _marks("warn", "triangle-up", [(x, y) for x, y, cell in points if cell.tone == "warn"]),
        _marks("other", "circle-open", unmeasured),
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _marks(name: str, symbol: str, points: Sequence[tuple[int, int]]) -> dict[str, Any]:
    place = {"x": [x for x, _ in points], "y": [y for _, y in points]}
    marker = {"symbol": symbol, "size": 5 if name == "other" else 8}
    return {"type": "scatter", "mode": "markers", "name": name, "hoverinfo": "skip", "marker": marker} | place


def _layout(rows: Sequence[str], columns: Sequence[str]) -> dict[str, Any]:
    labels = [visible(row, _LABEL_LIMIT) for row in rows]
    left = 24 + round(6.6 * max(len(label) for label in labels))
    # As wide as the page, but never so narrow that a finger cannot hit a cell of a usual model.
    cell = max(min((_PAGE_WIDTH - left) // len(columns), 40), 16 if len(columns) <= 64 else 8)
    step = 1 if cell >= 16 else 10
    axis = {"fixedrange": True, "showgrid": False, "zeroline": False, "ticks": "", "ticklabelstandoff": 5}
    across = list(range(0, len(columns), step)) if columns != [""] else []
    wide, high = left + cell * len(columns), 34 + _CELL_HEIGHT * len(rows)
    right, bottom = max(_MIN_WIDTH - wide, 16), max(_MIN_HEIGHT - high, 10)
    return {
        "width": wide + right,
        "height": high + bottom,
        "margin": {"l": left, "r": right, "t": 34, "b": bottom},
        "showlegend": False,
        "dragmode": False,
        "hovermode": "closest",
        "xaxis": axis
        | {"side": "top", "range": [-0.5, len(columns) - 0.5], "tickmode": "array", "tickangle": 0}
        | {"tickvals": across, "ticktext": [_for_plotly(columns[place]) for place in across]},
        "yaxis": axis
        | {"range": [len(rows) - 0.5, -0.5], "tickmode": "array", "tickvals": list(range(len(rows)))}
        | {"ticktext": [_for_plotly(label) for label in labels]},
    }


def _for_plotly(text: str) -> str:
    """Plotly reads a few HTML tags in its texts, and their entities."""
    return html.escape(text, quote=False)


def _hover(module: Module) -> str:
    shape = "\u00d7".join(show_number(size) for size in entries(module.data.get("shape"))) or "\u2013"
    name = visible(module.name, 3 * _HOVER_WIDTH)
    parts = [name[at : at + _HOVER_WIDTH] for at in range(0, len(name), _HOVER_WIDTH)][:4]
    lines = [f"<b>{_for_plotly(part)}</b>" for part in parts]
    lines.append(_for_plotly(f"{visible(module.status, 24)} \u00b7 {visible(shape, 20)}"))
    gain = number(module.data.get("gain"))
    lines.append(f"decode error {show_number(module.decode_error)} \u00b7 gain {show_number(gain)}")
    for backend, probes in mapping(module.data.get("probes")).items():
        lines.append(_for_plotly(f"{visible(backend, 22)}: {_probe_words(mapping(probes))}"))
    return "<br>".join(lines[:_HOVER_LINES])


def _probe_words(probes: Mapping[str, Any]) -> str:
    """The names of those that did not pass; one word where there is none."""
    tones = {str(name): tone(mapping(probe).get("status")) for name, probe in probes.items()}
    for word in ("fail", "warn"):
        if word in tones.values():
            return visible(f"{word} {', '.join(name for name, found in tones.items() if found == word)}", 34)
    return "nothing wrong" if "pass" in tones.values() else "not run"
