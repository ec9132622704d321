"""What runs that ended early left beside OUT: put back, removed, or kept and named. No torch."""

import contextlib
import os
import secrets
import shlex
from pathlib import Path

from modelopt_convert.run.errors import OutputRefusedError
from modelopt_convert.stage import fsops
from modelopt_convert.stage.leftovers import Marker, beside, left_beside, read_marker
from modelopt_convert.stage.locks import LOCKING_FILE_SYSTEMS, file_system_of, try_lock
from modelopt_convert.stage.ownership import in_words

_REMOVALS = 100  # tries at a tree that another run is removing too


class Sweep:
    """Looks after what lies beside one OUT.

    Attributes:
        output: OUT.
        warnings: What could not be removed, or is not mopt's to remove.
    """

    def __init__(self, output: Path) -> None:
        """Nothing is touched yet."""
        self.output = output
        self.warnings: list[str] = []

    def sweep_stages(self, mine: Path) -> None:
        """Remove the stages of runs that ended without doing so.

        Args:
            mine: The stage of this run.

        Raises:
            OutputRefusedError: ``output.busy``: another run holds OUT, or may.
        """
        for number, other in left_beside(self.output, "stage").items():
            if other == mine:
                continue
            if file_system_of(self.output.parent) not in LOCKING_FILE_SYSTEMS:
                raise OutputRefusedError(
                    f"{other}: left by another run, and file locks prove nothing on this file system",
                    code="output.busy",
                    path=str(other),
                    hint=f"if no mopt is running on any host: rm -r {shlex.quote(str(other))}",
                )
            lock = try_lock(other)
            if lock is None:
                if not other.exists():  # its owner finished between the listing and the lock
                    continue
                raise OutputRefusedError(
                    f"{self.output}: another mopt is writing it (its stage is {other.name})",
                    code="output.busy",
                    path=str(self.output),
                    hint="wait for it to finish, or give another OUT",
                )
            try:
                self._sweep(other, number)
            finally:
                os.close(lock)

    def recover(self) -> None:
        """Roll back a two-rename swap that was cut between its renames; remove what a finished one left.

        A tree of which something is gone was being removed, so its swap was finished, and OUT was deleted since.
        """
        for number, old in left_beside(self.output, "old").items():
            with contextlib.suppress(FileNotFoundError):  # another run has just done it
                if os.path.lexists(self.output):
                    self._sweep(old, number)
                elif (marker := self._marker_beside(old, number)) is not None and marker.is_whole(old):
                    fsops.rename(old, self.output)
                elif marker is not None:
                    self._sweep(old, number)

    def sweep_markers(self) -> None:
        """Remove the markers of runs that were killed when nothing else of theirs was left."""
        found = [number for number, path in left_beside(self.output, "mark").items() if read_marker(path) is not None]
        if found:
            # Such a run ended with a swap or a removal that may not be on disk; nor is what has just been rolled back.
            fsops.sync_dir(self.output.parent)
        for number in found:
            self.unmark(number)

    def remove(self, tree: Path, marker: Marker, *, replaced: bool) -> str | None:
        """Remove a tree that mopt made or replaced; keep and name another, and one into which somebody put a file.

        Another run may be removing the same tree: what vanishes meanwhile is no failure.
        """
        for attempt in range(_REMOVALS):
            if not os.path.lexists(tree):
                break
            try:
                what = "the old checkpoint" if replaced else "what a run left"
                if not marker.is_of(tree):
                    return f"{tree} is left alone: it has the name of {what}, and is another folder"
                if strangers := marker.strangers(tree, replaced=replaced):
                    kept = self.kept_name()
                    fsops.rename(tree, kept)
                    return f"{what} was kept in {kept}: it holds what came after it: {in_words(strangers)}"
                fsops.remove_tree(tree)
            except FileNotFoundError:
                if attempt == _REMOVALS - 1:
                    raise
        return None

    def unmark(self, number: str) -> None:
        """Remove the marker of a run of which nothing is left; the removals of that are on disk already."""
        left = (beside(self.output, "stage", number), beside(self.output, "old", number))
        if any(map(os.path.lexists, left)):  # as after a swap that was cut in two
            return
        with contextlib.suppress(FileNotFoundError):  # another run sweeps it too
            fsops.remove_file(beside(self.output, "mark", number))

    def disown(self, number: str) -> None:
        """Remove the marker of a run whose names somebody else took: the next run shall not sweep what bears them."""
        with contextlib.suppress(OSError):
            fsops.remove_file(beside(self.output, "mark", number))

    def kept_name(self) -> Path:
        """A name beside OUT that the user can see."""
        return self.output.parent / f"{self.output.name}.mopt-kept-{secrets.token_hex(4)}"

    def _marker_beside(self, tree: Path, number: str) -> Marker | None:
        """The marker of what was found; without one it is nobody knows whose, and stays, but for an empty folder."""
        marker = read_marker(beside(self.output, "mark", number))
        if marker is None and os.path.lexists(tree):
            try:
                fsops.remove_dir(tree)  # of a run that was killed before it wrote its marker
            except OSError:
                self.warnings.append(f"{tree} is left alone: it has the name of a stage, and no marker of mopt's")
        return marker

    def _sweep(self, tree: Path, number: str) -> None:
        marker = self._marker_beside(tree, number)
        if marker is None:
            return
        # The tree may be the old checkpoint of a swap that was never synced: removing it before the swap is on disk
        # could lose both in a power cut.
        fsops.sync_dir(self.output.parent)
        try:
            kept = self.remove(tree, marker, replaced=tree == beside(self.output, "old", number))
        except OSError as error:
            self.warnings.append(f"{tree} could not be removed: {said(error)}")
            return
        if kept:
            self.warnings.append(kept)
        # The same for the marker, without which what a power cut brings back would be left for ever.
        fsops.sync_dir(self.output.parent)
        self.unmark(number)


def said(error: OSError) -> str:
    """What the system says, and of what."""
    return f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
