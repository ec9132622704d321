"""Random histories of one OUT: runs, killed runs, and users who delete, change modes, and put files of their own there.

At every moment OUT is, whole, a version that some run published; or absent, where it never was, was deleted, or a run
was killed between two renames. No file of the user's is ever lost. No torch.
"""

import shutil
import stat
import tempfile
from collections import Counter
from pathlib import Path

from crash_driver import FOLDERS, files_of, held_by
from figures import note
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tracing import Ended, driver, run

EXAMPLES, STEPS = 30, 25
LAST_CALL = 60  # of a run that replaces a checkpoint in folders and sweeps; later ones kill nothing
# Around the swap, where any number would seldom hit.
AT_THE_SWAP = ("rename:1", "rename:2", "exchange:1", "sync:9", "unlink:1", "unlink:2", "rmdir:1")
KILLED_AT = st.one_of(st.integers(1, LAST_CALL).map("any:{}".format), st.sampled_from(AT_THE_SWAP))
IN_OUT, BESIDE = ("thesis.docx", ".git"), ("out.txt", ".out.mopt", ".out.mopt-stage-mine")
OWN = b"written by the user"
counts: Counter[str] = Counter()


class Histories(RuleBasedStateMachine):
    """One OUT, whatever happens to it.

    Attributes:
        known: The version that OUT was last seen to be; None is absent.
        missing: Whether it is absent by a killed run, and not by the user.
        may_be_set_aside: Whether a killed run may have left a version beside OUT.
        foreign: Files of the user's, in OUT and beside it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.top = Path(tempfile.mkdtemp(prefix="mopt-histories-"))
        self.out = self.top / "out"
        self.versions: dict[str, dict[str, bytes]] = {}
        self.known: str | None = None
        self.missing = self.may_be_set_aside = False
        self.foreign: set[Path] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.top)

    @initialize(two_renames=st.booleans(), folders=st.booleans())
    def choose(self, two_renames: bool, folders: bool) -> None:
        self.switches = ["--two-renames"] * two_renames + ["--components"] * folders
        self.folders = FOLDERS if folders else ()

    def start(self, *more: str) -> Ended:
        """Publish the next version."""
        self.next = f"version {len(self.versions)}"
        self.versions[self.next] = files_of(self.next, self.folders)
        return run(driver(self.out, self.next, *self.switches, *more))

    def now(self) -> str | None:
        """Which version OUT is."""
        if not self.out.exists():
            return None
        own = {path.name for path in self.foreign if path.parent == self.out}
        held = {name: data for name, data in held_by(self.out).items() if name not in own}
        found = [name for name, files in self.versions.items() if files == held]
        counts["torn"] += not found
        assert found, f"OUT is torn: {sorted(held)}"
        return found[0]

    @rule(overwrite=st.booleans())
    def run(self, overwrite: bool) -> None:
        """To its end: it publishes, or is refused for a reason that the user made."""
        mode = stat.S_IMODE(self.out.stat().st_mode) if self.known else None
        ended = self.start(*["--no-overwrite"] * (not overwrite))
        counts["runs"] += 1
        in_out = any(path.parent == self.out for path in self.foreign)
        if ended.code == 0:
            assert not in_out and (overwrite or self.known is None), "a refusal is missing"
            assert self.now() == self.next
            assert mode is None or stat.S_IMODE(self.out.stat().st_mode) == mode
            litter = {path for path in self.top.iterdir() if path != self.out} - self.foreign
            counts["litter"] += len(litter)
            assert not litter
            counts["recovered"] += self.missing
            self.missing = False
            self.known, self.may_be_set_aside = self.next, False
            return
        counts["refused"] += 1
        assert ended.code == 4, ended
        found = self.now()
        # An OUT that was set aside is put back first, and then counts as one that exists.
        back = self.known is None and self.may_be_set_aside and found is not None
        assert found == self.known or back
        counts["recovered"] += self.missing
        self.missing = False
        assert found is not None and (in_out or not overwrite), ended
        self.known = found
        self.may_be_set_aside &= not back

    @rule(call=KILLED_AT)
    def run_killed(self, call: str) -> None:
        """Somewhere on its way: what it was to replace stands, or is set aside, or is replaced."""
        ended = self.start(f"--kill={call}")
        assert ended.code in {-9, 0, 4}, ended
        counts["kills"] += ended.code == -9
        found = self.now()
        if found is None and self.known is not None:
            assert ended.code == -9 and "--two-renames" in self.switches, "OUT is missing"
            assert not any(path.parent == self.out for path in self.foreign)
            counts["missing"] += 1
            self.missing = True
        elif found not in {self.known, self.next}:
            assert self.known is None and self.may_be_set_aside, "a version came back that nobody set aside"
        if found is not None:
            counts["recovered"] += self.missing
            self.missing = False
        # What a killed run replaced lies beside OUT until the next run ends.
        self.may_be_set_aside = ended.code == -9 or (self.may_be_set_aside and ended.code != 0)
        self.known = found

    @rule(name=st.sampled_from(IN_OUT + BESIDE))
    def put_a_file(self, name: str) -> None:
        if name in BESIDE or self.known is not None:
            path = (self.out if name in IN_OUT else self.top) / name
            path.write_bytes(OWN)
            self.foreign.add(path)
            counts["foreign files"] += 1

    @precondition(lambda self: any(path.parent == self.out for path in self.foreign))
    @rule()
    def take_them_out_again(self) -> None:
        for path in {path for path in self.foreign if path.parent == self.out}:
            path.unlink()
            self.foreign.remove(path)

    @precondition(lambda self: self.known is not None)
    @rule()
    def delete_out(self) -> None:
        shutil.rmtree(self.out)
        self.foreign = {path for path in self.foreign if path.parent != self.out}
        self.known = None
        counts["deletions"] += 1

    @precondition(lambda self: self.known is not None)
    @rule(mode=st.sampled_from([0o700, 0o750, 0o755, 0o777]))
    def change_its_mode(self, mode: int) -> None:
        self.out.chmod(mode)

    @invariant()
    def it_is_what_it_should_be(self) -> None:
        counts["steps"] += 1
        assert self.now() == self.known

    @invariant()
    def the_users_files_stand(self) -> None:
        assert all(path.read_bytes() == OWN for path in self.foreign)


def test_random_histories() -> None:
    counts.clear()
    slow = settings(
        max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, suppress_health_check=list(HealthCheck)
    )
    try:
        known_history()
        run_state_machine_as_test(Histories, settings=slow)
    finally:
        note(16, cases=counts.pop("steps"), **{name.replace(" ", "_"): number for name, number in counts.items()})


def known_history() -> None:
    """What chance may not find in so few histories: a kill between two renames, and what follows from it."""
    history = Histories()
    history.choose(two_renames=True, folders=True)
    history.run(overwrite=False)
    for overwrite in (True, False):
        history.run_killed("rename:2")
        history.it_is_what_it_should_be()
        assert history.known is None and counts["missing"]
        history.run(overwrite)
        history.it_is_what_it_should_be()
    assert (history.known, counts["recovered"], counts["refused"]) == ("version 2", 2, 1)
    for call in AT_THE_SWAP[4:]:  # what is replaced is being removed; then the user deletes OUT
        history.run_killed(call)
        history.delete_out()
        history.run(overwrite=False)
        history.it_is_what_it_should_be()
    refused = counts["refused"]
    history.put_a_file("thesis.docx")
    history.run(overwrite=True)
    history.the_users_files_stand()
    assert counts["refused"] == refused + 1
    history.teardown()
