"""Kill a run, then strike the next one too, which finds what the first left: a third makes OUT whole all the same."""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash_cases import SCENARIOS, Case, check_missing, collected
from crash_driver import held_by
from figures import note
from forks import Forks
from root import LONG
from stage_support import copy_of_left
from tracing import Call, need_strace

# From the creation of its first file on, a run does the same whatever it found: there each tree takes another of so
# many calls, and all of them are struck between the trees.
SPREAD = 4 if LONG else 7
FAULTS = ("signal=KILL", "error=EIO")


def left_in(place: Path) -> tuple[tuple[str, int], ...]:
    """What recovery can tell apart: names without the run's part, and sizes, except in a stage."""
    found = []
    for path in sorted(place.rglob("*")):
        kind, _, rest = path.relative_to(place).as_posix().partition(".mopt-")
        word, _, below = rest.partition("-")
        size = path.stat().st_size if path.is_file() and word != "stage" else 0
        found.append((f"{kind}{word}{below[8:]}", size))
    return tuple(found)


def trees_after_a_kill(case: Case, top: Path) -> list[Path]:
    """One folder for each different state in which a killed run can leave OUT's parent."""
    case.reset()
    found: dict[tuple[str, tuple[tuple[str, int], ...]], Path] = {}
    for call in case.undisturbed(top / "log"):
        if call.changes:
            case.reset()
            case.strike(call, "signal=KILL", top / "log")
            saved = top / f"tree{len(found)}"
            if found.setdefault((case.state(), left_in(case.place)), saved) == saved:
                case.place.rename(saved)  # no copy: a marker names an inode, which no other folder may get
    return list(found.values())


def spread(calls: list[Call], number: int) -> Iterator[Call]:
    """All changing calls of recovery; of those that every run makes some, for each tree others."""
    first = next(place for place, call in enumerate(calls) if "O_CREAT" in call.line)
    for place, call in enumerate(calls):
        if call.changes and (place < first or (place - first) % SPREAD == number % SPREAD):
            yield call


# Folders in the checkpoint change nothing for recovery.
@pytest.mark.parametrize("scenario", SCENARIOS[:3])
def test_struck_while_it_recovers(scenario: str, tmp_path: Path, driver_server: Forks) -> None:
    need_strace()
    case = Case(scenario, tmp_path / "place", driver_server)
    counts: Counter[str] = Counter()
    recovered = litter = 0
    faults: list[str] = []

    def restore(tree: Path) -> None:
        shutil.rmtree(case.place)
        copy_of_left(tree, case.place)

    trees = trees_after_a_kill(case, tmp_path)
    for number, tree in enumerate(trees):
        restore(tree)
        for call in spread(case.undisturbed(tmp_path / "log"), number):
            number += 1
            for fault in FAULTS if LONG else FAULTS[number % 2 :][:1]:
                with collected(faults, call):
                    restore(tree)
                    ended = case.strike(call, fault, tmp_path / "log")
                    state = case.state()
                    counts[state] += 1
                    assert state != "torn", sorted(held_by(case.out))
                    assert ended.code in ({-9} if "KILL" in fault else {0, 5}), ended
                    case.check_kept(ended)
                    if state == "absent" and case.before == "old":
                        check_missing(case, ("old", "new"))  # the killed run may have published
                        recovered += 1
                    case.check_next_run()
                litter += len(case.litter())
    print(f"\n{scenario}: {len(trees)} trees, {counts.total()} strikes, OUT afterwards {dict(counts)}")
    missing = counts["absent"] if case.before == "old" else 0
    figures = {"torn": counts["torn"], "missing": missing, "recovered": recovered, "litter": litter}
    note(10, what=f"kill, then KILL or EIO, {scenario}", cases=counts.total(), trees=len(trees), **figures)
    assert not faults, "\n\n".join(faults)
    assert len(trees) > SPREAD and counts["new"]
