"""swap-nibbles and unswizzle-scales: bytes, config keys, refusals; and build-nvfp4 on layouts not ModelOpt's."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import postprocess, swapped
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import Tensors, build, config_of, copy, edit, load, packed_in, run_mopt, same_bits, tree

from modelopt_convert import inspect
from modelopt_convert.plan.plan import Step
from modelopt_convert.stage.shard_writer import ShardWriter
from modelopt_convert.write import pieces, stream


def same_tensors(left: Path, right: Path) -> bool:
    a, b = load(left), load(right)
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def keys(folder: Path) -> dict[str, Any]:
    return config_of(folder)["quantization_config"]


@pytest.mark.parametrize("against_base", [True, False])
def test_swapped_file_is_swapped_back(nvfp4: Path, base: Path, tmp_path: Path, against_base: bool) -> None:
    source = edit(nvfp4, tmp_path / "source", swapped)
    before = tree(source)
    with_base = ["--base", base] if against_base else []
    outcome = run_mopt("swap-nibbles", source, tmp_path / "out", *with_base)
    assert outcome.exit_code == 0 and outcome.report is not None
    assert same_tensors(tmp_path / "out", nvfp4 / "transformer")
    assert keys(tmp_path / "out")["swap_weight_nibbles"] is False
    assert tree(source) == before
    unproven = "layout.unproven" in {warning["code"] for warning in outcome.report["warnings"]}
    assert unproven is not against_base
    proofs = [check["status"] for check in outcome.report["checks"] if check["name"] == "proof"]
    assert proofs == (["pass"] if against_base else [])


def test_twice_swapped_is_the_source(nvfp4: Path, tmp_path: Path) -> None:
    assert run_mopt("swap-nibbles", nvfp4, tmp_path / "once").exit_code == 0
    assert not same_tensors(tmp_path / "once", nvfp4 / "transformer")
    assert run_mopt("swap-nibbles", tmp_path / "once", tmp_path / "twice").exit_code == 0
    assert same_tensors(tmp_path / "twice", nvfp4 / "transformer")


@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_unswizzle_and_reverse_are_inverse(families: Path, tmp_path: Path, family: str) -> None:
    source = families / family / "nvfp4"
    assert run_mopt("unswizzle-scales", source, tmp_path / "swizzled", "--reverse").exit_code == 0
    assert keys(tmp_path / "swizzled")["checkpoint_weight_scale_layout"] == "swizzled"
    expected = dict(load(source / "transformer"))
    postprocess(expected)
    found = load(tmp_path / "swizzled")
    assert all(same_bits(found[name], tensor) for name, tensor in expected.items())
    assert run_mopt("unswizzle-scales", tmp_path / "swizzled", tmp_path / "back").exit_code == 0
    assert same_tensors(tmp_path / "back", source / "transformer")
    assert keys(tmp_path / "back")["checkpoint_weight_scale_layout"] == "linear"


@pytest.mark.parametrize(
    ("command", "more"),
    [("swap-nibbles", []), ("unswizzle-scales", [])],
)
def test_a_right_file_is_not_made_wrong(nvfp4: Path, base: Path, tmp_path: Path, command: str, more: list[str]) -> None:
    outcome = run_mopt(command, nvfp4, tmp_path / "out", "--base", base, *more)
    assert outcome.exit_code == 1 and outcome.error_code == "check.already_in_order"
    assert list(tmp_path.iterdir()) == []


def test_reverse_of_a_swizzled_file_is_already_in_order(families: Path, tmp_path: Path) -> None:
    base = families / "flux2" / "base"
    source = edit(families / "flux2" / "nvfp4", tmp_path / "source", postprocess)
    outcome = run_mopt("unswizzle-scales", source, tmp_path / "out", "--reverse", "--base", base)
    assert outcome.exit_code == 1 and outcome.error_code == "check.already_in_order"


def test_only_modules_that_need_it_are_rewritten(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """ModelOpt's sharded post-processing leaves a module linear when its weight and scale lie in different shards."""
    odd = packed_in(load(nvfp4 / "transformer"))[3]

    def most(tensors: Tensors) -> None:
        left = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{odd}.")}
        postprocess(tensors)
        tensors.update(left)

    source = edit(nvfp4, tmp_path / "source", most)
    outcome = run_mopt("unswizzle-scales", source, tmp_path / "out", "--base", base)
    assert outcome.exit_code == 0 and outcome.report is not None
    assert same_tensors(tmp_path / "out", nvfp4 / "transformer")
    assert outcome.report["counts"]["source"]["rewritten: 128x4 to row-major"] == 39
    assert outcome.report["ledger"]["source"][f"{odd}.weight_scale"] == "kept"


@pytest.mark.parametrize("padding", [None, "row", "row_col"])
@pytest.mark.parametrize("against_base", [True, False])
def test_post_processed_export_is_mended(
    families: Path, tmp_path: Path, padding: str | None, against_base: bool
) -> None:
    """HunyuanVideo's proj_out has 16 rows, Wan's layers K/16 = 6: both kinds of padding show."""
    family = families / "hunyuan_video"
    source = edit(family / "nvfp4", tmp_path / "source", lambda tensors: postprocess(tensors, padding=padding))
    with_base = ["--base", family / "base"] if against_base else []
    outcome = run_mopt("unswizzle-scales", source, tmp_path / "out", *with_base)
    assert outcome.exit_code == 0, outcome.stderr
    assert same_tensors(tmp_path / "out", family / "nvfp4" / "transformer")


def test_sharded_post_processed_export_is_proven_and_mended(
    exports: Path, base: Path, built_nvfp4: Path, tmp_path: Path
) -> None:
    """ModelOpt post-processes shard by shard: where a module's weight and scale lie apart, the scale stays linear."""
    source = copy(exports / "nvfp4_sharded", tmp_path / "source")
    plain = load(source)
    for shard in sorted(source.glob("*.safetensors")):
        tensors = load_file(shard)
        whole = {name for name in tensors if f"{name.removesuffix('_scale')}" in tensors}
        part = {name: tensor for name, tensor in tensors.items() if not name.endswith("weight_scale") or name in whole}
        postprocess(part)
        save_file({name: tensor.contiguous() for name, tensor in (tensors | part).items()}, shard, {"format": "pt"})
    apart = sum(
        same_bits(load(source)[f"{name}.weight_scale"], plain[f"{name}.weight_scale"]) for name in packed_in(plain)
    )
    report = run_mopt("inspect", source, "--base", base).report
    assert report is not None and 0 < apart < 40
    assert report["layout"]["scale_layout"] == "mixed" and report["layout"]["modules_contradicting"] == 40 - apart
    outcome = run_mopt("unswizzle-scales", source, tmp_path / "out", "--base", base)
    assert outcome.exit_code == 0 and outcome.report is not None
    assert outcome.report["counts"]["source"]["rewritten: 128x4 to row-major"] == 40 - apart
    assert same_tensors(tmp_path / "out", exports / "nvfp4" / "transformer")
    assert build(source, base, tmp_path / "built").exit_code == 0
    assert same_tensors(tmp_path / "built", built_nvfp4)


def test_padding_that_holds_something_is_an_error(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    def plant(tensors: Tensors) -> None:
        postprocess(tensors)
        name = f"{packed_in(tensors)[0]}.weight_scale"
        raw = tensors[name].view(torch.uint8).clone()
        raw[-1, -1] = 7
        tensors[name] = raw.view(torch.float8_e4m3fn)

    source = edit(nvfp4, tmp_path / "source", plant)
    for with_base in ([], ["--base", base]):
        outcome = run_mopt("unswizzle-scales", source, tmp_path / "out", *with_base)
        assert outcome.exit_code == 3, outcome.stderr
        assert not (tmp_path / "out").exists()
    assert build(source, base, tmp_path / "out").exit_code == 3


def comfy_file(tensors: Tensors, path: Path, *, packed_qkv: bool = False) -> Path:
    """A ComfyUI file of the same weights: high nibble first, swizzled, with markers or BFL's names."""
    tensors = dict(tensors)
    postprocess(tensors)
    swapped(tensors)
    if packed_qkv:
        renamed = {module: f"double_blocks.{number}.img_attn.qkv" for number, module in enumerate(packed_in(tensors))}
        tensors = {
            f"{renamed[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": tensor
            for name, tensor in tensors.items()
            if name.rpartition(".")[0] in renamed
        }
    else:
        for module in packed_in(tensors):
            text = json.dumps({"format": "nvfp4"}).encode()
            tensors[f"{module}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    path.parent.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt", "note": "kept"})
    return path


def test_markers_by_which_a_loader_would_guess_wrong_are_stripped(families: Path, tmp_path: Path) -> None:
    plain = load(families / "flux2" / "nvfp4" / "transformer")
    source = comfy_file(plain, tmp_path / "in" / "comfy.safetensors")
    assert run_mopt("swap-nibbles", source, tmp_path / "low").exit_code == 0
    assert run_mopt("unswizzle-scales", tmp_path / "low" / "comfy.safetensors", tmp_path / "out").exit_code == 0
    found = load(tmp_path / "out")
    assert found.keys() == plain.keys() and all(same_bits(found[name], plain[name]) for name in plain)
    with safe_open(tmp_path / "out" / "comfy.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}


def test_names_that_decide_are_refused(families: Path, tmp_path: Path) -> None:
    plain = load(families / "flux2" / "nvfp4" / "transformer")
    source = comfy_file(plain, tmp_path / "in" / "bfl.safetensors", packed_qkv=True)
    for command in ("swap-nibbles", "unswizzle-scales"):
        outcome = run_mopt(command, source, tmp_path / "out")
        assert outcome.exit_code == 3 and outcome.error_code == "layout.names_decide"
        assert "SGLang already reads this file right; rewritten under these names" in outcome.message
        assert not (tmp_path / "out").exists()
    assert run_mopt("swap-nibbles", source, tmp_path / "out", "--force-names").exit_code == 0


def test_base_that_does_not_tell_is_refused(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    def other(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if tensor.ndim == 2:
                tensors[name] = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).to(tensor.dtype)

    outcome = run_mopt("swap-nibbles", nvfp4, tmp_path / "out", "--base", edit(base, tmp_path / "other", other))
    assert outcome.exit_code == 3 and outcome.error_code == "layout.undetermined"


def test_nothing_packed_is_refused(base: Path, tmp_path: Path) -> None:
    outcome = run_mopt("swap-nibbles", base, tmp_path / "out")
    assert outcome.exit_code == 3 and outcome.error_code == "layout.nothing_packed"


def test_shards_and_index_are_kept(exports: Path, tmp_path: Path) -> None:
    source = copy(exports / "nvfp4_sharded", tmp_path / "source")
    assert run_mopt("swap-nibbles", source, tmp_path / "out").exit_code == 0
    names = {path.name for path in source.glob("*.safetensors*")}
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors*")} == names
    index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads(next(source.glob("*.index.json")).read_text())["weight_map"]


def test_output_rules_hold_here_too(nvfp4: Path, tmp_path: Path) -> None:
    source = copy(nvfp4, tmp_path / "source")
    before = tree(tmp_path)
    for output in (source, source / "inner", tmp_path):
        assert run_mopt("swap-nibbles", source, output, "--overwrite").exit_code == 4
    assert run_mopt("swap-nibbles", source, tmp_path / "out", "--dry-run").exit_code == 0
    assert tree(tmp_path) == before


@pytest.mark.parametrize("order", ["swapped", "swizzled", "both", "row_col", "comfyui"])
@pytest.mark.parametrize("family", ["flux1", "hunyuan_video"])
def test_build_writes_the_canonical_layout(families: Path, tmp_path: Path, family: str, order: str) -> None:
    """Whatever the order of the export, the build has the very bytes of the build from the plain export."""

    def plant(tensors: Tensors) -> None:
        if order in ("swizzled", "both", "comfyui"):
            postprocess(tensors)
        if order == "row_col":
            postprocess(tensors, padding="row_col")
        if order in ("swapped", "both", "comfyui"):
            swapped(tensors)
        if order == "comfyui":
            for module in packed_in(tensors):
                tensors[f"{module}.comfy_quant"] = torch.tensor(list(b'{"format":"nvfp4"}'), dtype=torch.uint8)

    where = families / family
    source = edit(where / "nvfp4", tmp_path / "export", plant)
    mixed = ["--keep-bf16", "transformer_blocks.[:1].**"]
    plain = build(where / "nvfp4", where / "base", tmp_path / "plain", *mixed, preset="none")
    found = build(source, where / "base", tmp_path / "out", *mixed, preset="none")
    assert plain.exit_code == found.exit_code == 0, found.stderr
    assert same_tensors(tmp_path / "out", tmp_path / "plain")
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "plain" / "config.json").read_bytes()
    assert found.report is not None and "export.layout" in {warning["code"] for warning in found.report["warnings"]}
    report = inspect(tmp_path / "out", base=where / "base", all_scales=True)
    assert report.layout.nibble_order == "low" and report.layout.basis == "proven"
    # HunyuanVideo's q, k and v have scales of their own, which is as ModelOpt exports it.
    assert {one.code for one in report.lint} <= {"fused.global_scale", "engine.loss"}


def test_build_drops_keys_by_which_the_engine_would_misread(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    def declare(config: dict[str, Any]) -> None:
        config["quantization_config"] |= {"checkpoint_uses_packed_qkv": True, "swap_weight_nibbles": True}

    source = edit(nvfp4, tmp_path / "export", None, declare)
    assert build(source, base, tmp_path / "out").exit_code == 0
    assert "checkpoint_uses_packed_qkv" not in keys(tmp_path / "out")
    assert keys(tmp_path / "out")["swap_weight_nibbles"] is False


def test_build_refuses_what_the_engine_would_misread(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """From packed-QKV names SGLang infers swapped and swizzled, and no config key overrides it."""

    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            if ".attn.to_q." in name and name.startswith("transformer_blocks.0."):
                tensors[f"double_blocks.0.img_attn.qkv.{name.rpartition('.')[2]}"] = tensors.pop(name)

    source, plain = edit(nvfp4, tmp_path / "export", rename), edit(base, tmp_path / "base", rename)
    for more in ([], ["--dry-run"]):
        outcome = build(source, plain, tmp_path / "out", *more, preset="none")
        assert outcome.exit_code == 3 and outcome.error_code == "engine.misread"
        assert "double_blocks.0.img_attn.qkv" in outcome.message and not (tmp_path / "out").exists()


@pytest.fixture
def mended(nvfp4: Path, base: Path, tmp_path: Path) -> dict[str, Path]:
    """One source rewritten with the base and without."""
    source = edit(nvfp4, tmp_path / "source", swapped)
    found = {"proven": tmp_path / "proven", "unproven": tmp_path / "unproven"}
    assert run_mopt("swap-nibbles", source, found["proven"], "--base", base).exit_code == 0
    assert run_mopt("swap-nibbles", source, found["unproven"]).exit_code == 0
    return found


def test_what_a_rewrite_proved_stays_proven(mended: dict[str, Path], base: Path) -> None:
    assert same_tensors(mended["proven"], mended["unproven"])
    found = {name: run_mopt("verify", folder, "--device", "cpu") for name, folder in mended.items()}
    assert {name: one.exit_code for name, one in found.items()} == {"proven": 0, "unproven": 0}
    verified = {name: one.report["verify"] for name, one in found.items()}
    # A record is a claim: what is checked without a base is that nothing changed.
    assert {name: one["proof"] for name, one in verified.items()} == {"proven": "unchanged", "unproven": "unchanged"}
    assert "its record claims (the author is not verified): proven at build" in verified["proven"]["statement"]
    assert "proven at build" not in verified["unproven"]["statement"]
    records = {name: json.loads((folder / "mopt.json").read_text()) for name, folder in mended.items()}
    assert sorted(records["proven"]["proof"]["modules"]) == sorted(packed_in(load(mended["proven"])))
    assert "base" in records["proven"]["sources"] and "proof" not in records["unproven"]
    for folder in mended.values():
        against = run_mopt("verify", folder, "--base", base, "--device", "cpu")
        assert against.exit_code == 0 and against.report["verify"]["proof"] == "proven"


@pytest.mark.parametrize("name", ["proven", "unproven"])
@pytest.mark.parametrize("what", ["shape", "dtype", "metadata", "name"])
def test_a_header_changed_after_a_rewrite_is_not_the_recorded_one(
    mended: dict[str, Path], name: str, what: str
) -> None:
    """Not one byte of a tensor is another: only the header's own digest can tell."""
    [shard] = mended[name].glob("*.safetensors")
    raw = shard.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    kept = next(one for one in header if one.endswith(".weight") and header[one]["dtype"] == "BF16"
                and len({*header[one]["shape"]}) > 1)  # fmt: skip
    if what == "shape":
        header[kept]["shape"].reverse()
    elif what == "dtype":
        header[kept]["dtype"] = "F16"
    elif what == "metadata":
        header["__metadata__"]["planted"] = "1"
    else:
        header[f"{kept}s"] = header.pop(kept)
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    found = run_mopt("verify", mended[name], "--device", "cpu")
    assert found.exit_code == 1, found.stdout
    record = next(level for level in found.report["verify"]["levels"] if level["level"] == "record")
    assert record["status"] == "fail"


@pytest.mark.parametrize("tensor", ["weight", "weight_scale", "weight_scale_2"])
def test_a_rewrite_of_damage_is_not_proven(nvfp4: Path, base: Path, tmp_path: Path, tensor: str) -> None:
    def damage(tensors: Tensors) -> None:
        swapped(tensors)
        name = f"{sorted(packed_in(tensors))[-1]}.{tensor}"
        tensors[name] = tensors[name] * 1.5 if tensor == "weight_scale_2" else tensors[name].flip(0)

    source = edit(nvfp4, tmp_path / "source", damage)
    failed = run_mopt("swap-nibbles", source, tmp_path / "out", "--base", base)
    assert (failed.exit_code, failed.error_code) == (3, "layout.undetermined"), failed.stderr
    assert [one.name for one in tmp_path.iterdir()] == ["source"]


def test_what_was_written_is_proven_and_not_what_was_read(
    nvfp4: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault is in the writing: every code of one module has the other sign."""
    source = edit(nvfp4, tmp_path / "source", swapped)
    wrong = f"{packed_in(load(source))[-1]}.weight"
    original = pieces.produce

    def produce(step: Step, *more: Any) -> Iterator[Any]:
        for piece in original(step, *more):
            yield bytes(byte ^ 0x88 for byte in piece) if step.output.name == wrong else piece

    monkeypatch.setattr(stream, "produce", produce)
    failed = run_mopt("swap-nibbles", source, tmp_path / "out", "--base", base)
    assert (failed.exit_code, failed.error_code) == (1, "check.proof"), failed.stderr
    assert wrong.removesuffix(".weight") in failed.message
    assert [one.name for one in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("fault", ["codes", "scales"])
def test_a_rewrite_that_wrote_something_else_is_thrown_away(
    nvfp4: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """One bit that memory or a disk turns on the way; here the writer does."""
    source = edit(nvfp4, tmp_path / "source", swapped)
    module = packed_in(load(source))[0]
    name = f"{module}.weight{'_scale' if fault == 'scales' else ''}"
    write = ShardWriter.write

    def damaged(self: ShardWriter, tensor: str, chunks: Any, extent: Any = None) -> None:
        found = [bytearray(chunk) for chunk in chunks]
        if tensor == name:
            found[0][0] ^= 0x08
        write(self, tensor, found, extent)

    monkeypatch.setattr(ShardWriter, "write", damaged)
    failed = run_mopt("swap-nibbles", source, tmp_path / "out", "--base", base)
    assert (failed.exit_code, failed.error_code) == (1, "check.proof"), failed.stderr
    assert module in str(failed.report["checks"])
    assert [one.name for one in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("fault", ["unlike", "more", "less"])
def test_a_rewrite_whose_rest_is_not_the_bases_is_refused(nvfp4: Path, base: Path, tmp_path: Path, fault: str) -> None:
    def plant(tensors: Tensors) -> None:
        swapped(tensors)
        if fault == "unlike":
            tensors["proj_out.weight"] = tensors["proj_out.weight"] * 1.5
        elif fault == "more":
            tensors["extra.weight"] = torch.ones(4, 4)
        else:
            del tensors["proj_out.weight"]

    source = edit(nvfp4, tmp_path / "source", plant)
    refused = run_mopt("swap-nibbles", source, tmp_path / "out", "--base", base, "--accept-near")
    assert (refused.exit_code, refused.error_code) == (1, "check.proof"), refused.stderr
    assert ("extra" if fault == "more" else "proj_out.weight") in refused.report["error"]["message"]
    assert refused.report["proof"]["words"] == "mismatch"
    assert [one.name for one in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0, float("inf")])
def test_a_rewrite_whose_scales_no_kernel_could_use_is_refused(
    nvfp4: Path, base: Path, tmp_path: Path, value: float
) -> None:
    """No base tells an input_scale, so the proof of the weights does not see it."""

    def plant(tensors: Tensors) -> None:
        swapped(tensors)
        name = next(one for one in tensors if one.endswith(".input_scale"))
        tensors[name] = torch.full_like(tensors[name], value)

    source = edit(nvfp4, tmp_path / "source", plant)
    refused = run_mopt("swap-nibbles", source, tmp_path / "out", "--base", base)
    assert (refused.exit_code, refused.error_code) == (1, "check.proof"), refused.stderr
    assert "input_scale" in refused.report["error"]["message"]
    assert [one.name for one in tmp_path.iterdir()] == ["source"]


def test_a_file_without_any_input_scale_is_no_damaged_one(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """As ComfyUI's files may be; none was there before the rewrite."""
    source = edit(
        nvfp4,
        tmp_path / "source",
        lambda tensors: [
            swapped(tensors),
            *(tensors.pop(one) for one in list(tensors) if one.endswith(".input_scale")),
        ],
    )
    done = run_mopt("swap-nibbles", source, tmp_path / "out", "--base", base)
    assert done.exit_code == 0 and done.report is not None, done.stderr
    assert "export.odd_input_scale" in {one["code"] for one in done.report["warnings"]}
    assert done.report["proof"]["counts"]["reproduced"] == len(done.report["proof"]["modules"]) > 20


def test_weights_without_input_scales_are_compared_and_no_mismatch(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in [one for one in tensors if one.endswith(".input_scale")]:
            del tensors[name]

    looked = run_mopt("verify", edit(nvfp4, tmp_path / "source", change), "--base", base)
    assert looked.exit_code == 1 and looked.report is not None
    assert looked.report["verify"]["proof"] == "weights proven, never calibrated"


def test_a_rewrite_says_what_is_odd_about_input_scales(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    def plant(tensors: Tensors) -> None:
        swapped(tensors)
        for name in [one for one in tensors if one.endswith(".input_scale")]:
            tensors[name] = torch.full_like(tensors[name], 0.5)

    done = run_mopt("swap-nibbles", edit(nvfp4, tmp_path / "source", plant), tmp_path / "out", "--base", base)
    assert done.exit_code == 0, done.stderr
    told = [one["message"] for one in done.report["warnings"] if one["code"] == "export.odd_input_scale"]
    assert len(told) == 1 and "0.5" in told[0]


def test_a_rewrite_whose_rest_is_near_the_bases_needs_consent(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    def plant(tensors: Tensors) -> None:
        swapped(tensors)
        tensors["proj_out.weight"] = tensors["proj_out.weight"] * 1.02

    source = edit(nvfp4, tmp_path / "source", plant)
    refused = run_mopt("swap-nibbles", source, tmp_path / "out", "--base", base)
    assert (refused.exit_code, refused.error_code) == (1, "check.proof"), refused.stderr
    assert "proj_out.weight" in refused.report["error"]["message"]
    assert [one.name for one in tmp_path.iterdir()] == ["source"]
    done = run_mopt("swap-nibbles", source, tmp_path / "out", "--base", base, "--accept-near")
    assert done.exit_code == 0, done.stderr
    assert done.report["proof"]["words"] == "not proven: near"
    assert json.loads((tmp_path / "out" / "mopt.json").read_text())["proof"]["status"] == "not proven"
    unchanged = run_mopt("verify", tmp_path / "out")
    assert (unchanged.exit_code, unchanged.report["verify"]["proof"]) == (0, "unchanged"), unchanged.stderr
    assert unchanged.report["verify"]["statement"].endswith("swap-nibbles published it as not proven: near")
    against = run_mopt("verify", tmp_path / "out", "--base", base)
    assert (against.exit_code, against.report["verify"]["proof"]) == (1, "not proven: near")
    accepted = run_mopt("verify", tmp_path / "out", "--base", base, "--accept-near")
    assert (accepted.exit_code, accepted.report["verify"]["proof"]) == (0, "not proven: near")


@pytest.mark.parametrize("fault", ["renamed", "reshaped", "I16", "another model"])
@pytest.mark.parametrize("command", ["swap-nibbles", "unswizzle-scales"])
def test_a_base_without_the_weight_of_a_module_tells_nothing(
    nvfp4: Path, base: Path, families: Path, tmp_path: Path, command: str, fault: str
) -> None:
    def spoil(tensors: Tensors) -> None:
        name = next(one for one, tensor in tensors.items() if one.startswith("transformer_blocks") and tensor.ndim == 2)
        weight = tensors.pop(name)
        other = {"renamed": weight, "reshaped": weight.reshape(2 * weight.shape[0], -1)}
        tensors[f"{name}s" if fault == "renamed" else name] = other.get(fault, weight.view(torch.int16))

    of_flux = config_of(base / "transformer")  # another config is refused for itself
    unlike = (
        edit(families / "qwen_image" / "base", tmp_path / "base", change_config=lambda config: config.update(of_flux))
        if fault == "another model"
        else edit(base, tmp_path / "base", spoil)
    )
    source = edit(nvfp4, tmp_path / "source", swapped if command == "swap-nibbles" else postprocess)
    refused = run_mopt(command, source, tmp_path / "out", "--base", unlike)
    assert (refused.exit_code, refused.error_code) == (3, "layout.undetermined"), refused.stderr
    assert not (tmp_path / "out").exists()
