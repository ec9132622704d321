"""Build every family in every format, load it with the engines' own loaders, and say what they made of it.

    python scripts/engines/kit.py [--engine ENGINE ...] [--family FAMILY ...] [--write]

Writes docs/engines.json, docs/converted.json and docs/engines.md with ``--write``; the rows that were not run stay.
Without it, it ends with 1 if a row is another than there. The environments of the engines are made in .venv/engines, by
set_up.py. ComfyUI is no package: MOPT_COMFYUI names a checkout, else it is not run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "scripts" / "make"), str(HERE)]

from conversions import BUILDS, LOADERS, Row, key_of, make, rows, section  # noqa: E402
from conversions import FAMILIES as CONVERTED_FAMILIES  # noqa: E402
from families import ALL, NOT_RUN  # noqa: E402
from set_up import ENGINES, missing, set_up  # noqa: E402

from modelopt_convert.formats.table import FORMATS  # noqa: E402

RECORD = ROOT / "docs" / "engines.json"
CONVERTED = ROOT / "docs" / "converted.json"
PAGE = ROOT / "docs" / "engines.md"
KEYS = ("outcome", "compared", "packed", "off", "first", "figure", "why", "differ", "takes")
HEAD = """# What the engines' own loaders make of a checkpoint

Made by `make engines`. A small model of every family, calibrated and exported by ModelOpt, is built by `mopt` with its
preset; then the engine's own classes and loaders load it on a CPU, without kernels. Every parameter that the engine
holds is decoded by what the engine settled on, and compared with what the checkpoint says, which `mopt` has proven
against the base. No GEMM is run.

- *right*: all is held, to the last bits of float32.
- *loss*: weights are a little off, or packed ones are not kept packed; all others are as they lie.
- *wrong*: other values than the checkpoint's. *fails*: it does not load.

`mopt` knows these as `modelopt_convert/engines/limits.toml`, and a test compares the two. It refuses what fails or is
wrong in the engine that a checkpoint is built for (`--engine`), but for `--allow-known-broken`, and says what is lost.
`engines.json` has the modules that each engine holds packed (`takes`) and the parameters that differ (`differ`).

"""


def build(exports: Path, family: str, algorithm: str, out: Path) -> Path:
    """A checkpoint of one family in one format, with its preset, whatever engines make of it."""
    preset, _ = ALL[family]
    where = exports / family
    BUILDS[algorithm](
        preset=preset,
        export=where / algorithm,
        base=where / "base",
        output=out / f"{family}-{algorithm}",
        allow_known_broken=True,
    )
    return out / f"{family}-{algorithm}"


def load(engine: str, python: Path, checkpoints: Sequence[Path], loader: str = "") -> list[Row]:
    """What an engine makes of some checkpoints."""
    command = [str(python), str(HERE / (loader or ENGINES[engine]["loader"])), *map(str, checkpoints)]
    around = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=around)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"checkpoint"')]
    if len(lines) != len(checkpoints):
        raise SystemExit(f"{engine} did not get through: {done.stderr[-3000:]}")
    rows = []
    for line in lines:
        found = json.loads(line)
        family, _, algorithm = Path(found["checkpoint"]).name.rpartition("-")
        known = {"engine": engine, "version": ENGINES[engine]["version"], "family": family, "format": algorithm}
        rows.append(known | {key: found[key] for key in KEYS if found.get(key) not in (None, [])})
    return rows


def key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """What tells rows apart."""
    return row["engine"], row["family"], row["format"]


def recorded() -> dict[tuple[str, str, str], Row]:
    """The rows of docs/engines.json."""
    return {key(row): row for row in json.loads(RECORD.read_text(encoding="utf-8"))}


def converted() -> dict[tuple[str, str, str, str, str], Row]:
    """The rows of docs/converted.json."""
    return {key_of(row): row for row in json.loads(CONVERTED.read_text(encoding="utf-8"))}


def load_converted(engine: str, python: Path, exports: Path, families: Sequence[str], out: Path) -> list[Row]:
    """What an engine makes of what is converted for it."""
    keys = [one for one in rows() if one[0] == engine and one[3] in families]
    found = load(engine, python, [make(exports, one, out) for one in keys], LOADERS[engine])
    return [{"engine": engine, "to": one[1], "made": one[2]} | row for one, row in zip(keys, found, strict=True)]


def page(rows: Iterable[Row], conversions: Iterable[Row]) -> str:
    """The text of docs/engines.md."""
    by_key = {key(row): row for row in rows}
    engines = [engine for engine in ENGINES if any(key[0] == engine for key in by_key)]
    titles = [f"{engine} {ENGINES[engine]['version']}" for engine in engines]
    lines = [f"| family | format | {' | '.join(titles)} |", "|---|---|" + "---|" * len(engines)]
    notes = []
    for family in ALL:
        for algorithm in FORMATS:
            cells = [by_key.get((engine, family, algorithm)) for engine in engines]
            words = " | ".join(one["outcome"] if one else "-" for one in cells)
            lines.append(f"| {family} | {algorithm.upper()} | {words} |")
            notes += [_note(one) for one in cells if one is not None and one["outcome"] != "right"]
    alike = Counter(note.partition(": ")[2] for note in notes)
    everywhere = {note for note, count in alike.items() if count == len(ALL) * len(FORMATS)}
    notes = [note for note in notes if note.partition(": ")[2] not in everywhere]
    notes += [f"- in all of a column: {note}" for note in sorted(everywhere)]
    counts = []
    for engine, title in zip(engines, titles, strict=True):
        mine = [row for row in by_key.values() if row["engine"] == engine]
        right = sum(row["outcome"] == "right" for row in mine)
        counts.append(f"- {title}: {right} of {len(mine)} right")
    counts += [f"- not run: {family} in {engine}, since {why}" for (engine, family), why in NOT_RUN.items()]
    whole = HEAD + "\n".join([*lines, "", *counts, "", "## What is not right", "", *notes, ""])
    return whole + section(conversions)


def _write(file: Path, rows: Iterable[Row]) -> None:
    """One row a line."""
    file.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n", encoding="utf-8")


def _note(row: Row) -> str:
    where = f"- {row['engine']} {row['version']}, {row['family']} {row['format'].upper()}, {row['outcome']}: "
    if "why" in row:
        return where + f"`{row['why']}`"
    figure = f"off by {row['figure']:.2%}" if "figure" in row else "never set, or of another shape"
    return where + f"{row['off']} of {row['compared']} parameters; the worst is `{row['first']}`, {figure}"


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--family", nargs="+", choices=list(ALL), default=list(ALL))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    absent = {engine: why for engine in options.engine if (why := missing(engine)) is not None}
    for engine, why in absent.items():
        print(f"{engine} is not run, its rows stay as they are: {why}")
    engines = [engine for engine in options.engine if engine not in absent]
    found: list[Row] = []
    others: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        exports = Path(os.environ.get("MOPT_TEST_EXPORTS", name)) / "families"
        if not exports.exists():
            export = [sys.executable, ROOT / "scripts" / "make" / "make_export.py", exports, "--family", "all"]
            subprocess.run([*export, *BUILDS], check=True, stdout=subprocess.DEVNULL)
        pairs = [(family, algorithm) for family in options.family for algorithm in BUILDS]
        built = {one: build(exports, *one, Path(name)) for one in pairs}
        for engine in engines:
            python = set_up(engine, ROOT / ".venv" / "engines" / engine)
            found += load(engine, python, [built[one] for one in pairs if (engine, one[0]) not in NOT_RUN])
            if engine in LOADERS:
                families = [family for family in options.family if family in CONVERTED_FAMILIES]
                others += load_converted(engine, python, exports, families, Path(name))
    before, before_of = recorded(), converted()
    other = [row for row in found if before.get(key(row)) != row]
    other += [row for row in others if before_of.get(key_of(row)) != row]
    for row in other:
        print(f"{' '.join(map(str, row.values()))}"[:2000])
    if options.write:
        merged = before | {key(row): row for row in found}
        order = [(engine, family, form) for engine in ENGINES for family in ALL for form in BUILDS]
        merged_of = before_of | {key_of(row): row for row in others}
        kept = [merged[one] for one in order if one in merged]
        kept_of = [merged_of[one] for one in rows() if one in merged_of]
        _write(RECORD, kept)
        _write(CONVERTED, kept_of)
        PAGE.write_text(page(kept, kept_of), encoding="utf-8")
        return 0
    print(f"{len(found) + len(others)} rows, {len(other)} other than in docs")
    return 1 if other else 0


if __name__ == "__main__":
    sys.exit(main())
