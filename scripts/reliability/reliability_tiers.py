"""The tiers of tests behind mopt's promise: what each strikes, and which tests it consists of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tier:
    """One row of docs/reliability.md.

    Attributes:
        number: Under which its tests note their figures.
        name: In one or two words.
        struck: What is done to mopt, and what must then hold.
        tests: What pytest is asked to run.
        counted: Which of its figures are its cases; without such figures, the tests that passed are.
        workers: How many tests run at once.
        long: Whether its tests are left out of a normal run, or a share of them.
        never: What each of its tests asserts to be 0.
    """

    number: int
    name: str
    struck: str
    tests: tuple[str, ...]
    counted: str = "cases"
    workers: int = 0
    long: bool = False
    never: tuple[str, ...] = ()


TIERS = (
    Tier(1, "property", "arithmetic of formats: round trips, involution, all 256 bytes, arguments left as they were",
         ("tests/formats/test_codes.py",)),
    Tier(2, "oracle", "our bytes against those of ModelOpt's quantizer, recorded", ("tests/formats/test_goldens.py",),
         counted="tensors_compared"),
    Tier(3, "writer", "our files against `save_file`, and read by safetensors",
         ("tests/stage/test_shard_writer.py", "tests/checkpoint/test_header.py::test_what_we_write_is_what_save_file_writes",
          "tests/checkpoint/test_header.py::test_names_that_cannot_be_written")),
    Tier(4, "parser", "headers and indexes damaged before and after encoding: refused, or read as safetensors does",
         ("tests/checkpoint/test_header.py", "tests/checkpoint/test_header_mutations.py", "tests/checkpoint/test_fuzz_corpus.py",
          "tests/test_refusals_all_hit.py")),
    Tier(5, "hostile", "names, links, pipes, sizes and counts that no model has: refused in bounded memory",
         ("tests/checkpoint/test_hostile_input.py", "tests/checkpoint/test_reader_hostile.py", "tests/checkpoint/test_bounds.py"), counted="rows"),
    Tier(6, "pickle", "a `.pt` that runs code or asks for memory: nothing runs", ("tests/checkpoint/test_torch_archive_bounds.py",)),
    Tier(7, "truncation", "files cut at every byte: none is accepted",
         ("tests/checkpoint/test_truncation.py", "tests/checkpoint/test_header_mutations.py::test_cut_or_grown_anywhere_is_refused",
          "tests/checkpoint/test_torch_archive_bounds.py::test_cut_anywhere_in_its_directory_is_refused"), counted="lengths"),
    Tier(8, "kill", "SIGKILL at every system call that changes the disk, one transformer or two, folders or hf:// inputs: OUT is old or new, the next run cleans up",
         ("tests/stage/test_crash.py::test_killed_at_every_changing_call", "tests/cli/test_crash.py"), workers=2, long=True),
    Tier(9, "I/O error", "EIO, ENOSPC, EDQUOT, EROFS, EINTR at every system call, once and for good",
         ("tests/stage/test_crash.py::test_error_at_every_call",), workers=2, long=True),
    Tier(10, "compound", "SIGKILL or EIO while a run recovers what a killed one left",
         ("tests/stage/test_crash_twice.py",), workers=2, long=True),
    Tier(11, "power loss", "every subset of unsynced writes after every step; then each fsync taken away",
         ("tests/stage/test_powerloss.py",), workers=2, long=True),
    Tier(12, "real limits", "full, read-only and layered file systems, limits of size, missing rights",
         ("tests/stage/test_real_limits.py",)),
    Tier(13, "short I/O", "reads and writes that stop short, signals, files that shrink or grow while read",
         ("tests/checkpoint/test_truncation.py::test_a_shard_cut_by_another_thread_is_an_error",
          "tests/checkpoint/test_truncation.py::test_signals_while_reading_change_nothing",
          "tests/checkpoint/test_reader_hostile.py", "tests/stage/test_shard_writer.py::test_short_writes_are_continued",
          "tests/stage/test_directory_failures.py::test_short_writes_are_continued",
          "tests/stage/test_directory_failures.py::test_a_write_that_takes_nothing_is_an_error",
          "tests/stage/test_shared_blocks.py"), counted="tests"),
    Tier(14, "refusals", "every OUT that mopt must not touch, also one swapped after the check",
         ("tests/stage/test_output_rules.py", "tests/stage/test_directory_planted.py", "tests/stage/test_refusals.py")),
    Tier(15, "concurrency", "4 processes at once want OUT while it is read, in some rounds one is killed",
         ("tests/stage/test_race.py",), workers=2, long=True),
    Tier(16, "state machine", "random runs, kills, deletions, foreign files and modes: OUT is a published version",
         ("tests/long/test_state_machine.py",), long=True),
    Tier(17, "determinism", "the same input under other threads, hash seed, folder and umask: the same bytes",
         ("tests/commands/test_determinism.py",), counted="trees_equal"),
    Tier(18, "scale", "full-size FLUX.1-dev by its headers, and 10,000 modules: time and memory",
         ("tests/long/test_scale.py",), long=True),
    Tier(19, "CLI", "every exit code, told to people, as JSON and quietly: one and the same",
         ("tests/cli/test_outcomes.py", "tests/cli/test_surface.py"), counted="ways"),
    Tier(20, "regressions", "every fault seen in the field, planted again (`tests/REGRESSIONS.md`)", ()),
    Tier(21, "ownership", "OUT with files of every kind, edited weights and cards, markers and leftovers that are not mopt's: refused by name, or kept",
         ("tests/stage/test_ownership.py", "tests/stage/test_directory_planted.py", "tests/stage/test_mounts.py",
          "tests/stage/test_other_stage.py"),
         never=("lost", "litter")),
    Tier(22, "reports", "reports and pages through hard links, mounts, links and other spellings, over files of others, on a disk that fails",
         ("tests/stage/test_written_file.py",), never=("lost", "litter")),
    Tier(23, "hostile Hub", "every field and header of a Hub's answers in turn, of wrong types, huge, negative, path-like; answers that stall or never end",
         ("tests/checkpoint/hub/test_answers.py", "tests/checkpoint/hub/test_hostile.py", "tests/commands/push/test_hostile_hub.py"),
         counted="lies", workers=2, long=True, never=("escapes", "exit 70", "tracebacks", "hangs")),
    Tier(24, "surroundings", "no home, no working folder, few descriptors, closed and full streams, paths that are no text, any failing call: every command, a documented code and one line",
         ("tests/cli/test_edge.py", "tests/cli/test_errno.py", "tests/run/test_boundary.py",
          "tests/commands/test_reads_that_fail.py"), workers=2, long=True,
         never=("exit 70", "tracebacks", "lost")),
    Tier(25, "signals", "SIGINT, SIGTERM and SIGHUP from the first instruction on: a report that says what stands",
         ("tests/cli/test_signals.py",), workers=2, long=True, never=("torn", "exit 70", "tracebacks", "hangs")),
    Tier(26, "cluster", "kills and signals while a Ray cluster writes the shards: OUT is old or new, the next run cleans up",
         ("tests/write/test_ray_cluster.py",), never=("torn", "litter")),
)  # fmt: skip
