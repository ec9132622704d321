"""The frontier as a plot: bytes to the right, error upwards; SVG, drawn from the report. Pure."""

import html
from collections.abc import Mapping, Sequence
from math import log10
from typing import Any

from modelopt_convert.stage.written_file import PLOT_HEAD

_WIDTH, _HEIGHT = 860, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 92, 24, 28, 64
_TICKS = 5
PLOT_STYLE = """
.plot{display:block;width:100%;height:auto;font:13px system-ui,-apple-system,"Segoe UI",sans-serif}
.plot text{fill:#566270}.plot .axis{stroke:#c3cad3}.plot .line{fill:none;stroke:#2f6fb3;stroke-width:2}
.plot .dot{fill:#2f6fb3}.plot .run{fill:none;stroke:#8a5000;stroke-width:2}.plot .best{fill:#b3241c}
.plot .said{fill:#8a5000}.plot .best-said{fill:#b3241c;font-weight:600}
@media (prefers-color-scheme:dark){.plot text{fill:#9aa7b5}.plot .axis{stroke:#4b5664}.plot .line{stroke:#79aee0}
.plot .dot{fill:#79aee0}.plot .run{stroke:#f2bd62}.plot .said{fill:#f2bd62}.plot .best,.plot .best-said{fill:#ff8d83}}
"""


def plot_file(report: Mapping[str, Any]) -> str:
    """The plot as a file of its own, with its style.

    Args:
        report: That of ``mopt advise``.
    """
    return f"{plot(report, f'<style>{PLOT_STYLE}</style>')}\n"


def plot(report: Mapping[str, Any], style: str = "") -> str:
    """The plot as an element.

    Args:
        report: That of ``mopt advise``.
        style: An element to put at its beginning.
    """
    points: Sequence[Mapping[str, Any]] = report["frontier"]
    chosen: Mapping[str, Any] = report["chosen"]
    drawn = [*(one for one in points if one["measured"] and one["keeps"] != chosen["keeps"]), chosen]
    least, most = int(report["least_bytes"]), int(report["most_bytes"])
    errors = [*(one["error_predicted"] for one in points), *(one["measured"]["error"] for one in drawn)]
    highest = float(max(errors)) or 1.0

    def across(num_bytes: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (num_bytes - least) / (most - least)

    def up(error: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * error / highest

    places = [f"{across(one['bytes']):.1f} {up(one['error_predicted']):.1f}" for one in points]
    foot, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    label = f"Frontier of {len(report['units'])} units: bytes of the transformer, and error if errors add up"
    parts = [
        f'{PLOT_HEAD} class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(label)}">',
        style,
        f'<path class="axis" fill="none" d="M{_LEFT} {_TOP}V{foot}H{right}"/>',
        *(
            f'<text x="{across(at):.1f}" y="{foot + 20}" text-anchor="middle">{_size(at)}</text>'
            for at in (least + (most - least) * number / (_TICKS - 1) for number in range(_TICKS))
        ),
        *(
            f'<text x="{_LEFT - 8}" y="{up(at) + 4:.1f}" text-anchor="end">{at:.2g}</text>'
            for at in (highest * number / (_TICKS - 1) for number in range(_TICKS))
        ),
        f'<text x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 18}" text-anchor="middle">'
        f"bytes of the transformer: all {len(report['units'])} units packed to all kept</text>",
        f'<text x="{_LEFT}" y="{_TOP - 10}">mean squared error ({html.escape(str(report["score"]))})</text>',
        f'<path class="line" d="M{"L".join(places)}"/>',
        *(
            f'<circle class="dot" cx="{place.partition(" ")[0]}" cy="{place.partition(" ")[2]}" r="2.5"/>'
            for place in places
        ),
    ]
    for one in drawn:
        x, y, is_chosen = across(one["bytes"]), up(one["measured"]["error"]), one is chosen
        kind, said = ("best", "best-said") if is_chosen else ("run", "said")
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="6"/>')
        words = f"{_decibels(one['measured'])}{', chosen' if is_chosen else ''}"
        end = ' text-anchor="end"' if x > _WIDTH * 0.75 else ""
        parts.append(f'<text class="{said}"{end} x="{x + (-10 if end else 10):.1f}" y="{y - 8:.1f}">{words}</text>')
    return "\n".join([*filter(None, parts), "</svg>"])


def _decibels(measured: Mapping[str, Any]) -> str:
    return "equal pictures" if measured["psnr"] is None else f"{measured['psnr']:.1f} dB"


def _size(num_bytes: float) -> str:
    """Decimal units, three digits."""
    unit = min(int(log10(max(num_bytes, 1)) // 3), 4)
    return f"{num_bytes / 1000**unit:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"
