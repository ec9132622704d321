"""The guards of what goes to disk that mutants.py takes away, each with the tests that are to notice."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One guard taken away.

    Attributes:
        file: In the package.
        what: In words.
        old: Its text, which is in the file exactly once.
        new: What stands there instead.
        tests: Below tests/; one of them is to go red.
    """

    file: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...]


_STAGING = "stage/test_directory.py::"
_FAILURES = "stage/test_directory_failures.py::"
_GUARDS = "stage/test_directory_guards.py::"
_PLANTED = "stage/test_directory_planted.py::"
_OTHER = "stage/test_other_stage.py"
_SHARD = "stage/test_shard_writer.py"
_ORDER = f"{_STAGING}test_order_of_what_reaches_the_disk"
_DURABLE = f"{_GUARDS}test_one_thing_that_cannot_be_synced_is_enough"


def _staging(what: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant("stage/directory.py", what, old, new, tests)


def _elsewhere(file: str, what: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(file, what, old, new, tests)


def _fsops(what: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant("stage/fsops.py", what, old, new, tests)


def _shard(what: str, old: str, new: str) -> Mutant:
    return Mutant("stage/shard_writer.py", what, old, new, (_SHARD,))


DISK = (
    _staging("a shard without fsync counts as on disk", "self._durable and durable", "self._durable", _DURABLE),
    _staging(
        "fsync of a small file",
        "self._durable = fsops.sync(fd) and self._durable\n        finally",
        "pass\n        finally",
        _ORDER,
    ),
    _staging(
        "a later small file makes up for one",
        "fsops.sync(fd) and self._durable\n        finally",
        "fsops.sync(fd)\n        finally",
        _DURABLE,
    ),
    _staging("fsync of the stage", "(*self._folders, self.path):", "self._folders:", _ORDER),
    _staging("fsync of folders in the stage", "(*self._folders, self.path):", "(self.path,):", _DURABLE),
    _staging(
        "the stage's fsync makes up for a file",
        "fsops.sync_dir(folder) and self._durable",
        "fsops.sync_dir(folder)",
        _DURABLE,
    ),
    _staging(
        "fsync of the parent after the swap",
        "        try:\n            self._durable = fsops.sync_dir(self.output.parent) and self._durable",
        "        try:\n            pass",
        _ORDER,
    ),
    _staging(
        "the parent's fsync makes up for a file",
        "        try:\n            self._durable = fsops.sync_dir(self.output.parent) and self._durable",
        "        try:\n            self._durable = fsops.sync_dir(self.output.parent)",
        _DURABLE,
    ),
    _elsewhere(
        "stage/sweep.py",
        "fsync before a sweep",
        "        fsops.sync_dir(self.output.parent)\n        try:\n            kept",
        "        try:\n            kept",
        f"{_STAGING}test_an_old_tree_beside_the_new_is_swept",
    ),
    _staging(
        "fsync after a stage is kept",
        "            fsops.rename(self.path, kept)\n            fsops.sync_dir(self.output.parent)\n",
        "            fsops.rename(self.path, kept)\n",
        f"{_FAILURES}test_a_failed_second_rename_undoes_the_first",
    ),
    _staging(
        "the old mode is kept",
        "replaces else 0o777",
        "False else 0o777",
        f"{_STAGING}test_the_mode_of_the_replaced_folder_is_kept",
    ),
    _staging("setgid is inherited", " & stat.S_ISGID", " & 0", f"{_GUARDS}test_a_setgid_parent_hands_its_group_on"),
    _elsewhere(
        "stage/swap.py",
        "ENOSYS is no exchange",
        "{errno.EINVAL, errno.ENOSYS}",
        "{errno.EINVAL}",
        f"{_GUARDS}test_a_kernel_or_file_system_that_cannot_exchange",
    ),
    _elsewhere(
        "stage/swap.py",
        "EINVAL is no exchange",
        "{errno.EINVAL, errno.ENOSYS}",
        "{errno.ENOSYS}",
        f"{_GUARDS}test_a_kernel_or_file_system_that_cannot_exchange",
    ),
    _staging(
        "another OUT is not replaced",
        "if self._changed_hands():",
        "if False:",
        f"{_PLANTED}test_another_checkpoint_in_place_of_the_one_that_may_be_replaced",
    ),
    _staging(
        "an OUT that appeared is not replaced",
        "return then is None or (then",
        "return then is not None and (then",
        f"{_PLANTED}test_a_checkpoint_where_there_was_none",
    ),
    _elsewhere(
        "stage/sweep.py",
        "no sweep where locks prove nothing",
        "if file_system_of(self.output.parent) not in LOCKING_FILE_SYSTEMS:",
        "if False:",
        f"{_STAGING}test_where_locks_prove_nothing_nothing_is_swept",
    ),
    _elsewhere(
        "stage/sweep.py",
        "a stage that went meanwhile is nobody's",
        "if not other.exists():  #",
        "if False:  #",
        f"{_GUARDS}test_a_stage_that_goes_between_the_listing_and_the_lock",
    ),
    _elsewhere(
        "stage/sweep.py",
        "a held stage is busy",
        "            if lock is None:\n",
        "            if lock is None:\n                continue\n",
        f"{_STAGING}test_while_one_run_writes_another_is_refused",
    ),
    _elsewhere(
        "stage/sweep.py",
        "recovery renames back",
        "marker.is_whole(old):\n                    fsops.rename(old, self.output)",
        "marker.is_whole(old):\n                    self._sweep(old, number)",
        f"{_STAGING}test_a_swap_cut_in_two_is_rolled_back",
    ),
    _staging(
        "the space is checked",
        "if free < num_bytes:",
        "if False:",
        f"{_FAILURES}test_no_space_is_found_before_anything_is_written",
    ),
    _elsewhere(
        "stage/swap.py",
        "an OUT that appears is not renamed over",
        "if os.path.lexists(output):\n                raise",
        "if False:\n                raise",
        f"{_FAILURES}test_an_output_that_appears_just_before_the_swap",
    ),
    _elsewhere(
        "stage/swap.py",
        "a failed second rename is undone",
        "        try:\n            fsops.rename(old, output)\n        except OSError:",
        "        try:\n            pass\n        except OSError:",
        f"{_FAILURES}test_a_failed_second_rename_undoes_the_first",
    ),
    _staging(
        "a kept stage is named where it is",
        "if not kept.exists():  #",
        "if True:  #",
        f"{_GUARDS}test_a_kept_stage_whose_name_is_not_yet_on_disk",
    ),
    _staging(
        "a failed parent's fsync is told",
        '            left = f"; the old checkpoint is kept',
        '            return\n            left = f"; the old checkpoint is kept',
        f"{_FAILURES}test_a_failed_sync_after_the_swap",
    ),
    _elsewhere(
        "run/signals.py",
        "SIGINT is held",
        "noted.append(caught)) for number in stopping()",
        "noted.append(caught)) for number in stopping() if number != signal.SIGINT",
        f"{_GUARDS}test_signals_wait_for_the_swap",
    ),
    _elsewhere(
        "run/signals.py",
        "SIGTERM is held",
        "noted.append(caught)) for number in stopping()",
        "noted.append(caught)) for number in stopping() if number != signal.SIGTERM",
        f"{_GUARDS}test_signals_wait_for_the_swap",
    ),
    _elsewhere(
        "run/signals.py",
        "SIGHUP is held",
        "noted.append(caught)) for number in stopping()",
        "noted.append(caught)) for number in stopping() if number != signal.SIGHUP",
        f"{_GUARDS}test_signals_wait_for_the_swap",
    ),
    _staging(
        "a signal waits until the stage is known",
        "            with signals_held():  # what is made is known to be\n",
        "            with contextlib.nullcontext():\n",
        f"{_GUARDS}test_a_signal_right_after_something_is_made_leaves_nothing",
    ),
    _staging(
        "a signal waits until the marker is known",
        "        with signals_held():\n            fd =",
        "        with contextlib.nullcontext():\n            fd =",
        f"{_GUARDS}test_a_signal_right_after_something_is_made_leaves_nothing",
    ),
    _elsewhere(
        "run/signals.py",
        "a held signal acts in the end",
        "    if noted:\n        signal",
        "    if False:\n        signal",
        f"{_GUARDS}test_signals_wait_for_the_swap",
    ),
    _elsewhere(
        "run/signals.py",
        "no handlers outside the main thread",
        "if threading.current_thread() is not threading.main_thread():",
        "if False:",
        f"{_GUARDS}test_publishing_outside_the_main_thread",
    ),
    _staging(
        "a failed run removes its stage",
        "        if not self._done and (kept := self._discard())",
        "        if False and (kept := self._discard())",
        f"{_STAGING}test_an_error_leaves_nothing",
    ),
    _fsops("files are made, never opened", " | os.O_EXCL", "", f"{_FAILURES}test_nothing_in_the_stage_is_written_over"),
    _fsops("space is reserved", "os.posix_fallocate(fd, 0, num_bytes)", "pass", _SHARD),
    _fsops(
        "short writes are continued",
        "view = view[written:]",
        "view = view[len(view):]",
        f"{_FAILURES}test_short_writes_are_continued",
    ),
    _fsops(
        "a write that takes nothing is an error",
        'raise OSError(errno.EIO, "the file system accepted no bytes")',
        "return",
        f"{_FAILURES}test_a_write_that_takes_nothing_is_an_error",
    ),
    _fsops(
        "a failed fsync is an error",
        "            return False\n        raise\n",
        "            return False\n",
        f"{_FAILURES}test_a_failed_fsync_is_not_tried_again",
    ),
    _fsops(
        "a file system without fsync is told",
        "            return False\n        raise\n",
        "            return True\n        raise\n",
        _DURABLE,
    ),
    _fsops(
        "NOREPLACE",
        "_renameat2(source, target, _RENAME_NOREPLACE)",
        "_renameat2(source, target, 0)",
        f"{_FAILURES}test_an_output_that_appears_just_before_the_swap",
    ),
    _fsops(
        "a C library without renameat2",
        "if function is None:",
        "if False:",
        f"{_GUARDS}test_a_c_library_without_renameat2",
    ),
    Mutant(
        "stage/locks.py",
        "locks are exclusive",
        "fcntl.LOCK_EX",
        "fcntl.LOCK_SH",
        (f"{_STAGING}test_while_one_run_writes_another_is_refused",),
    ),
    Mutant(
        "stage/locks.py",
        "a child process does not get the lock",
        "        fcntl.flock(fd,",
        "        os.set_inheritable(fd, True)\n        fcntl.flock(fd,",
        (f"{_GUARDS}test_a_child_process_does_not_keep_the_lock",),
    ),
    Mutant(
        "stage/locks.py",
        "no lock through a link",
        " | os.O_NOFOLLOW",
        "",
        (f"{_GUARDS}test_a_lock_is_never_taken_through_a_link",),
    ),
    Mutant(
        "stage/locks.py",
        "another user's stage is busy",
        "(FileNotFoundError, PermissionError)",
        "FileNotFoundError",
        (f"{_GUARDS}test_a_stage_of_another_user_is_busy",),
    ),
    Mutant(
        "stage/locks.py",
        "the path still names what was locked",
        "if (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino):",
        "if True:",
        (f"{_STAGING}test_a_stage_swept_before_it_was_locked_is_made_again",),
    ),
    Mutant(
        "stage/locks.py",
        "the longest mount point counts",
        "len(mount.point.parts) >= best",
        "best < 0",
        (f"{_STAGING}test_file_system_type_by_mount_point",),
    ),
    _shard("fsync of a shard", "self.durable = fsops.sync(self._fd)", "pass"),
    _shard("the size is reserved", "            fsops.preallocate(self._fd, self.num_bytes)\n", ""),
    _shard("every tensor is written", "                if missing:\n", "                if False:\n"),
    _shard("only what is planned", "if name not in self._offsets or name in self.digests:", "if False:"),
    _shard("nothing twice", "if name not in self._offsets or name in self.digests:", "if name not in self._offsets:"),
    _shard("not too many bytes", "        if came > num_bytes:\n            break\n", ""),
    _shard("not too few bytes", "        if came != planned:\n", "        if came > planned:\n"),
    _shard("digests", "        digest.update(chunk)\n", ""),
    _staging(
        "what is in the stage is mopt's", "        if odd := self._odd(self.path):\n", "        if False:\n", _OTHER
    ),
    _staging(
        "files of the stage are as they were written",
        "now.get(name) != self._written.get(name)}",
        "name not in now}",
        _OTHER,
    ),
    _staging("folders of the stage", "sorted(odd | ((tree.keys() - now.keys()) ^ folders))", "sorted(odd)", _OTHER),
    _staging(
        "the stage is the one that was made",
        "        if not self._is_mine(self.path):\n",
        "        if False:\n",
        _OTHER,
    ),
    _staging("what came to OUT is the stage", "        if self._is_mine(self.output):\n", "        if True:\n", _OTHER),
    _elsewhere(
        "stage/swap.py",
        "an exchange is undone",
        "        fsops.exchange(stage, output)\n        return\n",
        "        return\n",
        _OTHER,
    ),
    _elsewhere("stage/swap.py", "two renames are undone", "    if old is not None:\n", "    if False:\n", _OTHER),
    _elsewhere(
        "stage/sweep.py",
        "what took the stage's name has no marker",
        'with contextlib.suppress(OSError):\n            fsops.remove_file(beside(self.output, "mark", number))',
        "pass",
        _OTHER,
    ),
    _staging(
        "what comes in the instant of the swap is named",
        "            if odd := self._odd(self.output):\n",
        "            if odd := list[str]():\n",
        "stage/test_directory_planted.py::test_a_file_that_comes_in_the_instant_of_the_swap_is_named",
    ),
    _staging(
        "a name that is taken in the stage is no failure of the disk",
        "if place.is_relative_to(self.path) and",
        "if False and",
        "stage/test_directory_planted.py::test_a_name_that_somebody_took_in_the_stage_is_said_to_be",
    ),
    _staging(
        "what somebody put into a stage is kept when the run fails",
        "kept = self._beside.remove(self.path, self._marker, replaced=False)",
        "fsops.remove_tree(self.path)",
        _OTHER,
    ),
)
