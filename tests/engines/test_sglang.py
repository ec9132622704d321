"""SGLang's view as a table: what it infers from tensors, what it reads from where, how it merges, what it refuses."""

import json
from typing import Any

import pytest
from sglang_files import (
    FILE,
    MODELOPT,
    SWAPPED,
    SWIZZLED,
    UNPACKED,
    UNSIZED,
    Tensors,
    believed,
    layout,
    marker,
    packed,
    tensor,
)

from modelopt_convert.engines.belief import Belief
from modelopt_convert.engines.sglang import believe, misread


def layers(*modules: str, algorithm: str = "nvfp4") -> dict[str, Any]:
    return {"format_version": "1.0", "layers": {module: {"format": algorithm} for module in modules}}


def test_the_defaults_are_low_and_linear() -> None:
    for belief in (believed(packed()), believed(packed(), MODELOPT), believed(packed(), None, {"format": "pt"})):
        assert layout(belief) == ("low", "linear")
        assert belief.quantized and belief.refuses is None and belief.engine == "sglang@0.5.23"
        assert belief.because == ("no key, no marker, no packed-QKV name: the defaults, low nibble first and linear",)


def test_nothing_quantized_is_not_quantized() -> None:
    belief = believed(UNPACKED)
    assert not belief.quantized and not belief.modules and belief.group_size is None
    assert not believed({}).quantized
    assert believed(UNPACKED, MODELOPT).quantized  # declared, though nothing is packed


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (SWAPPED, ("high", "linear")),
        ({"swap_weight_nibbles": False}, ("low", "linear")),
        (SWIZZLED, ("low", "128x4")),
        ({"checkpoint_weight_scale_layout": "linear"}, ("low", "linear")),
        (SWAPPED | SWIZZLED, ("high", "128x4")),
        # from_config takes this key where swap_weight_nibbles is absent, and for the nibbles alone.
        ({"checkpoint_uses_packed_qkv": True}, ("high", "linear")),
        ({"checkpoint_uses_packed_qkv": True, "swap_weight_nibbles": False}, ("low", "linear")),
    ],
)
def test_declared_keys_are_taken_each_with_its_own_default(keys: dict[str, Any], expected: tuple[str, str]) -> None:
    belief = believed(packed(), MODELOPT | keys)
    assert layout(belief) == expected
    for key in keys.keys() - {"checkpoint_uses_packed_qkv"}:
        assert [reason for reason in belief.because if key in reason and "config.json" in reason]


@pytest.mark.parametrize(
    "name",
    [
        "double_blocks.0.img_attn.qkv.weight",
        "double_blocks.12.txt_attn.qkv.bias",
        "single_blocks.3.linear1.weight_scale",
    ],
)
def test_packed_qkv_names_mean_swapped_and_swizzled(name: str) -> None:
    belief = believed(packed() | tensor(name, "BF16", (4,)))
    assert layout(belief) == ("high", "128x4")
    assert name in belief.because[0]


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.double_blocks.0.img_attn.qkv.weight",  # matched from the start of the name only
        "double_blocks.0.img_attn.qkv_norm.weight",
        "double_blocks.0.img_attn.proj.weight",
        "double_blocks.x.img_attn.qkv.weight",
        "single_blocks.0.linear2.weight",
        "single_blocks.0.linear1",
        "blocks.0.to_q.comfy_quantized",
        "comfy_quant",
    ],
)
def test_names_that_only_look_like_evidence_mean_nothing(name: str) -> None:
    assert layout(believed(packed() | tensor(name, "BF16", (4,)))) == ("low", "linear")


def test_markers_mean_swapped_and_swizzled_and_header_layers_do_not() -> None:
    assert layout(believed(packed() | marker())) == ("high", "128x4")
    belief = believed(packed(), None, {"_quantization_metadata": layers("blocks.0.to_q")})
    assert layout(belief) == ("low", "linear")
    assert belief.modules == {"blocks.0.to_q"}


@pytest.mark.parametrize("evidence", [marker(), packed("double_blocks.0.img_attn.qkv", (384, 64), (384, 8))])
@pytest.mark.parametrize("said", [{"swap_weight_nibbles": False}, {"checkpoint_weight_scale_layout": "linear"}, {}])
def test_no_key_takes_back_what_is_inferred(evidence: Tensors, said: dict[str, Any]) -> None:
    """Merged as inferred or declared."""
    both = {"swap_weight_nibbles": False, "checkpoint_weight_scale_layout": "linear"}
    assert layout(believed(packed() | evidence, MODELOPT | said)) == ("high", "128x4")
    assert layout(believed(packed() | evidence, MODELOPT | both)) == ("high", "128x4")


def test_a_declared_layout_wins_over_the_inferred_linear_one() -> None:
    assert believed(packed(), MODELOPT | SWIZZLED).layout.scales == "128x4"
    assert believed(packed(), MODELOPT).layout.scales == "linear"


def test_config_json_comes_before_the_header() -> None:
    header = {"_quantization_metadata": MODELOPT | SWAPPED, "quantization_config": MODELOPT | SWIZZLED}
    belief = believed(UNPACKED, MODELOPT, header)
    assert layout(belief) == ("low", "linear")
    assert not [reason for reason in belief.because if "header" in reason]


def test_quantization_metadata_comes_before_quantization_config() -> None:
    first, second = {"_quantization_metadata": MODELOPT | SWAPPED}, {"quantization_config": MODELOPT | SWIZZLED}
    for header in (first | second, second | first):
        assert layout(believed(UNPACKED, None, header)) == ("high", "linear")
    assert layout(believed(UNPACKED, None, second)) == ("low", "128x4")
    assert "header _quantization_metadata" in believed(UNPACKED, None, first).because[0]


def test_what_is_no_declaration_is_passed_over() -> None:
    """Layers by name, broken JSON, an algorithm without a method: the next in the order is asked."""
    nothing: list[Any] = [layers("x"), "{broken", "", {"quant_algo": "NVFP4"}]
    for first in nothing:
        header = {"_quantization_metadata": first, "quantization_config": MODELOPT | SWAPPED}
        assert layout(believed(UNPACKED, None, header)) == ("high", "linear"), first


@pytest.mark.parametrize(
    ("weight", "scale", "size"),
    [
        ((160, 80), (160, 10), 16),
        ((160, 80), (160, 16), 10),  # ModelOpt's row_col padding of K = 160
        ((160, 80), (256, 12), None),  # 160 columns are no multiple of 12
        ((256, 64), (256, 8), 16),
        ((160, 96), (256, 16), 12),  # 128x4 padding of K = 192 to 16 columns
        ((160, 80), (160, 5), 32),
        ((160, 80), (160, 0), None),
    ],
)
def test_the_group_size_is_inferred_from_shapes(
    weight: tuple[int, ...], scale: tuple[int, ...], size: int | None
) -> None:
    assert believed(packed("m", weight, scale)).group_size == size


def test_the_inferred_group_size_beats_the_declared_one() -> None:
    assert believed(packed(scale=(160, 16)), MODELOPT | {"group_size": 16}).group_size == 10


def test_the_first_module_by_name_that_tells_decides_the_group_size() -> None:
    padded, untold = packed("a", scale=(160, 16)), packed("A", scale=(160, 12))
    plain: Tensors = {}
    for number in range(20):  # so many that no other order comes out right by chance
        plain |= packed(f"b{number}")
    assert believed(plain | padded).group_size == believed(padded | plain).group_size == 10
    assert believed(plain | untold).group_size == 16


def test_a_group_size_that_no_shape_tells_is_the_declared_one() -> None:
    groups = {"group_0": {"weights": {"group_size": 32}}, "group_1": {"weights": {"group_size": 64}}}
    assert believed(UNPACKED, UNSIZED | {"config_groups": groups, "group_size": 16}).group_size == 16
    assert believed(UNPACKED, UNSIZED | {"config_groups": groups}).group_size == 32
    assert believed(packed(scale=(160, 12)), UNSIZED | {"config_groups": groups}).group_size == 32
    for nothing in ({}, {"group_0": {}}, {"group_0": {"weights": {}}}, {"group_0": None}):
        assert believed(UNPACKED, UNSIZED | {"config_groups": nothing}).group_size is None


@pytest.mark.parametrize("algorithm", ["NVFP4_AWQ", "NVFP4_SVD", "MXFP8", "MIXED_PRECISION", "W4A16_NVFP4", None])
def test_other_algorithms_are_refused_by_name(algorithm: str | None) -> None:
    refuses = believed(packed(), {"quant_method": "modelopt", "quant_algo": algorithm}).refuses
    assert refuses == f"sglang@0.5.23 refuses quant_algo {algorithm}"


def test_nvfp4_fp8_and_what_is_not_modelopts_are_not_refused() -> None:
    for config in (MODELOPT, MODELOPT | {"quant_algo": "FP8"}, {"quant_method": "fp8", "quant_algo": "X"}, None):
        assert believed(packed(), config).refuses is None


def test_packed_modules_are_inferred_file_by_file() -> None:
    together, split = packed("a", file="1"), packed("b", file="1", scale_file="2")
    assert believed(together | split).modules == {"a"}
    assert believed(packed("b", file="2") | together).modules == {"a", "b"}


def test_only_codes_with_block_scales_are_packed() -> None:
    for tensors in (
        packed("m", scale_dtype="U8"),
        packed("m", scale_dtype="F32"),
        packed("m", scale=(1600,)),  # flat scales are not block scales
        packed("m", scale=()),
        tensor("m.weight", "F8_E4M3", (160, 160)) | tensor("m.weight_scale", "F8_E4M3", (160, 10)),
        tensor("m.weight", "U8", (160, 80)),
        tensor("m.weight_scale", "F8_E4M3", (160, 10)),
    ):
        belief = believed(tensors)
        assert not belief.modules and not belief.quantized


def test_layers_of_the_header_count_if_they_are_nvfp4() -> None:
    header = {"_quantization_metadata": layers("a") | {"format_version": "1.0"}}
    assert believed(packed("a", scale_dtype="U8"), None, header).modules == {"a"}
    assert not believed(UNPACKED, None, {"_quantization_metadata": layers("a", algorithm="float8_e4m3fn")}).modules
    assert not believed(UNPACKED, None, {"_quantization_metadata": {"layers": {"a": "nvfp4", "b": None}}}).modules


def test_no_input_is_changed() -> None:
    config = {"quantization_config": MODELOPT | {"config_groups": {"g": {"weights": {"group_size": 16}}}}}
    metadata = {FILE: {"_quantization_metadata": json.dumps(layers("a"))}}
    tensors = packed("a") | marker("a")
    before = json.dumps([config, metadata, list(tensors)])
    assert believe(tensors, metadata, config) == believe(tensors, metadata, config)
    assert json.dumps([config, metadata, list(tensors)]) == before


def wrong(belief: Belief, nibbles: str = "low", scales: str = "linear", *modules: str) -> list[str]:
    return misread(belief, nibbles, scales, group_size=16, packed=frozenset(modules))


def test_a_misreading_names_both_sides() -> None:
    plain, marked = believed(packed()), believed(packed() | marker())
    assert wrong(plain) == wrong(marked, "high", "128x4") == []
    (nibbles,) = wrong(plain, nibbles="high")
    assert "read the low nibble" in nibbles and nibbles.endswith("it is the high")
    (scales,) = wrong(marked, "high", "linear")
    assert "scales as 128x4" in scales and scales.endswith("they are linear")
    assert len(wrong(marked)) == 2


def test_what_is_not_known_is_not_misread() -> None:
    for belief in (believed(packed()), believed(packed() | marker())):
        for nibbles in ("undetermined", "none", "equivalent"):
            for scales in ("undetermined", "none", "equivalent", "mixed"):
                assert wrong(belief, nibbles, scales) == []


def test_wrong_groups_missed_modules_and_refusals_are_misreadings() -> None:
    (groups,) = wrong(believed(packed(scale=(160, 16))))
    assert "groups of 10" in groups and "of 16" in groups
    split = believed(packed("b", file="1", scale_file="2") | packed("c", file="1"))
    (missed,) = wrong(split, "low", "linear", "c", "b")
    assert "1 packed modules for unquantized (b first)" in missed
    (refusal,) = wrong(believed(packed(), MODELOPT | {"quant_algo": "NVFP4_AWQ"}))
    assert "refuses" in refusal
