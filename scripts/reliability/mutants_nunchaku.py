"""What nunchaku's checkpoints mean, and the guards of their form, that mutants.py takes away, each with its tests."""

from mutants_disk import Mutant

_TESTS = "dialects/test_nunchaku.py"
_WHOLE = f"{_TESTS}::test_their_whole_conversion_gives_back_weight_and_bias"
_FAULTS = "dialects/test_nunchaku_refused.py::test_what_the_engine_would_not_load_is_one_line"
_COMMAND = "commands/convert/test_nunchaku.py"


def _value(what: str, old: str, new: str, test: str = _WHOLE) -> Mutant:
    return Mutant("dialects/nunchaku.py", what, old, new, (test,))


def _guard(what: str, old: str, new: str, test: str = _FAULTS) -> Mutant:
    return Mutant("dialects/nunchaku_form.py", what, old, new, (test,))


NUNCHAKU = (
    _value("smoothing is undone", "                    found /= smooth\n", ""),
    _value(
        "the shift is undone",
        "found[start : start + len(weight)] += SHIFT *",
        "found[start : start + len(weight)] += 0 *",
    ),
    _value(
        "1 is in the scales alone",
        "for which in {1, self.parts - 2}:",
        "for which in range(self.parts):",
        f"{_TESTS}::test_their_modulation_gives_back_rows_and_bias",
    ),
    _guard(
        "NVFP4 is not shifted",
        "if one.linear.shifted and not one.weight.is_nvfp4 else None",
        "if one.linear.shifted else None",
        f"{_TESTS}::test_int4_after_gelu_is_shifted_and_nothing_else_is",
    ),
    _guard("what is needed is there", "if odd is not None or missing is not None:", "if odd is not None:"),
    _guard("nothing else is there", "if odd is not None or missing is not None:", "if missing is not None:"),
    _guard("a rank of whole tiles", "if not rank or rank % RANK:", "if not rank:"),
    _guard("no scale of NVFP4 beside INT4", "if beside is not None and not is_nvfp4:", "if False:"),
    _guard(
        "both stretches of columns",
        "if len(wholes) != linear.stretches:",
        "if False:",
        f"{_TESTS}::test_the_output_of_a_single_block_is_of_two_modules",
    ),
    Mutant(
        "commands/convert/nunchaku.py",
        "bf16 alone",
        'if is_nunchaku(source) and target != "bf16":',
        "if False:",
        (f"{_COMMAND}::test_other_targets_are_refused_in_one_line_that_names_bf16",),
    ),
    Mutant(
        "commands/convert/awq.py",
        "another base",
        "if not error <= limit}",
        "if False}",
        (f"{_COMMAND}::test_a_base_that_is_another_is_refused",),
    ),
)
