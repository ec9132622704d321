"""Every spelling of ComfyUI's files, as ComfyUI 0.29.0 would take it; and one line for what it would take wrongly."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from described import Files, Module, description, read_back, same, written_out

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.dialects.form import Canonical, Quantized
from modelopt_convert.dialects.renaming import under_diffusers_names
from modelopt_convert.dialects.scales import check_described
from modelopt_convert.dialects.targets import FORMS
from modelopt_convert.families.flux2 import FLUX2
from modelopt_convert.families.table import Found
from modelopt_convert.run.errors import InputError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORM = FORMS["comfyui"]
Tensors = dict[str, torch.Tensor]


def read(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> tuple[Canonical, Files]:
    files = Files()
    infos: dict[str, TensorInfo] = {name: files.put(name, tensor) for name, tensor in tensors.items()}
    found = FORM.read(Headers(infos, {"f": dict(metadata or {})}, {}, ()), files.read, {}, "IN")
    assert not infos.keys() - found.tensors.keys() - found.fates.keys()
    return found, files


def marker(entry: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)


def layers(**formats: Any) -> dict[str, str]:
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": formats})}


def weight(rows: int = 6, columns: int = 32, dtype: torch.dtype = E4M3) -> torch.Tensor:
    return torch.arange(rows * columns).remainder(97).to(torch.uint8).reshape(rows, columns).view(dtype)


ONE = torch.tensor(0.25)
FP8 = Quantized("fp8", 6, 32)


@pytest.mark.parametrize("sentinel", [torch.zeros(n, dtype=t) for n in (0, 1, 2) for t in (E4M3, torch.float32)])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_older_spelling(sentinel: torch.Tensor, prefix: str) -> None:
    tensors = {
        f"{prefix}scaled_fp8": sentinel,
        f"{prefix}a.weight": weight(),
        f"{prefix}a.scale_weight": ONE,
        f"{prefix}a.scale_input": ONE * 2,
        f"{prefix}b.weight": torch.ones(3, 3, dtype=torch.bfloat16),
    }
    found, files = read(tensors)
    assert found.modules == {f"{prefix}a": FP8}
    assert files.tensor(found.tensors[f"{prefix}a.weight_scale"]) == 0.25
    assert files.tensor(found.tensors[f"{prefix}a.input_scale"]) == 0.5
    fate = found.fates[f"{prefix}scaled_fp8"]
    assert "float8_e4m3fn" in fate and ("full precision" in fate) == (sentinel.numel() == 2)
    assert f"{prefix}scaled_fp8" in found.keep and f"{prefix}scaled_fp8" not in found.tensors


def test_an_input_scale_of_one_is_dropped_as_comfyui_does() -> None:
    tensors = {"a.weight": weight(), "a.scale_weight": ONE, "a.scale_input": torch.tensor(1.0)}
    found, _ = read(tensors | {"scaled_fp8": torch.zeros(1, dtype=E4M3)})
    assert "a.input_scale" not in found.tensors
    assert "drops" in found.fates["a.scale_input"] and "a.scale_input" in found.keep
    modern, _ = read({"a.weight": weight(), "a.weight_scale": ONE, "a.input_scale": torch.tensor(1.0)})
    assert "a.input_scale" in modern.tensors  # in the newer spelling it stays


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_scale_in_any_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scale = torch.full(shape, 0.3).to(dtype)
    found, files = read(
        {"a.weight": weight(), "a.weight_scale": scale, "a.comfy_quant": marker({"format": "float8_e4m3fn"})}
    )
    mine = found.tensors["a.weight_scale"]
    assert (mine.dtype, mine.shape) == ("F32", ())
    assert files.tensor(mine) == scale.float().reshape(())
    assert ("a.weight_scale" in found.keep) == (dtype != torch.float32)


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_a_row(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scale = (torch.arange(6) / 7 + 0.1).to(dtype)
    found, files = read({"a.weight": weight(), "a.weight_scale": scale.reshape(shape)})
    assert found.tensors["a.weight_scale"].shape == (6,)
    assert torch.equal(files.tensor(found.tensors["a.weight_scale"]), scale.float())
    out, _ = written_out(FORM.write(found, files.read), files)
    assert out.tensors["a.weight_scale"].shape == (6, 1)


def test_one_scale_for_each_member_of_a_fused_module() -> None:
    name = "double_blocks.0.img_attn.qkv"
    scale = torch.tensor([0.1, 0.2, 0.3])
    described, files = read({f"{name}.weight": weight(), f"{name}.weight_scale": scale})
    found = under_diffusers_names(described, Found(FLUX2, "comfyui", "", []), "IN")
    check_described(found, "IN")
    for which, member in enumerate(("to_q", "to_k", "to_v")):
        info = found.tensors[f"transformer_blocks.0.attn.{member}.weight_scale"]
        assert info.shape == () and files.tensor(info) == scale[which]
    alone, _ = read({"a.weight": weight(), "a.weight_scale": scale})
    with pytest.raises(InputError) as caught:
        check_described(alone, "IN")
    assert caught.value.code == "dialect.shape"


def test_a_plain_cast_has_codes_that_are_the_values() -> None:
    tensors = {"a.weight": weight(), "a.bias": torch.ones(6).to(E4M3), "n.weight": torch.tensor([1.5, -0.25]).to(E4M3)}
    found, files = read(tensors)
    assert found.modules == {"a": FP8}
    assert files.tensor(found.tensors["a.weight_scale"]) == 1.0
    assert "are the values" in found.fates["a.weight"]
    for name in ("a.bias", "n.weight"):
        assert torch.equal(files.tensor(found.tensors[name]), tensors[name].bfloat16()) and name in found.keep
    decoded, _ = written_out(FORMS["bf16"].write(found, files.read), files)
    assert decoded.tensors["a.weight"].dtype == "BF16"


def test_e5m2_goes_to_bf16_and_comfyui_alone() -> None:
    tensors = {
        "a.weight": weight(dtype=E5M2),
        "a.weight_scale": ONE,
        "a.comfy_quant": marker({"format": "float8_e5m2"}),
    }
    found, files = read(tensors)
    assert found.modules["a"].algorithm == "fp8_e5m2"
    out = FORMS["bf16"].write(found, files.read)
    assert torch.equal(files.tensor(out.tensors["a.weight"]), (tensors["a.weight"].float() * 0.25).bfloat16())
    for target in ("modelopt", "torchao", "compressed-tensors", "bfl-diffusers"):
        with pytest.raises(InputError) as caught:
            FORMS[target].write(found, files.read)
        assert caught.value.code == "convert.no_place" and "fp8_e5m2" in caught.value.message


@pytest.mark.parametrize("way", ["tensor", "header", "both"])
def test_markers_header_or_both_and_formats_mixed(way: str) -> None:
    files = Files()
    modules = {
        "a": Module("nvfp4", 20, 48),
        "b": Module("fp8", 5, 16),
        "c": Module("mxfp8", 40, 64),
        "d": Module("fp8", 9, 16, by_row=True),
    }
    described = description(modules, files, 3)
    written = FORM.write(described, files.read)
    if way == "header":
        rest = {name: info for name, info in written.tensors.items() if not name.endswith(".comfy_quant")}
        written = replace(written, tensors=rest)
    if way == "tensor":
        written = replace(written, metadata={"format": "pt"})
    found, stored = read_back(FORM, written, files, {})
    same(described, files, found, stored)


def test_black_forest_labs_files_have_no_markers() -> None:
    files = Files()
    described = description({"a": Module("nvfp4", 32, 64)}, files, 1)
    written = FORM.write(described, files.read)
    rest = {name: info for name, info in written.tensors.items() if not name.endswith(".comfy_quant")}
    found, stored = read_back(FORM, replace(written, tensors=rest, metadata={}), files, {})
    same(described, files, found, stored)
    # Among marked modules one that is packed and not marked would be a guess.
    more = description({"a": Module("nvfp4", 32, 64), "b": Module("fp8", 4, 16)}, files, 1)
    half = {name: info for name, info in FORM.write(more, files.read).tensors.items() if name != "a.comfy_quant"}
    with pytest.raises(InputError) as caught:
        read_back(FORM, replace(written, tensors=half, metadata={}), files, {})
    assert caught.value.code == "dialect.unmarked"


def test_full_precision_is_said_and_kept() -> None:
    entry = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    found, _ = read({"a.weight": weight(), "a.weight_scale": ONE, "a.comfy_quant": marker(entry)})
    assert "full precision" in found.fates["a.comfy_quant"] and "a.comfy_quant" in found.keep


@pytest.mark.parametrize(
    "empty", [torch.zeros(32, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8), marker({"x": 1})]
)
def test_an_empty_marker_of_a_plain_module_says_nothing(empty: torch.Tensor) -> None:
    found, _ = read({"a.weight": torch.ones(4, 4, dtype=torch.bfloat16), "a.comfy_quant": empty})
    assert found.modules == {} and found.fates["a.comfy_quant"].startswith("left out") and "a.comfy_quant" in found.keep


def nvfp4(rows: int = 16, columns: int = 64) -> Tensors:
    files = Files()
    written = FORM.write(description({"a": Module("nvfp4", rows, columns, bias=False)}, files, 0), files.read)
    return {name: files.tensor(info) for name, info in written.tensors.items()}


def changed(**roles: torch.Tensor | None) -> Callable[[], Tensors]:
    def make() -> Tensors:
        tensors = nvfp4() | {f"a.{role}": tensor for role, tensor in roles.items() if tensor is not None}
        return {name: tensor for name, tensor in tensors.items() if roles.get(name.removeprefix("a."), 0) is not None}

    return make


def fp8(**roles: torch.Tensor) -> Callable[[], Tensors]:
    said = {"a.weight": weight(), "a.weight_scale": ONE, "a.comfy_quant": marker({"format": "float8_e4m3fn"})}
    return lambda: said | {f"a.{role}": tensor for role, tensor in roles.items()}


NUL = torch.zeros(9, dtype=torch.uint8)
SILENT = {
    "NUL bytes": NUL,
    "no bytes": torch.zeros(0, dtype=torch.uint8),
    "JSON without it": marker({"full_precision_matrix_mult": False}),
}


@pytest.mark.parametrize("what", SILENT)
@pytest.mark.parametrize("said", [{}, layers(a={"format": "nvfp4"})], ids=["tensors", "header"])
@pytest.mark.parametrize("kind", [Module("nvfp4", 16, 64), Module("mxfp8", 32, 64), Module("fp8", 4, 16)])
def test_a_marker_without_a_format_leaves_it_to_the_tensors(what: str, said: dict[str, str], kind: Module) -> None:
    if said and kind.algorithm != "nvfp4":
        said = layers(a={"format": {"fp8": "float8_e4m3fn"}.get(kind.algorithm, kind.algorithm)})
    files = Files()
    described = description({"a": kind}, files, 0)
    written = FORM.write(described, files.read).tensors
    tensors = {name: files.tensor(info) for name, info in written.items()} | {"a.comfy_quant": SILENT[what]}
    found, stored = read(tensors, said)
    same(described, files, replace(found, fates={}, keep={}), stored)
    told = found.fates["a.comfy_quant"]
    assert (
        what in told and told.endswith("by the header" if said else "by its tensors") and "a.comfy_quant" in found.keep
    )


@pytest.mark.parametrize(("rows", "way"), [(128, "named"), (32, "shape"), (128, "")])
def test_mxfp8_without_a_marker_needs_a_name_or_a_shape(rows: int, way: str) -> None:
    files, others = Files(), Files()
    described = description({"a": Module("mxfp8", rows, 128)}, files, 0)
    infos = {one.name: one for one in FORM.write(described, files.read).tensors.values()}
    del infos["a.comfy_quant"]
    bare = {name: others.put(name, files.tensor(one)) for name, one in infos.items()}
    headers = Headers(bare, {"f": {}}, {}, (), is_named=way == "named")
    if way:
        return same(described, files, FORM.read(headers, others.read, {}, "IN"), others)
    with pytest.raises(InputError) as caught:
        FORM.read(headers, others.read, {}, "IN")
    assert caught.value.code == "dialect.unmarked" and "--from modelopt row by row" in caught.value.hint


PLAIN = torch.ones(16, 64, dtype=torch.bfloat16)
REFUSED: list[tuple[str, Callable[[], Tensors], dict[str, str], str]] = [
    ("NUL, no global", changed(comfy_quant=NUL, weight_scale_2=None), {}, "dialect.marker"),
    ("NUL, no scales", changed(comfy_quant=NUL, weight_scale=None), {}, "dialect.marker"),
    ("NUL beside I8", changed(comfy_quant=NUL, weight=torch.ones(16, 32, dtype=torch.int8)), {}, "dialect.marker"),
    ("NUL, scales row-major", changed(comfy_quant=NUL, weight_scale=torch.ones(16, 4).to(E4M3)), {}, "dialect.shape"),
    ("no format, a key nobody knows", changed(comfy_quant=marker({"t": True})), {}, "dialect.marker"),
    ("NUL, header says otherwise", changed(comfy_quant=NUL), layers(a={"format": "mxfp8"}), "dialect.contradiction"),
    ("a list", changed(comfy_quant=marker(["nvfp4"])), {}, "dialect.marker"),
    ("deeply nested", changed(comfy_quant=torch.full((4000,), ord("["), dtype=torch.uint8)), {}, "dialect.marker"),
    ("a key nobody knows", changed(comfy_quant=marker({"format": "nvfp4", "t": True})), {}, "dialect.marker"),
    ("another format", changed(comfy_quant=marker({"format": "int8_tensorwise"})), {}, "dialect.format"),
    ("another dtype", changed(comfy_quant=marker({"format": "float8_e4m3fn"})), {}, "dialect.contradiction"),
    ("not quantized", changed(weight=PLAIN), {}, "dialect.contradiction"),
    ("header says otherwise", nvfp4, layers(a={"format": "mxfp8"}), "dialect.contradiction"),
    ("header is no object", changed(comfy_quant=None), layers(a="nvfp4"), "dialect.marker"),
    ("scale alone", lambda: {"a.weight": PLAIN, "a.weight_scale": ONE}, {}, "dialect.contradiction"),
    ("scales row-major", changed(weight_scale=torch.ones(16, 4).to(E4M3)), {}, "dialect.shape"),
    ("no scales", changed(weight_scale=None), {}, "dialect.shape"),
    ("no global scale", changed(weight_scale_2=None), {}, "dialect.shape"),
    ("two global scales", changed(weight_scale_2=torch.ones(2)), {}, "dialect.shape"),
    ("two scales", changed(input_scale=torch.ones(2)), {}, "dialect.shape"),
    ("odd rows", changed(bias=torch.ones(40)), {}, "dialect.shape"),
    ("padding unknown", changed(weight=torch.zeros(16, 32, dtype=torch.uint8)), {}, "dialect.padded"),
    ("svdquant", changed(svdquant_lora_a=torch.ones(4, 64)), {}, "dialect.role"),
    ("awq", changed(pre_quant_scale=torch.ones(63)), {}, "dialect.shape"),
    ("a factor for other columns", changed(pre_quant_scale=torch.ones(65)), {}, "dialect.shape"),
    ("awq of FP8", fp8(pre_quant_scale=torch.ones(64)), {}, "dialect.role"),
    ("both spellings", fp8(scale_weight=ONE), {}, "dialect.contradiction"),
    ("hidden sentinel", lambda: {"a.weight": weight(), "a.scale_weight": ONE}, layers(), "dialect.contradiction"),
    ("a second scale", fp8(weight_scale_2=ONE), {}, "dialect.shape"),
    ("a scale for seven", fp8(weight_scale=torch.ones(7)), {}, "dialect.shape"),
    ("blocks of scales", fp8(weight_scale=torch.ones(2, 2)), {}, "dialect.shape"),
    ("integer scale", fp8(weight_scale=torch.ones(1, dtype=torch.uint8)), {}, "dialect.shape"),
    ("E8M0 unmarked", lambda: {"a.weight": weight(), "a.weight_scale": weight()}, {}, "dialect.unmarked"),
    ("packed without scales", lambda: {"a.weight": torch.ones(4, 4, dtype=torch.uint8)}, {}, "dialect.shape"),
    ("MXFP8 with an input scale", lambda: {**mxfp8(), "a.input_scale": ONE}, {}, "dialect.shape"),
]  # fmt: skip


def mxfp8() -> Tensors:
    files = Files()
    written = FORM.write(description({"a": Module("mxfp8", 32, 64, bias=False)}, files, 0), files.read)
    return {name: files.tensor(info) for name, info in written.tensors.items()}


@pytest.mark.parametrize(("what", "make", "metadata", "code"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_contradicts_itself_is_refused_in_one_line(
    what: str, make: Callable[[], Tensors], metadata: dict[str, str], code: str
) -> None:
    with pytest.raises(InputError) as caught:
        read(make(), metadata)
    assert caught.value.code == code
    assert "\n" not in caught.value.message and caught.value.hint


def test_a_known_shape_tells_padding_from_rows_and_columns() -> None:
    """Without a bias nothing in the file says how many rows and columns there were."""
    files = Files()
    described = description(
        {"a": Module("mxfp8", 33, 48, bias=False), "b": Module("nvfp4", 17, 48, bias=False)}, files, 2
    )
    written = FORM.write(described, files.read)
    assert (written.tensors["a.weight"].shape, written.tensors["a.weight_scale"].shape) == ((64, 64), (128, 4))
    assert written.tensors["b.weight"].shape == (32, 24)
    found, stored = read_back(FORM, written, files, {"a": (33, 48), "b": (17, 48)})
    same(described, files, found, stored)
    for wrong in ({"a": (33, 80), "b": (17, 48)}, {"a": (70, 48), "b": (17, 48)}, {"a": (33, 48), "b": (17, 80)}):
        with pytest.raises(InputError) as caught:
            read_back(FORM, written, files, wrong)
        assert caught.value.code == "dialect.shape"
