"""The guards of what people are told that mutants.py takes away, each with its tests: page, terminal, usage, kinds."""

from mutants_disk import Mutant

_PAGE = "verification/test_page.py::test_"
_STYLE = "verification/test_page_style.py::test_"
_TERMINAL = "cli/test_terminal.py::test_"
_SURFACE = "cli/test_surface.py::test_"
_EXPLAIN = "cli/test_explain.py::test_"
_AT_ONCE = "commands/build/test_all_at_once.py::test_"
_FOREIGN = "checkpoint/test_foreign.py::test_"


def _page(file: str, what: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(f"verification/page/{file}.py", what, old, new, tests)


def _cli(file: str, what: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(f"cli/{file}.py", what, old, new, tests)


TOLD = (
    _page(
        "markup",
        "what a page shows is text",
        "return html.escape(visible(value, limit))",
        "return visible(value, limit)",
        f"{_PAGE}hostile_names_are_text",
    ),
    _page(
        "excerpt",
        "what cannot be seen is spelled out",
        'return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in words)',
        "return words",
        f"{_PAGE}hostile_names_are_text",
        f"{_STYLE}natural_order_and_visible_text",
    ),
    _page(
        "shell",
        "a page fetches nothing",
        "default-src 'none'",
        "default-src *",
        f"{_PAGE}the_policy_lets_this_style_in_and_nothing_else",
    ),
    _page(
        "document",
        "a run that failed is no pass",
        'if kind == "pass" and report.get("exit_code"):',
        "if False:",
        f"{_PAGE}the_verdict_is_in_the_words_of_the_report",
    ),
    _page(
        "document",
        "what is not proven is not green",
        'elif kind == "pass" and str(found.get("proof")).startswith("not proven"):',
        "elif False:",
        f"{_PAGE}the_verdict_is_in_the_words_of_the_report",
    ),
    _page(
        "excerpt",
        "a module that was not compared is grey",
        'compared, ("other", unseen)',
        'compared, ("pass", unseen)',
        f"{_PAGE}only_what_was_compared_with_the_base_is_green",
    ),
    _page(
        "excerpt",
        "a module that a level names has failed",
        'status = "fail" if is_failed else data.get("status")',
        'status = data.get("status")',
        f"{_PAGE}a_module_that_a_level_names_is_not_green",
    ),
    _page(
        "modules",
        "a page is of a bounded size",
        "shown = modules[:_MAX_SHOWN]",
        "shown = modules",
        f"{_PAGE}size_is_bounded_for_absurd_checkpoints",
    ),
    _cli(
        "_output",
        "a terminal obeys nothing of the result",
        "enumerate(wrapped(printable(text), _width()))",
        "enumerate(wrapped(text, _width()))",
        f"{_TERMINAL}nothing_of_a_result_moves_the_terminal",
    ),
    _cli(
        "_output",
        "NO_COLOR is heeded",
        'or os.environ.get("NO_COLOR") ',
        "",
        f"{_TERMINAL}colors_can_be_had_off",
    ),
    _cli(
        "_output",
        "a pipe gets no folded lines",
        "shutil.get_terminal_size().columns if is_terminal(sys.stdout) else None",
        "shutil.get_terminal_size().columns",
        f"{_SURFACE}people_get_text_without_escapes_and_quiet_gets_nothing",
    ),
    _cli(
        "_output",
        "no step goes back",
        "max([self._step, *found])",
        "max([0, *found])",
        f"{_TERMINAL}a_phase_is_a_step_of_the_whole",
    ),
    _cli(
        "_output",
        "time left is of all shards",
        "total_bytes * (count - number + 1)",
        "total_bytes",
        f"{_TERMINAL}time_left_is_that_of_all_shards",
    ),
    _cli(
        "_usage",
        "a report under --json alone",
        'if "--json" in words and ',
        "if ",
        f"{_EXPLAIN}an_unknown_code_is_a_usage_error",
    ),
    _cli(
        "_usage",
        "a usage error of inspect is an inspection",
        ', "inspect": InspectReport}',
        "}",
        f"{_SURFACE}a_usage_error_under_json_is_one_document",
    ),
    Mutant(
        "verification/transformer.py",
        "near is said only where nothing else failed",
        'found.proof == NEAR_WORDS and all(one.status != "fail" for one in found.levels if one.level != "L2")',
        "found.proof == NEAR_WORDS",
        ("verification/test_verify.py::test_what_is_near_the_base_and_not_as_recorded_is_a_mismatch",),
    ),
    Mutant(
        "run/codes.py",
        "an unknown code is refused",
        "if code not in known:",
        "if False:",
        (f"{_EXPLAIN}an_unknown_code_is_a_usage_error",),
    ),
    Mutant(
        "checkpoint/foreign.py",
        "a length that begins like a pickle is a length",
        r'rb"\x80([\x04\x05]\x95|[\x02-\x05]..(?!\0{4}))"',
        r'rb"\x80[\x02-\x05]"',
        (f"{_FOREIGN}a_file_that_was_cut_short_is_no_other_kind",),
    ),
    Mutant(
        "checkpoint/foreign.py",
        "a byte of a newline counts as any other",
        "re.DOTALL | re.IGNORECASE",
        "re.IGNORECASE",
        (f"{_FOREIGN}the_kind_is_named_and_what_to_run",),
    ),
    Mutant(
        "checkpoint/header.py",
        "another kind of file is named before its length",
        'raise foreign(prefix, file) or InputError(\n            f"{file}: the header claims {length} bytes, the fo',
        'raise InputError(\n            f"{file}: the header claims {length} bytes, the fo',
        (f"{_FOREIGN}the_kind_is_named_and_what_to_run",),
    ),
    Mutant(
        "plan/keeps.py",
        "a hint keeps a fused group whole",
        "for group in fused if name in group for member in group",
        "for group in fused if False for member in group",
        (f"{_AT_ONCE}what_the_hints_say_makes_the_build_succeed",),
    ),
    Mutant(
        "run/errors.py",
        "a hint keeps all modules of a kind",
        "for fault in faults for name in _KEPT_NAME",
        "for fault in faults[:1] for name in _KEPT_NAME",
        (f"{_AT_ONCE}what_the_hints_say_makes_the_build_succeed",),
    ),
    Mutant(
        "commands/build/faults.py",
        "data is looked at where headers are refused",
        "is_blind = request.dry_run or",
        "is_blind = True or",
        (f"{_AT_ONCE}several_kinds_in_some_modules_are_all_told",),
    ),
    Mutant(
        "proof/export.py",
        "a replaced module that is far from the base is compared whole",
        "or (name in plan.replaced and",
        "or (False and",
        ("proof/test_refusals.py::test_a_module_that_the_base_replaces_is_not_near_with_a_wrong_row",),
    ),
    Mutant(
        "plan/inputs.py",
        "the file whose shape is wrong is named",
        "if is_right == [False, True]:",
        "if False:",
        ("plan/test_refusals_base.py::test_the_bias_and_the_other_blocks_tell_which_shape_is_wrong",),
    ),
)
