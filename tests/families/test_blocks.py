"""What a checkpoint lacks, against diffusers' classes: every tensor of every block that is taken away is missed."""

import pytest
from native_names import MODELS, OPTIONAL, family_of, shapes

from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.families.blocks import COUNTS, lacking
from modelopt_convert.families.table import recognise

ALL = {**MODELS, **OPTIONAL}


def full(model: str) -> dict[str, object]:
    """The config as diffusers saves it, with the counts that the class has by itself."""
    import diffusers
    import torch

    name, config = ALL[model]
    with torch.device("meta"):
        return dict(getattr(diffusers, name)(**config).config)


@pytest.mark.parametrize("model", ALL)
def test_nothing_is_missed_of_what_is_whole(model: str) -> None:
    found = recognise(shapes(model))
    assert found is not None
    config = full(model)
    assert lacking(found.family, shapes(model), config) is lacking(found.family, shapes(model), {}) is None
    # Every count is a key that the class has.
    stacks = {counted[0] for name in shapes(model) if (counted := found.family.count(module_of(name), "diffusers"))}
    assert stacks and all(isinstance(config[COUNTS[stack]], int) for stack in stacks & COUNTS.keys())
    # Chroma's guidance and the refiner of images are in no list that a key counts alone.
    assert stacks - COUNTS.keys() <= {
        "distilled_guidance_layer.layers",
        "distilled_guidance_layer.norms",
        "siglip_refiner",
    }


@pytest.mark.parametrize("model", MODELS)
def test_the_last_block_of_each_stack_is_missed_where_the_config_counts(model: str) -> None:
    family, config = family_of(model), full(model)
    found = recognise(shapes(model))
    assert found is not None
    for stack, key in COUNTS.items():
        if f"{stack}." not in family.stacks or not (held := [n for n in shapes(model) if n.startswith(f"{stack}.")]):
            continue
        last = max(int(name.removeprefix(f"{stack}.").partition(".")[0]) for name in held)
        rest = [name for name in shapes(model) if not name.startswith(f"{stack}.{last}.")]
        said = f"no block {last} in {stack!r}, where config.json says {key} = {config[key]}"
        assert lacking(found.family, rest, config) == said
        assert lacking(found.family, rest, {}) is None


@pytest.mark.parametrize("model", [model for model in MODELS if model not in ("sd3", "flux1 without guidance")])
def test_each_tensor_that_other_blocks_have_is_missed(model: str) -> None:
    found = recognise(shapes(model))
    assert found is not None
    names = list(shapes(model))
    several = [name for name in names if name.startswith(("transformer_blocks.1.", "blocks.1.", "layers.1."))]
    assert len(several) > 5
    for gone in several:
        said = lacking(found.family, [name for name in names if name != gone], {})
        assert said == f"no {gone!r}, which other blocks have"


def test_a_block_in_between_is_missed_without_a_config() -> None:
    rest = [name.replace("blocks.1.", "blocks.2.") for name in shapes("wan")]
    found = recognise(shapes("wan"))
    assert found is not None
    assert lacking(found.family, rest, {}) == "no block 1 in 'blocks', where there is a block 2"
