"""The HTML report of ``mopt verify``: one file that fetches nothing. What it shows of a checkpoint is escaped.

Whatever is missing or null is left out: the page is of what was found, not of what should have been.
"""

import base64
import hashlib
import html
import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from modelopt_convert.run.errors import OutputRefusedError
from modelopt_convert.stage.written_file import PAGE_HEAD
from modelopt_convert.verification.page.figures import (
    Module,
    build_figures,
    entries,
    mapping,
    read_modules,
    show_number,
    tone,
    visible,
)
from modelopt_convert.verification.page.style import SCRIPT, STYLE

_MARKS = {"pass": "\u2713", "warn": "!", "fail": "\u2715", "other": "\u25cb"}
_WORST = 12
_MAX_TABLE = 2000
_MAX_PROBES = 100
_MAX_LISTED = 20
_TEXT_LIMIT = 2000

Cell = tuple[str, str]  # class of the td, and HTML


def require_plotly() -> str:
    """Plotly's script, from the package that carries it; nothing is downloaded.

    Raises:
        OutputRefusedError: Plotly is not installed.
    """
    try:
        offline = importlib.import_module("plotly.offline")
    except ImportError as error:
        raise OutputRefusedError(
            f"--report: the HTML report needs plotly, which cannot be imported: {visible(error)}",
            code="report.needs_plotly",
            hint="pip install 'modelopt-convert[report]'",
        ) from error
    return str(offline.get_plotlyjs())


def render(report: Mapping[str, Any]) -> str:
    """The page, the same bytes for the same report.

    Args:
        report: What stands under ``verify`` in the JSON report.

    Raises:
        OutputRefusedError: Plotly is not installed.
    """
    plotly = _in_script(require_plotly())
    modules = read_modules(report)
    figures = build_figures(modules)
    sections = [
        _verdict(report),
        _levels(report),
        _backends(report),
        _heatmaps(figures),
        _worst(modules),
        _probes(modules),
        _all_modules(modules),
        _facts(report),
    ]
    scripts = ""
    if figures["figures"]:
        scripts = (
            f'<script type="application/json" id="figures">{_json(figures)}</script>\n'
            f"<script>{plotly}</script>\n<script>{SCRIPT}</script>\n"
        )
    title = f"{visible(report.get('verdict') or 'mopt verify', 40)}: {_last_part(report.get('checkpoint'))}"
    return (
        f"{PAGE_HEAD}"
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(plotly, SCRIPT)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n</main>\n{scripts}</body>\n</html>\n"
    )


def _policy(*scripts: str) -> str:
    """Only these very scripts may run, and nothing may be fetched: a second line behind the escaping."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _in_script(code: str) -> str:
    """Code that cannot end its own script element, with the line ends that the HTML parser would give it."""
    return code.replace("\r\n", "\n").replace("\r", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _json(value: object) -> str:
    words = json.dumps(value, ensure_ascii=True, allow_nan=False, sort_keys=True, separators=(",", ":"))
    return words.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _text(value: object, limit: int = _TEXT_LIMIT) -> str:
    return html.escape(visible(value, limit))


def _last_part(path: object) -> str:
    return visible(str(path or "").rstrip("/").rpartition("/")[2], 80)


def _badge(status: object) -> str:
    if status is None:
        return ""
    kind = tone(status)
    return f'<span class="badge {kind}">{_MARKS[kind]} {_text(status, 40)}</span>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    body = ["".join(f'<td class="{kind}">{content}</td>' for kind, content in row) for row in rows]
    if not body:
        return ""
    numbers = {"decode error", "gain", "worst row", "worst column", "SQNR dB", "calc_diff", "modules"}
    head = "".join(f'<th class="{"number" if name in numbers else ""}">{_text(name)}</th>' for name in heads)
    lines = "\n".join(f"<tr>{line}</tr>" for line in body)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'


def _section(title: str, content: str, note: str = "") -> str:
    if not content:
        return ""
    said = f'<p class="soft">{_text(note)}</p>\n' if note else ""
    return f"<section>\n<h2>{_text(title)}</h2>\n{said}{content}\n</section>"


def _pairs(values: Mapping[str, object]) -> str:
    known = {name: value for name, value in values.items() if value is not None}
    items = "".join(f"<div><dt>{_text(name, 80)}</dt><dd>{_value(value)}</dd></div>" for name, value in known.items())
    return f"<dl>{items}</dl>" if items else ""


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        parts = [f"{visible(name, 80)} {show_number(part)}" for name, part in value.items()]
        return _text(", ".join(parts))
    if isinstance(value, list | tuple):
        return _text(", ".join(show_number(part) for part in value))
    return _text(show_number(value))


def _verdict(report: Mapping[str, Any]) -> str:
    verdict, proof = report.get("verdict"), report.get("proof")
    kind = tone(verdict)
    if kind == "pass" and str(proof).startswith("not proven"):
        kind = "warn"
    device = mapping(report.get("device"))
    capability = device.get("capability")
    where = [device.get("name"), None if capability is None else f"compute capability {capability}"]
    facts = {
        "checkpoint": report.get("checkpoint"),
        "algorithm": report.get("algorithm"),
        "device": ", ".join(str(part) for part in where if part) or None,
        "modules run on a native kernel": report.get("native_executed"),
    }
    word = "no verdict" if verdict is None else verdict
    statement = report.get("statement")
    said = f"<p>{_text(statement)}</p>" if statement else ""
    beside = f", {_text(proof, 200)}" if proof else ""
    heading = f'<p class="soft">mopt verify</p>\n<h1>{_MARKS[kind]} {_text(word, 200)}{beside}</h1>'
    return f'<header class="verdict {kind}">\n{heading}\n{said}{_pairs(facts)}\n</header>'


def _levels(report: Mapping[str, Any]) -> str:
    rows: list[list[Cell]] = []
    for level in map(mapping, entries(report.get("levels"))):
        about = _text(level.get("reason") or "")
        metrics = mapping(level.get("metrics"))
        if metrics:
            about += f'<div class="soft">{_value(metrics)}</div>'
        about += _listed([*entries(level.get("failures")), *entries(level.get("warnings"))])
        name = f"<b>{_text(level.get('level') or '')}</b> {_text(level.get('title') or '')}"
        rows.append([("", name), ("", _badge(level.get("status"))), ("long", about)])
    return _section("Levels", _table(["level", "status", "why"], rows))


def _listed(failures: Sequence[object]) -> str:
    if not failures:
        return ""
    items = "".join(f"<li>{_text(failure)}</li>" for failure in failures[:_MAX_LISTED])
    more = len(failures) - _MAX_LISTED
    return f"<ul>{items}{f'<li>and {more} more</li>' if more > 0 else ''}</ul>"


def _backends(report: Mapping[str, Any]) -> str:
    rows: list[list[Cell]] = [
        [
            ("name", _text(backend.get("name") or "")),
            ("", _text(backend.get("kind") or "")),
            ("", _badge(backend.get("status"))),
            ("number", _value(backend.get("modules"))),
            ("long", " \u00b7 ".join(_text(backend[key]) for key in ("self_test", "reason") if backend.get(key))),
        ]
        for backend in map(mapping, entries(report.get("backends")))
    ]
    note = "Each is tried on made operands first; one that fails there is broken and judges nothing."
    return _section("Backends", _table(["backend", "kind", "status", "modules", "why"], rows), note)


def _heatmaps(figures: Mapping[str, Any]) -> str:
    if not figures["figures"]:
        return '<section>\n<h2>Modules</h2>\n<p class="soft">No module was looked at.</p>\n</section>'
    options = "".join(
        f'<option value="{place}">{_text(metric["label"])}</option>' for place, metric in enumerate(figures["metrics"])
    )
    parts = [
        f'<div class="controls"><label>Color: <select id="metric">{options}</select></label>'
        '<span class="scale"><span id="low"></span><i id="ramp"></i><span id="high"></span></span>'
        f'<span class="marks">{_MARKS["fail"]} fail &nbsp; \u25b2 warn &nbsp; {_MARKS["other"]} no figure</span></div>',
        '<noscript><p class="soft">The heatmaps need JavaScript; the tables below do not.</p></noscript>',
    ]
    for place, figure in enumerate(figures["figures"]):
        more = f" (the worst; {figure['left_out']} more in the table)" if figure["left_out"] else ""
        parts.append(f'<h3>{_text(figure["title"])}{more}</h3>\n<div class="figure" id="figure-{place}"></div>')
    note = "One cell per module: a column per block, a row per role. Point at a cell or tap it for the module's name."
    return _section("Errors by layer", "\n".join(parts), note)


_MODULE_HEADS = [
    "module",
    "status",
    "shape",
    "decode error",
    "gain",
    "worst row",
    "worst column",
    "SQNR dB",
    "calc_diff",
]


def _module_row(module: Module) -> list[Cell]:
    shape = "\u00d7".join(show_number(size) for size in entries(module.data.get("shape")))
    figures = [module.data.get(key) for key in ("relative_error", "gain", "worst_row", "worst_column", "sqnr_db")]
    return [
        ("name", _text(module.name, 300)),
        ("", _badge(module.status)),
        ("", _text(shape)),
        *(("number", _value(figure)) for figure in [*figures, module.kernel_error]),
    ]


def _worst(modules: Sequence[Module]) -> str:
    rows = [_module_row(module) for module in modules[:_WORST]]
    return _section(
        "Worst modules", _table(_MODULE_HEADS, rows), "By status, then by decode error, then by kernel error."
    )


def _probes(modules: Sequence[Module]) -> str:
    rows: list[list[Cell]] = []
    for module in modules:
        for backend, probes in mapping(module.data.get("probes")).items():
            for name, result in mapping(probes).items():
                probe = mapping(result)
                if tone(probe.get("status")) not in ("fail", "warn"):
                    continue
                where = [
                    f"{key} {', '.join(show_number(place) for place in entries(probe[key])[:_MAX_LISTED])}"
                    for key in ("rows", "columns")
                    if entries(probe.get(key))
                ]
                rows.append(
                    [
                        ("name", _text(module.name, 300)),
                        ("", f"{_text(backend, 80)} {_text(name, 40)}"),
                        ("", _badge(probe.get("status"))),
                        ("number", _value(probe.get("calc_diff"))),
                        ("long", "<br>".join(_text(part) for part in [probe.get("detail"), *where] if part)),
                    ]
                )
    note = f"The first {_MAX_PROBES} of {len(rows)}, of the worst modules." if len(rows) > _MAX_PROBES else ""
    heads = ["module", "probe", "status", "calc_diff", "what was found"]
    return _section("Probes that did not pass", _table(heads, rows[:_MAX_PROBES]), note)


def _all_modules(modules: Sequence[Module]) -> str:
    if len(modules) <= _WORST:
        return ""
    rows = [_module_row(module) for module in modules[:_MAX_TABLE]]
    words = f"all {len(modules)} modules" if len(modules) <= _MAX_TABLE else f"the worst {_MAX_TABLE} of {len(modules)}"
    return (
        f"<section><details>\n<summary>Table of {words}</summary>\n{_table(_MODULE_HEADS, rows)}\n</details></section>"
    )


def _facts(report: Mapping[str, Any]) -> str:
    device = mapping(report.get("device"))
    versions = {"torch": device.get("torch"), "CUDA": device.get("cuda")} | dict(mapping(report.get("versions")))
    found = _section("Thresholds", _pairs(mapping(report.get("thresholds"))))
    return "\n".join(part for part in (found, _section("Versions", _pairs(versions))) if part)
