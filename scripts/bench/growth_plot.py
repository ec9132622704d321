"""Curves as SVG: the same points give the same bytes, and both color schemes are served. No library."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 28, 28, 64
STYLE = """
svg{--ink:#1b2129;--soft:#5b6673;--line:#d9dde3;--paper:#fff;--a:#0b62b0;--b:#b3541e}
@media (prefers-color-scheme:dark){
svg{--ink:#e6eaef;--soft:#9aa6b3;--line:#323b46;--paper:#12161b;--a:#6db3f2;--b:#f0a05a}}
text{font:12px system-ui,sans-serif;fill:var(--soft)}.name{fill:var(--ink);font-weight:600}
.paper{fill:var(--paper)}.grid{stroke:var(--line)}.axis{stroke:var(--soft)}
.a{stroke:var(--a);fill:var(--a)}.b{stroke:var(--b);fill:var(--b)}polyline{fill:none!important;stroke-width:2}
"""


@dataclass(frozen=True)
class Line:
    """A named curve through points."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One plot; the axes carry their units in their labels, and ``log`` is about the one that goes across."""

    across: str
    up: str
    log: bool
    lines: Sequence[Line]


def draw(panels: Sequence[Panel]) -> str:
    """All panels, two in a row."""
    rows = math.ceil(len(panels) / 2)
    size = f'viewBox="0 0 {2 * WIDTH} {rows * HEIGHT}" width="{2 * WIDTH}" height="{rows * HEIGHT}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">', f"<style>{STYLE}</style>"]
    parts.append('<rect class="paper" width="100%" height="100%"/>')
    for number, panel in enumerate(panels):
        parts.append(f'<g transform="translate({number % 2 * WIDTH} {number // 2 * HEIGHT})">')
        parts += [*_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel) -> list[str]:
    across = [x for line in panel.lines for x, _ in line.points]
    ticks_up = _ticks(max(y for line in panel.lines for _, y in line.points))
    ticks_across = sorted(set(across)) if panel.log else _ticks(max(across))
    low, high = (math.log10(min(across)), math.log10(max(across))) if panel.log else (0.0, ticks_across[-1])
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT

    def at_x(x: float) -> float:
        part = ((math.log10(x) if panel.log else x) - low) / ((high - low) or 1)
        return LEFT + part * (right - LEFT)

    def at_y(y: float) -> float:
        return bottom - max(y, 0.0) / ticks_up[-1] * (bottom - TOP)

    parts = []
    for y in ticks_up:
        parts.append(f'<path class="grid" d="M{LEFT} {at_y(y):.1f}H{right}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{y:,.6g}</text>')
    for x in ticks_across:
        parts.append(f'<text x="{at_x(x):.1f}" y="{bottom + 17}" text-anchor="middle">{x:,.6g}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}" fill="none"/>')
    parts.append(f'<text class="name" x="{LEFT}" y="{TOP - 12}">{html.escape(panel.up)}</text>')
    parts.append(
        f'<text x="{(LEFT + right) // 2}" y="{bottom + 35}" text-anchor="middle">{html.escape(panel.across)}</text>'
    )
    for number, (line, color) in enumerate(zip(panel.lines, "ab", strict=False)):
        places = [(at_x(x), at_y(y)) for x, y in line.points]
        parts.append(f'<polyline class="{color}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
        parts += [f'<circle class="{color}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
        place = LEFT + 110 * number
        parts.append(f'<path class="{color}" d="M{place} {HEIGHT - 14}h18" stroke-width="2"/>')
        parts.append(f'<text x="{place + 24}" y="{HEIGHT - 10}">{html.escape(line.name)}</text>')
    return parts


def _ticks(highest: float) -> list[float]:
    """From nothing to beyond the highest, in four to eight round steps."""
    highest = max(highest, 1e-9)
    power = 10 ** math.floor(math.log10(highest))
    step = next(power * one for one in (0.2, 0.25, 0.5, 1.0, 2.0) if highest / (power * one) <= 6)
    return [step * number for number in range(math.ceil(highest / step) + 1)]
