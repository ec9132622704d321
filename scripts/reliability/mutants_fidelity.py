"""Guards of what is said of pictures that mutants.py turns round, each with the tests that are to notice."""

from mutants_disk import Mutant

_ADVISE = "fidelity/test_advise.py::"
_FRONTIER = "fidelity/test_frontier.py"
_EMULATION = "fidelity/test_emulation.py"

FIDELITY = (
    Mutant("fidelity/selftest.py", "a check that fails is told", "if not holds:", "if False:", (_EMULATION,)),
    Mutant(
        "fidelity/frontier.py",
        "a knapsack leaves out no choice that may be the best",
        "if at_most >= best and gain > most:",
        "if at_most > best and gain > most:",
        (_FRONTIER,),
    ),
    Mutant(
        "fidelity/frontier.py",
        "a choice fits into the bytes",
        "(room - state.cost) // size) + 1",
        "room // size) + 1",
        (_FRONTIER,),
    ),
    Mutant(
        "commands/advise.py",
        "a PSNR is reached by its bound",
        "found.lower95 is not None and found.lower95 >= wanted",
        "found.psnr >= wanted",
        (f"{_ADVISE}test_a_psnr_is_reached_by_the_bound_that_compare_asks_for",),
    ),
    Mutant(
        "commands/drawing_requests.py",
        "advise knows the formats",
        "if self.format not in FORMATS:",
        "if False:",
        (f"{_ADVISE}test_what_cannot_be_meant_is_a_usage_error",),
    ),
    Mutant(
        "preset/preset.py",
        "a preset of another format is told",
        "return own if self.inherited and algorithm not in own else []",
        "return []",
        (f"{_ADVISE}test_built_in_another_format_it_warns",),
    ),
)
