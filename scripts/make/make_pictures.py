"""Draw the pictures of the documents: what mopt does, the two nibbles of a byte, and the 128x4 order of scales.

    python scripts/make/make_pictures.py

Every value and every place in the drawings of layouts is asked of the code that packs and swizzles.
"""

from collections.abc import Iterator
from html import escape
from pathlib import Path

import torch

from modelopt_convert.formats.nvfp4.codes import (
    E2M1_VALUES,
    decode_e2m1,
    encode_e2m1,
    pack_e2m1,
    swap_nibbles,
    unpack_e2m1,
)
from modelopt_convert.formats.nvfp4.scales import swizzle_128x4

FOLDER = Path(__file__).resolve().parent.parent.parent / "docs"
WIDTH, EDGE = 900, 24
TILE_ROWS, TILE_COLUMNS, BANDS = 128, 4, 4
# Two of each: of the light page and of the dark one.
COLOURS = {
    "paper": ("#ffffff", "#0d1117"),
    "box": ("#f4f6f9", "#1d2632"),
    "edge": ("#5b6b82", "#6f8197"),
    "name": ("#10233f", "#e8eef6"),
    "words": ("#44546a", "#a9b6c6"),
    "arrow": ("#5b6b82", "#8fa0b6"),
    "good": ("#d7f0dc", "#1c4a2a"),
    "bad": ("#fbdcd9", "#5c2320"),
    "band0": ("#cfe1fb", "#1f3f6e"),
    "band1": ("#d7f0dc", "#1c4a2a"),
    "band2": ("#fdebc3", "#5b4510"),
    "band3": ("#efd9f5", "#4d2a5a"),
}
FONT = 'system-ui, "Segoe UI", "DejaVu Sans", Helvetica, Arial, sans-serif'


def _style() -> str:
    light, dark = ("; ".join(f"--{name}: {two[one]}" for name, two in COLOURS.items()) for one in (0, 1))
    rules = [
        f"svg {{ {light}; font-family: {FONT} }}",
        f"@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}",
        ".paper { fill: var(--paper) } .tip { fill: var(--arrow) }",
        ".arrow { fill: none; stroke: var(--arrow); stroke-width: 1.8 }",
        ".title { font-size: 16px; font-weight: 600; fill: var(--name) }",
        ".words { font-size: 13px; fill: var(--words) }",
        '.bits { font-size: 15px; fill: var(--name); font-family: ui-monospace, "DejaVu Sans Mono", monospace }',
        ".small { font-size: 10px; fill: var(--words) }",
        ".middle { text-anchor: middle }",
        *(f".{name} {{ fill: var(--{name}); stroke: var(--edge) }}" for name in COLOURS if name[:3] in _FILLED),
    ]
    return "\n".join(rules)


_FILLED = ("box", "goo", "bad", "ban")


def _svg(title: str, height: int, parts: Iterator[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
    paper = f'<rect class="paper" width="{WIDTH}" height="{height}"/>'
    return "\n".join(
        [head, f"<title>{escape(title)}</title>", f"<style>\n{_style()}\n</style>", paper, *parts, "</svg>", ""]
    )


def _text(kind: str, x: float, y: float, said: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(said)}</text>'


def _box(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>'


def _card(kind: str, x: float, y: float, width: float, title: str, *words: str) -> list[str]:
    lines = [_text("words", x + 14, y + 50 + 19 * number, said) for number, said in enumerate(words)]
    return [_box(kind, x, y, width, 46 + 19 * len(words)), _text("title", x + 14, y + 28, title), *lines]


def _arrow(x: float, y: float, to_x: float, to_y: float) -> list[str]:
    middle = (x + to_x) / 2
    path = f"M{x:g} {y:g}C{middle:g} {y:g} {middle:g} {to_y:g} {to_x - 8:g} {to_y:g}"
    return [f'<path class="arrow" d="{path}"/>', f'<path class="tip" d="M{to_x - 10:g} {to_y - 6:g}v12l10-6z"/>']


def welcome() -> str:
    """Export and base go into the proof, and OUT to the engines."""

    def parts() -> Iterator[str]:
        yield from _card("box", EDGE, 24, 186, "EXPORT", "packed by ModelOpt;", "its layout undeclared")
        yield from _card("box", EDGE, 152, 186, "BASE", "the original model,", "in BF16")
        proof = ("BASE is quantized again; every", "code and scale of what stays", "packed is compared")
        yield from _card("good", 254, 78, 226, "mopt: the proof", *proof)
        yield from _card("box", 526, 24, 206, "OUT", "one layout, declared, and", "the record mopt.json")
        yield from _card("bad", 526, 152, 206, "refused", "with the module and place;", "OUT stays as it was")
        yield from _card("box", 776, 24, 100, "engines", "SGLang,", "vLLM-omni")
        for arrow in ((210, 66, 254, 116), (210, 194, 254, 150), (480, 116, 526, 66), (480, 150, 526, 194)):
            yield from _arrow(*arrow)
        yield from _arrow(732, 66, 776, 66)

    title = "An export and its base go into the proof. OUT comes out and goes to engines, or the export is refused."
    return _svg(title, 262, parts())


def nibbles() -> str:
    """One byte, two codes; what is read where the order is guessed wrong."""
    values = torch.tensor([[0.5, -6.0, 3.0, 1.0]])
    codes = encode_e2m1(values)
    packed = pack_e2m1(codes)
    wrong = decode_e2m1(unpack_e2m1(swap_nibbles(packed)))

    def parts() -> Iterator[str]:
        cell, left = 96, 216
        yield _text("title", EDGE, 36, "Two 4-bit codes share a byte. mopt writes the low nibble first.")
        for y, said in (
            (85, "columns of the weight"),
            (143, "their codes"),
            (213, "bytes of the file"),
            (271, "read right"),
            (319, "read swapped"),
        ):
            yield _text("words", EDGE, y, said)
        for column, (value, code) in enumerate(zip(values[0].tolist(), codes[0].tolist(), strict=True)):
            band, x = f"band{column % 2}", left + cell * column
            yield _text("words middle", x + cell / 2, 85, f"column {column}")
            yield _box(band, x, 118, cell - 8, 38)
            yield _text("bits middle", x + cell / 2 - 4, 142, f"{code:04b}")
            yield _box("good", x, 250, cell - 8, 32)
            yield _text("bits middle", x + cell / 2 - 4, 271, f"{value:g}")
            read = float(wrong[0, column])
            yield _box("bad" if read != value else "good", x, 298, cell - 8, 32)
            yield _text("bits middle", x + cell / 2 - 4, 319, f"{read:g}")
        for number, byte in enumerate(packed[0].tolist()):
            x = left + 2 * cell * number
            yield _box("band1", x, 188, cell - 4, 38)
            yield _box("band0", x + cell - 4, 188, cell - 4, 38)
            yield _text("bits middle", x + cell / 2 - 4, 212, f"{byte >> 4:04b}")
            yield _text("bits middle", x + 3 * cell / 2 - 8, 212, f"{byte & 15:04b}")
            yield _text("words middle", x + cell - 4, 180, f"byte {number} = 0x{byte:02X}: high, low")
        yield _text("words", 624, 131, "A code is a sign and one of")
        yield _text("words", 624, 150, ", ".join(f"{one:g}" for one in E2M1_VALUES) + ".")
        yield _text("words", 624, 271, "times the scale of the block: the weight")
        yield _text("words", 624, 319, "neighbours change places, no error")

    return _svg(
        "Two codes in a byte, the low nibble first, and what is read where the nibbles are swapped", 350, parts()
    )


def scales() -> str:
    """One tile of 128 rows and 4 columns of scales, as a matrix and as its 512 bytes."""
    rows, columns = torch.meshgrid(torch.arange(TILE_ROWS), torch.arange(TILE_COLUMNS), indexing="ij")
    row_at, column_at = (swizzle_128x4(one.to(torch.uint8)).flatten().tolist() for one in (rows, columns))
    per_band = TILE_ROWS // BANDS

    def parts() -> Iterator[str]:
        top, cell, left, line = 108, 40, 96, 31
        yield _text(
            "title", EDGE, 36, "Block scales lie row by row in what mopt writes, and in the 128x4 order in some files."
        )
        yield _text("words", left, 72, "as a matrix: [128 rows, 4 blocks]")
        for band in range(BANDS):
            first = per_band * band
            y = top + 62 * band
            yield _text("words", EDGE, y + 18, f"row {first}")
            yield _text("words", EDGE, y + 50, f"to {first + per_band - 1}")
            for column in range(TILE_COLUMNS):
                yield _box(f"band{band}", left + cell * column, y, cell - 4, 56)
                yield _text("bits middle", left + cell * column + 18, y + 33, f"c{column}")
        x = 330
        yield _text("words", x + 58, 72, "as 512 bytes in the 128x4 order: 32 lines, of one row of each band")
        wide = 31
        for number, shown in enumerate((0, 1, 2, None, per_band - 1)):
            y = top + 50 * number
            if shown is None:
                yield _text("words", x + 290, y + 20, "...")
                continue
            yield _text("words", x - 24, y + 21, f"byte {16 * shown}")
            for place in range(16):
                offset = 16 * shown + place
                row, column = row_at[offset], column_at[offset]
                yield _box(f"band{row // per_band}", x + 58 + wide * place, y, wide - 3, line)
                middle = x + 72 + wide * place
                yield _text("small middle", middle, y + 13, str(row))
                yield _text("small middle", middle, y + 26, f"c{column}")
        yield _text(
            "words",
            EDGE,
            382,
            "The scale of row r and block c lies at byte (r % 32) * 16 + (r // 32) * 4 + c of its tile. Rows are",
        )
        yield _text(
            "words",
            EDGE,
            402,
            "padded to 128 and blocks to 4. Read row by row, nearly every row gets the scales of others, and no error.",
        )

    return _svg("The scales of one tile of 128 rows and 4 blocks, row by row and in the 128x4 order", 424, parts())


def render() -> dict[str, str]:
    """The text of each drawing, by the name of its file."""
    return {"welcome.svg": welcome(), "nibbles.svg": nibbles(), "scales-128x4.svg": scales()}


if __name__ == "__main__":
    for name, text in render().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
