"""The guards of what is not mopt's, by record, marker and inode, that mutants.py takes away, each with its tests."""

from mutants_disk import Mutant

_OWNED = "stage/test_ownership.py::"
_PLANTED = "stage/test_directory_planted.py::"
_FILE = "stage/test_written_file.py::"
_STAGING = "stage/test_directory.py::"
_GUARDS = "stage/test_directory_guards.py::"
_FAILURES = "stage/test_directory_failures.py::"
_MOUNTS = "stage/test_mounts.py::"
_POWER = "stage/test_powerloss.py::"
_LISTED = f"{_OWNED}test_what_the_record_does_not_list_is_foreign"
_RECORDED = f"{_OWNED}test_whatever_is_not_as_recorded_is_foreign"
_EDITED = f"{_OWNED}test_weights_that_were_edited_are_foreign"
_UNMARKED = f"{_PLANTED}test_a_folder_without_a_marker_is_neither_restored_nor_swept"
_CHANGED = f"{_OWNED}test_what_changed_since_the_check_stops_the_swap"
_THERE = f"{_FILE}test_what_mopt_did_not_write_is_refused"


def _of(file: str, what: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(f"stage/{file}.py", what, old, new, tests)


OWNED = (
    _of(
        "output_rules",
        "foreign files need a consent",
        "if standing.foreign and not overwrite_foreign:",
        "if False:",
        _LISTED,
    ),
    _of(
        "output_rules",
        "no git repository goes",
        'if os.path.lexists(folder / ".git"):',
        "if False:",
        "stage/test_output_rules.py",
    ),
    _of(
        "output_rules",
        "nothing mounted in OUT is emptied",
        "if is_mounted_below(output):",
        "if False:",
        f"{_MOUNTS}test_nothing_is_emptied_through_a_mount_inside_out",
    ),
    _of(
        "ownership",
        "what the record does not list",
        "if name not in owned and name not in known and not inside:",
        "if False:",
        _LISTED,
    ),
    _of("ownership", "small files are as recorded", "if _small_digest(folder / name) == files[name]}", "}", _RECORDED),
    _of(
        "ownership",
        "only plain files are the checkpoint's",
        "        if entry.is_file and name.rpartition",
        "        if name.rpartition",
        f"{_OWNED}test_a_link_in_the_place_of_a_file_is_foreign",
    ),
    _of(
        "ownership",
        "a record is as mopt writes it",
        "record is not None and json_bytes(record) == raw",
        "record is not None",
        f"{_OWNED}test_an_edited_record_says_nothing",
    ),
    _of(
        "ownership",
        "a part is the one that was built",
        " and _small_digest(folder / name / RECORD) == digest:",
        ":",
        f"{_OWNED}test_a_pipeline_is_known_part_by_part",
    ),
    _of(
        "ownership",
        "headers are as recorded",
        'if len(infos) != len(tensors) or now != record["digests"].get("headers"):',
        "if False:",
        f"{_OWNED}test_shards_are_those_of_the_index",
    ),
    _of(
        "ownership",
        "the bytes of weights are the recorded ones",
        "return found is not None and all(found[name] == digests.get(name) for name in found)",
        "return found is not None",
        _EDITED,
    ),
    _of(
        "ownership",
        "what was read is known by a time that no user can set",
        "status.st_mtime_ns, status.st_ctime_ns\n",
        "status.st_mtime_ns\n",
        f"{_OWNED}test_weights_are_read_once",
    ),
    _of(
        "ownership",
        "what vanishes is no error",
        "                status = (folder / path).lstat()\n            except FileNotFoundError:",
        "                status = (folder / path).lstat()\n            except KeyError:",
        "stage/test_output_rules.py::test_a_file_that_vanishes_while_it_is_looked_at_is_no_stranger",
    ),
    _of(
        "ownership",
        "what cannot be read is not foreign",
        "if isinstance(error.__cause__, OSError):",
        "if False:",
        f"{_OWNED}test_what_cannot_be_read_is_not_foreign",
    ),
    _of(
        "ownership",
        "modes of files are kept",
        "            return same.mode\n",
        "            pass\n",
        f"{_OWNED}test_modes_are_kept",
    ),
    _of(
        "ownership",
        "new files are no more open than the old",
        "functools.reduce(int.__and__, modes)",
        "functools.reduce(int.__or__, modes)",
        f"{_OWNED}test_modes_are_kept",
    ),
    _of(
        "fsops",
        "a kept mode outdoes the umask",
        "if mode is not None and stat.S_IMODE(os.fstat(fd).st_mode) != mode:",
        "if False:",
        f"{_OWNED}test_modes_are_kept",
    ),
    _of(
        "directory",
        "modes of folders are kept",
        "if (old_mode := self._folder_mode(folder)) is not None:",
        "if (old_mode := None) is not None:",
        f"{_OWNED}test_modes_are_kept",
    ),
    _of(
        "directory",
        "OUT is checked after recovery",
        "self._standing = check_output_allowed(self.output, self._inputs, **self._consent)",
        "pass",
        f"{_STAGING}test_a_swap_cut_in_two_is_rolled_back",
    ),
    _of(
        "directory",
        "OUT's place is checked before the swap",
        "                check_place(self.output, self._inputs)\n",
        "                pass\n",
        f"{_FAILURES}test_an_output_that_changed_since_the_check",
    ),
    _of(
        "directory",
        "what changed since the check stops the swap",
        "(found := changed(self._standing, standing_at(self.output))):",
        "(found := []):",
        _CHANGED,
    ),
    _of(
        "ownership",
        "an edit under the old time stops the swap",
        " | {*now.foreign} - {*before.foreign}",
        "",
        _CHANGED,
    ),
    _of(
        "leftovers",
        "a marker says what mopt says",
        "if not isinstance(tree, dict) or not all(_are_numbers(words, 3) for words in tree.values()):",
        "if not isinstance(tree, dict):",
        f"{_PLANTED}test_a_marker_of_wrong_types_is_none",
    ),
    _of(
        "ownership",
        "sizes and types are compared",
        "found[path] = Entry(kind, status.st_size,",
        "found[path] = Entry(0, 0,",
        _CHANGED,
    ),
    _of("ownership", "times are compared", "status.st_mtime_ns, mode)", "0, mode)", _CHANGED),
    _of(
        "sweep",
        "a stranger's file in the old tree is kept",
        "if strangers := marker.strangers(tree, replaced=replaced):",
        "if strangers := list[str]():",
        f"{_FAILURES}test_what_somebody_put_into_the_old_tree_outlives_it",
    ),
    _of(
        "sweep",
        "no sweep without a marker",
        "        if marker is None:\n            return\n",
        "        marker = marker or Marker()\n",
        _UNMARKED,
    ),
    _of(
        "sweep",
        "no recovery without a marker",
        "(marker := self._marker_beside(old, number)) is not None and",
        "(marker := self._marker_beside(old, number) or Marker()) and",
        _UNMARKED,
    ),
    _of(
        "sweep",
        "what was being removed is not put back",
        "is not None and marker.is_whole(old):",
        "is not None:",
        f"{_STAGING}test_what_was_being_removed_is_not_put_back",
    ),
    _of("leftovers", "a marker is mopt's", "and raw[: len(_HEAD)] != _HEAD[: len(raw)]:", "and False:", _UNMARKED),
    _of(
        "leftovers",
        "names are exact",
        "([0-9a-f]{{8}})",
        "(.*)",
        _UNMARKED,
    ),
    _of(
        "leftovers",
        "only this output's leftovers",
        "re.escape(f'.{output.name}.mopt-{kind}-')",
        "f'.*mopt-{kind}-'",
        f"{_STAGING}test_only_what_belongs_to_this_output_is_swept",
    ),
    _of(
        "leftovers",
        "links are not leftovers",
        " and not path.is_symlink()}",
        "}",
        f"{_PLANTED}test_what_is_no_folder_is_neither_restored_nor_swept",
    ),
    _of(
        "leftovers",
        "stages of every executor are known",
        "|attempts(/[0-9a-f]{{16}})?",
        "",
        f"{_PLANTED}test_whatever_an_executor_leaves_is_swept",
    ),
    _of(
        "leftovers",
        "an old tree holds what it held",
        "and (old or not _is_staged(name, entry, copied))",
        "and not _is_staged(name, entry, copied)",
        f"{_PLANTED}test_what_came_into_an_old_tree_after_a_kill_is_kept",
    ),
    _of(
        "leftovers",
        "an exchanged tree is known",
        "(replaced or inode_of(folder) == self.replaces)",
        "replaced",
        f"{_PLANTED}test_an_exchanged_tree_is_known_by_its_inode",
    ),
    _of(
        "sweep",
        "a marker stays as long as what it marks",
        "        if any(map(os.path.lexists, left)):  # as after a swap that was cut in two\n            return\n",
        "",
        f"{_POWER}test_a_rollback_lasts",
    ),
    _of(
        "sweep",
        "fsync of what a marker's run did last",
        "        if found:\n            # Such",
        "        if False:\n            # Such",
        f"{_POWER}test_a_rollback_lasts",
    ),
    _of(
        "directory",
        "descriptors are given up first",
        "        self._unlock()\n        kept = None",
        "        kept = None",
        f"{_GUARDS}test_a_run_without_descriptors_leaves_nothing",
    ),
    _of(
        "fsops",
        "one descriptor is enough to remove a tree",
        "if error.errno not in _NO_DESCRIPTOR:",
        "if True:",
        f"{_GUARDS}test_a_run_without_descriptors_leaves_nothing",
    ),
    _of(
        "mounts",
        "the table ends lines with a newline",
        'raw.split(b"\\n")',
        "raw.decode(errors='surrogateescape').encode(errors='surrogateescape').splitlines()",
        f"{_MOUNTS}test_the_table_is_split_where_the_kernel_ends_its_fields",
    ),
    _of(
        "mounts",
        "the table parts fields with blanks",
        'fields.split(b" ")',
        "fields.split()",
        f"{_MOUNTS}test_the_table_is_split_where_the_kernel_ends_its_fields",
    ),
    _of("written_file", "only mopt's own reports are replaced", "_is_marked(_content(path))", "True", _THERE),
    _of(
        "written_file",
        "only plain files are replaced",
        "ours = stat.S_ISREG(status.st_mode) and",
        "ours =",
        f"{_FILE}test_what_is_no_plain_file_is_refused",
    ),
    _of(
        "written_file",
        "no report on a mount",
        "if ours and is_mount_point(path):",
        "if False:",
        f"{_FILE}test_no_report_is_written_through_a_mount",
    ),
    _of(
        "written_file",
        "no report in an input",
        "                refuse_overlap(path, other)\n",
        "                pass\n",
        f"{_FILE}test_no_report_stands_in_an_input_under_whatever_name",
    ),
    _of(
        "written_file",
        "a report is looked at again",
        "            check_file_replaced(path)  # what",
        "            # what",
        f"{_FILE}test_what_is_put_there_meanwhile_stays",
    ),
    _of(
        "written_file",
        "a new report replaces nothing",
        "fsops.rename_noreplace(beside, path)",
        "fsops.rename(beside, path)",
        f"{_FILE}test_what_is_put_there_in_the_last_instant_stays",
    ),
    _of(
        "written_file",
        "a live run's file is not swept",
        "                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n                head",
        "                head",
        f"{_FILE}test_what_another_run_is_writing_is_not_swept",
    ),
    _of(
        "written_file",
        "only what mopt began is swept",
        "if any(head[: len(one)] == one[: len(head)] for one in _BEGINNINGS):",
        "if True:",
        f"{_FILE}test_what_is_not_left_by_mopt_is_not_swept",
    ),
    _of(
        "written_file",
        "a file swept at once is made again",
        "if os.fstat(fd).st_nlink:",
        "if True:",
        f"{_FILE}test_a_file_swept_before_it_was_locked_is_made_again",
    ),
    _of(
        "written_file",
        "a failed write leaves nothing",
        "                fsops.remove_file(beside)\n            raise",
        "                pass\n            raise",
        f"{_FILE}test_a_disk_that_fails_leaves_the_old_report",
    ),
    _of(
        "written_file",
        "two names of one place",
        "        if left.name == right.name and left.parent.samefile(right.parent):\n            return True\n",
        "",
        f"{_FILE}test_no_report_is_written_through_a_mount",
    ),
    _of(
        "leftovers",
        "a marker speaks of its own run",
        'and path.name.endswith(f"-{found.number}")',
        "",
        f"{_PLANTED}test_a_marker_speaks_of_its_own_run_alone",
    ),
)
