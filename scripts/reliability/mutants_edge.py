"""The guards of the edge of the process that mutants.py takes away, each with its tests."""

from mutants_disk import Mutant

_BOUNDARY = "run/test_boundary.py::test_"
_EDGE = "cli/test_edge.py::test_"
_SIGNALS = "cli/test_signals.py::test_"
_FORESEEN = f"{_BOUNDARY}what_is_foreseen"
_NAMES = f"{_EDGE}names_that_are_not_utf8"
_STREAMS = f"{_EDGE}help_and_usage_errors_to_streams_that_cannot_be_written"
_BLOCKED = f"{_SIGNALS}stopped_while_nobody_reads_stdout"
_PRINTED = f"{_EDGE}the_report_file_comes_before_what_cannot_be_printed"


def _boundary(what: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant("run/boundary.py", what, old, new, tests or (_FORESEEN,))


def _signals(what: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant("run/signals.py", what, old, new, tests)


def _cli(what: str, old: str, new: str, *tests: str, file: str = "_output") -> Mutant:
    return Mutant(f"cli/{file}.py", what, old, new, tests)


EDGE = (
    _boundary("what the system says of an input", "not _lies_in(path, inputs)", "True"),
    _boundary("what the system says of anything else", "or not _lies_in(path, inputs)", "or False"),
    _boundary("a limit is no bad input", "error.errno in _SCARCE or", ""),
    _boundary("a full disk", "if error.errno in _FULL:", "if False:"),
    _boundary("too few descriptors", "    if error.errno in _SCARCE:", "    if False:"),
    _boundary("a file nested too deeply", "case RecursionError():", "case KeyboardInterrupt():"),
    _boundary("no memory", "case MemoryError():", "case KeyboardInterrupt():"),
    _boundary("no memory, in words", "any(word in str(error) for word in _SCARCE_WORDS)", "False"),
    _boundary("a library that cannot be loaded", "case ImportError() if", "case ImportError() if False and"),
    _boundary(
        "a module of mopt that is not there is a bug",
        'if not (error.name or "").startswith(_PACKAGE)',
        "if True",
        f"{_BOUNDARY}what_can_only_be_a_bug_is_left_as_it_is",
    ),
    _boundary(
        "what a library raises on import is no bug",
        "case _ if _is_of_an_import(error):",
        "case _ if False:",
        f"{_BOUNDARY}what_a_library_raises_while_it_is_imported_is_no_bug",
    ),
    _boundary(
        "what mopt raises on import is one",
        'not any(frame.f_globals.get("__name__", "").startswith(_PACKAGE) for frame in later)',
        "True",
        f"{_BOUNDARY}what_a_library_raises_while_it_is_imported_is_no_bug",
    ),
    _boundary(
        "a limit on data is a limit",
        'resource.RLIMIT_DATA: ("data", "d", 256 << 20, 32 << 20)',
        'resource.RLIMIT_DATA: ("data", "d", 0, 0)',
        "cli/test_edge.py::test_few_descriptors_and_little_memory",
    ),
    _boundary(
        "links of an input are followed",
        "Path(os.path.realpath(one))",
        "one",
        f"{_BOUNDARY}an_input_is_known_by_where_its_links_lead",
    ),
    _boundary("a loop of links", 'str(error).startswith("Symlink loop")', "False"),
    _boundary("a removed working folder", "        os.getcwd()", "        pass", f"{_EDGE}the_working_folder_is_gone"),
    _boundary(
        "too little address space",
        "and limit < least:",
        "and False:",
        f"{_EDGE}few_descriptors_and_little_memory",
    ),
    Mutant(
        "api.py",
        "the boundary of the API",
        "with bounded(request.reads()):",
        "if True:",
        (f"{_BOUNDARY}a_function_of_the_api_raises_one_of_its_kinds",),
    ),
    Mutant(
        "commands/command.py",
        "what stands after a late failure",
        "published=published is not None or (stands",
        "published=(stands",
        (f"{_BOUNDARY}what_stands_is_said_whatever_fails_after_it",),
    ),
    Mutant(
        "checkpoint/location.py",
        "why there is no folder",
        "        return error.strerror\n",
        "        return NO_FOLDER\n",
        (f"{_EDGE}a_path_that_cannot_be_used_is_named_with_its_cause",),
    ),
    Mutant(
        "checkpoint/location.py",
        "a loop of links is not absent",
        "            location.stat()  #",
        "            pass  #",
        (f"{_EDGE}a_path_that_cannot_be_used_is_named_with_its_cause",),
    ),
    Mutant("report/report.py", "paths of a report are text", "return unicode_text(value)", "return value", (_NAMES,)),
    Mutant(
        "report/report.py",
        "names in a report are text",
        "{_unicode(name): _unicode(one)",
        "{name: _unicode(one)",
        ("report/test_schemas.py::test_names_of_a_report_are_text",),
    ),
    _cli(
        "the boundary of the command line",
        "bounded(request.reads())",
        "bounded([])",
        f"{_EDGE}a_path_that_cannot_be_used_is_named_with_its_cause",
    ),
    _cli(
        "the report before the print",
        "        report, unwritten = _written(output, report)\n        try:",
        "        unwritten = None\n        try:",
        _BLOCKED,
        _PRINTED,
    ),
    _cli(
        "the report says that nothing was printed",
        'report.model_copy(update={"exit_code": int(ExitCode.STORAGE)})',
        "report",
        _PRINTED,
    ),
    _cli("the report of a run stopped while it prints", "_ended(command.report(error), error)", "report", _BLOCKED),
    _cli("what stands when a run is stopped", "isinstance(failure, Interrupted) and", "False and", _BLOCKED),
    _cli(
        "a stream that cannot be written at exit",
        "            drop(stream)",
        "            pass",
        _STREAMS,
        file="_console",
    ),
    _cli(
        "what an encoding does not have",
        'stream.reconfigure(errors="backslashreplace")',
        "pass",
        f"{_EDGE}what_an_encoding_does_not_have_is_escaped",
        file="_console",
    ),
    _cli(
        "a reader of the help who leaves",
        "if isinstance(ended.__context__, BrokenPipeError):",
        "if False:",
        _STREAMS,
        file="__init__",
    ),
    _cli(
        "a usage error that cannot be told",
        "if isinstance(error, OSError) and isinstance(usage, int):",
        "if False:",
        _STREAMS,
        file="__init__",
    ),
    Mutant(
        "__main__.py",
        "signals before imports",
        "    leave_at_once()\n",
        "",
        (f"{_SIGNALS}a_signal_while_mopt_is_imported",),
    ),
    Mutant(
        "__main__.py",
        "what cannot be imported",
        "    except Exception as error:",
        "    except KeyError as error:",
        (f"{_EDGE}few_descriptors_and_little_memory",),
    ),
    _signals(
        "the first signal stops",
        "        if self._acts:",
        "        if False:",
        f"{_SIGNALS}a_second_signal_ends_at_once",
        _BLOCKED,
    ),
    _signals(
        "a second signal ends it",
        "        if self._came:",
        "        if False:",
        f"{_SIGNALS}a_second_signal_ends_at_once",
    ),
    _signals(
        "a signal waits for the report",
        "        self._acts, self._raised = True, None\n        try:\n            self._stop()",
        "        self._acts, self._raised = True, None\n        try:\n            pass",
        f"{_SIGNALS}a_signal_while_the_report_is_made_stops_the_print",
    ),
    _signals(
        "an interruption that a library kept",
        "            yield\n            self.insist()",
        "            yield",
        f"{_SIGNALS}a_library_that_keeps_an_interruption_and_goes_on_does_not_keep_it",
    ),
    _signals(
        "no signal changes how a run ended",
        "signal.SIG_IGN if handler is _leave else handler or signal.SIG_DFL",
        "handler or signal.SIG_DFL",
        f"{_SIGNALS}after_the_last_word_no_signal_counts",
    ),
)
