"""Several runs want one OUT at the same time: one wins or all are refused, and OUT is whole throughout. No torch."""

import os
import random
import subprocess
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from crash_driver import SHARD, files_of, held_by, lay
from figures import note
from root import LONG
from stage_support import litter, publish
from tracing import ENVIRONMENT, Ended, driver, run, told_in

from modelopt_convert.run.errors import OutputRefusedError

RACERS = 4
ROUNDS = 10 if LONG else RACERS + 1  # each of them is killed in one
NAMES = [f"round {round_} run {racer}" for round_ in range(ROUNDS) for racer in range(RACERS)]
VERSIONS = {name: files_of(name) for name in ["first", *NAMES, "last"]}


class Reader(threading.Thread):
    """Reads the files of OUT again and again: each must be that of some version, whole."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.out = out
        self.done = threading.Event()
        self.torn: list[str] = []
        self.counts: Counter[str] = Counter()
        self.owner = {data: name for name, files in VERSIONS.items() for data in files.values()}

    def run(self) -> None:
        while not self.done.is_set():
            owners = set()
            for file in ("config.json", SHARD, "mopt.json"):
                try:
                    data = (self.out / file).read_bytes()
                except FileNotFoundError:
                    # Opened by way of the old tree while that was being removed; or in the instant between two renames.
                    self.counts["missed"] += 1
                    continue
                if data not in self.owner:
                    self.torn.append(f"{file}: {len(data)} bytes")
                owners.add(self.owner.get(data))
            self.counts["mixed" if len(owners) > 1 else "of one version"] += 1


def race(out: Path, names: list[str], killed: str | None, switches: list[str]) -> list[Ended]:
    """Start all at once; kill one of them, if so asked, somewhere on its way."""
    racers = {
        name: subprocess.Popen(
            driver(out, name, "--wait", *switches),
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    }
    for racer in racers.values():
        assert racer.stdin is not None
        racer.stdin.close()
        racer.stdin = None
    if killed is not None:
        threading.Event().wait(random.Random(killed).uniform(0.03, 0.06))
        racers[killed].kill()
    ended = []
    for racer in racers.values():
        stdout, stderr = racer.communicate()
        ended.append(Ended(racer.returncode, stdout, stderr, told_in(stdout)))
    return ended


def version_in(out: Path) -> str:
    held = held_by(out)
    found = [name for name, files in VERSIONS.items() if files == held]
    assert found, f"OUT is torn: {sorted(held)}"
    return found[0]


def set_aside(out: Path) -> Path:
    """Where a run that was killed between its two renames left the old tree; the next run puts it back."""
    [old] = out.parent.glob(".out.mopt-old-*")
    return old


@pytest.mark.parametrize("method", ["exchange", "two renames"])
@pytest.mark.parametrize("kill", [False, True], ids=["all live", "one in each round is killed"])
def test_race(tmp_path: Path, kill: bool, method: str) -> None:
    (tmp_path / "place").mkdir()
    out = lay(tmp_path / "place" / "out", "first")
    reader = Reader(out)
    switches = ["--two-renames"] * (method == "two renames")
    reader.start()
    counts: Counter[str] = Counter()
    before, gone = "first", False
    try:
        for round_ in range(ROUNDS):
            names = [name for name in NAMES if name.startswith(f"round {round_} ")]
            killed = names[round_ % RACERS] if kill else None
            ended = dict(zip(names, race(out, names, killed, switches), strict=True))
            after = version_in(out if out.exists() else set_aside(out))
            absent = not out.exists()
            assert not absent or (killed and method == "two renames"), "OUT is missing"
            for name, end in ended.items():
                counts[f"exit {end.code}"] += 1
                assert end.code in {0, 4} or (end.code == -9 and name == killed), end
                assert end.code != 4 or end.told["code"] == "output.busy", end
            winners = {name for name, end in ended.items() if end.code == 0}
            counts["all refused"] += not winners
            restored = gone and bool(winners or not absent)
            counts["recovered"] += restored
            counts["missing"] += absent and (restored or not gone)
            gone = absent
            # Whoever says that it published did, and nobody else; the killed one may or may not have.
            assert after in winners | ({before, killed} if not winners or killed else set())
            before = after
    finally:
        reader.done.set()
        reader.join()
    last = run(driver(out, "last"))
    counts["recovered"] += gone and version_in(out) == "last"
    litter = sum(path.name != "out" for path in out.parent.iterdir())
    figures = {kind: reader.counts[kind] for kind in ("of one version", "mixed", "missed")} | dict(counts)
    what = f"{method}, {'one killed' if kill else 'all live'}"
    note(15, what=what, cases=ROUNDS, torn=len(reader.torn), litter=litter, **figures)
    print(f"\n{ROUNDS} rounds: {dict(sorted(counts.items()))}; reads: {dict(sorted(reader.counts.items()))}")
    assert not reader.torn
    assert (last.code, version_in(out)) == (0, "last")
    assert not litter


@pytest.mark.parametrize("switches", [[], ["--two-renames"]], ids=["exchange", "two renames"])
def test_two_runs_remove_the_same_old_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switches: list[str]
) -> None:
    """One has swapped and removes what it replaced; to the other, which starts then, that is litter to be swept."""
    (tmp_path / "place").mkdir()
    out = lay(tmp_path / "place" / "out", "first")
    one = subprocess.Popen(
        driver(out, "last", "--pause", *switches),
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert one.stdout is not None and one.stdout.readline() == "paused\n"
    told: list[str] = []
    unlink = os.unlink

    def unlink_late(*where: Any, **how: Any) -> None:
        """The first file is gone by the time its turn comes, and so is the rest."""
        if not told:
            told.append(one.communicate()[0])
        unlink(*where, **how)

    monkeypatch.setattr(os, "unlink", unlink_late)
    expected = "new"
    try:
        assert publish(out).warnings == ()
    except OutputRefusedError as error:
        assert error.code == "output.busy"
        expected = "last"
    finally:
        monkeypatch.undo()
        told.append(one.communicate()[0] if not told else "")
    assert one.returncode == 0
    assert told_in(told[0])["warnings"] == []
    assert held_by(out) == files_of(expected)
    assert litter(out) == []
