"""The colors of the page of verify, and how it writes and sorts names."""

import re

import pytest

from modelopt_convert.verification.page.excerpt import natural, visible
from modelopt_convert.verification.page.style import STYLE


def _luminance(color: str) -> float:
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(scheme: int) -> None:
    """By WCAG 2 at level AA, 4.5 to 1."""
    colors = dict(re.findall(r"--([\w-]+):(#\w+)", re.findall(r":root\{(.*?)\}", STYLE, re.DOTALL)[scheme]))
    pairs = [(ink, paper) for ink in ("ink", "soft") for paper in ("card", "paper")]
    pairs += [(kind, f"{kind}-bg") for kind in ("pass", "part", "warn", "fail", "other")]
    pairs += [("ink", f"fill-{kind}") for kind in ("part", "other")]
    pairs += [("down", "r1"), ("down", "r2"), ("down", "r3"), ("up", "r4"), ("up", "r5")]
    colors |= {"dark": "#0c1a12", "white": "#ffffff"}
    pairs += [("dark", "fill-pass"), ("dark", "fill-warn"), ("white", "fill-fail")]
    for ink, paper in pairs:
        low, high = sorted(_luminance(colors[one]) for one in (ink, paper))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, paper)


def test_natural_order_and_visible_text() -> None:
    assert sorted(["b.10.q", "b.9.q", "b.9", "a"], key=natural) == ["a", "b.9", "b.9.q", "b.10.q"]
    assert visible("a\tb\u2066c") == "a\\tb\\u2066c"
    assert len(visible("x" * 10_000)) == 301
