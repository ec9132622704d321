"""Draw docs/house.svg: the rooms of the package on their floors, and the imports that are really there.

    python scripts/make/make_house.py

A room lies one floor above the highest room that it imports. An arrow that follows from two others is left out.
"""

import ast
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise, permutations, product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests" / "support")]
TARGET = ROOT / "docs" / "house.svg"

from rooms import ANYWHERE, INSIDE, MODULES, ROOMS, TREES, room  # noqa: E402

WIDTH, BOX, HEIGHT, FLOOR, TOP = 900, 264, 64, 94, 64
LANE, GAP = 14, 22  # the width of an arrow that passes a floor, and what lies between two neighbours
LETTERS = 39  # of a line in a box
WORDS = "An arrow says that modules of the upper room import the lower. Where others lead there too, none is drawn."
STYLE = """
svg { --paper: #ffffff; --floor: #f4f6f9; --box: #ffffff; --edge: #5b6b82; --name: #10233f; --words: #44546a;
  --arrow: #8494a9; font-family: system-ui, "Segoe UI", "DejaVu Sans", Helvetica, Arial, sans-serif }
@media (prefers-color-scheme: dark) { svg { --paper: #0d1117; --floor: #151b23; --box: #1d2632; --edge: #6f8197;
  --name: #e8eef6; --words: #a9b6c6; --arrow: #73839a } }
.paper { fill: var(--paper) } .floor { fill: var(--floor) } .box { fill: var(--box); stroke: var(--edge) }
.name { font-size: 17px; font-weight: 600; fill: var(--name) } .title { font-size: 15px; fill: var(--name) }
.words { font-size: 11.5px; fill: var(--words) } .count { font-size: 11.5px; fill: var(--words); text-anchor: end }
.arrow { fill: none; stroke: var(--arrow); stroke-width: 1.6 } .tip { fill: var(--arrow) }
"""


@dataclass(eq=False)
class Spot:
    """A box, or the lane in which an arrow passes a floor: then it has no name."""

    name: str
    x: float = WIDTH / 2

    @property
    def half(self) -> float:
        return (BOX if self.name else LANE) / 2


def arrows() -> set[tuple[str, str]]:
    """Which room imports which, without what follows from the rest; upward imports are a test's matter."""
    found = {(room(module), room(other)) for module in INSIDE for other in ANYWHERE[module] & set(INSIDE)}
    down = {(above, below) for above, below in found if ROOMS.index(below) < ROOMS.index(above)}
    reached: dict[str, set[str]] = {}
    for one in ROOMS:
        direct = {below for above, below in down if above == one}
        reached[one] = direct.union(*(reached[below] for below in direct))
    return {
        (above, below)
        for above, below in down
        if not any(below in reached[other] for upper, other in down if upper == above)
    }


def floors(drawn: set[tuple[str, str]]) -> tuple[list[list[Spot]], list[list[Spot]]]:
    """The spots of every floor, from below, and every arrow as the spots that it passes, from above."""
    level: dict[str, int] = {}
    for one in ROOMS:
        level[one] = max((level[below] + 1 for above, below in drawn if above == one), default=0)
    spots = {one: Spot(one) for one in ROOMS}
    found: list[list[Spot]] = [[] for _ in range(max(level.values()) + 1)]
    for one in ROOMS:
        found[level[one]].append(spots[one])
    paths = []
    for above, below in sorted(drawn, key=lambda pair: (ROOMS.index(pair[0]), ROOMS.index(pair[1]))):
        passed = [Spot("") for _ in range(level[below] + 1, level[above])]
        for lane, number in zip(passed, range(level[above] - 1, level[below], -1), strict=True):
            found[number].append(lane)
        paths.append([spots[above], *passed, spots[below]])
    return found, paths


def place(found: list[list[Spot]], paths: list[list[Spot]]) -> None:
    """Put the spots of each floor in the order with the fewest crossings, near what they are joined to."""
    steps = [step for path in paths for step in pairwise(path)]
    where = {spot: number for number, floor in enumerate(found) for spot in floor}
    for floor in found:
        _spread(floor)
    for _ in range(6):
        for number, floor in enumerate(found):
            near = [step for step in steps if number in (where[step[0]], where[step[1]])]
            # The first of equals is taken, so that the picture is always the same.
            floor[:] = min(permutations(floor), key=lambda order, near=near: _cost(order, near))
            _spread(floor)
    for _ in range(300):
        for floor in found:
            wanted = {}
            for spot in floor:
                joined = [other for step in steps if spot in step for other in step if other is not spot]
                wanted[spot] = sum(other.x for other in joined) / len(joined)
            for spot in floor:
                spot.x = (spot.x + wanted[spot]) / 2
            _separate(floor)
    left = min(spot.x - spot.half for spot in where)
    right = max(spot.x + spot.half for spot in where)
    for spot in where:
        spot.x += (WIDTH - left - right) / 2
    for path in paths:
        _straighten(path[1:-1], [found[where[spot]] for spot in path[1:-1]])


def _spread(floor: Sequence[Spot]) -> None:
    total = sum(2 * spot.half + GAP for spot in floor) - GAP
    x = (WIDTH - total) / 2
    for spot in floor:
        spot.x = x + spot.half
        x += 2 * spot.half + GAP


def _cost(order: tuple[Spot, ...], steps: list[tuple[Spot, Spot]]) -> tuple[int, float]:
    _spread(order)
    crossings = sum(
        (a[0].x - b[0].x) * (a[1].x - b[1].x) < 0
        for a, b in product(steps, steps)
        if a[0] is not b[0] and a[1] is not b[1]
    )
    return crossings, sum(abs(above.x - below.x) for above, below in steps)


def _separate(floor: Sequence[Spot]) -> None:
    """Move apart what overlaps, and back inside the paper."""
    for _ in range(20):
        for left, right in pairwise(floor):
            overlap = left.half + right.half + GAP - (right.x - left.x)
            if overlap > 0:
                left.x -= overlap / 2
                right.x += overlap / 2
        for spot in floor:
            spot.x = min(max(spot.x, GAP + spot.half), WIDTH - GAP - spot.half)


def _straighten(lanes: list[Spot], passed: list[list[Spot]]) -> None:
    """Draw the lanes of an arrow as one upright line, if there is one that no box is near."""
    for x in sorted({lane.x for lane in lanes}, key=lambda x: -abs(x - WIDTH / 2)):
        others = [other for floor in passed for other in floor if other not in lanes]
        if all(abs(other.x - x) >= other.half + LANE / 2 for other in others):
            for lane in lanes:
                lane.x = x
            return


def words(name: str) -> list[str]:
    """What a room is, in the first words of its docstring."""
    said = " ".join((ast.get_docstring(TREES[f"modelopt_convert.{name}"]) or "").replace("``", "").split())
    first = min((said.find(end) for end in (": ", ". ", ", and ") if end in said), default=len(said))
    return textwrap.wrap(said[:first].rstrip("."), LETTERS, max_lines=2, placeholder=" ...")


def render() -> str:
    """The drawing's text."""
    drawn = arrows()
    found, paths = floors(drawn)
    place(found, paths)
    height = TOP + FLOOR * len(found) + 6

    def top(number: int) -> float:
        return TOP + FLOOR * (len(found) - 1 - number) + (FLOOR - HEIGHT) / 2

    where = {spot: number for number, floor in enumerate(found) for spot in floor}
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        "<title>The rooms of modelopt_convert, and which imports which</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>',
        f'<text class="title" x="{GAP}" y="30">Every room imports only rooms below it.</text>',
        f'<text class="words" x="{GAP}" y="49">{WORDS}</text>',
    ]
    for number in range(0, len(found), 2):
        y = top(number) - (FLOOR - HEIGHT) / 2
        lines.append(f'<rect class="floor" y="{y:g}" width="{WIDTH}" height="{FLOOR}"/>')
    for path in paths:
        lines += _arrow(path, [top(where[spot]) for spot in path], paths)
    for spot, number in where.items():
        if spot.name:
            lines += _box(spot, top(number))
    return "\n".join([*lines, "</svg>", ""])


def _port(spot: Spot, towards: list[float], mine: float) -> float:
    """Where on the edge of a box an arrow meets it: those to the left further left."""
    if not spot.name:
        return spot.x
    place = sorted(towards).index(mine) - (len(towards) - 1) / 2
    return spot.x + 34 * place


def _arrow(path: list[Spot], tops: list[float], paths: list[list[Spot]]) -> list[str]:
    start = _port(path[0], [one[1].x for one in paths if one[0] is path[0]], path[1].x)
    end = _port(path[-1], [one[-2].x for one in paths if one[-1] is path[-1]], path[-2].x)
    xs = [start, *(spot.x for spot in path[1:-1]), end]
    text = f"M{start:.1f} {tops[0] + HEIGHT:.1f}"
    for number in range(1, len(path)):
        left = tops[number - 1] + HEIGHT
        enters = tops[number] - (7 if number == len(path) - 1 else 0)
        middle = (left + enters) / 2
        text += f"C{xs[number - 1]:.1f} {middle:.1f} {xs[number]:.1f} {middle:.1f} {xs[number]:.1f} {enters:.1f}"
        if number < len(path) - 1:
            text += f"V{tops[number] + HEIGHT:.1f}"
    y = tops[-1]
    tip = f'<path class="tip" d="M{end - 5:.1f} {y - 9:.1f}h10l-5 9z"/>'
    return [f'<path class="arrow" d="{text}"/>', tip]


def _box(spot: Spot, y: float) -> list[str]:
    left = spot.x - spot.half
    count = sum(room(module) == spot.name and MODULES[module].name != "__init__.py" for module in INSIDE)
    return [
        f'<rect class="box" x="{left:.1f}" y="{y:g}" width="{BOX}" height="{HEIGHT}" rx="6"/>',
        f'<text class="name" x="{left + 12:.1f}" y="{y + 23:g}">{spot.name}</text>',
        f'<text class="count" x="{left + BOX - 12:.1f}" y="{y + 22:g}">{count} module{"s" * (count != 1)}</text>',
        *(
            f'<text class="words" x="{left + 12:.1f}" y="{y + 41 + 15 * number:g}">{escape(line)}</text>'
            for number, line in enumerate(words(spot.name))
        ),
    ]


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
