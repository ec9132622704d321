"""Take away one guard at a time and see a test go red: every fsync, check and refusal around what mopt writes.

    python scripts/mutants.py [--only WORD ...] [--write]

Each mutant is the package copied into a temporary folder with one text replaced; the tests named beside it then run
against that copy. ``--only`` takes those whose file or description has one of the words; ``--write`` puts the rows into
docs/reliability-mutants.md. It ends with 1 if one survived, or if its text is not in the source exactly once.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mutants_disk import DISK, Mutant
from mutants_rules import RULES
from mutants_tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "reliability-mutants.md"
MUTANTS = DISK + RULES + TASKS
_SECONDS = 600
HEAD = """# Guards taken away, one at a time

Made by `make mutants`, which is not part of CI. Each row is mopt's own source with one guard removed or turned round,
and the test that went red first. A row with **survived** would be a guard that no test watches.

"""


@dataclass(frozen=True)
class Result:
    """What became of one mutant: the tests that went red, or why there is no answer."""

    mutant: Mutant
    red: tuple[str, ...]
    fault: str = ""


def plant(mutant: Mutant, folder: Path) -> str:
    """Copy the package and apply the mutant; what is wrong, if it cannot be."""
    for name in ("modelopt_convert", "presets"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "modelopt_convert" / mutant.file
    source = path.read_text()
    if source.count(mutant.old) != 1:
        return f"its text occurs {source.count(mutant.old)} times"
    path.write_text(source.replace(mutant.old, mutant.new))
    return ""


def run(mutant: Mutant, cache: Path) -> Result:
    """Plant it and run its tests."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if fault := plant(mutant, folder):
            return Result(mutant, (), fault)
        # With the safe path neither the tests nor what they start find the package of the working folder first.
        more = {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1", "MOPT_TEST_EXPORTS": str(cache)}
        words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=no", "-rfE"]
        tests = [f"tests/{test}" for test in mutant.tests]
        where = "import modelopt_convert as m; print(m.__file__)"
        found = subprocess.run(
            [sys.executable, "-c", where], cwd=ROOT, env=os.environ | more, capture_output=True, text=True
        )
        if not found.stdout.startswith(str(folder)):
            return Result(mutant, (), "another copy of the package was found")
        try:
            done = subprocess.run(
                [*words, *tests], cwd=ROOT, env=os.environ | more, capture_output=True, text=True, timeout=_SECONDS
            )
        except subprocess.TimeoutExpired:
            return Result(mutant, (), f"its tests did not end in {_SECONDS} s")
    lines = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    red = tuple(dict.fromkeys(line.removeprefix("tests/").partition("[")[0] for line in lines))
    if done.returncode not in (0, 1):  # such as 2, where the package cannot even be imported
        return Result(mutant, (), f"pytest ended with {done.returncode}: {done.stdout[-300:]}{done.stderr[-300:]}")
    return Result(mutant, red)


def row(result: Result) -> str:
    """Of the table."""
    red = ", ".join(f"`{name}`" for name in result.red) or f"**{result.fault or 'survived'}**"
    return f"{_begin(result.mutant)} {red} |"


def _begin(mutant: Mutant) -> str:
    return f"| `{mutant.file}` | {mutant.what} |"


def table(results: list[Result]) -> str:
    """A row for each mutant; those that were not run now keep the row that they had."""
    old = TABLE.read_text().splitlines() if TABLE.exists() else []
    new = [row(result) for result in results]
    rows = [next((line for line in new + old if line.startswith(_begin(one))), "") for one in MUTANTS]
    rows = [line for line in rows if line]
    survived = sum("**" in line for line in rows)
    lines = ["| file | taken away | red |", "|---|---|---|", *rows]
    return "\n".join([*lines, "", f"{len(rows)} mutants, {survived} survived.", ""])


def main() -> int:
    """Run them all, or some."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    chosen = [one for one in MUTANTS if any(word in f"{one.file} {one.what}" for word in options.only)]
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as cache:
        for mutant in chosen:
            last = run(mutant, Path(cache))
            results.append(last)
            print(f"{mutant.file}: {mutant.what}: {', '.join(last.red) or last.fault or 'SURVIVED'}", flush=True)
    if options.write:
        TABLE.write_text(HEAD + table(results))
    return int(not results or any(not result.red or result.fault for result in results))


if __name__ == "__main__":
    sys.exit(main())
