"""The HTML report of ``mopt verify``: one file without a script. What it shows of a checkpoint is escaped.

Whatever is missing or null is left out: the page is of what was found, not of what should have been.
"""

import shlex
from collections.abc import Mapping
from typing import Any

from modelopt_convert.report.words import PROVEN_WORDS, SAMPLED_WORDS, UNCHANGED_WORDS
from modelopt_convert.run.text import by_kind
from modelopt_convert.stage.written_file import PAGE_HEAD
from modelopt_convert.verification.page.excerpt import entries, mapping, read_modules, tone, visible
from modelopt_convert.verification.page.markup import MARKS, badge, listed, pairs, section, table, text, value_text
from modelopt_convert.verification.page.modules import compared, drawn, probes, worst
from modelopt_convert.verification.page.shell import whole
from modelopt_convert.verification.page.style import STYLE

_TERMS = {
    "verdict": "pass, fail, inconclusive (nothing to prove it by, or what was required did not run), backend broken or "
    "backends disagree (a kernel is in question, not the checkpoint).",
    "proven": "every byte of every quantized module was compared with the base, and fits.",
    "weights proven, never calibrated": "as proven, but modules have no input scale.",
    "not proven: sampled": "only some rows of each module were compared; they fit.",
    "not proven: near": "something is close to the base, but is not the base quantized.",
    "unchanged": "every byte is as mopt.json, the record beside the weights, says. A record is what its author claims.",
    "base": "the model before it was quantized.",
    "module": "one quantized weight. It has codes of 4 or 8 bits, and scales that turn codes back into values.",
    "decode error": "size of the difference between the decoded weight and the base, relative to the base. "
    "Quantization itself costs some: about 0.1 is usual for NVFP4, about 0.03 for FP8.",
    "gain": "the factor by which decoded values are larger than the base's; 1 is right.",
    "worst row, worst column": "the largest decode error of a single row or column.",
    "SQNR": "the decode error in decibels; more is better.",
    "kernel error, calc_diff": "how far the product of an engine's kernel is from the exact product; 0 is equal.",
    "level": "one kind of check. What was skipped says nothing, and is never a pass.",
}


def render(report: Mapping[str, Any], *, command: str, date: str) -> str:
    """The page, the same bytes for the same arguments.

    Args:
        report: The JSON report of the run.
        command: What was called.
        date: When.
    """
    found = mapping(report.get("verify"))
    modules = read_modules(found)
    parts = [
        _verdict(report, found),
        _next(report, found),
        compared(modules, _misplaced(found)),
        _levels(found),
        drawn(modules) if found.get("checkpoint") else "",
        probes(modules),
        worst(modules),
        _backends(found),
        _run(report, found, command, date),
        section("Thresholds", pairs(mapping(found.get("thresholds")), "run")),
        section("Terms", pairs(_TERMS, "terms")),
    ]
    title = f"{_word(found)}: {_last_part(found.get('checkpoint')) or 'backends'} - mopt verify"
    return whole(PAGE_HEAD, title, STYLE, parts)


def _word(found: Mapping[str, Any]) -> str:
    """The verdict, and beside it what is proven, in the words of the report."""
    verdict, proof = found.get("verdict"), found.get("proof")
    word = visible("no verdict" if verdict is None else verdict, 200)
    return f"{word}, {visible(proof, 200)}" if proof else word


def _last_part(path: object) -> str:
    return visible(str(path or "").rstrip("/").rpartition("/")[2], 80)


def _verdict(report: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    kind = tone(found.get("verdict"))
    if kind == "pass" and report.get("exit_code"):
        kind = "other"
    elif kind == "pass" and str(found.get("proof")).startswith("not proven"):
        kind = "warn"
    preset = found.get("preset")
    facts = {
        "checkpoint": found.get("checkpoint"),
        "base": "; ".join(map(_place, _bases(report))) or ("none given" if found.get("checkpoint") else None),
        "preset": f"{visible(preset)} (by mopt.json)" if preset else None,
        "format": str(found.get("algorithm") or "").upper(),
        "native kernels ran on": f"{visible(found['native_executed'])} modules" if found.get("native_executed") else "",
    }
    said = f"<p>{text(found['statement'])}</p>\n" if found.get("statement") else ""
    mark = f'<span aria-hidden="true">{MARKS[kind]}</span> '
    return (
        f'<header class="verdict {kind}">\n<p class="soft">mopt verify</p>\n'
        f"<h1>{mark}{text(_word(found), 500)}</h1>\n{said}{pairs(facts)}\n</header>"
    )


def _bases(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The base of each transformer, as far as there is one."""
    inputs = mapping(report.get("inputs"))
    return [mapping(one) for name, one in inputs.items() if str(name).rpartition("/")[2] == "base"]


def _place(one: Mapping[str, Any]) -> str:
    """An input, and what was observed of it."""
    identity = mapping(one.get("identity"))
    path, repo, commit = str(one.get("path") or ""), identity.get("repo"), identity.get("commit")
    known = ", ".join([str(repo)] * bool(repo and str(repo) not in path) + [f"commit {commit}"] * bool(commit))
    return visible(f"{path} ({known})" if known else path)


def _next(report: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What to do, and the command for it."""
    checkpoint = shlex.quote(visible(found.get("checkpoint") or "CHECKPOINT", 2000))
    bases = _bases(report)
    base = shlex.quote(visible(bases[0].get("path") or "BASE", 2000)) if len(bases) == 1 else "BASE"
    proving = f"mopt verify {checkpoint} --base {base}"
    is_far = str(found.get("checkpoint")).startswith("hf://")
    verdict, proof = found.get("verdict"), found.get("proof")
    error = mapping(report.get("error"))
    said, command = str(error.get("hint") or ""), ""
    if verdict == "inconclusive" and error.get("code") == "verify.inconclusive" and found.get("checkpoint"):
        command = proving
    elif verdict == "prewarmed":
        said, command = "Kernels were built, and nothing was verified. Verify the checkpoint.", proving
    elif verdict == "pass" and not error and not found.get("checkpoint"):
        said, command = "Verify a checkpoint with these backends.", proving
    elif verdict == "pass" and not error:
        said, command = {
            PROVEN_WORDS: ("Load it in an engine.", "")
            if is_far
            else ("Load it in an engine, or publish it.", f"mopt push {checkpoint} ORGANIZATION/NAME"),
            UNCHANGED_WORDS: ("Nothing changed since the record was written. Prove it against the base.", proving),
            SAMPLED_WORDS: ("The rows that were compared fit. Compare all of them to prove it.", proving),
        }.get(str(proof), ("It is right as far as was looked. Prove it against the base.", proving))
    elif not said:
        said = str(error.get("message") or "")
    line = f"<pre><code>{text(command)}</code></pre>" if command else ""
    sentence = f"{said[:1].upper()}{said[1:].rstrip('.')}." if said else ""
    return section("What to do next", f"<p>{text(sentence)}</p>\n{line}" if sentence else "")


def _misplaced(found: Mapping[str, Any]) -> int:
    """How many modules fail for their layout alone: their values, read in the layout that was found, are the base's."""
    levels = {str(one.get("level")): one for one in map(mapping, entries(found.get("levels")))}
    wrong = {str(words).partition(": ")[0] for words in entries(mapping(levels.get("L1")).get("failures"))}
    others = (one for name, one in levels.items() if name != "L1")
    wrong -= {str(words).partition(": ")[0] for one in others for words in entries(one.get("failures"))}
    modules = mapping(found.get("modules"))
    return sum(mapping(modules.get(name)).get("status") == "pass" for name in wrong)


def _levels(found: Mapping[str, Any]) -> str:
    rows = []
    for level in map(mapping, entries(found.get("levels"))):
        about = text(level.get("reason") or "")
        faults = (*entries(level.get("failures")), *entries(level.get("warnings")))
        about += listed(by_kind([str(one) for one in faults]))
        name = f"<b>{text(level.get('level') or '')}</b> {text(level.get('title') or '')}"
        rows.append([name, badge(level.get("status")), about])
    return section("Levels", table("levels", ["level", "status", "why"], rows))


def _backends(found: Mapping[str, Any]) -> str:
    rows = [
        [
            text(backend.get("name") or ""),
            badge(backend.get("status")),
            text(backend.get("kind") or ""),
            f"{value_text(backend.get('modules'))} modules",
            text(backend.get("reason") or ""),
        ]
        for backend in map(mapping, entries(found.get("backends")))
    ]
    note = "Each is tried on made operands first; one that fails there is broken and judges nothing."
    return section("Backends", table("backends", ["backend", "status", "kind", "compared", "why"], rows), note)


def _run(report: Mapping[str, Any], found: Mapping[str, Any], command: str, date: str) -> str:
    device, versions = mapping(found.get("device")), mapping(report.get("versions"))
    capability = device.get("capability")
    where = [device.get("name"), None if capability is None else f"compute capability {capability}"]
    facts = {
        "date": date,
        "mopt": versions.get("mopt"),
        "exit code": report.get("exit_code"),
        "device": ", ".join(str(part) for part in where if part),
        "torch": device.get("torch") or versions.get("torch"),
        "CUDA": device.get("cuda"),
        "Python": versions.get("python"),
    }
    return section("The run", f"<pre><code>{text(command)}</code></pre>\n{pairs(facts, 'run')}")
