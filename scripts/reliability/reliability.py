"""Run the tiers of tests and tell what they counted: cases, torn outputs, litter and the rest.

    python scripts/reliability/reliability.py [--only 8,11] [--write]

``--only`` takes some tiers; ``--write`` puts the rows into docs/reliability.md, where the others keep what they had. It
ends with 1 if a test of any tier failed, and that tier's row says so.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from reliability_tiers import TIERS, Tier

ROOT = Path(__file__).resolve().parent.parent.parent
TABLE = ROOT / "docs" / "reliability.md"
COLUMNS = ("torn", "missing", "recovered", "litter")
LARGEST = {"peak_mb", "milliseconds"}  # of these the largest is told, of the others the sum
NO_COUNT = {"exit_code"}
TITLES = ("tier", "name", "what is struck", "cases", *COLUMNS, "other figures", "seconds", "command")
HEAD = """# What the tests of reliability counted

Made by `make reliability`; `python scripts/reliability/reliability.py --write --only 8,11` runs some tiers again and
leaves the other rows. What the figures mean:

- cases: what was struck or compared; the tests that passed, for a tier that does not count within them.
- torn: OUT was neither the old checkpoint nor the new one. 0, or the tier fails.
- missing: OUT was there and was gone after a kill or a lasting error: only between the two renames of a file system
  that cannot exchange names. The old one is then whole beside it; recovered: the next run put it back, as every test of
  this requires, whether or not it counts that.
- litter: what lay beside OUT after the next run. 0, or the tier fails.
- wrong exit 0, escapes, canaries, sigbus, accepted: a run that claimed success without the new checkpoint, an exception
  that is no refusal, code of a pickle that ran, a process that died, a cut file that was taken. 0, or the tier fails.
- lost, tracebacks, exit 70, hangs: a file that was not mopt's to replace or remove, a raw traceback, a code that says
  "a bug in mopt", a command that did not end in time. 0, or the tier fails.
- without a sync: how many disks a power cut would have torn or lost, were that one fsync not there.
- peak mb, milliseconds: the largest of all cases. A dash is a figure that the tier does not have.

"""


@dataclass(frozen=True)
class Outcome:
    """What pytest said of one tier, and what its tests noted."""

    passed: int
    failed: int
    skipped: int
    seconds: float
    figures: Counter[str]


def named_regressions() -> tuple[str, ...]:
    """The tests of tests/REGRESSIONS.md."""
    text = (ROOT / "tests" / "REGRESSIONS.md").read_text()
    return tuple(f"tests/{name}" for name in dict.fromkeys(re.findall(r"`((?:\w+/)*test_\w+\.py::test_\w+)` \|", text)))


def run(tier: Tier, exports: str) -> Outcome:
    """Run its tests in a process of their own; real exports are made once for all tiers, in this folder."""
    with tempfile.TemporaryDirectory() as name:
        noted, results = Path(name) / "figures", Path(name) / "results.xml"
        more = {
            "MOPT_FIGURES": str(noted),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        more["MOPT_TEST_EXPORTS"] = exports
        if tier.long:
            more["MOPT_TEST_LONG"] = "1"
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}"]
        words += [f"-n{tier.workers}"] if tier.workers else []
        began = time.monotonic()
        subprocess.run([*words, *(tier.tests or named_regressions())], cwd=ROOT, env=os.environ | more, check=False)
        seconds = time.monotonic() - began
        suites = list(ET.parse(results).iter("testsuite")) if results.exists() else []
        counts = {kind: sum(int(suite.get(kind, 0)) for suite in suites) for kind in ("tests", "skipped")}
        failed = sum(int(suite.get(kind, 0)) for suite in suites for kind in ("failures", "errors"))
        passed = counts["tests"] - counts["skipped"] - failed
        lines = noted.read_text().splitlines() if noted.exists() else []
    return Outcome(passed, failed, counts["skipped"], seconds, total(tier, [json.loads(line) for line in lines]))


def total(tier: Tier, notes: list[dict[str, int | str]]) -> Counter[str]:
    """The figures of one tier, of all its tests; others may have noted theirs on the way."""
    figures: Counter[str] = Counter()
    for note in notes:
        for key, value in note.items():
            if note["tier"] != tier.number or key in {"tier", *NO_COUNT} or isinstance(value, str):
                continue
            name = "without a sync" if key.startswith("without ") else key
            figures[name] = max(figures[name], value) if name in LARGEST else figures[name] + value
    return figures


def row(tier: Tier, outcome: Outcome) -> str:
    """Of the table."""
    figures = dict(outcome.figures)
    good = outcome.passed and not outcome.failed
    cases = figures.pop(tier.counted, outcome.passed)
    figures.pop("cases", None)  # of some of its tests only
    told = [str(figures.pop(name, "-")) for name in COLUMNS]
    others = {"tests": outcome.passed, "skipped": outcome.skipped, "failed": outcome.failed}
    shown = {name: value for name, value in others.items() if value} | dict(sorted(figures.items()))
    shown |= dict.fromkeys(tier.never, 0) if good else {}
    other = ", ".join(f"{name}: {value:,}" for name, value in shown.items()).replace("_", " ")
    name = tier.name if good else f"{tier.name}: **FAILED**"
    cells = [name, tier.struck, f"{cases:,}", *told, other, f"{outcome.seconds:.0f}", command(tier)]
    return begin(tier) + " | ".join(cells) + " |"


def not_run(tier: Tier) -> str:
    """The row of a tier that has no figures yet."""
    cells = [tier.name, tier.struck, *["not run"] * (len(TITLES) - 4), command(tier)]
    return begin(tier) + " | ".join(cells) + " |"


def begin(tier: Tier) -> str:
    return f"| {tier.number} | "


def command(tier: Tier) -> str:
    return f"`python scripts/reliability/reliability.py --only {tier.number}`"


def table(new: list[str]) -> str:
    """A row for each tier; those that were not run now keep the row that they had."""
    old = TABLE.read_text().splitlines() if TABLE.exists() else []
    rows = [next((line for line in new + old if line.startswith(begin(tier))), not_run(tier)) for tier in TIERS]
    return "\n".join([f"| {' | '.join(TITLES)} |", "|---" * len(TITLES) + "|", *rows, ""])


def tests_of_tiers() -> str:
    """Which tests make up each tier."""
    lines = [f"{tier.number}. {', '.join(f'`{test}`' for test in tier.tests) or 'those it names'}" for tier in TIERS]
    return "\n".join(["", "## The tests of each tier", "", *lines, ""])


def machine() -> str:
    """What the last run ran on."""
    system = ".".join(platform.release().split(".")[:2])
    place = subprocess.run(["df", "--output=fstype", tempfile.gettempdir()], capture_output=True, text=True, check=True)
    versions = {name: version(name) for name in ("pytest", "hypothesis", "torch", "safetensors")}
    if shutil.which("strace"):
        said = subprocess.run(["strace", "--version"], capture_output=True, text=True, check=True).stdout
        versions["strace"] = said.split()[3]
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    cores = len(os.sched_getaffinity(0))
    return (
        f"\nThe last run: {cores} cores, Linux {system}, {place.stdout.split()[-1]}; "
        f"mopt {version('modelopt-convert')}, Python {platform.python_version()}, {named}.\n"
        "Seconds are of that machine, with whatever else it did.\n"
    )


def main() -> int:
    """Run them all, or some."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="8,11")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    wanted = {int(number) for number in options.only.split(",")} if options.only else {tier.number for tier in TIERS}
    if strangers := wanted - {tier.number for tier in TIERS}:
        parser.error(f"no such tier: {sorted(strangers)}")
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as exports:
        for tier in (tier for tier in TIERS if tier.number in wanted):
            outcome = run(tier, exports)
            failed |= bool(outcome.failed or not outcome.passed)
            rows.append(row(tier, outcome))
            print(rows[-1], flush=True)
            if options.write:  # after each, so that a run that is broken off keeps what it has
                TABLE.write_text(HEAD + table(rows) + machine() + tests_of_tiers())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
