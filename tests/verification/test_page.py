"""The HTML report of verify: parsed as a browser would, and its figures checked by plotly itself."""

import base64
import hashlib
import json
import math
import re
import sys
from html.parser import HTMLParser
from typing import Any

import pytest

from modelopt_convert.run.errors import ExitCode, OutputRefusedError
from modelopt_convert.verification.page.document import render, require_plotly
from modelopt_convert.verification.page.figures import build_figures, natural, read_modules, visible

ROLES = ["attn.to_q", "attn.to_k", "attn.to_v", "ff.net.0.proj", "ff.net.2"]
PLOTLY_BYTES = len(require_plotly().encode())

# The names of hostile.safetensors, so to say.
HOSTILE = [
    "<script>alert(1)</script>.0.q",
    "<script>alert(1)</script>.1.q",
    "</script><script>alert(2)</script>",
    "a\x00b\x1b[31m\u202egnp.0.\n<img src=x onerror=alert(3)>",
    "a\x00b\x1b[31m\u202egnp.1.<b>bold</b>",
    "\"'><a href='javascript:alert(4)'>%{x}</a>",
    "<!--<script>",
    "\ud800",
    "&lt;i&gt;",
    "x" * 5000,
    "blocks." + "9" * 4000 + ".q",
    "",
]


def probe(status: str = "pass", calc_diff: float | None = 2e-6, **more: Any) -> dict[str, Any]:
    return {"status": status, "detail": "", "rows": [], "columns": [], "calc_diff": calc_diff} | more


def module(status: str = "pass", error: float | None = 0.09, **more: Any) -> dict[str, Any]:
    identity = probe("pass", None) if status != "fail" else probe("fail", None, detail="3 of 64", rows=[1, 5, 9])
    both = {"identity": identity, "random": probe(status, 2e-6 if status == "pass" else 0.5)}
    fixed = {"shape": [64, 32], "status": status, "relative_error": error, "gain": 1.0, "worst_row": 0.1}
    return fixed | {"probes": {"torch": both, "cutlass": both}} | more


def report(modules: dict[str, Any], verdict: str = "pass") -> dict[str, Any]:
    return {
        "checkpoint": "/data/out",
        "algorithm": "nvfp4",
        "verdict": verdict,
        "proof": {"pass": "proven", "fail": "mismatch"}.get(verdict, ""),
        "statement": "proven, cpu only",
        "device": {"name": "H100", "capability": "9.0", "torch": "2.13.0", "cuda": None},
        "levels": [
            {"level": "L0", "title": "container", "status": "pass", "reason": "", "failures": [], "warnings": []},
            {
                "level": "L2",
                "title": "decode",
                "status": "fail",
                "reason": "",
                "failures": [f"m{n}" for n in range(30)],
            },
            {"level": "L3", "title": "kernel parity", "status": "skipped", "reason": "no GPU"},
        ],
        "backends": [
            {"name": "torch", "kind": "emulated", "status": "pass", "reason": "", "modules": 40},
            {"name": "cutlass", "kind": "native", "status": "broken", "reason": "self-test: zeros", "modules": 0},
        ],
        "modules": modules,
        "native_executed": "0 of 40",
        "thresholds": {"relative_error": 0.15, "kernel_calc_diff": 1e-5},
    }


def blocks(count: int, roles: list[str] = ROLES, status: str = "pass") -> dict[str, Any]:
    names = [f"blocks.{block}.{role}" for block in range(count) for role in roles]
    return {name: module(status, 0.08 + place / 1e4) for place, name in enumerate(names)}


class Page(HTMLParser):
    """What a browser sees: elements with their attributes, text, and the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style", "title"):
            self._inside.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._inside == ["script"]:
            self.scripts[-1] += data
        elif not self._inside:
            self.text += data + "\n"

    @property
    def figures(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


@pytest.mark.parametrize(
    "given",
    [
        report(blocks(8)),
        report(blocks(50, [f"experts.{number}.up" for number in range(20)])),
        report(blocks(8, status="fail"), "fail"),
        report({name: module() for name in HOSTILE}),
        report({}),
        {},
    ],
    ids=["40", "1000", "all fail", "hostile", "no module", "empty"],
)
def test_the_page_is_whole_and_fetches_nothing(given: dict[str, Any]) -> None:
    text = render(given)
    assert render(given) == text
    text.encode()
    page = Page(text)
    assert {"src", "srcset", "href", "data", "action"}.isdisjoint(key for _, given in page.elements for key in given)
    assert not [key for _, given in page.elements for key in given if key.startswith("on")]
    assert {"link", "a", "img", "iframe", "base", "form"}.isdisjoint(tag for tag, _ in page.elements)
    assert page.count("script") in (0, 3)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme:dark" in style
    assert 'name="viewport"' in text


def test_the_policy_lets_only_these_scripts_run() -> None:
    page = Page(render(report(blocks(2))))
    (policy,) = [given["content"] for tag, given in page.elements if given.get("http-equiv")]
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    for script in page.scripts[1:]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


@pytest.mark.parametrize("count", [8, 200])
def test_size(count: int) -> None:
    """Of 40 and of 1,000 modules; beyond plotly itself under a megabyte."""
    assert len(render(report(blocks(count))).encode()) < PLOTLY_BYTES + 25_000 + 5 * count * 800 < 6_000_000


def test_size_is_bounded_for_absurd_checkpoints() -> None:
    many = {f"layer{number}.{'<' * 400}": module("fail") for number in range(5000)}
    many |= {f"blocks.{number}.{number}": module("fail") for number in range(5000)}
    text = render(report(many, "fail"))
    assert len(text) < PLOTLY_BYTES + 2_000_000
    assert "the worst 2000 of 10000" in text


def test_figures_are_plotlys() -> None:
    from plotly import graph_objects

    given = report(blocks(8) | {"x_embedder": module("warn"), "norm.0.out": {"status": "skipped", "shape": None}})
    figures = Page(render(given)).figures
    assert [figure["title"] for figure in figures["figures"]] == ["blocks", "other modules"]
    labels = [metric["label"] for metric in figures["metrics"]]
    assert [label.split(":")[0] for label in labels] == ["Decode", "Kernel cutlass", "Kernel torch", "Status"]
    for figure in figures["figures"]:
        assert len(figure["metrics"]) == len(labels)
        for heat, *marks in figure["metrics"]:
            made = graph_objects.Figure([heat | figure["shared"], *marks], figure["layout"])
            assert len(made.data) == 4


def test_every_module_has_its_cell_at_its_block_and_role() -> None:
    given = blocks(12)
    del given["blocks.3.attn.to_k"]
    given["blocks.10.attn.to_q"] = module("fail", None)
    figure = build_figures(read_modules({"modules": given}))["figures"][0]
    columns, rows = figure["layout"]["xaxis"]["ticktext"], figure["layout"]["yaxis"]["ticktext"]
    assert (columns, rows) == ([str(number) for number in range(12)], sorted(ROLES))
    heat, failed, warned, unmeasured = figure["metrics"][0]
    for y, role in enumerate(rows):
        for x in range(12):
            name = f"blocks.{x}.{role}"
            assert figure["shared"]["hovertext"][y][x].startswith(f"<b>{name}</b>") == (name in given)
            error = given.get(name, {}).get("relative_error")
            assert heat["z"][y][x] == (None if error is None else round(math.log10(error), 4))
    assert (failed["x"], failed["y"]) == ([10], [rows.index("attn.to_q")])
    assert warned["x"] == unmeasured["x"] == []


def test_failing_modules_stay_when_there_are_too_many_rows() -> None:
    given = {f"blocks.{block}.role{role}": module() for role in range(90) for block in range(2)}
    given["blocks.1.role77"] = module("fail", 1.2)
    figure = build_figures(read_modules({"modules": given}))["figures"][0]
    assert len(figure["layout"]["yaxis"]["ticktext"]) == 60
    assert "role77" in figure["layout"]["yaxis"]["ticktext"]
    assert figure["left_out"] == 60


def test_hostile_names_are_text() -> None:
    given = report({name: module("fail") for name in HOSTILE}, "<img src=x>")
    given["levels"][0]["failures"] = HOSTILE
    given["thresholds"] = {"<b>": 1.0}
    text = render(given)
    page = Page(text)
    plain = Page(render(report(blocks(4, status="fail"), "fail")))
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements}
    assert "<script>alert(1)</script>.0.q" in page.text
    assert "a\\x00b\\x1b[31m\\u202egnp" in page.text
    assert "\\ud800" in page.text
    assert "&lt;i&gt;" in page.text
    outside = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not [char for char in outside if not char.isprintable() and char != "\n"]
    # Plotly reads tags in its texts: there are none but ours, and the entities are those that it knows.
    for figure in page.figures["figures"]:
        words = [*figure["layout"]["yaxis"]["ticktext"], *figure["layout"]["xaxis"]["ticktext"]]
        for line in figure["shared"]["hovertext"]:
            words += line
        for word in words:
            assert set(re.findall(r"<[^>]*>?", word)) <= {"<b>", "</b>", "<br>"}
            assert set(re.findall(r"&\w*", word)) <= {"&lt", "&gt", "&amp"}


def test_the_worst_come_first() -> None:
    given = {
        "blocks.2.q": module("pass", 0.5),
        "blocks.10.q": module("pass", 0.5),
        "blocks.3.q": module("warn", 0.1),
        "blocks.4.q": module("fail", 0.1),
        "blocks.5.q": module("fail", None),
        "blocks.6.q": {"status": "skipped"},
        "blocks.7.q": None,
    }
    found = [one.name for one in read_modules({"modules": given})]
    assert [name.split(".")[1] for name in found] == ["4", "5", "3", "6", "7", "2", "10"]


def test_levels_backends_probes_and_facts_are_shown() -> None:
    given = report(blocks(4) | {"blocks.0.attn.to_q": module("fail", 1.25)}, "fail")
    text = Page(render(given)).text
    for words in ("fail, mismatch", "proven, cpu only", "no GPU", "and 10 more", "self-test: zeros", "0 of 40"):
        assert words in text, words
    for words in ("rows 1, 5, 9", "1.25", "64\u00d732", "kernel_calc_diff", "2.13.0", "compute capability 9.0"):
        assert words in text, words


@pytest.mark.parametrize(
    ("verdict", "proof", "kind", "mark"),
    [
        ("pass", "proven", "pass", "\u2713"),
        ("pass", "unchanged", "pass", "\u2713"),
        ("pass", "not proven: sampled", "warn", "!"),
        ("pass", "not proven: near", "warn", "!"),
        ("fail", "not proven: near", "fail", "\u2715"),
        ("fail", "mismatch", "fail", "\u2715"),
        ("inconclusive", "not proven: no base", "other", "\u25cb"),
        ("pass", "<img src=x>", "pass", "\u2713"),
    ],
)
def test_what_is_proven_stands_beside_the_verdict(verdict: str, proof: str, kind: str, mark: str) -> None:
    page = Page(render(report({}, verdict) | {"proof": proof}))
    assert f"{mark} {verdict}, {proof}\n" in page.text
    assert [given["class"] for tag, given in page.elements if tag == "header"] == [f"verdict {kind}"]


def test_without_a_proof_the_verdict_stands_alone() -> None:
    assert "\u25cb prewarmed\n" in Page(render(report({}, "prewarmed") | {"proof": ""})).text


@pytest.mark.parametrize("hollow", [None, 7, "text", [None], {"a": None}, [{"a": [1]}], math.inf])
@pytest.mark.parametrize(
    "key", ["levels", "backends", "modules", "device", "thresholds", "verdict", "proof", "checkpoint"]
)
def test_what_is_missing_or_odd_is_left_out(key: str, hollow: object) -> None:
    Page(render(report(blocks(2)) | {key: hollow}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1e-17, 1e308, 5e-324, True, "1"])
def test_odd_numbers(value: object) -> None:
    probes = {"torch": {"random": {"status": "fail", "calc_diff": value}, "sweep": None}, "other": None}
    given = {name: module("fail", value, gain=value, probes=probes) for name in ("b.0.q", "b.1.q")}  # type: ignore[arg-type]
    page = Page(render(report(given)))
    assert "NaN" not in page.scripts[0] and "Infinity" not in page.scripts[0]


def test_natural_order_and_visible_text() -> None:
    assert sorted(["b.10.q", "b.9.q", "b.9", "a"], key=natural) == ["a", "b.9", "b.9.q", "b.10.q"]
    assert visible("a\tb\u2066c") == "a\\tb\\u2066c"
    assert len(visible("x" * 10_000)) == 301


def test_without_plotly_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(OutputRefusedError) as caught:
        render(report({}))
    assert caught.value.code == "report.needs_plotly"
    assert caught.value.exit_code == ExitCode.OUTPUT
    assert caught.value.hint == "pip install 'modelopt-convert[report]'"
