"""Kill a run, or fail one of its system calls, at every call that touches the disk: OUT is the old tree or the new."""

import errno
import os
from collections import Counter
from pathlib import Path

import pytest
from crash_cases import SCENARIOS, Case, check_missing, collected
from crash_driver import held_by
from figures import note
from forks import Forks
from root import LONG
from tracing import Call, Ended, need_strace

ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EROFS")
FAULTS = [f"{error}{persistent}" for error in ERRORS for persistent in ("", "+")]
REPEATED = {"pwrite64", "fallocate", "fsync", "openat", "flock"}


@pytest.fixture
def case(scenario: str, tmp_path: Path, driver_server: Forks) -> Case:
    need_strace()
    return Case(scenario, tmp_path / "place", driver_server)


@pytest.fixture
def calls(case: Case, tmp_path: Path) -> list[Call]:
    case.reset()
    return case.undisturbed(tmp_path / "log")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_at_every_changing_call(case: Case, calls: list[Call], tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    recovered = litter = 0
    faults: list[str] = []
    for call in calls:
        if call.changes:
            with collected(faults, call):
                case.reset()
                ended = case.strike(call, "signal=KILL", tmp_path / "log")
                assert ended.code == -9
                state = case.state()
                counts[state] += 1
                assert state != "torn", sorted(held_by(case.out))
                if state == "absent" and case.before == "old":
                    check_missing(case)
                    recovered += 1
                case.check_next_run()
            litter += len(case.litter())
    print(f"\nSIGKILL, {case.scenario}: {counts.total()} points, OUT afterwards {dict(counts)}")
    missing = counts["absent"] if case.before == "old" else 0
    figures = {"torn": counts["torn"], "missing": missing, "recovered": recovered, "litter": litter}
    note(8, what=f"SIGKILL, {case.scenario}", cases=counts.total(), old=counts["old"], new=counts["new"], **figures)
    assert not faults, "\n\n".join(faults)
    assert counts[case.before] and counts["new"]
    assert case.scenario != "two renames" or counts["absent"] == 1


def is_repeated(call: Call) -> bool:
    """Whether Python repeats it after EINTR (PEP 475), for ever if that persists; not where it lists folders."""
    return call.name in REPEATED and "O_NONBLOCK" not in call.line


def check_told(case: Case, ended: Ended, state: str, error: str) -> None:
    """Exit 0 only with the new tree in place; else exit 5 and a message with the path and the errno."""
    told = ended.told
    assert told["in_place"] == (ended.code == 0)
    if ended.code == 0:
        assert state == "new"
        return
    assert ended.code == 5, told["message"]
    assert str(case.place) in told["message"]
    assert error in told["message"] or os.strerror(getattr(errno, error)) in told["message"]
    assert told["published"] == (state == "new")


# A checkpoint in folders goes through the same code as one without.
@pytest.mark.parametrize("scenario", SCENARIOS[:3])
@pytest.mark.parametrize("fault", [*FAULTS, "EINTR"])  # + means from then on
def test_error_at_every_call(case: Case, calls: list[Call], fault: str, tmp_path: Path) -> None:
    error, persistent = fault.rstrip("+"), fault.endswith("+")
    counts: Counter[str] = Counter()
    recovered = litter = 0
    faults: list[str] = []
    step = 1 if LONG else 2  # of the calls; the next fault strikes the others
    for call in calls[(*FAULTS, "EINTR").index(fault) % step :: step]:
        with collected(faults, call):
            case.reset()
            ended = case.strike(call, f"error={fault}", tmp_path / "log")
            state = case.state()
            counts[f"exit {ended.code}, {state}"] += 1
            assert state != "torn", sorted(held_by(case.out))
            kept = case.check_kept(ended)
            if not persistent and ended.code != 0 and state == case.before and not kept:
                assert case.litter() == [], "what failed was not the removal"
            if state == "absent" and case.before == "old":
                assert persistent, "one failure is undone at once"
                assert check_missing(case) in ended.told["message"] + ended.told["hint"]
                recovered += 1
            check_told(case, ended, state, error)
            if error == "EINTR" and is_repeated(call):
                assert (ended.code, ended.told.get("warnings")) == (0, []), ended.told
            case.check_next_run()
        litter += len(case.litter())
    print(f"\n{fault}, {case.scenario}: {counts.total()} points, {dict(sorted(counts.items()))}")
    figures = {
        "torn": sum(number for kind, number in counts.items() if kind.endswith("torn")),
        "missing": sum(number for kind, number in counts.items() if kind.endswith("absent")) * (case.before == "old"),
        "wrong_exit_0": sum(number for kind, number in counts.items() if kind in {"exit 0, old", "exit 0, absent"}),
        "recovered": recovered,
        "litter": litter,
    }
    note(9, what=f"{fault}, {case.scenario}", cases=counts.total(), **figures)
    assert not faults, "\n\n".join(faults)
    assert counts[f"exit 5, {case.before}"]
    assert error == "EINTR" or counts["exit 5, new"]
    assert case.before == "absent" or counts["exit 0, new"]  # the old tree could not be removed: a warning
