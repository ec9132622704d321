"""nunchaku's key map: it covers every Linear of the blocks of diffusers' classes, and no name twice."""

import pytest
from native_names import shapes as shapes_of

from modelopt_convert.families.nunchaku import MODELS, Nunchaku, nunchaku_of

BY_NAME = pytest.mark.parametrize("model", MODELS, ids=lambda one: one.family.name)


@BY_NAME
def test_every_linear_of_a_block_is_a_member_of_one_module(model: Nunchaku) -> None:
    """But for modulations that the engine leaves as they are, which are not in the table."""
    shapes = shapes_of(model.family.name)
    stacks = {pattern.partition("{}")[0] for pattern in model.linears}
    linears = {
        full.removesuffix(".weight")
        for full, shape in shapes.items()
        if len(shape) == 2 and full.endswith(".weight") and full.startswith(tuple(stacks))
    }
    members: dict[str, list[int]] = {}
    for pattern in model.linears:
        for number in {full.split(".")[1] for full in linears if full.startswith(pattern.partition("{}")[0])}:
            one = model.linear(pattern.replace("{}", number))
            assert one is not None
            for member in one.members:
                members.setdefault(member, []).append(one.columns)
                assert shapes[f"{member}.weight"][0] % max(1, one.parts) == 0
                assert (f"{member}.bias" in shapes) == model.biased
    assert all(sorted(columns) == list(range(len(columns))) for columns in members.values())
    left = linears - members.keys()
    assert members.keys() <= linears and all("adaLN_modulation" in one for one in left)
    assert bool(left) == (model.family.name == "z_image")


@BY_NAME
def test_what_is_renamed_and_smoothed_are_modules_of_the_class(model: Nunchaku) -> None:
    modules = {full.rpartition(".")[0] for full in shapes_of(model.family.name)}
    for other in (*model.renamed.values(), *model.smoothed, *model.smoothed.values()):
        assert other.replace("{}", "0") in modules, other
    assert len(set(model.renamed.values())) == len(model.renamed)
    assert not model.renamed.keys() & model.linears.keys()


def test_a_model_is_told_by_its_mark_and_numbers_are_plain() -> None:
    for model in MODELS:
        assert nunchaku_of([model.mark, "x"]) is model
        assert model.linear(model.mark) is not None
        assert model.linear(model.mark.replace(".0.", ".00.")) is None
        assert model.linear(model.mark.replace(".0.", ".{}.")) is None
    assert nunchaku_of(["transformer_blocks.0.attn.to_q"]) is None
