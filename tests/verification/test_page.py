"""The HTML report of verify: parsed as a browser would."""

import base64
import hashlib
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from modelopt_convert.report.words import PROOFS
from modelopt_convert.verification.page.document import render
from modelopt_convert.verification.page.excerpt import read_modules
from modelopt_convert.verification.page.style import STYLE

ROLES = ["attn.to_q", "attn.to_k", "attn.to_v", "ff.net.0.proj", "ff.net.2"]

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
    fixed = {"shape": [64, 32], "status": status, "compared": "all", "verdict": "reproduced", "relative_error": error}
    counted = {"codes": 2048, "codes_equal": 2048, "scales": 128, "scales_equal": 128, "gain": 1.0, "worst_row": 0.1}
    return fixed | counted | {"probes": {"torch": both, "cutlass": both}} | more


UNSEEN = {"shape": [64, 32], "status": "pass", "verdict": None, "compared": None, "probes": {}}


def found(modules: dict[str, Any], verdict: str = "pass") -> dict[str, Any]:
    return {
        "checkpoint": "/data/out",
        "algorithm": "nvfp4",
        "preset": "flux1-dev",
        "verdict": verdict,
        "proof": {"pass": "proven", "fail": "mismatch"}.get(verdict, "not proven: no base"),
        "statement": f"{verdict}, cpu only",
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


def page(
    verify: dict[str, Any],
    *,
    command: str = "mopt verify /data/out",
    code: str = "",
    hint: str | None = None,
    **more: Any,
) -> str:
    error = {"code": code, "message": "it is so", "hint": hint, "path": None} if code else None
    whole = {
        "exit_code": 6 if code else 0,
        "error": error,
        "versions": {"mopt": "0.2.0", "python": "3.12.1"},
        "inputs": {"checkpoint": {"path": "/data/out"}, "base": {"path": "hf://o/n", "identity": {"commit": "c0ffee"}}},
        "verify": verify,
    }
    return render(whole | more, command=command, date="2026-11-28 05:10 UTC")


def blocks(count: int, roles: list[str] = ROLES, status: str = "pass") -> dict[str, Any]:
    names = [f"blocks.{block}.{role}" for block in range(count) for role in roles]
    return {name: module(status, 0.08 + place / 1e4) for place, name in enumerate(names)}


class Page(HTMLParser):
    """What a browser sees: elements with their attributes, text, and sections by their headings."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {"": ""}
        self.title = ""
        self._inside = self._section = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside == "title":
            self.title += data
        elif self._inside in ("h1", "h2") and data.strip():
            self._section = data if self._inside == "h2" else "verdict"
            self.sections[self._section] = data
        elif self._inside != "style":
            self.sections[self._section] += data + "\n"
        if self._inside == "h1" and data.strip():
            self.sections["verdict"] = data.strip() + "\n"

    def handle_endtag(self, tag: str) -> None:
        self._inside = "h1" if tag == "span" and self._inside == "span" and "verdict" not in self.sections else ""

    @property
    def text(self) -> str:
        return "\n".join(self.sections.values())

    def classes(self, tag: str) -> list[set[str]]:
        return [set((given.get("class") or "").split()) for name, given in self.elements if name == tag]

    @property
    def cells(self) -> dict[str, str]:
        """What each cell says of its module, by the first of its classes, which colors it."""
        cells = [given for name, given in self.elements if name == "i" and "title" in given]
        return {str(one["title"]): str(one["class"]).split()[0] for one in cells}


@pytest.mark.parametrize(
    "given",
    [
        found(blocks(8)),
        found(blocks(50, [f"experts.{number}.up" for number in range(20)])),
        found(blocks(8, status="fail"), "fail"),
        found({name: module() for name in HOSTILE}),
        found({}),
        {},
    ],
    ids=["40", "1000", "all fail", "hostile", "no module", "empty"],
)
def test_the_page_is_whole_and_fetches_and_runs_nothing(given: dict[str, Any]) -> None:
    text = page(given)
    assert page(given) == text
    text.encode()
    seen = Page(text)
    keys = {key for _, attributes in seen.elements for key in attributes}
    assert keys.isdisjoint({"src", "srcset", "href", "data", "action", "style"})
    assert not [key for key in keys if key.startswith("on")]
    assert {tag for tag, _ in seen.elements}.isdisjoint({"script", "link", "a", "img", "iframe", "base", "form"})
    assert "url(" not in STYLE and "@import" not in STYLE
    (html,) = [attributes for tag, attributes in seen.elements if tag == "html"]
    assert html == {"lang": "en"} and seen.title.endswith(" - mopt verify")
    headings = [tag for tag, _ in seen.elements if tag in ("h1", "h2", "h3")]
    assert headings[0] == "h1" and headings.count("h1") == 1 and headings[1:2] in (["h2"], [])


def test_the_policy_lets_this_style_in_and_nothing_else() -> None:
    text = page(found(blocks(2)))
    (policy,) = [given["content"] for _, given in Page(text).elements if given.get("http-equiv")]
    style = text[text.index("<style>") + 7 : text.index("</style>")]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


@pytest.mark.parametrize("status", ["pass", "fail"])
def test_a_page_of_500_modules_is_small(status: str) -> None:
    assert len(page(found(blocks(100, status=status))).encode()) < 300_000


def test_size_is_bounded_for_absurd_checkpoints() -> None:
    many = {f"layer{number}.{'<' * 400}": module("fail") for number in range(5000)}
    many |= {f"blocks.{number}.{number}": module("fail") for number in range(5000)}
    text = page(found(many, "fail"))
    assert len(text) < 6_000_000
    assert "the worst 2000 of 10000" in text and "Of 10000 modules these are the worst 2000." in text


@pytest.mark.parametrize(
    ("given", "color", "words"),
    [
        (module(), "pass", "pass, error 0.09"),
        (module(compared="sampled rows"), "part", "pass, sampled, error 0.09"),
        (module("warn", 0.3), "warn", "warn, error 0.3"),
        (module("fail", None), "fail", "fail"),
        (UNSEEN, "other", "not compared"),
        (UNSEEN | {"probes": module()["probes"]}, "other", "not compared"),
        (UNSEEN | {"status": "fail"}, "fail", "fail"),
        (UNSEEN | {"status": "skipped"}, "other", "skipped"),
        ({"compared": "all"}, "other", "not checked"),
        (None, "other", "not checked"),
    ],
)
def test_only_what_was_compared_with_the_base_is_green(given: Any, color: str, words: str) -> None:
    seen = Page(page(found({"b.0.q": given, "b.1.q": given})))
    assert seen.cells == {f"b.0.q: {words}": color, f"b.1.q: {words}": color}
    assert [one["class"] for tag, one in seen.elements if tag == "rect"] == [color]


def test_an_inconclusive_run_does_not_look_like_a_pass() -> None:
    given = found(dict.fromkeys(blocks(4), UNSEEN), "inconclusive")
    seen = Page(page(given | {"levels": []}, code="verify.inconclusive", hint="give --base to prove it"))
    assert set(seen.cells.values()) == {"other"}
    colored = [tag for tag, one in seen.elements if {"pass", "part"} & set((one.get("class") or "").split())]
    assert colored == ["b"], "the backend that passed its self-test, and nothing else"
    assert "0 of 20 modules were compared with a base." in seen.sections["What was compared"]
    following = seen.sections["What to do next"].splitlines()
    assert {"Give --base to prove it.", "mopt verify /data/out --base hf://o/n"} <= set(following)


def test_a_module_that_a_level_names_is_not_green() -> None:
    """A layout that is not as declared is a fault of the module, though what is stored fits."""
    wrong = {"level": "L1", "title": "layout", "status": "fail", "failures": ["b.1.q: the even column is high"]}
    given = found({"b.0.q": module(), "b.1.q": module()}, "fail") | {"levels": [wrong]}
    assert Page(page(given)).cells == {"b.0.q: pass, error 0.09": "pass", "b.1.q: fail, error 0.09": "fail"}


def test_what_only_the_record_vouches_for_is_grey_and_says_so() -> None:
    seen = Page(page(found({"q": UNSEEN}) | {"proof": "unchanged"}))
    assert seen.cells == {"q: as recorded": "other"}


def test_what_was_compared_is_counted() -> None:
    modules = blocks(2) | {"x": module("fail", 1.2, codes_equal=48), "y": UNSEEN, "z": module(compared="sampled rows")}
    seen = Page(page(found(modules, "fail")))
    assert (
        "12 of 13 modules were compared with a base; 22,576 of 24,576 codes are the base's; "
        "1,536 of 1,536 block scales are the base's." in seen.sections["What was compared"]
    )
    (said,) = [one["aria-label"] for tag, one in seen.elements if tag == "svg"]
    assert said == "10 compared whole, 1 sampled rows compared, 1 fail, 1 not compared with a base"
    bars = [[float(str(one[key]).rstrip("%")) for key in ("x", "width")] for tag, one in seen.elements if tag == "rect"]
    assert [wide for _, wide in bars] == pytest.approx([1000 / 13, 100 / 13, 100 / 13, 100 / 13], abs=0.01)
    assert [at for at, _ in bars] == pytest.approx([0, 1000 / 13, 1100 / 13, 1200 / 13], abs=0.01)


def test_every_module_has_a_cell_in_the_line_of_its_role_by_block() -> None:
    given = blocks(12) | {"x_embedder": module("warn")}
    del given["blocks.3.attn.to_k"]
    text = page(found(given))
    lines = {
        label: (re.findall(r'title="([^:]*):', cells), re.findall(r">(\d*)</i>", cells))
        for label, cells in re.findall(r'<span role="img" aria-label="([^:]*): [^"]*">(.*?)</span>', text)
    }
    for role in ROLES:
        numbers = [number for number in range(12) if f"blocks.{number}.{role}" in given]
        assert lines[role] == ([f"blocks.{number}.{role}" for number in numbers], list(map(str, numbers)))
    assert lines["x_embedder"] == (["x_embedder"], [""]) and len(lines) == len(ROLES) + 1


def test_shades_are_of_the_errors_and_a_switch_without_a_script_shows_them() -> None:
    errors = {f"b.{place}.q": module("pass", 10 ** (place / 4 - 3)) for place in range(5)}
    seen = Page(page(found(errors)))
    shades = [one["class"] for tag, one in seen.elements if tag == "i" and "title" in one]
    assert [str(one).split()[1] for one in shades] == ["d1", "d2", "d3", "d4", "d5"]
    assert [str(one).split()[2] for one in shades] == ["k3"] * 5, "all agree"
    assert [one["id"] for tag, one in seen.elements if tag == "input"] == ["show-s", "show-d", "show-k"]
    for shade in range(1, 6):
        for kind in "dk":
            assert f"#show-{kind}:checked~.maps .{kind}{shade}" in STYLE
    assert "input" not in [tag for tag, _ in Page(page(found({"q": UNSEEN}))).elements]


def test_hostile_names_are_text() -> None:
    given = found({name: module("fail") for name in HOSTILE}, "<img src=x>")
    given |= {key: HOSTILE[2] for key in ("checkpoint", "preset", "statement", "native_executed", "algorithm")}
    given["levels"][0]["failures"] = HOSTILE
    given["thresholds"] = {"<b>": 1.0}
    place = {"path": HOSTILE[5], "identity": {"repo": "<s>", "commit": "<s>"}}
    text = page(given, command=HOSTILE[3], code="x", hint=HOSTILE[6], inputs={"base": place}, versions={"mopt": "<s>"})
    seen, plain = Page(text), Page(page(found(blocks(4, status="fail"), "fail"), code="x", hint="y"))
    assert {tag for tag, _ in seen.elements} <= {tag for tag, _ in plain.elements}
    assert {key for _, one in seen.elements for key in one} <= {key for _, one in plain.elements for key in one}
    for words in (
        "<script>alert(1)</script>.0.q",
        "a\\x00b\\x1b[31m\\u202egnp",
        "\\ud800",
        "&lt;i&gt;",
        "<!--<script>",
    ):
        assert words in seen.text
    assert not [char for char in text if not char.isprintable() and char != "\n"]


def test_the_worst_come_first() -> None:
    given = {
        "blocks.2.q": module("pass", 0.5),
        "blocks.10.q": module("pass", 0.5),
        "blocks.8.q": module("pass", 0.1, compared="sampled rows"),
        "blocks.3.q": module("warn", 0.1),
        "blocks.4.q": module("fail", 0.1),
        "blocks.5.q": module("fail", None),
        "blocks.6.q": {"status": "skipped"},
        "blocks.7.q": None,
    }
    ordered = [one.name for one in read_modules({"modules": given})]
    assert [name.split(".")[1] for name in ordered] == ["4", "5", "3", "6", "7", "8", "2", "10"]


def test_each_part_says_what_it_is_for() -> None:
    given = found(blocks(4) | {"blocks.0.attn.to_q": module("fail", 1.25)}, "fail")
    seen = Page(page(given, command="mopt verify /data/out --base hf://o/n"))
    expected = {
        "verdict": ("fail, mismatch", "fail, cpu only", "/data/out", "hf://o/n (commit c0ffee)", "NVFP4", "0 of 40"),
        "Levels": ("no GPU", "30 places", "m0, m1, m2 and 27 more"),
        "Probes that did not pass": ("rows 1, 5, 9", "torch identity"),
        "Worst modules": ("1.25", "64\u00d732"),
        "Backends": ("self-test: zeros", "broken"),
        "The run": ("mopt verify /data/out --base hf://o/n", "0.2.0", "2026-11-28 05:10 UTC", "2.13.0", "3.12.1"),
        "Thresholds": ("kernel_calc_diff", "1e-05"),
        "Terms": ("decode error", "proven", "base", "gain", "SQNR"),
    }
    for section, words in expected.items():
        for one in words:
            assert one in seen.sections[section], (section, one)
    assert "flux1-dev (by mopt.json)" in seen.sections["verdict"] and "compute capability 9.0" in seen.text
    assert "none given" in Page(page(given, inputs={})).sections["verdict"]


@pytest.mark.parametrize(
    ("verdict", "proof", "code", "kind", "mark"),
    [
        ("pass", "proven", "", "pass", "\u2713"),
        ("pass", "unchanged", "", "pass", "\u2713"),
        ("pass", "proven", "verify.required", "other", "\u25cb"),
        ("pass", "not proven: sampled", "", "warn", "!"),
        ("pass", "not proven: near", "", "warn", "!"),
        ("fail", "not proven: near", "", "fail", "\u2715"),
        ("fail", "mismatch", "", "fail", "\u2715"),
        ("backend broken", "proven", "", "fail", "\u2715"),
        ("backends disagree", "proven", "", "fail", "\u2715"),
        ("inconclusive", "not proven: no base", "", "other", "\u25cb"),
        ("prewarmed", "", "", "other", "\u25cb"),
        ("pass", "<img src=x>", "", "pass", "\u2713"),
    ],
)
def test_the_verdict_is_in_the_words_of_the_report(verdict: str, proof: str, code: str, kind: str, mark: str) -> None:
    text = page(found({}, verdict) | {"proof": proof}, code=code)
    seen = Page(text)
    words = f"{verdict}, {proof}" if proof else verdict
    assert seen.title == f"{words}: out - mopt verify"
    assert seen.sections["verdict"].splitlines()[0] == words
    assert seen.classes("header") == [{"verdict", kind}]
    assert f'<h1><span aria-hidden="true">{mark}</span> ' in text


@pytest.mark.parametrize(
    ("given", "command"),
    [
        ({"proof": "proven", "checkpoint": "hf://o/n"}, "Load it in an engine."),
        ({"proof": "proven"}, "mopt push /data/out ORGANIZATION/NAME"),
        ({"proof": "not proven: sampled", "checkpoint": "/a b"}, "mopt verify '/a b' --base hf://o/n"),
        ({"proof": "unchanged"}, "mopt verify /data/out --base hf://o/n"),
        ({"verdict": "prewarmed", "proof": "", "checkpoint": ""}, "mopt verify CHECKPOINT --base hf://o/n"),
        ({"proof": "", "checkpoint": ""}, "mopt verify CHECKPOINT --base hf://o/n"),
    ],
)
def test_there_is_a_command_to_go_on_with(given: dict[str, str], command: str) -> None:
    assert command in Page(page(found({}) | given)).sections["What to do next"].splitlines()


def test_terms_explain_each_word_for_what_is_proven_but_those_that_explain_themselves() -> None:
    terms = Page(page(found({}))).sections["Terms"].splitlines()
    untold = {word for word in PROOFS if word and word not in terms}
    assert untold == {
        "quantized here, not calibrated",
        "quantized here, inputs calibrated",
        "not proven: no base",
        "not proven: nothing compared",
        "mismatch",
    }


@pytest.mark.parametrize("hollow", [None, 7, "text", [None], {"a": None}, [{"a": [1]}], math.inf])
@pytest.mark.parametrize(
    "key", ["levels", "backends", "modules", "device", "thresholds", "verdict", "proof", "checkpoint"]
)
def test_what_is_missing_or_odd_is_left_out(key: str, hollow: object) -> None:
    Page(page(found(blocks(2)) | {key: hollow}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1e-17, 1e308, 5e-324, True, "1"])
def test_odd_numbers(value: object) -> None:
    probes = {"torch": {"random": {"status": "fail", "calc_diff": value}, "sweep": None}, "other": None}
    given = {name: module("fail", value, gain=value, codes=value, probes=probes) for name in ("b.0.q", "b.1.q")}  # type: ignore[arg-type]
    assert len(Page(page(found(given))).cells) == 2
