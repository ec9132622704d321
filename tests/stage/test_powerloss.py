"""Cut the power after every step: whatever then is on disk, the next run finds OUT old or new; and no fsync is spare.

The steps are recorded from real runs, the disks come from powerloss_model.py, and what is made of each is judged by
mopt's own recovery. No torch.
"""

import ast
import copy
import dataclasses
import errno
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from crash_driver import FOLDERS, lay, refuse_with
from figures import note
from fs_trace import PACKAGE, Event, Trace
from powerloss_model import Disk, Entry, PowerLoss, found_in, lay_out, listing, read_disk, visible
from root import LONG
from stage_support import forbid_renameat2, publish

from modelopt_convert.run.errors import OutputRefusedError, StorageError
from modelopt_convert.stage import fsops, leftovers, ownership
from modelopt_convert.stage.directory import StagingDir
from modelopt_convert.stage.written_file import write_report

METHODS = ("absent", "exchange", "two renames")
# The functions that sync, by the test that shows why.
AT_EVERY_RUN = {
    "shard_writer.__exit__",
    "directory.write_file",
    "directory.publish",
    "directory._sync_after_swap",
    "directory._mark",
}
AFTER_A_REMOVAL, IN_A_DISCARD, OF_A_REPORT = "directory._remove_old", "directory._discard", "written_file.write_report"
IN_A_SWEEP, IN_A_REFUSAL = "sweep._sweep", "directory._set_aside"
OF_A_COPY = "file_copy.copy_file"  # of a whole pipeline
OF_MARKERS = "sweep.sweep_markers"  # and of what was rolled back
WITH_WHAT_WAS_LEFT = {IN_A_SWEEP, OF_MARKERS}
KINDS = {"plain": (), "components": FOLDERS}


@dataclass
class Story:
    """One or more runs to one OUT, recorded, and what recovery makes of a disk.

    Attributes:
        outcomes: What it made of those that it has seen.
        versions: What OUT may be, by name.
        disk: What was on disk before the first run.
    """

    top: Path
    method: str
    folders: Sequence[str] = ()
    outcomes: dict[tuple[object, ...], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.versions: dict[str, list[Entry]] = {}
        self.place = self.top / "place"
        self.place.mkdir()
        if self.method != "absent":
            lay(self.out, "old", self.folders)
            self.versions["old"] = whole(self.out)
        self.disk = read_disk(self.place)
        self.trace = Trace(self.place)
        self.versions["new"] = whole(lay(self.top / "new", "new", self.folders))

    @property
    def out(self) -> Path:
        return self.place / "out"

    @property
    def events(self) -> list[Event]:
        return self.trace.events

    def publish(self, *, limit: int | None = None, overwrite: bool = True) -> None:
        """Run mopt, and let it be killed after the event of this number."""
        self.trace.limit = limit
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda _fd: None)  # recorded all the same
            self.trace.install(patch)
            without_times(patch)
            if self.method == "two renames":
                forbid_renameat2(patch)
            publish(self.out, overwrite=overwrite, folders=self.folders)

    def killed(self, limit: int) -> bool:
        """Whether a run could be killed after so many events; if not, it has ended."""
        try:
            self.publish(limit=limit)
        except StorageError:
            return True
        return len(self.events) == limit

    def models(self, without: int | None = None) -> list[PowerLoss]:
        """The disk after each event; ``without`` is a sync that was never asked for."""
        model = PowerLoss(self.disk)
        models = [model]
        for number, event in enumerate(self.events):
            model = copy.copy(model)
            if number != without:
                model.apply(event)
            models.append(model)
        assert sorted(listing(model.now)) == found_in(self.place), "the trace is not what happened"
        return models

    def outcome(self, disk: Disk) -> str:
        """What the next run makes of this disk."""
        key = visible(disk)
        if key not in self.outcomes:
            room = self.top / "room"
            lay_out(disk, room)
            self.outcomes[key] = self._recovered(room)
        return self.outcomes[key]

    def _recovered(self, room: Path) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda _fd: None)  # of the disk that is only a thought
            without_times(patch)
            # What is laid out is no folder that a marker names, though it may get the number of one that is gone. Nor
            # does a power cut put another folder in the place of one.
            patch.setattr(leftovers, "identity_of", lambda _path: (0, 0))
            patch.setattr(leftovers.Marker, "is_of", lambda _marker, _folder: True)
            try:
                with StagingDir(room / "out", (), overwrite=True, need_bytes=1):
                    pass
            except OutputRefusedError:  # not a checkpoint, so it is torn
                pass
        state = self.named(room / "out")
        beside = set(os.listdir(room)) - {"out"}
        if beside and all(".mopt-kept-" in name and self.named(room / name) == "new" for name in beside):
            return f"{state} and kept"
        return "litter" if beside else state

    def named(self, out: Path) -> str:
        """Which version a folder holds."""
        if not out.exists():
            return "absent"
        return next((name for name, entries in self.versions.items() if entries == whole(out)), "torn")

    def good(self, outcome: str) -> bool:
        """Whether the promise lets OUT be this before the run has ended."""
        name = outcome.removesuffix(" and kept")
        return name in self.versions or (name == "absent" and "old" not in self.versions)


def without_times(patch: pytest.MonkeyPatch) -> None:
    """The disks of the model have none: what is laid out of them is newer than any marker says."""

    def look(folder: Path) -> dict[str, ownership.Entry]:
        return {name: dataclasses.replace(one, changed_ns=0) for name, one in found(folder).items()}

    found = ownership.look
    for module in (leftovers, ownership):
        patch.setattr(module, "look", look)


def whole(folder: Path) -> list[Entry]:
    """What a folder holds, and its own mode."""
    return [(".", None, stat.S_IMODE(folder.stat().st_mode)), *found_in(folder)]


def survey(story: Story, end: str, *, begin: int = 0, without: int | None = None, enough: int = 10**9) -> Counter[str]:
    """How many different disks there can be from this event on, by what recovery makes of them.

    ``torn`` are those whose OUT is none of the versions, ``lost`` those on which it is, after the run has ended, not
    what the run said. The last steps come first, since most is pending then; ends when ``enough`` are torn or lost.
    """
    seen: set[tuple[object, ...]] = set()
    counts: Counter[str] = Counter()
    models = story.models(without)
    for number in range(len(models) - 1, begin - 1, -1):
        for disk in models[number].disks(number):
            key = visible(disk)
            if key in seen:
                continue
            outcome = story.outcome(disk)
            if number == len(models) - 1 and outcome != end:
                outcome = "lost"
            elif not story.good(outcome):
                outcome = "torn"
            seen.add(key)
            counts[outcome] += 1
            if counts["torn"] + counts["lost"] >= enough:
                return counts
    return counts


def check_whole(story: Story, end: str, what: str, begin: int = 0) -> int:
    """No disk is torn, none lost; returns how many there are."""
    counts = survey(story, end, begin=begin)
    print(f"\n{what}: {len(story.events) - begin} steps, {dict(counts)}")
    assert not counts["torn"] and not counts["lost"], counts
    return counts.total()


def without(story: Story, end: str, sync: int, begin: int = 0) -> int:
    """How many disks are torn or lost without one sync; in every run and of a checkpoint in folders one is enough."""
    enough = 1 if story.folders or not LONG else 10**9
    counts = survey(story, end, begin=begin, without=sync, enough=enough)
    print(f"without {story.events[sync].label}: {dict(counts)}")
    return counts["torn"] + counts["lost"]


def syncs(story: Story) -> list[int]:
    return [number for number, event in enumerate(story.events) if event.op == "fsync"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_power_cut_at_any_step(method: str, kind: str, tmp_path: Path) -> None:
    story = Story(tmp_path, method, KINDS[kind])
    story.publish()
    states = check_whole(story, "new", f"{method}, {kind}")
    assert states > 15
    # The others are for what earlier runs left; here are none.
    asked = [sync for sync in syncs(story) if story.events[sync].site not in WITH_WHAT_WAS_LEFT]
    needed = {story.events[sync].label: without(story, "new", sync) for sync in asked}
    torn = {f"without {label}": number for label, number in needed.items()}
    note(11, what=f"{method}, {kind}", cases=states, torn=0, lost=0, **torn)
    assert all(needed.values()), needed
    removal = set() if method == "absent" else {AFTER_A_REMOVAL}
    copying = {OF_A_COPY} if story.folders else set()
    assert {label.split()[0] for label in needed} == AT_EVERY_RUN | removal | copying
    # With folders: two shards, their config and record, the folders; and a copy, its folder, and the marker's data.
    assert len(needed) == (12 + 3 if story.folders else 6) + len(removal)


@pytest.mark.parametrize("method", METHODS)
def test_a_power_cut_in_the_next_run(method: str, tmp_path: Path) -> None:
    """The first was killed, or ended; what it did last was never synced, and the next run must not build on it."""
    missed: Counter[str] = Counter()
    outcomes: dict[tuple[object, ...], str] = {}
    states, kills, killed = 0, 0, True
    while killed:
        (tmp_path / str(kills)).mkdir()
        story = Story(tmp_path / str(kills), method, outcomes=outcomes)
        killed = story.killed(kills)
        begin = len(story.events)
        story.publish()
        what = f"killed after {kills} steps" if killed else "had ended"
        states += check_whole(story, "new", f"{method}, the first {what}", begin)
        for sync in syncs(story):
            if sync >= begin and (site := story.events[sync].site) in WITH_WHAT_WAS_LEFT:
                missed[site] += without(story, "new", sync, begin)
        kills += killed
    figures = {f"without {site}": number for site, number in missed.items()}
    print(f"{method}: {kills} kills, {states} states; {figures}")
    note(11, what=f"{method}, after a kill", cases=states, kills=kills, torn=0, lost=0, **figures)
    assert kills > 18
    # Where OUT was absent there is no old tree, and nobody would miss what is swept; but it must not come back.
    assert {site for site, number in missed.items() if number} == WITH_WHAT_WAS_LEFT


def test_a_rollback_lasts(tmp_path: Path) -> None:
    """A run that puts OUT back and then ends has put it back for good: no other run is needed after a power cut."""
    whole_run = Story(tmp_path, "two renames")
    whole_run.publish()
    aside = next(number for number, event in enumerate(whole_run.events) if event.op == "rename")
    (tmp_path / "cut").mkdir()
    story = Story(tmp_path / "cut", "two renames")
    assert story.killed(aside + 1) and story.named(story.out) == "absent"
    with pytest.raises(OutputRefusedError):
        story.publish(overwrite=False)

    def outs(without: int | None) -> set[bool]:
        entries = [listing(disk) for disk in story.models(without)[-1].disks(0)]
        old = [(f"out/{path}", data, mode) for path, data, mode in story.versions["old"][1:]]
        return {[entry for entry in found if entry[0].startswith("out/")] == old for found in entries}

    assert outs(None) == {True}
    [sync] = [sync for sync in syncs(story) if story.events[sync].site == OF_MARKERS]
    assert outs(sync) == {True, False}


def test_what_was_kept_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the swap is refused the message names the finished checkpoint: it is there after a power cut too."""
    story = Story(tmp_path, "exchange")
    monkeypatch.setattr(fsops, "exchange", refuse_with(errno.EBUSY))
    with pytest.raises(StorageError) as failed:
        story.publish()
    assert failed.value.kept_at is not None
    states = check_whole(story, "old and kept", "kept")
    [sync] = [sync for sync in syncs(story) if story.events[sync].site == IN_A_REFUSAL]
    missed = without(story, "old and kept", sync)
    note(11, what="exchange refused", cases=states, torn=0, lost=0, **{f"without {IN_A_REFUSAL}": missed})
    assert missed


def test_a_removed_stage_stays_removed(tmp_path: Path) -> None:
    """Without its marker, which goes after it, it would be nobody's, and beside OUT for ever."""
    story = Story(tmp_path, "exchange")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _fd: None)
        story.trace.install(patch)
        with StagingDir(story.out, (), overwrite=True, need_bytes=1) as stage:
            stage.write_file("config.json", b"{}")
    states = check_whole(story, "old", "discarded")
    [sync] = [sync for sync in syncs(story) if story.events[sync].site == IN_A_DISCARD]
    missed = without(story, "old", sync)
    note(11, what="a run that failed", cases=states, torn=0, lost=0, **{f"without {IN_A_DISCARD}": missed})
    assert missed


@pytest.mark.parametrize("present", [True, False])
def test_a_report_is_the_old_one_or_the_new_one(tmp_path: Path, present: bool) -> None:
    place = tmp_path / "place"
    place.mkdir()
    old, new = '{"schema":"mopt.report/1", "is": "old"}', '{"schema":"mopt.report/1", "is": "new"}'
    if present:
        (place / "report.json").write_text(old)
    disk, trace = read_disk(place), Trace(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _fd: None)
        trace.install(patch)
        write_report(place / "report.json", new)
    whole = {old.encode() if present else None, new.encode()}

    def wrong(without: int | None = None) -> int:
        """How many disks hold something else, or after the end the old one."""
        model, count = PowerLoss(disk), 0
        for number, event in enumerate(trace.events):
            if number != without:
                model.apply(event)
            for one in model.disks(number):
                found = {path: data for path, data, _ in listing(one)}.get("report.json")
                count += found not in whole or (number == len(trace.events) - 1 and found != new.encode())
        return count

    asked = [number for number, event in enumerate(trace.events) if event.op == "fsync"]
    assert {trace.events[number].site for number in asked} == {OF_A_REPORT}
    assert wrong() == 0
    assert len(asked) == 2 and all(wrong(number) for number in asked)


def test_every_sync_of_mopt_is_shown_to_be_needed() -> None:
    found = set()
    for file in Path(PACKAGE).rglob("*.py"):
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef) and file.name != "fsops.py":
                names = [node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)]
                if {"sync", "sync_dir", "fsync", "fdatasync"} & set(names):
                    found.add(f"{file.stem}.{function.name}")
    rest = {IN_A_REFUSAL, AFTER_A_REMOVAL, IN_A_DISCARD, OF_A_REPORT, OF_A_COPY}
    assert found == AT_EVERY_RUN | WITH_WHAT_WAS_LEFT | rest
