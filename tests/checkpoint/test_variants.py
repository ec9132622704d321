"""Weights in several precisions in one folder: which are read, against the names that diffusers itself gives them."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from checkpoint_folders import reader_refusal
from diffusers import FluxTransformer2DModel
from diffusers.utils.hub_utils import _add_variant
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from support import build, edit, inspected, load, run_mopt, tree

from modelopt_convert import UsageError, inspect
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.checkpoint.variants import choose_weights, is_index
from modelopt_convert.run.errors import InputError

PLAIN = "diffusion_pytorch_model.safetensors"
WORDS = st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True)


def saved(folder: Path, variant: str | None, mark: float, size: str = "60kB", *, older: bool = False) -> set[str]:
    """A tiny transformer as diffusers saves it, every weight ``mark``; the names of its tensors.

    With ``older``, the shards are named as diffusers named them before 0.30.
    """
    shape = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    model = FluxTransformer2DModel(**shape, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6))
    for parameter in model.parameters():
        parameter.data.fill_(mark)
    fresh = folder / f"fresh{mark}"
    model.save_pretrained(fresh, variant=variant, max_shard_size=size)
    for path in fresh.iterdir():
        name = re.sub(rf"\.{variant}(-\d+-of-\d+)\.", rf"\1.{variant}.", path.name) if older else path.name
        data = path.read_text() if path.suffix == ".json" else None
        path.rename(folder / name)
        if older and data is not None and is_index(path.name):
            index = json.loads(data)
            index["weight_map"] = {
                key: re.sub(rf"\.{variant}(-\d+-of-\d+)\.", rf"\1.{variant}.", one)
                for key, one in index["weight_map"].items()
            }
            (folder / name).write_text(json.dumps(index))
    fresh.rmdir()
    return set(model.state_dict())


def mark_of(folder: Path, variant: str | None) -> tuple[float, tuple[str, ...]]:
    """The mark of the weights that are read, and what is left aside."""
    with CheckpointReader(folder, variant=variant) as reader:
        marks = set()
        for name in reader.files:
            with safe_open(folder / name, framework="pt") as file:
                marks |= {float(file.get_tensor(key).float().flatten()[0]) for key in file.keys()}  # noqa: SIM118
        assert len(marks) == 1
        assert set(reader.left_aside) | {*reader.files, *reader.indexes, "config.json"} == {
            one.name for one in folder.iterdir()
        }
        return marks.pop(), reader.left_aside


@pytest.mark.parametrize("seed", range(8))
def test_each_of_several_precisions_can_be_chosen(seed: int, tmp_path: Path) -> None:
    dice = random.Random(seed)
    variants: list[str | None] = [None, *dice.sample(["fp16", "bf16", "non_ema", "fp8_e4m3"], dice.randint(1, 3))]
    marks = {variant: float(number + 1) for number, variant in enumerate(variants)}
    for variant, mark in marks.items():
        older = variant is not None and dice.random() < 0.5
        saved(tmp_path, variant, mark, dice.choice(["60kB", "5GB"]), older=older)
    for variant, mark in marks.items():
        assert mark_of(tmp_path, variant)[0] == mark, (variant, sorted(one.name for one in tmp_path.iterdir()))
    error = _refused(tmp_path, "none_such")
    assert error.code == "input.variant" and all(str(one) in error.message for one in variants[1:])


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("size", ["60kB", "5GB"])
def test_of_variants_alone_one_is_taken_and_several_are_named(size: str, older: bool, tmp_path: Path) -> None:
    saved(tmp_path, "fp16", 1.0, size, older=older)
    assert mark_of(tmp_path, None) == (1.0, ())
    saved(tmp_path, "bf16", 2.0, size, older=older)
    error = reader_refusal(tmp_path)
    assert error.code == "input.ambiguous" and "--variant bf16 or fp16" in str(error.hint)
    assert mark_of(tmp_path, "bf16")[0] == 2.0
    for path in tmp_path.glob("*.index.*.json"):
        path.unlink()
    if size == "60kB":
        assert _refused(tmp_path, "bf16").code == "index.missing"
        assert f"{PLAIN}.index.bf16.json" in _refused(tmp_path, "bf16").message or not older


def _refused(folder: Path, variant: str) -> InputError:
    with pytest.raises(InputError) as caught:
        CheckpointReader(folder, variant=variant)
    return caught.value


def test_two_splits_beside_one_index(tmp_path: Path) -> None:
    """As after a second download in other sizes: the index decides, and says so of nothing else."""
    saved(tmp_path, None, 1.0, "30kB")
    old = {one.name for one in tmp_path.glob("*.safetensors")}
    saved(tmp_path, None, 2.0, "60kB")
    new = {one for one in old if not one.endswith(f"{len(old):05d}.safetensors")}
    mark, aside = mark_of(tmp_path, None)
    assert mark == 2.0 and set(aside) == old - new
    report = inspected(tmp_path)
    assert [one["code"] for one in report["warnings"]] == ["input.left_aside"]
    assert f"{len(old)} files of weights left aside" in report["warnings"][0]["message"]


def test_plain_shards_without_their_index_are_not_passed_over(tmp_path: Path) -> None:
    saved(tmp_path, None, 1.0)
    saved(tmp_path, "fp16", 2.0)
    (tmp_path / f"{PLAIN}.index.json").unlink()
    error = reader_refusal(tmp_path)
    assert error.code == "index.missing" and "--variant fp16" in str(error.hint)
    assert mark_of(tmp_path, "fp16")[0] == 2.0


@given(st.sets(WORDS, max_size=4), WORDS, st.booleans(), st.booleans())
def test_the_choice_does_not_depend_on_the_order(words: set[str], stem: str, plain: bool, listed: bool) -> None:
    name, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    files = [_add_variant(name, one) for one in sorted(words)] + [name] * plain
    indexes = [_add_variant(index, one) for one in sorted(words)] * listed + [index] * (plain and listed)
    for one in words:
        expected = (_add_variant(index, one), ()) if listed else (None, (_add_variant(name, one),))
        assert (
            choose_weights("x", files, indexes, one) == expected == choose_weights("x", files[::-1], indexes[::-1], one)
        )
    if plain or len(words) == 1:
        (only,) = [None] if plain else [*words]
        expected = (_add_variant(index, only), ()) if listed else (None, (_add_variant(name, only),))
        assert choose_weights("x", files, indexes, None) == expected
    else:
        with pytest.raises(InputError) as caught:
            choose_weights("x", files, indexes, None)
        assert caught.value.code == ("input.ambiguous" if words else "input.missing")
        assert all(one in str(caught.value.hint) for one in words)


def test_the_variant_is_the_bases_where_there_is_one(
    nvfp4: Path, base: Path, built_nvfp4: Path, tmp_path: Path
) -> None:
    """Other weights lie under the plain name: whoever took them would prove nothing."""
    folder = edit(base, tmp_path / "base")
    (folder / PLAIN).rename(folder / _add_variant(PLAIN, "bf16"))
    other = {name: torch.zeros_like(tensor) for name, tensor in load(base / "transformer").items()}
    save_file(other, folder / PLAIN)
    wrong = build(nvfp4, tmp_path / "base", tmp_path / "wrong")
    assert (wrong.exit_code, wrong.error_code) == (3, "export.other_base"), wrong.stderr
    outcome = build(nvfp4, tmp_path / "base", tmp_path / "out", "--variant", "bf16")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert outcome.report["inputs"]["base"]["files"] == [_add_variant(PLAIN, "bf16")]
    assert f"left aside, of a variant or not named by the index: {PLAIN}" in outcome.stderr
    assert load(tmp_path / "out").keys() == load(built_nvfp4).keys()
    assert tree(tmp_path / "out").keys() == tree(built_nvfp4).keys()
    report = inspect(nvfp4, base=tmp_path / "base", variant="bf16")
    assert report.layout.basis == "proven"
    outcome = run_mopt("verify", tmp_path / "out", "--base", tmp_path / "base", "--variant", "bf16", "--device", "cpu")
    assert outcome.exit_code == 0, outcome.stderr


def test_a_variant_of_one_file_is_refused(base: Path) -> None:
    file = next((base / "transformer").glob("*.safetensors"))
    outcome = run_mopt("inspect", file, "--variant", "fp16")
    assert outcome.exit_code == 3 and outcome.error_code == "input.variant"
    with pytest.raises(UsageError):
        inspect(file, variant="")
