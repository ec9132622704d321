"""The page of ``mopt compare``: a contact sheet with its figures, one file that fetches nothing and has no script.

What the page shows of checkpoints and prompts is escaped. Pictures are small PNGs within the page.
"""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from modelopt_convert.fidelity.pipeline import Drawn
from modelopt_convert.stage.written_file import SHEET_HEAD
from modelopt_convert.verification.page.excerpt import entries, mapping, number, show_number
from modelopt_convert.verification.page.markup import badge, pairs, section, table, text
from modelopt_convert.verification.page.style import STYLE

_WIDEST = 256  # pixels of a picture on the sheet
_LOUDER = 4  # what differences are multiplied by
_MOST_PAIRS = 24
_WORST = 12
_STYLE = (
    STYLE
    + """
.sheet td{padding:6px 10px 6px 0}.sheet td:first-child{min-width:9em;max-width:16em;font-family:inherit;font-size:.9rem}
.sheet img{display:block;width:160px;height:auto;border-radius:6px;image-rendering:pixelated}
.sheet small{display:block;color:var(--soft);font-variant-numeric:tabular-nums}
.figures td+td{font-variant-numeric:tabular-nums}
"""
)
_TERMS = {
    "emulated": "quantized modules are computed as an engine does, on another device, in exact products that float32 "
    "adds. No kernel of the engine ran.",
    "PSNR": "peak signal to noise of the pictures in decibels; more is better, and equal pictures have none.",
    "SSIM": "structural similarity (Wang et al. 2004, Gaussian window of 11 x 11, sigma 1.5); 1 is equal.",
    "LPIPS": "distance that AlexNet sees; 0 is equal.",
    "cosine": "of the last latents, before the VAE; 1 is equal.",
    "lower 95%": "the mean over such prompts and seeds is above it, with 95% confidence (Student's t, one-sided).",
    "difference": f"of checkpoint and base, {_LOUDER} times as large; black is equal.",
    "SQNR": "signal to quantization noise in decibels, on the base's own activations.",
    "clipped": "share of activations that are larger than the input scale can hold.",
}


def png(pair: int, base: Sequence[Drawn], made: Sequence[Sequence[Drawn]]) -> list[bytes]:
    """The pictures of one pair as PNG: the base's, and of each checkpoint its own and the difference.

    Args:
        pair: Its number.
        base: What the base drew.
        made: What each checkpoint drew.
    """
    exact = base[pair].frames[0]
    found = [exact]
    for one in made:
        got = one[pair].frames[0]
        found += [got, ((got - exact).abs() * _LOUDER).clamp(0, 1)]
    return [_encoded(picture) for picture in found]


def _encoded(picture: Tensor) -> bytes:
    """PNG of [H, W, 3] in 0..1, no wider than the sheet has it."""
    from PIL import Image

    height, width = picture.shape[:2]
    if max(height, width) > _WIDEST:
        scale = _WIDEST / max(height, width)
        planes = picture.movedim(-1, 0)[None]
        picture = functional.interpolate(planes, scale_factor=scale, mode="area")[0].movedim(0, -1)
    file = io.BytesIO()
    Image.fromarray((picture * 255).round().to(torch.uint8).numpy()).save(file, "PNG", optimize=True)
    return file.getvalue()


def render(report: Mapping[str, Any], pictures: Sequence[Sequence[bytes]], *, command: str, date: str) -> str:
    """The page, the same bytes for the same arguments.

    Args:
        report: The JSON report of the run.
        pictures: Of each pair, as ``png`` gives them; none for a transformer alone.
        command: What was called.
        date: When.
    """
    checkpoints = [mapping(one) for one in entries(report.get("checkpoints"))]
    parts = [
        _head(report, checkpoints),
        _sheet(checkpoints, pictures),
        *(_figures(one) for one in checkpoints),
        *(_modules(one) for one in checkpoints),
        _run(report, command, date),
        section("Terms", pairs(_TERMS, "terms")),
    ]
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    title = " and ".join(_name(one) for one in checkpoints) or "nothing compared"
    return (
        f"{SHEET_HEAD}"
        # A second line behind the escaping: no script may run, and nothing may be fetched.
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{text(title)} - mopt compare</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _name(one: Mapping[str, Any]) -> str:
    return str(one.get("path") or "").rstrip("/").rpartition("/")[2]


def _means(one: Mapping[str, Any]) -> dict[str, Any]:
    return {name: mapping(found).get("mean") for name, found in mapping(one.get("aggregate")).items()}


def _head(report: Mapping[str, Any], checkpoints: Sequence[Mapping[str, Any]]) -> str:
    error, drawing = mapping(report.get("error")), mapping(report.get("drawing"))
    asked = any(entries(one.get("required")) for one in checkpoints)
    kind = "fail" if report.get("exit_code") else "pass" if asked else "other"
    said = error.get("message") or "Pictures and figures are beside the base's; the engine's own kernels did not run."
    lines = {
        _name(one): ", ".join(f"{name} {show_number(number(mean))}" for name, mean in _means(one).items())
        for one in checkpoints
    }
    facts = {**lines, "compared": drawing.get("kind"), "pairs": drawing.get("pairs")}
    title = " and ".join(_name(one) for one in checkpoints) or "nothing compared"
    return (
        f'<header class="verdict {kind}">\n<p class="soft">mopt compare</p>\n'
        f"<h1>{text(title, 500)}</h1>\n<p>{text(said)}</p>\n{pairs(facts)}\n</header>"
    )


def _sheet(checkpoints: Sequence[Mapping[str, Any]], pictures: Sequence[Sequence[bytes]]) -> str:
    heads = ["prompt", "base"]
    for one in checkpoints:
        heads += [_name(one), "difference"]
    rows = []
    for row, shown in enumerate(pictures[:_MOST_PAIRS]):
        images = [mapping(entries(one.get("images"))[row]) for one in checkpoints]
        first = images[0]
        cells = [f"{text(first.get('prompt'), 200)}<small>seed {text(first.get('seed'))}</small>", _image(shown[0])]
        for place, image in enumerate(images):
            cells += [f"{_image(shown[1 + 2 * place])}{_under(image)}", _image(shown[2 + 2 * place])]
        rows.append(cells)
    more = len(pictures) - _MOST_PAIRS
    note = f"The first {_MOST_PAIRS} of {len(pictures)} pairs." if more > 0 else ""
    return section("Pictures", table("sheet", heads, rows), note)


def _under(image: Mapping[str, Any]) -> str:
    """The figures of one picture; equal pictures have no PSNR."""
    psnr = number(image.get("psnr"))
    said = "equal" if psnr is None else f"PSNR {psnr:.2f} dB"
    ssim = number(image.get("ssim"))
    return f"<small>{said}{'' if ssim is None else f', SSIM {ssim:.4f}'}</small>"


def _image(data: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _figures(one: Mapping[str, Any]) -> str:
    rows = [
        [text(name), *(text(show_number(number(mapping(found).get(key)))) for key in ("mean", "std", "lower95")),
         text(mapping(found).get("n"))]
        for name, found in mapping(one.get("aggregate")).items()
    ]  # fmt: skip
    required = [mapping(each) for each in entries(one.get("required"))]
    asked = [
        [
            text(each.get("condition")),
            badge("pass" if each.get("met") else "fail"),
            text(show_number(each.get("bound"))),
        ]
        for each in required
    ]
    steps = [
        [str(place), *(text(show_number(number(mapping(step).get(key)))) for key in ("cosine", "rmse"))]
        for place, step in enumerate(entries(one.get("steps")), 1)
    ]
    content = table("figures", ["figure", "mean", "std", "lower 95%", "pairs"], rows)
    content += table("figures", ["required", "holds", "bound"], asked)
    content += f"\n<h3>Latents, step by step</h3>\n{table('figures', ['step', 'cosine', 'rmse'], steps)}"
    emulation = mapping(one.get("emulation"))
    note = f"{emulation.get('format')}, {emulation.get('rule')}, emulated; weights {emulation.get('weights')}."
    return section(f"Figures of {_name(one)}", content, note)


def _modules(one: Mapping[str, Any]) -> str:
    def loss(name: str) -> float:
        found = number(mapping(modules[name]).get("output_sqnr_db"))
        return float("inf") if found is None else found

    modules = mapping(one.get("modules"))
    keys = ("output_sqnr_db", "input_sqnr_db", "weight_sqnr_db", "clipped", "zero_blocks")
    rows = [
        [text(name), *(text(show_number(number(mapping(modules[name]).get(key)))) for key in keys)]
        for name in sorted(modules, key=loss)[:_WORST]
    ]
    heads = ["module", "output SQNR", "input SQNR", "weight SQNR", "clipped", "zero blocks"]
    note = f"The {min(_WORST, len(modules))} of {len(modules)} that lose most, on the base's activations."
    return section(f"Modules of {_name(one)}", table("figures", heads, rows), note)


def _run(report: Mapping[str, Any], command: str, date: str) -> str:
    env, drawing, versions = (mapping(report.get(key)) for key in ("env", "drawing", "versions"))
    facts = {
        "date": date,
        "mopt": versions.get("mopt"),
        "torch": versions.get("torch"),
        "diffusers": versions.get("diffusers"),
        "device": env.get("name"),
        "exit code": report.get("exit_code"),
        "steps": drawing.get("steps"),
        "size": drawing.get("size"),
        "seeds": drawing.get("seeds"),
    }
    return section("The run", f"<pre><code>{text(command)}</code></pre>\n{pairs(facts, 'run')}")
