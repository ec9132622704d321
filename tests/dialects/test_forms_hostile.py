"""Headers altered at random: a form describes them or refuses them in one line, and never fails in another way."""

import json
from collections.abc import Mapping

from described import Files, Module, description, written_out
from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.dialects.form import Canonical, grouped
from modelopt_convert.dialects.scales import check_described
from modelopt_convert.dialects.targets import FORMS
from modelopt_convert.formats.dtypes import DTYPE_BITS, num_bits
from modelopt_convert.run.errors import InputError

MODULES = {
    "modelopt": {"x": Module("nvfp4", 20, 32)},
    "comfyui": {"x": Module("nvfp4", 20, 32), "y": Module("fp8", 6, 16), "z": Module("mxfp8", 9, 64)},
    "bfl-diffusers": {"x": Module("nvfp4", 20, 32), "y": Module("fp8", 6, 16, by_row=True)},
    "compressed-tensors": {"x": Module("nvfp4", 20, 32), "y": Module("fp8", 6, 16), "z": Module("mxfp8", 9, 64)},
    "torchao": {"x": Module("nvfp4", 20, 32), "y": Module("fp8", 6, 16), "z": Module("mxfp8", 9, 64)},
    "bf16": {"x": Module("nvfp4", 20, 32)},
}
DTYPES = st.sampled_from([name for name, bits in DTYPE_BITS.items() if bits >= 8])
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 6, 16, 20, 32, 128]), max_size=4).map(tuple)
ROLES = st.sampled_from([
    "weight", "weight_scale", "weight_scale_2", "input_scale", "bias", "comfy_quant", "scale_weight", "scale_input",
    "weight_packed", "weight_global_scale", "input_global_scale", "_weight_qdata", "_weight_scale", "pre_quant_scale",
    "_weight_per_tensor_scale", "weight_zero_point", "scaled_fp8", "input_quantizer._amax",
])  # fmt: skip
KEYS = (
    "format", "layers", "x", "_type", "_data", "block_size", "is_swizzled_scales", "elem_dtype", "config_groups", "g",
    "weights", "symmetric", "quantization_status", "swap_weight_nibbles", "quant_method", "dynamic_input_scale",
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 40) | st.sampled_from(["", "nvfp4", "mxfp8", "NVFP4Tensor", "Tensor"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(target=st.sampled_from(sorted(FORMS)), reader=st.sampled_from(sorted(FORMS)), data=st.data())
def test_whatever_lies_in_a_header(target: str, reader: str, data: st.DataObject) -> None:
    reader = data.draw(st.sampled_from([target, reader]))
    files = Files()
    headers, stored = written_out(FORMS[target].write(description(MODULES[target], files, 0), files.read), files)
    tensors = dict(headers.tensors)
    for _ in range(data.draw(st.integers(0, 3))):
        name = data.draw(st.sampled_from(sorted(tensors)) | st.tuples(st.sampled_from("xyw"), ROLES).map(".".join))
        if data.draw(st.booleans()):
            tensors.pop(name, None)
        elif not num_bits(dtype := data.draw(DTYPES), shape := data.draw(SHAPES)) % 8:
            count = num_bits(dtype, shape) // 8
            raw = data.draw(st.sampled_from([b"\0", b"\1", b'{"format": "nvfp4"}', b"\x7f\xc0"]))
            tensors[name] = stored.add(name, dtype, shape, (raw * (count // len(raw) + 1))[:count])
    metadata = dict(headers.metadata["f"])
    config = dict(headers.config)
    if data.draw(st.booleans()):
        key = data.draw(st.sampled_from([*sorted(metadata), "_quantization_metadata", "quantization_config"]))
        metadata[key] = json.dumps(data.draw(JSON))
        config["quantization_config"] = data.draw(JSON)
    shapes: Mapping[str, tuple[int, int]] = data.draw(
        st.sampled_from([{}, {"x": (20, 32)}, {"x": (7, 16), "z": (9, 48)}])
    )
    try:
        found = FORMS[reader].read(Headers(tensors, {"f": metadata}, config, ()), stored.read, shapes, "IN")
        check_described(found, "IN")
    except InputError as error:
        assert "\n" not in error.message and error.hint and len(error.message) < 1000
        return
    _check(found, tensors, stored)
    for form in FORMS.values():
        try:
            written = form.write(found, stored.read)
        except InputError as error:
            assert "\n" not in error.message and error.hint
            continue
        for info in written.tensors.values():
            assert len(stored.whole(info)) == info.num_bytes


def _check(found: Canonical, tensors: Mapping[str, TensorInfo], stored: Files) -> None:
    """Nothing is lost, and every quantized module is as a description says."""
    assert not tensors.keys() - found.tensors.keys() - found.fates.keys()
    roles = grouped(found.tensors.values())
    for name, one in found.modules.items():
        shape = roles[name]["weight"].shape
        assert shape == (one.rows, one.columns // 2 if one.algorithm == "nvfp4" else one.columns)
        scale = roles[name]["weight_scale"]
        if one.algorithm == "nvfp4":
            assert (scale.dtype, scale.shape) == ("F8_E4M3", (one.rows, one.columns // 16))
            assert (roles[name]["weight_scale_2"].dtype, roles[name]["weight_scale_2"].shape) == ("F32", ())
        elif one.algorithm == "mxfp8":
            assert (scale.dtype, scale.shape) == ("U8", (one.rows, -(-one.columns // 32)))
        else:
            assert scale.dtype == "F32" and scale.shape in ((), (one.rows,))
    for info in found.tensors.values():
        assert len(stored.whole(info)) == info.num_bytes
