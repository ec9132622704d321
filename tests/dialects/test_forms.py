"""What a form writes its own reader describes again, bit for bit, but for what was announced: for random modules."""

import struct
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from described import Files, Module, description, read_back, same, written_out
from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt_convert.checkpoint.recipe import recipe_of
from modelopt_convert.dialects.compressed_tensors_form import largest_counts
from modelopt_convert.dialects.form import Algorithm, Written
from modelopt_convert.dialects.targets import FORMS
from modelopt_convert.formats.dtypes import DTYPE_BITS
from modelopt_convert.run.errors import InputError

HOLDS: Mapping[str, tuple[Algorithm, ...]] = {
    "comfyui": ("nvfp4", "fp8", "fp8_e5m2", "mxfp8"),
    "bfl-diffusers": ("nvfp4", "fp8"),
    "compressed-tensors": ("nvfp4", "fp8", "mxfp8"),
    "torchao": ("nvfp4", "fp8", "mxfp8"),
    "bf16": ("nvfp4", "fp8", "fp8_e5m2", "mxfp8"),
}
MODULES = st.builds(
    Module,
    algorithm=st.just("nvfp4"),
    rows=st.integers(1, 150),
    columns=st.integers(1, 9).map(lambda blocks: 16 * blocks),
    bias=st.booleans(),
    by_row=st.booleans(),
    calibrated=st.booleans(),
    factor=st.floats(2.0**-60, 2.0**60, width=32),
)


UPPER = 1 + np.arange(1 << 22, 1 << 23, 97, dtype=np.float32) / np.float32(1 << 23)
NO_RECIPROCAL = float(UPPER[np.float32(1) / (np.float32(1) / UPPER) != UPPER][0])


def shapes(modules: Mapping[str, Module]) -> dict[str, tuple[int, int]]:
    return {name: (one.rows, one.columns) for name, one in modules.items()}


@settings(max_examples=40, deadline=None)
@given(target=st.sampled_from(sorted(HOLDS)), several=st.lists(MODULES, min_size=1, max_size=3), data=st.data())
def test_what_is_written_is_read_again(target: str, several: list[Module], data: st.DataObject) -> None:
    kinds = [data.draw(st.sampled_from(HOLDS[target])) for _ in several]
    modules = {
        f"blocks.{number}.x": replace(one, algorithm=kind)
        for number, (one, kind) in enumerate(zip(several, kinds, strict=True))
    }
    if target == "bfl-diffusers":
        modules = {name: replace(one, calibrated=True) for name, one in modules.items()}
    _check(target, modules, data.draw(st.integers(0, 99)), data)


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(["nvfp4", "fp8", "rows", "mxfp8"]),
    several=st.lists(MODULES, min_size=1, max_size=2),
    data=st.data(),
)
def test_modelopt_has_one_format_for_all_modules(kind: str, several: list[Module], data: st.DataObject) -> None:
    made: Mapping[str, Algorithm] = {"nvfp4": "nvfp4", "mxfp8": "mxfp8"}
    calibrated = data.draw(st.booleans())
    several = [replace(one, rows=max(2, one.rows)) for one in several]
    modules = {
        f"blocks.{number}.x": replace(
            one, algorithm=made.get(kind, "fp8"), by_row=kind == "rows", calibrated=calibrated
        )
        for number, one in enumerate(several)
    }
    written = _check("modelopt", modules, data.draw(st.integers(0, 99)), data)
    names = {"nvfp4": "NVFP4", "fp8": "FP8", "rows": "FP8_PER_CHANNEL_PER_TOKEN", "mxfp8": "MXFP8"}
    assert written.config is not None and written.config["quantization_config"]["quant_algo"] == names[kind]


def _check(target: str, modules: Mapping[str, Module], seed: int, data: st.DataObject) -> Written:
    files, form = Files(), FORMS[target]
    described = description(modules, files, seed)
    written = form.write(described, files.read)
    found, stored = read_back(form, written, files, shapes(modules))
    same(written.expected(described), files, found, stored)
    told = written.changed.keys() | written.instead.keys()
    assert told == written.why.keys() and written.keep <= told
    if target in ("comfyui", "modelopt"):
        assert not told
    # Any range of what is written is as it is in the whole, and the recipe says what it takes of files.
    info = data.draw(st.sampled_from(sorted(written.tensors.values(), key=lambda one: one.name)))
    begin = data.draw(st.integers(0, info.num_bytes))
    count = data.draw(st.integers(0, info.num_bytes - begin))
    taken: set[tuple[str, int]] = set()
    part = bytearray(count)

    def fetch(file: str, start: int, into: memoryview) -> None:
        taken.update((file, at) for at in range(start, start + into.nbytes))
        files.fetch(file, start, into)

    recipe_of(info).fill(begin, memoryview(part), fetch)
    assert bytes(part) == files.whole(info)[begin : begin + count]
    if count:
        said = {
            (one.file, at)
            for one in recipe_of(info).extents(begin, count)
            for at in range(one.start, one.start + one.num_bytes)
        }
        assert taken == said
    return written


@settings(max_examples=300, deadline=None)
@given(bits=st.integers(0x00800000, 0x7E7FFFFF))
def test_compressed_tensors_announces_the_factors_that_no_reciprocal_gives(bits: int) -> None:
    factor = struct.unpack("<f", struct.pack("<I", bits))[0]
    files = Files()
    described = description({"x": Module("nvfp4", 1, 16, factor=factor, calibrated=False)}, files, 0)
    written = FORMS["compressed-tensors"].write(described, files.read)
    near = int((np.float32(1) / np.float32(factor)).view(np.uint32)) + np.arange(-2, 3)
    exists = bool((np.float32(1) / near.astype(np.uint32).view(np.float32) == np.float32(factor)).any())
    assert ("x.weight_scale_2" in written.changed) == (not exists)
    if not exists:
        changed = written.changed["x.weight_scale_2"]
        assert changed is not None and written.keep == {"x.weight_scale_2"}
        (other,) = struct.unpack("<I", changed)
        assert abs(other - bits) == 1
    found, stored = read_back(FORMS["compressed-tensors"], written, files, {})
    same(written.expected(described), files, found, stored)


@pytest.mark.parametrize("factor", [0.0, float("inf"), float("nan"), 2.0**-140])
def test_a_scale_without_a_reciprocal_is_refused(factor: float) -> None:
    files = Files()
    described = description({"x": Module("nvfp4", 4, 16, factor=factor)}, files, 0)
    with pytest.raises(InputError) as caught:
        FORMS["compressed-tensors"].write(described, files.read)
    assert caught.value.code == "convert.reciprocal"


def test_what_a_reader_of_compressed_tensors_cannot_give_back_is_kept() -> None:
    files = Files()
    described = description(
        {"x": Module("nvfp4", 4, 16, factor=1.5), "y": Module("nvfp4", 4, 16, factor=0.5)}, files, 0
    )
    written = FORMS["compressed-tensors"].write(described, files.read)
    stored = dict(written.tensors)
    odd = files.put("x.weight_global_scale", torch.tensor([NO_RECIPROCAL]))
    found, _ = read_back(FORMS["compressed-tensors"], replace(written, tensors=stored | {odd.name: odd}), files, {})
    assert odd.name in found.keep and "y.weight_global_scale" not in found.keep


def test_siblings_with_other_global_scales_are_what_vllm_gets_wrong() -> None:
    files = Files()
    modules = {name: Module("nvfp4", 4, 16, factor=factor) for name, factor in (("q", 0.5), ("k", 0.5), ("v", 0.25))}
    described = description(modules, files, 0)
    assert largest_counts(described, [("q", "k")], files.read) == []
    (line,) = largest_counts(described, [("q", "k", "v")], files.read)
    assert "vLLM takes the maximum" in line


@pytest.mark.parametrize(
    ("target", "module", "code"),
    [
        ("modelopt", Module("fp8_e5m2", 4, 16), "convert.no_place"),
        ("bfl-diffusers", Module("mxfp8", 4, 32), "convert.no_place"),
        ("bfl-diffusers", Module("nvfp4", 4, 16, calibrated=False), "convert.no_input_scale"),
        ("compressed-tensors", Module("fp8_e5m2", 4, 16), "convert.no_place"),
        ("torchao", Module("fp8_e5m2", 4, 16), "convert.no_place"),
    ],
)
def test_what_a_dialect_has_no_place_for_is_refused(target: str, module: Module, code: str) -> None:
    files = Files()
    with pytest.raises(InputError) as caught:
        FORMS[target].write(description({"x": module}, files, 0), files.read)
    assert caught.value.code == code and "\n" not in str(caught.value)


def test_modelopt_refuses_a_mixture() -> None:
    files = Files()
    with pytest.raises(InputError) as caught:
        FORMS["modelopt"].write(
            description({"x": Module("fp8", 4, 16), "y": Module("nvfp4", 4, 16)}, files, 0), files.read
        )
    assert caught.value.code == "convert.no_place"


@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
def test_modelopt_has_input_scales_in_all_modules_or_in_none(kind: Algorithm) -> None:
    files, form = Files(), FORMS["modelopt"]
    modules = {"x": Module(kind, 4, 16), "y": Module(kind, 4, 16, calibrated=False)}
    with pytest.raises(InputError) as caught:
        form.write(description(modules, files, 0), files.read)
    assert caught.value.code == "convert.no_input_scale" and "1 have none: y" in caught.value.message
    without = form.write(description({"y": modules["y"]}, files, 0), files.read)
    assert without.config is not None and without.config["quantization_config"]["dynamic_input_scale"] is True


def test_modelopt_keeps_what_its_own_exports_said() -> None:
    files = Files()
    said = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "config_groups": {"group_0": {"targets": ["Linear"]}},
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "ignore": ["plain*"],
    }
    described = replace(description({"x": Module("nvfp4", 4, 16)}, files, 0), quantization=said)
    written = FORMS["modelopt"].write(described, files.read)
    assert written.config is not None
    keys = written.config["quantization_config"]
    assert (keys["config_groups"], keys["producer"]) == (said["config_groups"], said["producer"])
    assert (keys["ignore"], keys["swap_weight_nibbles"]) == (["plain"], False)


def test_bf16_has_no_packed_tensor_left() -> None:
    files = Files()
    described = description({"x": Module("nvfp4", 4, 16), "y": Module("mxfp8", 5, 48)}, files, 0)
    headers, _ = written_out(FORMS["bf16"].write(described, files.read), files)
    assert all(DTYPE_BITS[info.dtype] >= 16 for info in headers.tensors.values())
    assert headers.config == {"_class_name": "SomeTransformer"}
