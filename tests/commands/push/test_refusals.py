"""What mopt push refuses, each before anything is created or sent."""

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from loopback_hub import LoopbackHub
from push_support import REPO, contents, copy_of, flip_bias, published, push, shards_of, touched_nothing
from safetensors.torch import load_file, save_file
from support import edit_json, run_mopt

TOKEN = "hf_" + "aB3" * 12


def plant_pickle(folder: Path) -> None:
    (folder / "modelopt_state.pth").write_bytes(b"\x80\x04.")


def plant_token(folder: Path) -> None:
    (folder / "LICENSE.txt").write_text(f"key: {TOKEN}\n")


def plant_own_token(folder: Path) -> None:
    edit_json(folder / "mopt.json", lambda found: found.update(note="my hf_owner token"))


def plant_token_in_header(folder: Path) -> None:
    shard = shards_of(folder)[0]
    save_file(load_file(shard), shard, {"format": "pt", "note": TOKEN})


def plant_path(folder: Path) -> None:
    edit_json(folder / "config.json", lambda found: found.update(_name_or_path="/home/me/flux"))


def plant_path_in_card(folder: Path) -> None:
    with (folder / "README.md").open("a") as file:
        file.write(f"\nmade in {folder.resolve()}.\n")


def plant_path_in_header(folder: Path) -> None:
    shard = shards_of(folder)[0]
    save_file(load_file(shard), shard, {"format": "pt", "config": '{"from": "/mnt/models/x"}'})


def plant_link(folder: Path) -> None:
    (folder.parent / "secret").write_text("{}")
    (folder / "hf_quant_config.json").symlink_to(folder.parent / "secret")


PLANTED = {
    plant_pickle: ("push.pickle", "modelopt_state.pth"),
    plant_token: ("push.secret", "LICENSE.txt"),
    plant_own_token: ("push.secret", "mopt.json"),
    plant_token_in_header: ("push.secret", "00001-of"),
    plant_path: ("push.local_path", "config.json: _name_or_path holds a path of this machine: '/home/me/flux'"),
    plant_path_in_card: ("push.local_path", "README.md"),
    plant_path_in_header: ("push.local_path", "__metadata__.config"),
    plant_link: ("input.symlink_escape", "hf_quant_config.json"),
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_what_must_not_leave_this_machine(
    hub: LoopbackHub, built: Path, tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    folder = copy_of(built, tmp_path / "out")
    plant(folder)
    outcome = push(folder)
    code, words = PLANTED[plant]
    assert (outcome.exit_code, outcome.error_code) == (3, code)
    assert words in outcome.message and TOKEN not in outcome.stdout + outcome.stderr
    assert hub.log == []  # not even asked


def test_a_checkpoint_that_fails_its_own_check(hub: LoopbackHub, built: Path, tmp_path: Path) -> None:
    folder = copy_of(built, tmp_path / "out")
    flip_bias(folder)
    outcome = push(folder)
    assert (outcome.exit_code, outcome.error_code) == (1, "check.verify")
    assert outcome.report is not None and outcome.report["verify"]["verdict"] == "fail"
    assert touched_nothing(hub) and outcome.report["pushed"] is None


def test_structure_alone_is_checked_where_there_is_no_record(hub: LoopbackHub, built: Path, tmp_path: Path) -> None:
    folder = copy_of(built, tmp_path / "out")
    (folder / "mopt.json").unlink()
    edit_json(folder / "config.json", lambda found: found["quantization_config"].update(quant_algo="FP8"))
    outcome = push(folder)
    assert outcome.exit_code in (1, 3) and touched_nothing(hub)


@pytest.mark.parametrize("name", ["flux", "a/b/c", "alice/fl ux", "alice/..", "../alice"])
def test_a_name_that_is_none(hub: LoopbackHub, built: Path, name: str) -> None:
    outcome = push(built, name)
    assert (outcome.exit_code, outcome.error_code) == (3, "hub.repo_id") and hub.log == []


def test_no_right_to_write(hub: LoopbackHub, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    HfApi().create_repo(REPO)
    before = len(hub.log)
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    theirs = push(built)
    assert (theirs.exit_code, theirs.error_code) == (3, "hub.forbidden")
    missing = push(built, "alice/other")
    assert (missing.exit_code, missing.error_code) == (3, "hub.forbidden") and "bob" in missing.message
    reading = push(built, "bob/mine")  # the token may read only
    assert (reading.exit_code, reading.error_code) == (3, "hub.forbidden") and "only read" in reading.message
    assert all(one.method == "GET" for one in hub.log[before:])


def test_a_token_that_the_hub_does_not_know(hub: LoopbackHub, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    wrong = push(built)
    assert (wrong.exit_code, wrong.error_code) == (3, "hub.token") and "hf auth login" in wrong.message
    monkeypatch.delenv("HF_TOKEN")
    none = push(built)
    assert (none.exit_code, none.error_code) == (3, "hub.token") and "hf auth login" in none.message
    assert touched_nothing(hub)


def test_a_gated_and_a_private_repo(
    hub: LoopbackHub, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seed").mkdir()
    hub.seed("alice/gated", tmp_path / "seed", gated=True)
    hub.seed("alice/private", tmp_path / "seed", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    gated = push(built, "alice/gated", "--create-pr")
    assert (gated.exit_code, gated.error_code) == (3, "hub.gated")
    assert f"{hub.url}/alice/gated" in gated.message and "mopt push" in gated.message
    private = push(built, "alice/private", "--create-pr")
    assert (private.exit_code, private.error_code) == (3, "hub.forbidden")
    assert touched_nothing(hub)


def test_weights_of_somebody_else_are_not_mixed_with_ours(hub: LoopbackHub, built: Path, tmp_path: Path) -> None:
    seed = tmp_path / "seed"
    seed.mkdir()
    save_file(load_file(shards_of(built)[0]), seed / "lora.safetensors")
    (seed / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {}}')
    hub.seed(REPO, seed)
    head, before = hub.head(REPO), len(hub.log)
    outcome = push(built)
    assert (outcome.exit_code, outcome.error_code) == (3, "push.foreign_files")
    assert "lora.safetensors" in outcome.message and "another repo" in outcome.message
    assert hub.head(REPO) == head and not any(one.method in ("PUT", "DELETE") for one in hub.log[before:])
    # Beside a checkpoint of mopt's own they are no less another's.
    hub.reset(tmp_path / "again")
    push(built)
    hub.seed(REPO, seed)
    assert push(built).error_code == "push.foreign_files"
    assert "lora.safetensors" in published(hub)


def test_a_card_that_the_hub_would_refuse(hub: LoopbackHub, built: Path, tmp_path: Path) -> None:
    folder = copy_of(built, tmp_path / "out")
    (folder / "README.md").write_text("---\nbase_model_relation: copied\n---\n")
    outcome = push(folder)
    assert (outcome.exit_code, outcome.error_code) == (3, "push.card") and "base_model_relation" in outcome.message
    assert touched_nothing(hub)


def test_what_is_no_checkpoint(hub: LoopbackHub, built: Path, tmp_path: Path) -> None:
    assert push(shards_of(built)[0]).error_code == "push.folder"
    assert push(tmp_path / "nowhere").error_code == "input.missing"
    assert hub.log == []


def test_usage(hub: LoopbackHub, built: Path) -> None:
    assert push(built, REPO, "--create-pr", "--revision", "dev").exit_code == 2
    assert push(built, REPO, "--message", " ").exit_code == 2
    for words in (["push", f"hf://{REPO}", REPO], ["build-nvfp4", "--preset", "flux1-dev", "--output", f"hf://{REPO}"]):
        refused = run_mopt(*words)
        assert refused.exit_code == 2 and "folder on disk" in refused.stderr.replace("\n", " ")
    assert run_mopt("push", built, REPO, "--report-json", built / "report.json").exit_code == 2
    assert hub.log == [] and "report.json" not in contents(built)
