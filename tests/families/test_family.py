"""Laws that every family's table holds: a way there is a way back, and no two things get one name."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from modelopt_convert.families.family import Family, Spelling
from modelopt_convert.families.rows import Row
from modelopt_convert.families.table import FAMILIES
from modelopt_convert.run.errors import InputError

EVERY = st.sampled_from([(family, row) for family in FAMILIES for row in family.rows])
MODULES = EVERY.filter(lambda pair: not pair[1].parameter)
NUMBERS = st.integers(0, 10**9 - 1)
NATIVE: tuple[Spelling, ...] = ("comfyui", "original")
SPELLED = st.sampled_from(NATIVE)
ROLES = st.sampled_from([
    "weight", "bias", "weight_scale", "weight_scale_2", "input_scale", "comfy_quant", "weight_packed",
    "weight_global_scale", "_weight_qdata", "scale_weight", "input_quantizer._amax", "weight.absmax",
])  # fmt: skip
BY_TITLE = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def named(row: Row, spelling: Spelling, number: int) -> str:
    return (row.original if spelling == "original" else row.native).replace("{}", str(number))


@given(MODULES, SPELLED, NUMBERS)
def test_a_module_comes_back(pair: tuple[Family, Row], spelling: Spelling, number: int) -> None:
    family, row = pair
    native = named(row, spelling, number)
    names = family.fused(native)
    assert len(names) == len(row.members)
    assert [family.native(name, spelling) for name in names] == [(native, index) for index in range(len(names))]
    assert [family.native(name, "diffusers") for name in names] == [(name, 0) for name in names]


@given(EVERY, SPELLED, NUMBERS, ROLES)
def test_a_tensor_comes_back(pair: tuple[Family, Row], spelling: Spelling, number: int, role: str) -> None:
    """Whatever its role; a norm's is another in some spellings."""
    family, row = pair
    native = named(row, spelling, number)
    if not row.parameter:
        scale = row.norm and spelling == "original" and role == "weight"
        native += f".{family.original_norm if scale else role}"
    names = family.tensor(native)
    assert names is not None and len(names) == len(row.members)
    assert [family.native_tensor(name, spelling) for name in names] == [(native, place) for place in range(len(names))]


@given(MODULES, NUMBERS)
def test_the_scale_of_a_norm_is_its_weight_in_every_spelling(pair: tuple[Family, Row], number: int) -> None:
    """Files of ComfyUI's elder versions have it beside ComfyUI's names; a quantized module's ``.scale`` is none."""
    family, row = pair
    for spelling in NATIVE:
        native = named(row, spelling, number)
        expected = "weight" if row.norm else "scale"
        assert family.tensor(f"{native}.scale") == tuple(f"{name}.{expected}" for name in family.fused(native))


@BY_TITLE
def test_no_two_things_have_one_name(family: Family) -> None:
    members = [name for row in family.rows for name in row.members]
    assert len(members) == len(set(members))
    for names in ([row.native for row in family.rows], [row.original for row in family.rows]):
        assert len(names) == len(set(names))
    # The same name in both spellings is the same thing.
    either = {(row.native, row) for row in family.rows} | {(row.original, row) for row in family.rows}
    assert len(either) == len({name for name, _ in either})


@BY_TITLE
def test_rows_are_well_formed(family: Family) -> None:
    """What the look-up relies on: one number or none, the same in every name; as many members as parts."""
    parts = {"whole": 1, "thirds": 3, "columns and rest": 4}
    for row in family.rows:
        assert {name.count("{}") for name in (row.native, row.original, *row.members)} in ({0}, {1})
        assert len(row.members) == parts[row.split]
        assert row.swap == "never" or row.split == "whole"
        assert not (row.parameter and (row.norm or row.split != "whole" or row.swap != "never"))
    assert {mark for mark in family.marks if family.native(mark, "comfyui") is None} == set()


@given(MODULES, NUMBERS, st.integers(1, 400), st.integers(1, 64))
def test_members_are_all_rows_in_order_or_a_fault(
    pair: tuple[Family, Row], number: int, rows: int, columns: int
) -> None:
    family, row = pair
    native = named(row, "comfyui", number)
    assume(row.swap != "last block")
    fits = {
        "whole": row.swap == "never" or rows % 2 == 0,
        "thirds": rows % 3 == 0,
        "columns and rest": rows > 3 * columns,
    }[row.split]
    if not fits:
        with pytest.raises(InputError) as caught:
            family.members(native, rows, columns)
        assert caught.value.code == "family.rows"
        assert native in str(caught.value) and f"found {rows}" in str(caught.value) and "{}" not in str(caught.value)
        return
    held = family.members(native, rows, columns)
    assert held is not None and tuple(one.module for one in held) == family.fused(native)
    assert [row for one in held for row in range(one.first, one.first + one.rows)] == list(range(rows))
    if row.split == "columns and rest":
        assert [one.rows for one in held[:3]] == [columns] * 3
    if row.split == "thirds":
        assert len({one.rows for one in held}) == 1


@given(
    EVERY, SPELLED, st.sampled_from(["00", "01", "-1", "+1", " 1", "1 ", "{}", "x", "", "\u0661", "1" * 10, "9" * 5000])
)
def test_a_number_that_would_not_come_back_is_unknown(
    pair: tuple[Family, Row], spelling: Spelling, number: str
) -> None:
    family, row = pair
    name = row.original if spelling == "original" else row.native
    assume("{}" in name)
    native, member = (one.replace("{}", number) for one in (name, row.members[0]))
    assert family.tensor(f"{native}.weight") is None and family.tensor(native) is None
    assert family.fused(native) == () and family.members(native, 6, 1) is None and not family.swapped(native)
    assert family.native(member, spelling) is None and family.native_tensor(f"{member}.weight", spelling) is None


@given(st.sampled_from(FAMILIES), st.text(max_size=40), SPELLED)
def test_a_strange_name_is_unknown(family: Family, name: str, spelling: Spelling) -> None:
    assert family.tensor(f"strange.{name}") is None
    assert family.native_tensor(f"strange.{name}", spelling) is None
    assert family.fused(f"strange.{name}") == ()


@given(MODULES, NUMBERS, st.sampled_from(["new.weight", "lora_A.weight", "lora_down.bias", "inner.weight_scale"]))
def test_a_part_of_a_known_module_is_unknown(pair: tuple[Family, Row], number: int, inner: str) -> None:
    """Its tensors are roles, not modules: a LoRA beside a weight, or a model that has more, is not renamed along."""
    family, row = pair
    assert family.tensor(f"{named(row, 'comfyui', number)}.{inner}") is None
