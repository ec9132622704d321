"""vLLM-omni's view as a table: which entries exclude more than they name."""

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt_convert.engines.vllm_omni import begins_one, widened

# Few letters, so that names are often parts of others, within a segment and across dots.
NAMES = st.lists(st.text("ab1", min_size=1, max_size=3), min_size=1, max_size=4).map(".".join)


@settings(max_examples=500, deadline=None)
@given(st.sets(NAMES, max_size=12), st.sets(NAMES, max_size=12))
def test_widened_is_every_part_of_a_name(entries: set[str], names: set[str]) -> None:
    expected = {entry for entry in entries if any(entry in name for name in names)}
    assert widened(entries, names) == expected


@given(st.lists(NAMES), NAMES)
def test_a_beginning_is_found_among_texts_in_order(texts: list[str], start: str) -> None:
    assert begins_one(sorted(texts), start) == any(text.startswith(start) for text in texts)


def test_time_goes_by_the_length_of_both() -> None:
    """A quadratic search of 40,000 by 40,000 names would take minutes."""
    entries = {f"blocks.{number}.norm.linear" for number in range(40_000)}
    names = {f"more_blocks.{number}.attn.to_q" for number in range(40_000)}
    before = time.process_time()
    assert widened(entries, names) == set()
    assert time.process_time() - before < 20
