"""The tables of scripts/reliability name what exists: a row that names nothing would guard nothing."""

import ast

import pytest
from mutants import MUTANTS
from mutants_disk import Mutant
from reliability_tiers import TIERS
from root import ROOT


def exists(test: str) -> bool:
    """Whether a file of tests, or one test of it, is there; paths are relative to tests/."""
    file, _, name = test.partition("::")
    path = ROOT / "tests" / file
    return path.is_file() and (not name or f"\ndef {name}(" in path.read_text())


def test_the_text_of_every_mutant_is_in_its_file_once() -> None:
    assert len({(one.file, one.what) for one in MUTANTS}) == len(MUTANTS), "two rows of one name"
    package = ROOT / "modelopt_convert"
    files = {one.file: (package / one.file).read_text() for one in MUTANTS if (package / one.file).is_file()}
    wrong = [(one.file, one.what) for one in MUTANTS if files.get(one.file, "").count(one.old) != 1]
    assert wrong == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda one: f"{one.file}: {one.what}")
def test_what_a_mutant_leaves_is_python(mutant: Mutant) -> None:
    """A module that cannot be read fails every test, and shows of none that it watches the guard."""
    source = (ROOT / "modelopt_convert" / mutant.file).read_text()
    ast.parse(source.replace(mutant.old, mutant.new))


def test_every_test_of_a_mutant_or_a_tier_exists() -> None:
    tests = {test for one in MUTANTS for test in one.tests}
    tests |= {test.removeprefix("tests/") for tier in TIERS for test in tier.tests}
    assert len(tests) > 50
    assert [test for test in sorted(tests) if not exists(test)] == []
