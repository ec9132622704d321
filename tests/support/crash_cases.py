"""The ways of publishing that the crash tests strike, and what must hold after a strike. No torch."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from crash_driver import FOLDERS, files_of, held_by, lay
from forks import Forks
from stage_support import forbid_renameat2, publish
from tracing import Call, Ended, calls_under, fork, strike

from modelopt_convert.run.errors import MoptError

SCENARIOS = ("absent", "exchange", "two renames", "components")


@dataclass(frozen=True)
class Case:
    """One way of publishing, and the folder in which it happens, made anew for every run."""

    scenario: str
    place: Path
    forks: Forks

    @property
    def out(self) -> Path:
        return self.place / "out"

    @property
    def folders(self) -> Sequence[str]:
        return FOLDERS if self.scenario == "components" else ()

    @property
    def words(self) -> list[str | Path]:
        switches = {"two renames": ["--two-renames"], "components": ["--components"]}
        return [self.out, "new", *switches.get(self.scenario, [])]

    @property
    def before(self) -> str:
        return "absent" if self.scenario == "absent" else "old"

    def files(self, version: str) -> dict[str, bytes]:
        return files_of(version, self.folders)

    def reset(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        if self.before == "old":
            lay(self.out, "old", self.folders)

    def state(self) -> str:
        """What OUT is now."""
        if not self.out.exists():
            return "absent"
        held = held_by(self.out)
        return next((version for version in ("old", "new") if held == self.files(version)), "torn")

    def litter(self) -> list[str]:
        return sorted(path.name for path in self.place.iterdir() if path != self.out)

    def undisturbed(self, log: Path) -> list[Call]:
        """Every call of an undisturbed run, from where things stand, that touches OUT's parent."""
        ended, found = calls_under(self.forks, self.words, self.place, log)
        assert (ended.code, self.state(), self.litter()) == (0, "new", []), ended
        assert sum(call.changes for call in found) > 15
        return found

    def strike(self, call: Call, fault: str, log: Path) -> Ended:
        """Run from where things stand, with ``fault`` at ``call``."""
        return strike(self.forks, self.words, call, fault, self.place, log)

    def run_again(self) -> None:
        """The next run, to which nothing happens: in this process, since that is all the same to the disk."""
        with pytest.MonkeyPatch.context() as patch:
            if self.scenario == "two renames":
                forbid_renameat2(patch)
            publish(self.out, folders=self.folders)

    def check_next_run(self) -> None:
        """It ends with the new checkpoint in place and nothing beside it."""
        try:
            self.run_again()
        except MoptError as error:
            raise AssertionError(f"the next run failed: {error}") from error
        assert (self.state(), self.litter()) == ("new", [])

    def check_kept(self, ended: Ended) -> bool:
        """A checkpoint that could not take its place is whole where the message says; the user moves it away."""
        found = list(self.place.glob("out.mopt-kept-*"))
        for kept in found:
            assert str(kept) == ended.told["kept_at"]
            assert held_by(kept) == self.files("new")
            shutil.rmtree(kept)
        return bool(found)


@contextlib.contextmanager
def collected(faults: list[str], call: Call) -> Iterator[None]:
    """Go on after a failed point, so that one run shows them all."""
    try:
        yield
    except AssertionError as error:
        faults.append(f"{call.name} {call.nth}: {call.line}\n{error}")


def check_missing(case: Case, versions: tuple[str, ...] = ("old",)) -> str:
    """OUT was there and is not: its tree must be whole under one hidden name, and the next run must restore it."""
    assert case.scenario == "two renames", "an exchange never leaves OUT missing"
    olds = list(case.place.glob(".out.mopt-old-*"))
    [held] = [version for version in versions if [held_by(old) for old in olds] == [case.files(version)]]
    refused = fork(case.forks, [case.out, "new", "--no-overwrite"])
    assert (refused.code, refused.told["code"]) == (4, "output.exists")
    assert (case.state(), case.litter()) == (held, [])
    return olds[0].name
