"""What a record says was copied: a record is a claim, and may name anything."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelopt_convert.checkpoint.record import copied_files

PART = st.sampled_from(["", ".", "..", "vae", "a b", "..."])


@given(st.lists(PART, min_size=1, max_size=4))
def test_no_path_leads_out_of_the_checkpoint(parts: list[str]) -> None:
    path = "/".join(parts)
    stays = not {"", ".", ".."} & set(parts)
    assert copied_files({"copied": {path: "digest"}}) == ({path: "digest"} if stays else {})


@pytest.mark.parametrize("found", [None, [], "vae", 7, {}])
def test_other_types_are_no_copies(found: object) -> None:
    assert copied_files({"copied": found}) == {}
