"""The guards of the names of model families that mutants.py takes away, each with its tests."""

from mutants_disk import Mutant

_LAWS = "families/test_family.py::"
_TABLE = "families/test_table.py::"
_ORACLE = "families/test_against_diffusers.py"


def _family(what: str, old: str, new: str, test: str) -> Mutant:
    return Mutant("families/family.py", what, old, new, (f"{_LAWS}{test}",))


def _table(what: str, old: str, new: str, test: str) -> Mutant:
    return Mutant("families/table.py", what, old, new, (f"{_TABLE}{test}",))


def _blocks(what: str, old: str, new: str) -> Mutant:
    return Mutant("families/blocks.py", what, old, new, ("families/test_blocks.py",))


FAMILIES = (
    _family(
        "a number that would not come back",
        "if _NUMBER.fullmatch(number) and (",
        "if (",
        "test_a_number_that_would_not_come_back_is_unknown",
    ),
    _family(
        "a name with a place for a number",
        'if "{" in name:',
        "if False:",
        "test_a_number_that_would_not_come_back_is_unknown",
    ),
    _family(
        "a module in a known one",
        'if "." not in role or role.startswith(_DOTTED):',
        "if True:",
        "test_a_part_of_a_known_module_is_unknown",
    ),
    _family(
        "rows that do not fit",
        "if sum(sizes) != rows or min(sizes) <= 0 or (halves and rows % 2):",
        "if False:",
        "test_members_are_all_rows_in_order_or_a_fault",
    ),
    Mutant(
        "families/family.py",
        "the last block without the number of blocks",
        "if self.blocks is None:",
        "if False:",
        (f"{_TABLE}test_the_number_of_blocks_comes_with_the_family",),
    ),
    _table(
        "two transformers",
        "return found[0] if len(found) == 1 else None",
        "return found[0] if found else None",
        "test_two_transformers_in_one_checkpoint_are_no_answer",
    ),
    _table(
        "every mark is asked for",
        "modules.issuperset(_marks(family, spelling))",
        "not modules.isdisjoint(_marks(family, spelling))",
        "test_without_one_of_its_marks_it_is_not_known",
    ),
    Mutant("families/flux1.py", "shift and scale change places", ', swap="always"', "", (_ORACLE,)),
    Mutant("families/sd3.py", "shift and scale in the last block", ', swap="last block"', "", (_ORACLE,)),
    Mutant(
        "families/wan.py",
        "norms that change places",
        'module("norm2", "norm3"),\n    module("norm3", "norm2"),',
        'module("norm2", "norm2"),\n    module("norm3", "norm3"),',
        (_ORACLE,),
    ),
    _blocks("blocks that the config counts", "last + 1 if is_said else None)", "None)"),
    _blocks("a block in between", "if number not in blocks), last", "if False), last"),
    _blocks("tensors that other blocks have", "(absent := sorted(every - held))", "(absent := [])"),
    _blocks("parameters of a block itself", ' or family.count(name, "diffusers"):', ":"),
)
