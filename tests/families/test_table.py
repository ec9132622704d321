"""Which family a checkpoint is of: in every spelling, under every prefix, quantized or not, whole or not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_names import MODELS, OPTIONAL, Shapes, family_of, shapes

from modelopt_convert.families.family import Spelling
from modelopt_convert.families.table import FAMILIES, LEFT_OUT, PREFIXES, left_out, recognise

ALL = [*MODELS, *OPTIONAL]
SPELLED = [(model, spelling) for model in ALL for spelling in family_of(model).spellings]
# The companions of a packed weight in each dialect, beside what stays.
COMPANIONS = {
    "modelopt": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
    "comfyui": ("weight", "weight_scale", "weight_scale_2", "input_scale", "comfy_quant"),
    "comfyui's old FP8": ("weight", "scale_weight", "scale_input"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
    "torchao": ("_weight_qdata", "_weight_scale", "_weight_per_tensor_scale"),
    "bitsandbytes": ("weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"),
}


def spelled(model: str, spelling: Spelling, prefix: str = "") -> Shapes:
    """The model's names in one spelling; of joined modules' shapes only the width is right."""
    found: Shapes = {}
    for name, shape in shapes(model).items():
        place = family_of(model).native_tensor(name, spelling)
        assert place is not None
        found[prefix + place[0]] = shape
    return found


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("model", "spelling"), SPELLED)
def test_it_is_known_in_every_spelling_under_every_prefix(model: str, spelling: Spelling, prefix: str) -> None:
    names = spelled(model, spelling, prefix)
    found = recognise(names)
    assert found is not None
    assert (found.family.name, found.prefix) == (family_of(model).name, prefix)
    # Where two spellings are the same, either is right; where they are not, one is.
    assert set(spelled(model, found.spelling, prefix)) == set(names)
    first, known, *_, blocks = found.evidence
    assert found.family.title in first and f"{len(names)} of {len(names)} tensors" in known and "blocks" in blocks


@pytest.mark.parametrize("roles", COMPANIONS.values(), ids=COMPANIONS)
@pytest.mark.parametrize(("model", "spelling"), SPELLED)
def test_a_quantized_one_is_known_too(model: str, spelling: Spelling, roles: tuple[str, ...]) -> None:
    """Every matrix is packed; the companions go where the weight goes."""
    family = family_of(model)
    names: Shapes = {}
    for name, shape in spelled(model, spelling).items():
        module, _, role = name.rpartition(".")
        new = [f"{module}.{one}" for one in roles] if role == "weight" and len(shape) > 1 else [name]
        names |= dict.fromkeys(new, shape)
    found = recognise(names)
    assert found is not None and found.family.name == family.name
    assert set(spelled(model, found.spelling)) == set(spelled(model, spelling))
    assert f"{len(names)} of {len(names)} tensors have its names" in found.evidence
    if found.spelling != "diffusers":
        assert not [name for name in names if family.tensor(name) is None]


def test_qwen_image_is_comfyuis_by_prefix_or_marker() -> None:
    names = spelled("qwen_image", "diffusers")
    marked = names | {"transformer_blocks.0.attn.to_q.comfy_quant": (20,)}
    prefixed = spelled("qwen_image", "diffusers", "model.diffusion_model.")
    assert [found and found.spelling for found in map(recognise, (names, marked, prefixed))] == [
        "diffusers",
        "comfyui",
        "comfyui",
    ]


@pytest.mark.parametrize("model", ["flux1", "flux2", "chroma"])
def test_scales_of_norms_are_black_forest_labs(model: str) -> None:
    roles: dict[Spelling, str] = {"original": "scale", "comfyui": "weight"}
    for spelling, role in roles.items():
        names = spelled(model, spelling, "model.diffusion_model.")
        assert any(name.endswith(f"_norm.{role}") for name in names)
        found = recognise(names)
        assert found is not None and found.spelling == spelling


def test_of_a_whole_checkpoint_the_rest_is_said() -> None:
    rest = {
        "vae.decoder.conv_in.weight": "the VAE",
        "audio_vae.encoder.conv_in.weight": "the VAE of sound",
        "vocoder.conv_pre.weight": "the vocoder",
        "text_encoders.t5xxl.transformer.shared.weight": "a text encoder",
        "text_embedding_projection.aggregate_embed.weight": "the projection of a text encoder",
    }
    inside = {"audio_embeddings_connector.learnable_registers": "the connectors, a component of their own"}
    for prefix in ("model.diffusion_model.", "velocity_model."):
        names = spelled("ltx2", "original", prefix)
        strangers = rest | {prefix + name: what for name, what in inside.items()}
        found = recognise(names | dict.fromkeys(strangers, (4, 4)))
        assert found is not None and found.prefix == prefix
        assert {name: left_out(name, found) for name in strangers} == strangers
        assert {left_out(name, found) for name in names} == {None}
        # A stranger that nobody knows is not called anything; nor is one with a known start inside the transformer.
        assert left_out("new_part.weight", found) is None
        assert left_out(f"{prefix}vae.decoder.conv_in.weight", found) is None


def test_no_name_of_a_transformer_is_left_out() -> None:
    for model, spelling in SPELLED:
        for prefix in PREFIXES:
            names = spelled(model, spelling, prefix)
            found = recognise(names)
            assert found is not None
            assert not [name for name in names if left_out(name, found)], (model, spelling, prefix)
    assert all(start.endswith(".") for start in LEFT_OUT)


def test_a_norm_that_z_image_does_not_have_is_left_out() -> None:
    found = recognise(spelled("z_image", "comfyui"))
    assert found is not None
    assert left_out("norm_final.weight", found) == "a norm that the model does not have"
    assert found.family.tensor("norm_final.weight") is None


def test_two_transformers_in_one_checkpoint_are_no_answer() -> None:
    both = spelled("flux1", "original") | spelled("wan", "original", "model.diffusion_model.")
    assert recognise(both) is None
    assert recognise(
        spelled("ltx2", "original", "velocity_model.") | spelled("ltx2", "original", "diffusion_model.")
    ) is (None)


@pytest.mark.parametrize(("model", "spelling"), SPELLED)
def test_without_one_of_its_marks_it_is_not_known(model: str, spelling: Spelling) -> None:
    """A ControlNet or an adapter has most of a transformer's names, and is none."""
    family = family_of(model)
    for mark in family.marks:
        place = family.native(mark, spelling)
        assert place is not None
        assert (
            recognise({n: s for n, s in spelled(model, spelling).items() if not n.startswith(f"{place[0]}.")}) is None
        )


@given(st.dictionaries(st.text(max_size=30) | st.sampled_from(list(spelled("flux1", "original"))), st.just((2, 2))))
def test_any_names_have_an_answer(names: Shapes) -> None:
    found = recognise(names)
    assert found is None or found.family.name == "flux1"


def test_the_number_of_blocks_comes_with_the_family() -> None:
    """Only Stable Diffusion 3 has another last block."""
    assert [family.name for family in FAMILIES if family.needs_blocks] == ["sd3"]
    spellings: tuple[Spelling, ...] = ("diffusers", "original")
    for spelling in spellings:
        found = recognise(spelled("sd3", spelling))
        assert found is not None and found.family.blocks == 3
        modules = [f"joint_blocks.{number}.context_block.adaLN_modulation.1" for number in range(3)]
        assert [found.family.swapped(module) for module in modules] == [False, False, True]
    with pytest.raises(ValueError, match="recognise"):
        family_of("sd3").swapped(modules[0])
