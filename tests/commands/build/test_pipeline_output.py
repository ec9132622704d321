"""``--pipeline-output``: the base's other components stand beside what was built, and are checked later."""

import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import make_pipeline
from support import Outcome, copy, edit_json, run_mopt, tree

from modelopt_convert.checkpoint.config import MAX_CONFIG_BYTES
from modelopt_convert.checkpoint.reader import MAX_INDEX_BYTES

OURS = {"README.md", "mopt.json"}
BUILT = ("transformer/",)


@pytest.fixture(scope="module")
def pipeline(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two transformers, of which the exports quantize the first, and a VAE that diffusers wrote."""
    from diffusers import AutoencoderKL

    folder = make_pipeline(exports / "base", tmp_path_factory.mktemp("pipeline") / "base", exports / "base")
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def whole(exports: Path, pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from it. Never write there."""
    export = copy(exports / "nvfp4", tmp_path_factory.mktemp("export") / "transformer").parent
    outcome = make(export, pipeline, export.parent / "whole")
    assert outcome.exit_code == 0, outcome.stderr
    return export.parent / "whole"


def make(export: Path, base: Path, output: Path, *more: str) -> Outcome:
    where = ("--export", export, "--base", base, "--output", output)
    return run_mopt("build-nvfp4", "--preset", "flux1-dev", *where, "--pipeline-output", *more)


def verified(folder: Path, *more: str | Path) -> Outcome:
    return run_mopt("verify", folder, *more)


def copied(folder: Path) -> list[str]:
    """Paths of what the record says was copied."""
    return sorted(json.loads((folder / "mopt.json").read_text())["copied"])


def test_all_but_the_built_transformer_is_the_base_s(pipeline: Path, whole: Path, exports: Path, built: Path) -> None:
    mine, theirs = tree(whole), tree(pipeline)
    rest = {name: digest for name, digest in theirs.items() if not name.startswith(BUILT) and name != "README.md"}
    assert {name: digest for name, digest in mine.items() if not name.startswith(BUILT) and name not in OURS} == rest
    assert set(copied(whole)) == rest.keys() - {"model_index.json"}
    alone = run_mopt(
        "build-nvfp4",
        "--preset",
        "flux1-dev",
        "--export",
        exports / "nvfp4",
        "--base",
        pipeline / "transformer",
        "--output",
        whole.parent / "alone",
    )
    assert alone.exit_code == 0
    for name, digest in tree(whole.parent / "alone").items():
        assert name in OURS or mine[f"transformer/{name}"] == digest


def test_diffusers_takes_it_for_the_base_s_pipeline(pipeline: Path, whole: Path) -> None:
    """But for the transformer, which diffusers cannot load packed."""
    from diffusers import AutoencoderKL, FluxPipeline

    config = FluxPipeline.load_config(whole)
    assert config == FluxPipeline.load_config(pipeline)
    mine, theirs = (AutoencoderKL.from_pretrained(one, subfolder="vae").state_dict() for one in (whole, pipeline))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_verify_proves_it_and_reads_what_was_copied(pipeline: Path, whole: Path) -> None:
    alone, against = verified(whole), verified(whole, "--base", pipeline)
    assert (alone.exit_code, against.exit_code) == (0, 0), (alone.stderr, against.stderr)
    assert against.report is not None and against.report["verify"]["proof"] == "proven"


def _flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path, random.Random], object]] = {
    "a bit": _flip,
    "cut short": lambda path, chance: path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)]),
    "longer": lambda path, chance: path.write_bytes(path.read_bytes() + b"\0"),
    "gone": lambda path, chance: path.unlink(),
    "a folder": lambda path, chance: (path.unlink(), path.mkdir()),
    "another file": lambda path, chance: path.with_name("weights.safetensors").write_bytes(b"?"),
    "a pickle": lambda path, chance: path.with_name("pytorch_model.bin").write_bytes(b"?"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_to_a_copy_fails(whole: Path, tmp_path: Path, how: str) -> None:
    chance = random.Random(how)
    damaged = Path(shutil.copytree(whole, tmp_path / "damaged"))
    inside = [path for path in copied(whole) if "/" in path]  # beside model_index.json a loader takes no weights
    path = chance.choice(inside)
    DAMAGE[how](damaged / path, chance)
    outcome = verified(damaged)
    assert (outcome.exit_code, outcome.error_code) == (1, "check.verify"), (path, outcome.stderr)
    assert path.rpartition("/")[0] in outcome.message and outcome.report is not None
    assert outcome.report["verify"]["verdict"] == "fail" and outcome.report["verify"]["proof"] == "mismatch"


def _relisted(name: str, value: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "model_index.json", lambda index: index.update({name: value}))


BESIDE: dict[str, Callable[[Path], object]] = {
    "model_index.json edited": _relisted("vae_2", ["diffusers", "AutoencoderKL"]),
    "model_index.json gone": lambda folder: (folder / "model_index.json").unlink(),
    "weights beside it": lambda folder: (folder / "other.safetensors").write_bytes(b"?"),
    "another transformer": lambda folder: shutil.copytree(folder / "transformer", folder / "transformer_3"),
    "a component that nothing lists": lambda folder: shutil.copytree(folder / "vae", folder / "vae_2"),
    "copies that are no list": lambda folder: edit_json(folder / "mopt.json", lambda one: one.update(copied="x")),
    "a copy that leads out": lambda folder: edit_json(
        folder / "mopt.json", lambda one: one["copied"].update({"../../etc/passwd": "0"})
    ),
    "the built transformer is gone": lambda folder: shutil.rmtree(folder / "transformer"),
}


@pytest.mark.parametrize("how", BESIDE)
def test_what_stands_beside_the_copies_is_looked_at(whole: Path, tmp_path: Path, how: str) -> None:
    changed = Path(shutil.copytree(whole, tmp_path / "changed"))
    BESIDE[how](changed)
    outcome = verified(changed)
    # Without its list of copies, the second transformer is one that nothing quantized.
    code = (3, "verify.nothing_quantized") if how == "copies that are no list" else (1, "check.verify")
    assert (outcome.exit_code, outcome.error_code) == code, outcome.stderr


def test_an_edited_copy_is_not_overwritten_unasked(exports: Path, pipeline: Path, whole: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    again = make(exports / "nvfp4", pipeline / "transformer", out, "--overwrite")
    assert again.exit_code == 0 and tree(out) == tree(whole), again.stderr
    path = random.Random(1).choice(copied(whole))
    (out / path).write_bytes(b"mine")
    refused = make(exports / "nvfp4", pipeline, out, "--overwrite")
    assert (refused.exit_code, refused.error_code) == (4, "output.foreign") and path in refused.message
    assert (out / path).read_bytes() == b"mine"


def test_the_next_command_is_runnable(exports: Path, pipeline: Path, tmp_path: Path) -> None:
    where = ("--export", exports / "nvfp4", "--base", pipeline, "--output", tmp_path / "o u")
    outcome = run_mopt("build-nvfp4", "--preset", "flux1-dev", *where, "--pipeline-output", json_report=False)
    assert outcome.exit_code == 0, outcome.stderr
    assert f"next: sglang generate --model-path '{tmp_path / 'o u'}' --model-id FLUX.1-dev" in outcome.stdout
    card = (tmp_path / "o u" / "README.md").read_text()
    assert "sglang generate --model-path REPO_OR_FOLDER --model-id FLUX.1-dev" in card and "`transformer_2`" in card


@pytest.mark.parametrize("more", [("--pipeline-output",), ()])
def test_no_card_names_a_command_that_is_known_to_fail(families: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    base = make_pipeline(families / "ltx2" / "base", tmp_path / "base")
    where = ("--export", families / "ltx2" / "fp8", "--base", base, "--output", tmp_path / "out")
    outcome = run_mopt("convert-fp8", "--preset", "ltx2", *where, "--allow-known-broken", *more)
    assert outcome.exit_code == 0, outcome.stderr
    cards = list((tmp_path / "out").rglob("README.md"))
    assert len(cards) == 1 + len(more)
    for card in cards:
        assert "sglang generate" not in card.read_text() and "loads it wrong" in card.read_text()
    checked = verified(tmp_path / "out")
    assert checked.report is not None and "loads it wrong" in json.dumps(checked.report["verify"]["levels"])
    seen = run_mopt("inspect", tmp_path / "out")
    assert seen.report is not None and "engine.wrong" in [one["code"] for one in seen.report["lint"]]


def test_a_dry_run_says_what_would_be_copied(exports: Path, pipeline: Path, tmp_path: Path) -> None:
    outcome = make(exports / "nvfp4", pipeline / "transformer", tmp_path / "out", "--dry-run")
    assert outcome.exit_code == 0 and outcome.report is not None and not (tmp_path / "out").exists()
    said = {one["file"]: one["bytes"] for one in outcome.report["output"]["copied"]}
    assert said["vae/config.json"] == (pipeline / "vae" / "config.json").stat().st_size


def _write(path: str, text: str, folder: Path) -> None:
    (folder / path).write_text(text)


def _pickled(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "pytorch_model.bin")


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n"


def _pointer(folder: Path) -> None:
    next((folder / "vae").glob("*.safetensors")).write_text(POINTER)


def _sharded(index: str | None) -> Callable[[Path], None]:
    """With a text encoder in two shards, and this index."""

    def spoil(folder: Path) -> None:
        encoder = folder / "text_encoder"
        for number in (1, 2):
            shutil.copy(encoder / "model.safetensors", encoder / f"model-0000{number}-of-00002.safetensors")
        (encoder / "model.safetensors").unlink()
        (encoder / "model.safetensors.index.json").unlink()
        if index is not None:
            (encoder / "model.safetensors.index.json").write_text(index)

    return spoil


def _config(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(folder / "vae" / "config.json")


ODD: tuple[Any, ...] = (
    ["diffusers"],
    [1, "A"],
    ["diffusers", 1],
    ["a", "b", "c"],
    [["a"], "b"],
    [None, "A"],
    [],
    [1, 2],
    [None],
    {},
    "AutoencoderKL",
    True,
    None,
)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a transformer alone": (lambda folder: (folder / "model_index.json").unlink(), "pipeline.none"),
    "a component that is not there": (lambda folder: shutil.rmtree(folder / "vae"), "pipeline.incomplete"),
    "an empty component": (
        lambda folder: (shutil.rmtree(folder / "vae"), (folder / "vae").mkdir()),
        "pipeline.incomplete",
    ),
    "weights in a pickle alone": (_pickled, "pipeline.incomplete"),
    "a pickle without a config": (
        lambda folder: (folder / "tokenizer" / "model.bin").write_bytes(b"?"),
        "pipeline.incomplete",
    ),
    "a transformer that is not listed": (_relisted("transformer", [None, None]), "pipeline.not_listed"),
    **{
        f"{name!r} for a name": (_relisted(name, ["diffusers", "AutoencoderKL"]), "pipeline.index")
        for name in ("../vae", "..", ".", "", "README.md", "mopt.json", ".git", "a b", "a\n# Forged", "vaé", "a\0")
    },
    "half a component": (_relisted("vae", ["diffusers", None]), "pipeline.index"),
    "a pointer in place of weights": (_pointer, "pipeline.incomplete"),
    **{
        f"a pointer in place of {path}": (partial(_write, path, POINTER), "pipeline.incomplete")
        for path in (
            "tokenizer/spiece.model",
            "tokenizer/nested/deeper/merges.txt",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "LICENSE.md",
            "model_index.json",
        )
    },
    **{f"{value} for a folder": (_relisted("vae", value), "pipeline.index") for value in ODD},
    **{
        f"{value} for no folder": (_relisted("other", value), "pipeline.index")
        for value in ODD
        if isinstance(value, list) and any(isinstance(one, str) for one in value)
    },
    "a class of the pipeline's own code": (_relisted("_class_name", ["pipeline", "MyPipe"]), "pipeline.index"),
    "no class": (_relisted("_class_name", None), "pipeline.index"),
    "shards without an index": (_sharded(None), "pipeline.incomplete"),
    "shards with an index that says nothing": (_sharded("{}"), "pipeline.incomplete"),
    "shards with an index of one": (
        _sharded('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
        "pipeline.incomplete",
    ),
    "weights without a config": (_config(Path.unlink), "pipeline.incomplete"),
    "weights beside a folder called config.json": (
        _config(lambda path: (path.unlink(), path.mkdir(), (path / "x.json").write_text("{}"))),
        "pipeline.incomplete",
    ),
    "a config without a class": (_config(lambda path: path.write_text("{}")), "pipeline.incomplete"),
    "a config that is no JSON": (_config(lambda path: path.write_text("{")), "config.json"),
    "a shard that the index lists is missing": (
        lambda folder: edit_json(
            folder / "text_encoder" / "model.safetensors.index.json",
            lambda one: one["weight_map"].update(b="b.safetensors"),
        ),
        "pipeline.incomplete",
    ),
    "a config alone": (lambda folder: next((folder / "vae").glob("*.safetensors")).unlink(), "pipeline.incomplete"),
    "weights cut short": (
        lambda folder: os.truncate(next((folder / "vae").glob("*.safetensors")), 1000),
        "header.truncated",
    ),
    "weights of no bytes": (
        lambda folder: os.truncate(next((folder / "vae").glob("*.safetensors")), 0),
        "header.too_small",
    ),
    "an index that lies elsewhere": (
        lambda folder: (
            (folder / "model_index.json").unlink(),
            (folder / "model_index.json").symlink_to("/etc/hostname"),
        ),
        "input.symlink_escape",
    ),
    "an index of more than any has": (
        lambda folder: os.truncate(folder / "model_index.json", MAX_CONFIG_BYTES + 1),
        "pipeline.too_large",
    ),
    "shards' index of more than any has": (
        lambda folder: os.truncate(folder / "text_encoder" / "model.safetensors.index.json", MAX_INDEX_BYTES + 1),
        "index.too_large",
    ),
    "no JSON": (lambda folder: (folder / "model_index.json").write_text("{"), "pipeline.json"),
    "no object": (lambda folder: (folder / "model_index.json").write_text("[]"), "pipeline.json"),
    "nothing listed": (lambda folder: (folder / "model_index.json").write_text("{}"), "pipeline.index"),
    "a link that leads out": (
        lambda folder: (
            (folder / "vae" / "config.json").unlink(),
            (folder / "vae" / "config.json").symlink_to("/etc/hostname"),
        ),
        "input.symlink_escape",
    ),
    **{
        f"{name!r} for a file": (lambda folder, name=name: (folder / os.fsdecode(name)).write_text(""), "input.name")
        for name in (b"tokenizer/\xff.txt", b"tokenizer/nested/\xff.txt", b"LICENSE\xff")
    },
    "a folder whose name is no text": (
        lambda folder: (folder / "tokenizer" / "nested").rename(folder / "tokenizer" / "\udcff"),
        "input.name",
    ),
    "a link to a folder": (lambda folder: (folder / "vae" / "more").symlink_to(".."), "pipeline.link"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_whole_pipeline_is_refused(exports: Path, pipeline: Path, tmp_path: Path, fault: str) -> None:
    spoil, code = FAULTS[fault]
    base = Path(shutil.copytree(pipeline, tmp_path / "base"))
    spoil(base)
    before = tree(base)
    outcome = make(exports / "nvfp4", base / "transformer", tmp_path / "out")
    assert (outcome.exit_code, outcome.error_code) == (3, code), outcome.stderr
    assert tree(base) == before and not (tmp_path / "out").exists()


OUTSIDE = ("vae", "new", "transformer/new", ".", "..")
PLACES = ("output.is_input", "output.inside_input", "output.around_input")


@pytest.mark.parametrize("place", [*OUTSIDE, "elsewhere"])
@pytest.mark.parametrize("base", ["", "transformer"])
def test_all_of_the_pipeline_is_an_input(exports: Path, pipeline: Path, tmp_path: Path, place: str, base: str) -> None:
    """A base may be its transformer alone; a component may be a link."""
    root = Path(shutil.copytree(pipeline, tmp_path / "around" / "base"))
    elsewhere = (root / "vae").rename(tmp_path / "elsewhere") if place == "elsewhere" else None
    if elsewhere is not None:
        (root / "vae").symlink_to(elsewhere)
    before = tree(tmp_path)
    output = elsewhere or root / place
    refused = make(exports / "nvfp4", root / base, output, "--overwrite", "--overwrite-foreign")
    assert refused.exit_code == 4 and refused.error_code in PLACES, refused.stderr
    for more in ((), ("--dry-run",)):
        page = (elsewhere or root / "vae") / "report.json"
        told = make(exports / "nvfp4", root / base, tmp_path / "out", "--report-json", str(page), *more)
        assert told.exit_code == 2 and "outside every input" in told.stderr
    assert tree(tmp_path) == before


def test_what_is_linked_anywhere_in_the_pipeline_is_an_input(exports: Path, pipeline: Path, tmp_path: Path) -> None:
    """As a Hub's cache links every file to its blobs; a blob may be empty, and so no foreign report."""
    root, older = Path(shutil.copytree(pipeline, tmp_path / "base")), tmp_path / "older"
    assert make(exports / "nvfp4", root, older).exit_code == 0
    (root / "assets").mkdir()
    (root / "assets" / "older").symlink_to(older)
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / "0"
    blob.write_bytes(b"")
    before = tree(tmp_path)
    refused = make(exports / "nvfp4", root, older, "--overwrite")
    assert refused.exit_code == 4 and refused.error_code in PLACES, refused.stderr
    assert tree(tmp_path) == before
    (root / "vae" / "added.json").symlink_to(blob)
    told = make(exports / "nvfp4", root, tmp_path / "out", "--report-json", str(blob))
    assert told.exit_code == 2 and "outside every input" in told.stderr
    assert blob.read_bytes() == b""


def test_what_real_pipelines_have_is_taken(exports: Path, pipeline: Path, tmp_path: Path) -> None:
    """Settings of every kind, a library of its own, processors, variants; a folder that is null is named."""
    base = Path(shutil.copytree(pipeline, tmp_path / "base"))
    for name, value in {
        "guider": ["my_library", "Guider"],
        "processor": ["transformers", "Qwen2VLProcessor"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": [None, None],
        "image_encoder": [None, None],
        "scale": 1.5,
        "name": "x",
        "layers": [9, [18, 27], {"a": 1}, None],
        "nothing": None,
        "options": {"a": ["b"]},
    }.items():
        _relisted(name, value)(base)
    for path in (
        "guider/guider_config.json",
        "processor/chat_template.json",
        "feature_extractor/preprocessor_config.json",
    ):
        (base / path).parent.mkdir()
        (base / path).write_text("{}")
    (base / "safety_checker").mkdir()
    (base / "assets").mkdir()
    _sharded('{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}')(base)
    plain = next((base / "vae").glob("*.safetensors"))
    shutil.copy(plain, base / "vae" / "diffusion_pytorch_model.fp16-00001-of-00002.safetensors")
    shard = next((base / "transformer").glob("*.safetensors"))
    variant = shutil.copy(shard, shard.with_name(f"{shard.stem}.fp16.safetensors"))
    outcome = make(exports / "nvfp4", base, tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    told = [one["message"] for one in outcome.report["warnings"] if one["code"] == "pipeline.left_out"]
    assert told == ["not copied, since model_index.json says null of them: safety_checker"]
    assert outcome.report["inputs"]["transformer/base"]["skipped_files"] == [variant.name]
    assert verified(tmp_path / "out").exit_code == 0


def test_weights_that_are_no_safetensors_are_left_out_and_named(exports: Path, pipeline: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(pipeline, tmp_path / "base"))
    (base / "text_encoder" / "pytorch_model.bin").write_bytes(b"a pickle")
    outcome = make(exports / "nvfp4", base / "transformer", tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None
    told = {one["code"]: one["message"] for one in outcome.report["warnings"]}
    assert "text_encoder/pytorch_model.bin" in told["pipeline.left_out"]
    assert not (tmp_path / "out" / "text_encoder" / "pytorch_model.bin").exists()


def test_a_file_that_changes_meanwhile_is_refused(
    exports: Path, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelopt_convert.commands.build import command

    base = Path(shutil.copytree(pipeline, tmp_path / "base"))
    real = command.copy_file

    def late(source: Any, path: Path, *more: Any) -> object:
        done = real(source, path, *more)
        if path.match("vae/config.json"):  # it was read, and is written already
            (base / "vae" / "config.json").write_bytes(b"{}")
        return done

    monkeypatch.setattr(command, "copy_file", late)
    outcome = make(exports / "nvfp4", base / "transformer", tmp_path / "out")
    assert (outcome.exit_code, outcome.error_code) == (3, "input.changed")
    assert not (tmp_path / "out").exists()


def test_without_a_base_there_is_nothing_to_copy(exports: Path, tmp_path: Path) -> None:
    where = ("--export", exports / "fp8", "--output", tmp_path / "out", "--pipeline-output")
    outcome = run_mopt("convert-fp8", "--preset", "flux1-dev", *where)
    assert outcome.exit_code == 2 and "--pipeline-output" in outcome.stderr
