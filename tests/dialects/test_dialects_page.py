"""docs/dialects.md says what conversions do: some rows are made again in every run, all with MOPT_TEST_LONG."""

import random
from pathlib import Path

import pytest
from make_dialects import BACK, FAMILIES, FORMATS, HEAD, rows
from root import LONG, ROOT

PAGE = (ROOT / "docs" / "dialects.md").read_text(encoding="utf-8")
ALL = [(family, algorithm) for family in FAMILIES for algorithm in FORMATS]
CHOSEN = ALL if LONG else sorted(random.Random(19).sample(ALL, 3))


@pytest.mark.parametrize(("family", "algorithm"), CHOSEN)
def test_a_row_is_what_a_conversion_does(families: Path, family: str, algorithm: str) -> None:
    there, back = rows(families, family, algorithm)
    title = FORMATS[algorithm]
    assert there in _table(f"### From ModelOpt's {title}"), "run scripts/make/make_dialects.py"
    assert back in _table(f"### {title} back to ModelOpt"), "run scripts/make/make_dialects.py"


def test_the_page_has_every_family_and_the_words_that_are_written_by_hand() -> None:
    assert PAGE.startswith(HEAD.read_text(encoding="utf-8").rstrip()) and BACK in PAGE
    for title in FORMATS.values():
        for heading in (f"### From ModelOpt's {title}", f"### {title} back to ModelOpt"):
            assert [line.split(" | ")[0] for line in _table(heading)[2:]] == [f"| {one}" for one in FAMILIES.values()]


def _table(heading: str) -> list[str]:
    _, _, rest = PAGE.partition(f"\n{heading}\n\n")
    return rest.partition("\n\n")[0].splitlines()
