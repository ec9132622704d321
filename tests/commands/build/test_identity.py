"""What a build says of its base is what it saw there, or what its author claims: never what a preset was made for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, snapshot_download
from loopback_hub import LoopbackHub
from support import Outcome, Tensors, build, edit, run_mopt

from modelopt_convert.preset.preset import ChosenPreset, choose_preset, load_preset, preset_names

FLUX = "black-forest-labs/FLUX.1-dev"  # what the preset was made for
MINE = "alice/FLUX-tuned"


class Built:
    """An output, and all that is said of it."""

    def __init__(self, outcome: Outcome, folder: Path) -> None:
        assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
        self.card = (folder / "README.md").read_text()
        self.head = ModelCard(self.card).data.to_dict()
        self.record: dict[str, Any] = json.loads((folder / "mopt.json").read_text())
        verified = run_mopt("verify", folder, "--device", "cpu")
        assert verified.report is not None
        self.statement = str(verified.report["verify"]["statement"])
        self.said = "\n".join([self.card, json.dumps([self.record, outcome.report, verified.report])])
        shutil.rmtree(folder)

    @property
    def title(self) -> str:
        return next(line for line in self.card.splitlines() if line.startswith("# "))


def test_a_local_folder_is_no_model_that_a_preset_names(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    found = Built(build(nvfp4, base, tmp_path / "out"), tmp_path / "out")
    assert FLUX not in found.said
    assert not {"base_model", "base_model_relation", "license", "license_name", "pipeline_tag"} & found.head.keys()
    assert found.title == "# FluxTransformer2DModel, NVFP4" and "Built with preset `flux1-dev`." in found.card
    assert "--model-path BASE_MODEL --transformer-path" in found.card
    assert found.record["base_repo"] is None and "base_claimed" not in found.record
    assert found.record["sources"]["base"]["origin"] == "folder"
    content = found.record["sources"]["base"]["content_xxh3_128"]
    assert f"against a local folder (content {content[:12]})" in found.statement


def test_modules_of_which_rows_were_compared_are_counted_apart(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """The base's bytes replace them: what is packed was compared whole."""
    outcome = build(nvfp4, base, tmp_path / "out")
    assert outcome.report is not None
    assert outcome.report["proof"]["counts"] == {"reproduced": 24, "reproduced (sampled rows)": 16}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "compared with the\nbase: 24 reproduced." in card and "rows that were proven" not in card


def test_a_claim_is_told_as_one(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    found = Built(build(nvfp4, base, tmp_path / "out", "--base-model", FLUX), tmp_path / "out")
    assert found.head["base_model"] == FLUX and found.head["base_model_relation"] == "quantized"
    assert found.head["license_name"] == "flux-1-dev-non-commercial-license"
    assert found.head["pipeline_tag"] == "text-to-image"
    assert found.title == f"# {load_preset('flux1-dev').preset.title}, NVFP4"
    assert f"--model-path {FLUX} --transformer-path" in found.card
    assert found.record["base_claimed"] == FLUX and found.record["base_repo"] is None
    assert found.record["sources"]["base"]["origin"] == "folder"
    content = found.record["sources"]["base"]["content_xxh3_128"]
    assert f"a local folder (content {content[:12]}), said to be {FLUX}" in found.statement


@pytest.mark.parametrize("place", ["hub", "cache"])
def test_a_repo_that_was_seen_is_named_with_its_commit(
    hub: LoopbackHub, place: str, nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    """Of another repo than the preset's the license and the task are not known."""
    hub.seed(MINE, base)
    where = Path(snapshot_download(MINE)) if place == "cache" else f"hf://{MINE}"
    words = ("--preset", "flux1-dev", "--export", nvfp4, "--base", where, "--output", tmp_path / "out")
    found = Built(run_mopt("build-nvfp4", *words), tmp_path / "out")
    assert FLUX not in found.said
    assert found.head["base_model"] == MINE and not {"license", "pipeline_tag"} & found.head.keys()
    assert found.title == "# FLUX-tuned, NVFP4" and f"--model-path {MINE} --transformer-path" in found.card
    source = found.record["sources"]["base"]
    assert (source["origin"], source["repo"], source["commit"]) == (place, MINE, hub.head(MINE))
    assert found.record["base_repo"] == MINE and found.statement.endswith(f"against {MINE}@{hub.head(MINE)}")
    for more in ((), ("--dry-run",)):
        outcome = run_mopt("build-nvfp4", *words, "--base-model", FLUX, *more)
        assert (outcome.exit_code, outcome.error_code) == (3, "base.claimed_otherwise"), outcome.stderr
        assert FLUX in outcome.message and MINE in outcome.message and not (tmp_path / "out").exists()
    claimed = Built(run_mopt("build-nvfp4", *words, "--base-model", MINE), tmp_path / "out")
    assert (claimed.record["base_repo"], claimed.record["base_claimed"]) == (MINE, MINE)


def test_the_presets_own_base_is_seen_where_none_is_given(hub: LoopbackHub, base: Path, tmp_path: Path) -> None:
    hub.seed(FLUX, base)
    outcome = run_mopt("build-nvfp4", "--preset", "flux1-dev", "--output", tmp_path / "out")
    found = Built(outcome, tmp_path / "out")
    assert found.head["base_model"] == FLUX and found.head["license"] == "other"
    assert f"from {FLUX}@{hub.head(FLUX)}" in found.statement


def test_a_download_has_a_commit_and_no_name(hub: LoopbackHub, nvfp4: Path, base: Path, tmp_path: Path) -> None:
    hub.seed(FLUX, base)
    snapshot_download(FLUX, local_dir=tmp_path / "local")
    found = Built(build(nvfp4, tmp_path / "local", tmp_path / "out"), tmp_path / "out")
    assert FLUX not in found.said and "base_model" not in found.head and found.record["base_repo"] is None
    source = found.record["sources"]["base"]
    assert (source["origin"], source["commit"]) == ("download", hub.head(FLUX))
    assert source["checked"].split(", ")[0] == "config.json"
    assert found.statement.endswith(f"against a download of commit {hub.head(FLUX)}")


def test_without_a_base_nothing_is_known(fp8: Path, tmp_path: Path) -> None:
    outcome = run_mopt("convert-fp8", "--preset", "flux1-dev", "--export", fp8, "--output", tmp_path / "out")
    found = Built(outcome, tmp_path / "out")
    assert FLUX not in found.said and "base_model" not in found.head and found.record["base_repo"] is None


@pytest.mark.parametrize("word", ["FLUX.1-dev", "a/b/c", "a/b: c", "hf://a/b", "/b", "a/"])
def test_a_claim_is_a_repos_name(word: str, base: Path) -> None:
    outcome = run_mopt("build-nvfp4", "--preset", "flux1-dev", "--base", base, "--base-model", word, "--dry-run")
    assert outcome.exit_code == 2 and "ORGANIZATION/NAME" in outcome.stderr


# Models of one class, and the tiny model that stands for each.
SIBLINGS = {
    "flux1-dev": "flux1",
    "flux1-kontext-dev": "flux1",
    "flux1-krea-dev": "flux1",
    "flux1-fill-dev": "fill",
    "flux2-dev": "flux2",
    "flux2-klein-4b": "flux2_klein",
    "flux2-klein-base-4b": "flux2_klein",
}


@pytest.fixture
def bases(families: Path, tmp_path: Path) -> dict[str, Path]:
    """The base of each tiny model; FLUX.1 Fill's has more channels."""

    def widen(tensors: Tensors) -> None:
        tensors["x_embedder.weight"] = tensors["x_embedder.weight"].repeat(1, 6)

    fill = edit(families / "flux1" / "base", tmp_path / "fill", widen, lambda config: config.update(in_channels=384))
    return {"fill": fill} | {name: families / name / "base" for name in {*SIBLINGS.values()} - {"fill"}}


@pytest.mark.parametrize("name", SIBLINGS)
def test_siblings_have_names_of_their_own(hub: LoopbackHub, bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Also where config.json chooses, and config.json cannot tell which of several it is."""
    preset = load_preset(name).preset
    hub.seed(preset.base_repo, bases[SIBLINGS[name]])
    words = ("--base", f"hf://{preset.base_repo}", "--output", tmp_path / "out", "--allow-known-broken")
    outcome = run_mopt("build-nvfp4", *words)
    assert outcome.report is not None and outcome.report["preset"]["name"] == name
    assert outcome.report["preset"]["also"] == []
    found = Built(outcome, tmp_path / "out")
    assert found.title == f"# {preset.title}, NVFP4" and f"Built with preset `{name}`." in found.card
    assert found.head["base_model"] == preset.base_repo and found.head["pipeline_tag"] == preset.pipeline_tag
    for field in ("license", "license_name", "license_link"):
        assert found.head.get(field) == getattr(preset, field)
    if not any(one["engine"].startswith("sglang") and one["grade"] != "loss" for one in outcome.report["engines"]):
        assert f"--model-path {preset.base_repo} --transformer-path" in found.card
    for other in SIBLINGS.keys() - {name}:
        title = load_preset(other).preset.title
        assert title not in found.card or title in preset.title
        assert f"`{other}`" not in found.card


@pytest.mark.parametrize("family", ["flux1", "flux2_klein"])
def test_of_a_local_model_no_sibling_is_named(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """config.json fits several, so which it is, or is trained on from, nothing tells."""
    monkeypatch.chdir(tmp_path)
    alike = sorted(name for name, model in SIBLINGS.items() if model == family)
    unnamed = run_mopt("build-nvfp4", "--base", bases[family], "--allow-known-broken")
    assert unnamed.exit_code == 3 and unnamed.error_code == "output.unnamed" and not [*tmp_path.glob("*nvfp4")]
    out = tmp_path / "out"
    outcome = run_mopt("build-nvfp4", "--base", bases[family], "--allow-known-broken", "--output", out)
    assert outcome.report is not None
    assert [outcome.report["preset"]["name"], *outcome.report["preset"]["also"]] == alike
    found = Built(outcome, out)
    assert f"the sets that presets {', '.join(f'`{name}`' for name in alike)} have in common." in found.card
    assert not {"base_model", "license", "license_name", "pipeline_tag"} & found.head.keys()
    for name in alike:
        preset = load_preset(name).preset
        assert preset.title not in found.said and preset.base_repo not in found.said


@pytest.mark.parametrize(
    ("family", "claimed", "key"),
    [
        ("flux2_klein", "black-forest-labs/FLUX.2-dev", "guidance_embeds"),
        ("flux2", "black-forest-labs/FLUX.2-klein-4B", "guidance_embeds"),
        ("flux1", "black-forest-labs/FLUX.1-Fill-dev", "in_channels"),
        ("flux1", "Qwen/Qwen-Image", "_class_name"),
    ],
)
@pytest.mark.parametrize("command", ["build-nvfp4", "convert-fp8"])
def test_a_claim_that_config_json_contradicts_is_refused(
    bases: dict[str, Path], tmp_path: Path, family: str, claimed: str, key: str, command: str
) -> None:
    words = ("--base", bases[family], "--base-model", claimed, "--output", tmp_path / "out", "--allow-known-broken")
    named = ("--preset", {"flux1": "flux1-dev", "flux2": "flux2-dev"}.get(family, "flux2-klein-4b"))
    outcome = run_mopt(command, *words, *named)
    assert (outcome.exit_code, outcome.error_code) == (3, "base.claimed_otherwise")
    assert claimed in outcome.message and repr(key) in outcome.message and not (tmp_path / "out").exists()
    fine = run_mopt(command, *words, *named, "--base-model", "me/mine", "--dry-run")
    assert fine.exit_code == 0, fine.stderr


@pytest.mark.parametrize("command", ["build-nvfp4", "convert-fp8"])
def test_kontext_is_not_for_sglang_where_something_says_that_it_is_kontext(
    bases: dict[str, Path], tmp_path: Path, command: str
) -> None:
    """Its config.json is that of FLUX.1 [dev]: the fact goes by the repo."""
    words = (command, "--base", bases["flux1"], "--output", tmp_path / "out", "--dry-run")
    for said in (("--preset", "flux1-kontext-dev"), ("--base-model", "black-forest-labs/FLUX.1-Kontext-dev")):
        outcome = run_mopt(*words, *said)
        assert (outcome.exit_code, outcome.error_code) == (3, "engine.known_broken") and "Kontext" in outcome.message
        allowed = run_mopt(*words, *said, "--allow-known-broken")
        assert allowed.exit_code == 0 and allowed.report is not None
        assert "FLUX.1 Kontext" in " ".join(one["what"] for one in allowed.report["engines"])
    assert run_mopt(*words, "--preset", "flux1-dev").exit_code == 0


@pytest.mark.parametrize("command", ["build-nvfp4", "convert-fp8"])
def test_of_exports_is_told_where_there_is_one(families: Path, tmp_path: Path, command: str) -> None:
    where = families / "chroma"
    words = (command, "--preset", "chroma", "--base", where / "base", "--allow-known-broken", "--engine", "comfyui")
    export = ("--export", where / command.partition("-")[2])
    for number, more in enumerate([(), export]):
        out = tmp_path / str(number)
        outcome = run_mopt(*words, *more, "--output", out)
        assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
        told = "the export needs a calibration of your own"
        assert (told in str(outcome.report["preset"]["known_limits"])) == bool(number)
        assert (told in (out / "README.md").read_text()) == bool(number)


def test_no_repo_is_of_two_presets() -> None:
    repos = [repo for name in preset_names() for repo in load_preset(name).preset.repos]
    assert len(repos) == len(set(repos))


@pytest.mark.parametrize(
    ("name", "also", "repo", "known"),
    [
        ("flux1-dev", ["flux1-krea-dev"], None, None),
        ("flux1-dev", ["flux1-krea-dev"], *["black-forest-labs/FLUX.1-Krea-dev"] * 2),
        ("flux2-klein-4b", ["flux2-klein-base-4b"], None, None),
        ("flux2-klein-4b", ["flux2-klein-base-4b"], MINE, MINE),
        ("flux2-klein-4b", ["flux2-klein-base-4b"], *["black-forest-labs/FLUX.2-klein-base-4B"] * 2),
        ("krea2-turbo", [], "krea/Krea-2-Turbo", "krea/Krea-2"),
        ("flux2-dev", [], MINE, MINE),
    ],
)
def test_by_which_name_sglang_knows_a_model(name: str, also: list[str], repo: str | None, known: str | None) -> None:
    """It samples a distilled model and its base otherwise, and takes no notice of a name that it does not know."""
    assert ChosenPreset(loaded=load_preset(name), also=also, is_named=False).known_as(repo) == known
    named = ChosenPreset(loaded=load_preset(name), also=[], is_named=True)
    assert named.known_as(None) == (named.loaded.preset.known_as or named.loaded.preset.base_repo)


def test_of_presets_that_fit_alike_the_base_picks_one() -> None:
    """Qwen-Image and its successor have one config.json; only the base tells which of the two it is."""
    wanted = load_preset("qwen-image-2512").preset
    config = {"_class_name": wanted.class_name, **wanted.config}
    chosen = choose_preset(config, "nvfp4")
    assert chosen.also
    assert chosen.made_for(wanted.base_repo) == wanted
    assert chosen.made_for("me/mine") is None and chosen.made_for(None) is None
    known = choose_preset(config, "nvfp4", wanted.base_repo)
    assert (known.loaded.preset, known.also) == (wanted, [])
    assert choose_preset(config, "nvfp4", "me/mine") == chosen
