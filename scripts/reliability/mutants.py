"""Take away one guard at a time and see a test go red: around what mopt writes, and where it compares with the base.

    python scripts/reliability/mutants.py [--only WORD ...] [--write]

Each mutant is the package copied into a temporary folder with one text replaced; the tests named beside it then run
against that copy. First all of them run against a copy in which nothing is replaced, and must pass: else red would mean
nothing. ``--only`` takes those whose file or description has one of the words; ``--write`` puts the rows into
docs/reliability-mutants.md. It ends with 1 if one survived, or if its text is not in the source exactly once.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mutants_disk import DISK, Mutant
from mutants_edge import EDGE
from mutants_engines import ENGINES
from mutants_families import FAMILIES
from mutants_fidelity import FIDELITY
from mutants_forms import FORMS
from mutants_hub import HUB
from mutants_identity import IDENTITY
from mutants_lost import LOST
from mutants_nunchaku import NUNCHAKU
from mutants_owned import OWNED
from mutants_pipeline import PIPELINE
from mutants_proof import PROOF
from mutants_rules import RULES
from mutants_tasks import TASKS
from mutants_told import TOLD

ROOT = Path(__file__).resolve().parent.parent.parent
TABLE = ROOT / "docs" / "reliability-mutants.md"
MUTANTS = (
    *(DISK + RULES + ENGINES + OWNED + TASKS + PROOF + HUB + EDGE + IDENTITY + PIPELINE + TOLD + FAMILIES + FORMS),
    *NUNCHAKU,
    *LOST,
    *FIDELITY,
)
_SECONDS = 900
HEAD = """# Guards taken away, one at a time

Made by `make mutants`, which is not part of CI. Each row is mopt's own source with one guard removed or turned round,
and the test that went red first; where nothing is removed all these tests pass, which is tried before. A row with
**survived** would be a guard that no test watches.

"""


@dataclass(frozen=True)
class Result:
    """What became of one mutant: the tests that went red, or why there is no answer."""

    mutant: Mutant
    red: tuple[str, ...]
    fault: str = ""


def copy_package(folder: Path) -> None:
    """As tests are to find it."""
    for name in ("modelopt_convert", "presets"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def plant(mutant: Mutant, folder: Path) -> str:
    """Copy the package and apply the mutant; what is wrong, if it cannot be."""
    copy_package(folder)
    path = folder / "modelopt_convert" / mutant.file
    source = path.read_text()
    if source.count(mutant.old) != 1:
        return f"its text occurs {source.count(mutant.old)} times"
    path.write_text(source.replace(mutant.old, mutant.new))
    return ""


def test(folder: Path, tests: Sequence[str], cache: Path, *more: str) -> tuple[tuple[str, ...], str]:
    """Run tests against the package in a folder.

    Returns:
        Those that failed, and what kept them from running, if anything did; an error before a test is no failure of it.
    """
    # With the safe path neither the tests nor what they start find the package of the working folder first; the scripts
    # that they start find their neighbours all the same.
    paths = os.pathsep.join(
        map(
            str,
            (
                folder,
                ROOT / "tests" / "support",
                *(ROOT / "scripts" / one for one in ("make", "bench", "gpu", "reliability")),
            ),
        )
    )
    around = os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "MOPT_TEST_EXPORTS": str(cache)}
    where = "import modelopt_convert as m; print(m.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=ROOT, env=around, capture_output=True, text=True)
    if not found.stdout.startswith(str(folder)):
        return (), "another copy of the package was found"
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", "-rfE", *more]
    try:
        done = subprocess.run(
            [*words, *(f"tests/{name}" for name in tests)],
            cwd=ROOT,
            env=around,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return (), f"the tests did not end in {_SECONDS} s"
    lines = done.stdout.splitlines()
    red = [line.split()[1].removeprefix("tests/").partition("[")[0] for line in lines if line.startswith("FAILED ")]
    kept = any(line.startswith("ERROR ") for line in lines) and not red
    if done.returncode not in (0, 1) or kept:
        return (), f"pytest ended with {done.returncode}: {done.stdout[-300:]}{done.stderr[-300:]}"
    return tuple(dict.fromkeys(red)), ""


def run(mutant: Mutant, cache: Path) -> Result:
    """Plant it and run its tests."""
    with tempfile.TemporaryDirectory() as name:
        if fault := plant(mutant, Path(name)):
            return Result(mutant, (), fault)
        return Result(mutant, *test(Path(name), mutant.tests, cache, "-x"))


def control(mutants: Sequence[Mutant], cache: Path) -> str:
    """What is wrong with the tests where nothing was taken away; empty if they pass."""
    with tempfile.TemporaryDirectory() as name:
        copy_package(Path(name))
        red, fault = test(
            Path(name), list(dict.fromkeys(one for mutant in mutants for one in mutant.tests)), cache, "-n2"
        )
        return fault or ", ".join(red)


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
        if wrong := control(chosen, Path(cache)):
            raise SystemExit(f"with nothing taken away: {wrong}")
        for mutant in chosen:
            last = run(mutant, Path(cache))
            results.append(last)
            print(f"{mutant.file}: {mutant.what}: {', '.join(last.red) or last.fault or 'SURVIVED'}", flush=True)
    if options.write:
        TABLE.write_text(HEAD + table(results))
    return int(not results or any(not result.red or result.fault for result in results))


if __name__ == "__main__":
    sys.exit(main())
