"""``mopt presets new``: the draft of any base builds at once, and what is no base is refused in one line."""

import json
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from families import FAMILIES, allowed
from loopback_hub import LoopbackHub
from make_drafts import Headers, drafted
from pipelines import make_pipeline
from root import LONG
from safetensors.torch import save_file
from support import copy, edit, load, run_mopt

import modelopt_convert as mopt
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.preset.patterns import siblings
from modelopt_convert.preset.preset import load_preset, preset_names

# With ModelOpt's export of each, which has the modules that its recipe quantizes.
BUILT = (*FAMILIES, "z_image") if LONG else ("z_image", "wan", "hunyuan_video")
# Those for which ModelOpt's exporter can run the forward pass that tells it which modules have one input.
FORWARD = ("flux1", "flux2", "qwen_image", "wan", "wan_5b", "wan_i2v")


def draft(base: Path | str, *more: str | Path) -> str:
    """What stands on stdout."""
    outcome = run_mopt("presets", "new", base, *more, json_report=False)
    assert outcome.exit_code == 0, outcome.stderr
    assert tomllib.loads(outcome.stdout)["schema"] == 1
    return outcome.stdout


@pytest.mark.parametrize("family", BUILT)
def test_a_draft_builds_at_once_and_is_verified(families: Path, tmp_path: Path, family: str) -> None:
    base, mine, out = families / family / "base", tmp_path / "mine.toml", tmp_path / "out"
    mine.write_text(draft(base))
    told = allowed(family)
    outcome = run_mopt("build-nvfp4", "--preset", mine, "--base", base, "--output", out, *told)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert all(rule["matched"] for rule in outcome.report["rules"])
    packed = sum(one.dtype == torch.uint8 for one in load(out).values())
    assert f"The rest, {packed}, is quantized:" in mine.read_text()
    verified = run_mopt("verify", out, "--base", base)
    assert verified.exit_code == 0 and verified.report is not None, verified.stderr
    assert (verified.report["verify"]["verdict"], verified.report["verify"]["proof"]) == ("pass", "proven")
    export = ["--export", families / family / "fp8", "--base", base, "--output", tmp_path / "fp8", "--dry-run"]
    planned = run_mopt("convert-fp8", "--preset", mine, *export, *allowed(family, "fp8"))
    assert planned.exit_code == 0, planned.stderr


@pytest.mark.parametrize("family", FORWARD)
def test_shared_scales_are_those_of_modelopts_exporter(families: Path, family: str) -> None:
    """By the rules alone: modules of one parent that it quantized to one global scale, and no others."""
    with CheckpointReader(families / family / "base" / "transformer") as reader:
        preset = drafted(Headers(Path(family), reader.tensors, reader.config))
    (folder,) = (families / family / "nvfp4").glob("transformer*")
    scales = {module_of(name): one.item() for name, one in load(folder).items() if name.endswith(".weight_scale_2")}
    groups = [group for group in siblings(preset.shared_scale or [], scales) if len(group) > 1]
    assert groups and all(len({scales[name] for name in group}) == 1 for group in groups)
    together = {frozenset(group) for group in groups}
    for parent in {name.rpartition(".")[0] for name in scales}:
        inside = [name for name in scales if name.rpartition(".")[0] == parent]
        for value in {scales[name] for name in inside}:
            same = frozenset(name for name in inside if scales[name] == value)
            assert len(same) == 1 or same in together, same


def test_every_place_of_one_base_gives_the_same_text(
    families: Path, tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transformer, its pipeline, one file with --config, a repo on the Hub, and the function."""
    folder = families / "z_image" / "base" / "transformer"
    expected = draft(folder)
    file = tmp_path / "alone" / "model.safetensors"
    file.parent.mkdir()
    save_file(load(folder), file)
    hub.seed("me/z-image", make_pipeline(folder, tmp_path / "pipeline"))
    assert draft(tmp_path / "pipeline") == draft(file, "--config", folder / "config.json") == expected
    assert draft("hf://me/z-image") == expected
    (found,) = [mopt.new_preset(folder)]
    assert found.text == expected and found.preset.name == "zimagetransformer2dmodel-draft"
    monkeypatch.chdir(folder)
    assert draft(".") == expected
    told = run_mopt("presets", "new", folder)
    assert told.report is not None and told.report["schema"] == "mopt.presets/1"
    assert [one["toml"] for one in told.report["presets"]] == [expected]


def test_only_the_preset_is_on_stdout(families: Path, tmp_path: Path) -> None:
    base = copy(families / "z_image" / "base" / "transformer", tmp_path / "my base")
    (base / "diffusion_pytorch_model.fp16.safetensors").write_bytes(next(base.glob("*.safetensors")).read_bytes())
    outcome = run_mopt("presets", "new", base, json_report=False)
    assert tomllib.loads(outcome.stdout)["class_name"] == "ZImageTransformer2DModel"
    warning, broken, after = outcome.stderr.splitlines()
    assert warning.startswith("warning: ") and warning.endswith("[input.left_aside]")
    assert broken.startswith("warning: sglang@") and broken.endswith("[engine.known_broken]")
    said = "next: read it, save it as mine.toml, then mopt build-nvfp4 --engine vllm-omni --preset ./mine.toml"
    assert after == f"{said} --base '{base}'"


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("flux1", ["build-nvfp4"]),
        ("flux2", ["convert-fp8"]),
        ("sd3", ["convert-fp8"]),
        ("ltx2", ["build-nvfp4", "--engine", "vllm-omni"]),
        ("chroma", ["build-nvfp4", "--allow-known-broken"]),
    ],
)
def test_the_next_command_builds_at_once(
    families: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, how: list[str]
) -> None:
    """What no engine is known to load needs consent, which the command has, and the reason stands above it."""
    base = families / family / "base" / "transformer"
    outcome = run_mopt("presets", "new", base, json_report=False)
    (tmp_path / "mine.toml").write_text(outcome.stdout)
    *before, after = outcome.stderr.splitlines()
    words = shlex.split(after.rpartition("then mopt ")[2])
    assert words == [*how, "--preset", "./mine.toml", "--base", str(base)]
    assert [line for line in before if "[engine.known_broken]" in line] == before and bool(before) == (
        family != "flux1"
    )
    monkeypatch.chdir(tmp_path)
    planned = run_mopt(*words, "-n", "--output", "out")
    assert planned.exit_code == 0, planned.stderr


def test_two_transformers_have_one_draft_or_none(families: Path, tmp_path: Path) -> None:
    """A build of a pipeline has one preset for both."""
    folder = families / "wan" / "base" / "transformer"
    for place in ("same", "other", "third"):
        copy(folder, tmp_path / place / "transformer")
    copy(folder, tmp_path / "same" / "transformer_2")
    copy(folder, tmp_path / "other" / "transformer_2")
    assert draft(tmp_path / "same") == draft(folder)
    config = json.loads((folder / "config.json").read_text())
    second = tmp_path / "other" / "transformer_2"
    (second / "config.json").write_text(json.dumps(config | {"eps": 1e-5}))
    assert "eps" not in tomllib.loads(draft(tmp_path / "other"))["config"]  # it tells neither
    edit(folder, tmp_path / "third" / "transformer_2", lambda tensors: [tensors.pop("blocks.0.attn1.to_q.weight")])
    outcome = run_mopt("presets", "new", tmp_path / "third")
    assert (outcome.exit_code, outcome.error_code) == (3, "input.ambiguous")


def lora(folder: Path, base: Path) -> Path:
    tensors = {f"transformer.blocks.0.attn.to_q.lora_{one}.weight": torch.ones(16, 16) for one in "AB"}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(base / "config.json", folder)
    return folder


def test_what_is_no_base_is_refused_in_one_line(families: Path, exports: Path, tmp_path: Path) -> None:
    base = families / "z_image" / "base" / "transformer"
    no_config = tmp_path / "no-config"
    no_config.mkdir()
    save_file({"a.weight": torch.ones(16, 16)}, no_config / "model.safetensors")
    empty = tmp_path / "empty"
    empty.mkdir()
    nothing = copy(no_config, tmp_path / "nothing")
    save_file({"norm.weight": torch.ones(16)}, nothing / "model.safetensors")
    shutil.copy(base / "config.json", nothing)
    language = copy(no_config, tmp_path / "language")
    (language / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    vae, no_class = copy(no_config, tmp_path / "vae"), copy(no_config, tmp_path / "no-class")
    (vae / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    (no_class / "config.json").write_text('{"model_type": "clip_text_model"}')
    hollow = copy(no_config, tmp_path / "hollow")
    save_file({}, hollow / "model.safetensors")
    shutil.copy(base / "config.json", hollow)
    below = copy(no_config, tmp_path / "below")
    tensors = {
        "x\ny.norm.weight": torch.ones(16, 16),
        "[z].norm.weight": torch.ones(16, 16),
        "q.a.weight": torch.ones(16, 16),
    }
    save_file(tensors, below / "model.safetensors")
    (below / "config.json").write_text('{"_class_name": "ZImageTransformer2DModel"}')
    assert '"x\\ny.norm",' in draft(below)
    odd = edit(
        base,
        tmp_path / "odd",
        lambda tensors: tensors.update(
            {"layers.0.[].weight": torch.ones(16, 8), "layers.0.y.weight": torch.ones(16, 16)}
        ),
    )
    for place, code in {
        exports / "nvfp4" / "transformer": "base.quantized",
        lora(tmp_path / "lora", base): "base.lora",
        no_config: "input.no_config",
        empty: "input.missing",
        tmp_path / "nowhere": "input.missing",
        nothing: "preset.draft",
        hollow: "preset.draft",
        language: "preset.not_diffusion",
        vae: "preset.not_diffusion",
        no_class: "preset.draft",
        odd: "preset.draft",
    }.items():
        if code == "base.quantized" and not place.exists():
            place = exports / "nvfp4"
        outcome = run_mopt("presets", "new", place)
        assert outcome.exit_code == 3 and outcome.error_code == code, (place, outcome.stdout)
        error, hint = outcome.stderr.splitlines()
        assert error.startswith("error: ") and error.endswith(f"[{code}]") and hint.startswith("hint: ")
        assert len(outcome.stdout.splitlines()) == 1  # the report
        assert run_mopt("presets", "new", place, json_report=False).stdout == ""


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["new"], "BASE"),
        (["new", ""], "BASE"),
        (["new", "here", "--config", ""], "--config"),
        (["new", "hf://"], "BASE"),
        (["flux1-dev", "here"], "BASE"),
        (["--variant", "fp16"], "--variant"),
        (["flux1-dev", "--config", "here"], "--config"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(words: list[str], flag: str) -> None:
    outcome = run_mopt("presets", *words, json_report=False)
    assert outcome.exit_code == 2 and f"Invalid value for {flag}: " in outcome.stderr and outcome.stdout == ""


def test_a_draft_names_no_repo_so_that_a_build_needs_a_base(families: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(draft(families / "z_image" / "base"))
    outcome = run_mopt("build-nvfp4", "--preset", mine, "--output", tmp_path / "out")
    assert outcome.exit_code == 2 and "names no repo" in outcome.message, outcome.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("columns", [24, 1])
def test_what_nvfp4_cannot_hold_is_drafted_for_fp8(tmp_path: Path, columns: int) -> None:
    base, mine, out = tmp_path / "base", tmp_path / "mine.toml", tmp_path / "out"
    base.mkdir()
    names = [f"blocks.{number}.ff.{role}.weight" for number in range(4) for role in ("up", "down")]
    save_file({name: torch.ones(16, columns, dtype=torch.bfloat16) for name in names}, base / "model.safetensors")
    (base / "config.json").write_text('{"_class_name": "MadeUpTransformer2DModel"}')
    found = run_mopt("presets", "new", base, json_report=False)
    assert found.exit_code == 0 and f"then mopt convert-fp8 --preset ./mine.toml --base {base}" in found.stderr
    mine.write_text(found.stdout)
    assert "# No [nvfp4]: " in found.stdout and "nvfp4" not in tomllib.loads(found.stdout)
    assert run_mopt("build-nvfp4", "--preset", mine, "--base", base, "--output", out).error_code == "preset.algorithm"
    outcome = run_mopt("convert-fp8", "--preset", mine, "--base", base, "--output", out)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert sum(one.dtype == torch.float8_e4m3fn for one in load(out).values()) == 4
    verified = run_mopt("verify", out, "--base", base)
    assert verified.report is not None and verified.report["verify"]["proof"] == "proven"


@pytest.mark.parametrize("place", ["hf://me/model", "./folder", "folder"])
def test_a_base_in_the_place_of_a_preset_is_told_of_drafts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    if "hf://" not in place:  # of a folder without a config.json no draft could be made
        assert "presets new" not in run_mopt("presets", place).stderr
    (tmp_path / "folder" / "config.json").write_text("{}")
    outcome = run_mopt("presets", place)
    assert outcome.error_code == "preset.unknown" and f"`mopt presets new {place}` drafts one" in outcome.stderr
    assert "presets new" not in run_mopt("presets", "./absent.toml").stderr


def test_the_list_fits_a_terminal_and_stands_in_columns() -> None:
    lines = run_mopt("presets", json_report=False).stdout.splitlines()
    names = [preset.name for preset in (load_preset(name).preset for name in preset_names())]
    starts = [lines[0].index(title) for title in ("class", *FORMATS)]
    assert max(map(len, lines)) <= 80 and [line.split()[0] for line in lines[1:]] == names
    for line in lines:
        assert all(line[at - 2 : at] == "  " and line[at] != " " for at in starts), line
