"""mopt push: what then stands on the Hub, what was sent for it, and what is said of it."""

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, snapshot_download
from loopback_hub import LoopbackHub
from push_support import (
    REPO,
    contents,
    copy_of,
    flip_bias,
    lfs_bytes,
    published,
    push,
    shards_of,
    touched_nothing,
    unrecorded,
)
from support import build, copy, run_mopt

from modelopt_convert.commands.push import command


def test_a_new_repo_holds_the_checkpoint_and_nothing_else(any_hub: LoopbackHub, built: Path, tmp_path: Path) -> None:
    outcome = push(built)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert published(any_hub) == contents(built)
    pushed = outcome.report["pushed"]
    assert (pushed["repo_id"], pushed["revision"], pushed["commit"]) == (REPO, "main", any_hub.head(REPO))
    assert pushed["url"] == f"{any_hub.url}/{REPO}/commit/{pushed['commit']}" and pushed["pull_request"] is None
    assert sorted(pushed["sent"]) == sorted(contents(built)) and pushed["same"] == pushed["deleted"] == []
    assert pushed["bytes_sent"] == sum(map(len, contents(built).values()))
    assert len(any_hub.commits(REPO)) == 2  # the empty repo's, and ours
    got = Path(snapshot_download(REPO, local_dir=tmp_path / "got"))
    assert {path: data for path, data in contents(got).items() if path in contents(built)} == contents(built)
    assert run_mopt("verify", got).exit_code == 0


def test_the_second_time_nothing_is_sent(any_hub: LoopbackHub, built: Path) -> None:
    push(built)
    head, before = any_hub.head(REPO), len(any_hub.log)
    again = push(built)
    assert again.exit_code == 0 and again.report is not None
    assert any_hub.head(REPO) == head
    assert again.report["pushed"]["commit"] is None and again.report["pushed"]["sent"] == []
    assert sorted(again.report["pushed"]["same"]) == sorted(contents(built))
    asked = [one for one in any_hub.log[before:] if one.method in ("POST", "PUT") and "validate-yaml" not in one.path]
    assert asked == []
    people = run_mopt("push", built, REPO, json_report=False)
    assert f"already there: {any_hub.url}/{REPO}" in people.stdout


def test_a_dry_run_says_what_a_push_does_and_writes_nothing(hub: LoopbackHub, built: Path, tmp_path: Path) -> None:
    """To a new repo, to the same checkpoint, to a changed one; then the push does just that."""
    folder = unrecorded(built, tmp_path / "out")
    for step in ("new", "same", "changed"):
        if step == "changed":
            flip_bias(folder, 2)
        before = len(hub.log)
        planned = push(folder, REPO, "--dry-run")
        asked = [one for one in hub.log[before:] if one.method in ("POST", "PUT", "DELETE")]
        assert [one for one in asked if "validate-yaml" not in one.path] == []
        assert planned.exit_code == 0 and planned.report is not None and planned.report["status"] == "planned"
        assert planned.report["verify"]["levels"] and planned.report["pushed"]["commit"] is None
        done = push(folder)
        assert done.report is not None
        kinds = ("sent", "same", "deleted", "bytes_sent", "not_published")
        assert {kind: planned.report["pushed"][kind] for kind in kinds} == {
            kind: done.report["pushed"][kind] for kind in kinds
        }
        assert bool(planned.report["pushed"]["sent"]) is (step != "same")


def test_a_dry_run_of_a_push_is_told_with_the_command_that_does_it(hub: LoopbackHub, built: Path) -> None:
    told = run_mopt("push", built, REPO, "--private", "-n", json_report=False)
    assert told.exit_code == 0 and told.stdout.endswith(f"next: mopt push {built} {REPO} --private\n")
    assert {f"  send {path}" for path in contents(built)} <= set(told.stdout.splitlines())
    assert REPO not in hub.store.repos


def test_a_dry_run_refuses_what_a_push_refuses(hub: LoopbackHub, built: Path, tmp_path: Path) -> None:
    folder = copy_of(built, tmp_path / "out")
    flip_bias(folder)
    assert push(folder, REPO, "--dry-run").exit_code == 1
    assert touched_nothing(hub)


def test_of_a_changed_checkpoint_the_changed_shard_is_sent(hub: LoopbackHub, built: Path, tmp_path: Path) -> None:
    folder = unrecorded(built, tmp_path / "out")
    first = push(folder)
    assert first.report is not None and first.exit_code == 0
    assert [one["code"] for one in first.report["warnings"]] == ["push.unproven"]
    name, sent = flip_bias(folder, 2), lfs_bytes(hub)
    second = push(folder)
    assert second.report is not None and second.report["pushed"]["sent"] == [name]
    assert lfs_bytes(hub) - sent == (folder / name).stat().st_size
    assert published(hub) == contents(folder) and len(hub.commits(REPO)) == 3


def test_a_pull_request_leaves_main_alone(any_hub: LoopbackHub, built: Path) -> None:
    HfApi().create_repo(REPO)
    head = any_hub.head(REPO)
    outcome = push(built, REPO, "--create-pr", "--message", "A better one")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert any_hub.head(REPO) == head and published(any_hub, REPO, "refs/pr/1") == contents(built)
    pushed = outcome.report["pushed"]
    assert pushed["url"] == pushed["pull_request"] == f"{any_hub.url}/{REPO}/discussions/1"
    assert any_hub.commits(REPO, "refs/pr/1")[0].title == "A better one"
    assert pushed["revision"] == "refs/pr/1"
    assert pushed["load"].startswith(f"hf download {REPO} --revision refs/pr/1 --local-dir flux && sglang generate")
    # And it can be brought up to date.
    more = push(built, REPO, "--revision", "refs/pr/1")
    assert more.exit_code == 0 and more.report is not None and more.report["pushed"]["commit"] is None


def test_whoever_may_read_may_open_a_pull_request(
    hub: LoopbackHub, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    HfApi().create_repo(REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert push(built, REPO, "--create-pr").exit_code == 0
    assert published(hub, REPO, "refs/pr/1") == contents(built) and published(hub) == {}


def test_a_branch_is_made_where_there_is_none(hub: LoopbackHub, built: Path, tmp_path: Path) -> None:
    outcome = push(built, REPO, "--revision", "nvfp4/v1")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert published(hub, REPO, "nvfp4/v1") == contents(built) and published(hub) == {}
    assert f"hf download {REPO} --revision nvfp4/v1 --local-dir flux" in outcome.report["pushed"]["load"]
    assert "--transformer-path flux " in outcome.report["pushed"]["load"]
    folder = unrecorded(built, tmp_path / "out")
    (folder / "LICENSE.md").write_text("terms")
    push(folder, REPO, "--revision", "nvfp4/v1")
    assert published(hub, REPO, "nvfp4/v1")["LICENSE.md"] == b"terms"


def test_a_tag_does_not_move(hub: LoopbackHub, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(built)
    monkeypatch.setattr(command, "find_branches", lambda repo_id: ({"main": hub.head(repo_id)}, {"v1"}))
    refused = push(built, REPO, "--revision", "v1")
    assert refused.exit_code == 3 and refused.error_code == "push.revision"


@pytest.mark.parametrize("revision", ["0" * 40, "refs/heads/main"])
def test_what_is_no_branch_is_not_made_one(hub: LoopbackHub, built: Path, revision: str) -> None:
    push(built)
    before = dict(hub.store.repos[REPO].refs)
    refused = push(built, REPO, "--revision", revision)
    assert (refused.exit_code, refused.error_code) == (3, "push.revision") and "a branch" in refused.message
    assert hub.store.repos[REPO].refs == before


def test_private_means_private(hub: LoopbackHub, built: Path) -> None:
    assert push(built, REPO, "--private").exit_code == 0
    assert HfApi().repo_info(REPO).private is True
    assert push(built, REPO, "--private").exit_code == 0
    HfApi().create_repo("alice/public")
    before = len(hub.log)
    refused = push(built, "alice/public", "--private")
    assert refused.exit_code == 3 and refused.error_code == "push.public"
    assert all(one.method == "GET" for one in hub.log[before:]) and published(hub, "alice/public") == {}


def test_shards_of_the_checkpoint_before_are_deleted(
    hub: LoopbackHub, built: Path, built_nvfp4: Path, tmp_path: Path
) -> None:
    push(built)
    folder = tmp_path / "assets"
    folder.mkdir()
    (folder / "sample.png").write_bytes(b"\x89PNG\0")
    hub.seed(REPO, folder)
    outcome = push(built_nvfp4)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert published(hub) == contents(built_nvfp4) | {"sample.png": b"\x89PNG\0"}
    gone = [path.name for path in shards_of(built)] + ["diffusion_pytorch_model.safetensors.index.json"]
    assert outcome.report["pushed"]["deleted"] == sorted(gone)
    assert len(hub.commits(REPO)) == 4  # one commit for all of it
    # A record speaks of its own weights only, and goes with them.
    assert push(unrecorded(built, tmp_path / "other")).exit_code == 0
    assert "mopt.json" not in published(hub) and "README.md" in published(hub)


def test_two_transformers_are_one_repo(hub: LoopbackHub, exports: Path, tmp_path: Path) -> None:
    for kind in ("nvfp4", "base"):
        for name in ("transformer", "transformer_2"):
            copy(exports / kind, tmp_path / kind / name)
    output = tmp_path / "wan"
    assert build(tmp_path / "nvfp4", tmp_path / "base", output).exit_code == 0
    outcome = push(output, "alice/wan")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert published(hub, "alice/wan") == contents(output)
    load = outcome.report["pushed"]["load"]
    assert "hf download alice/wan --local-dir wan" in load and "--transformer-2-path wan/transformer_2" in load
    # The other layout would be found first, beside this one.
    refused = push(output / "transformer", "alice/wan")
    assert refused.error_code == "push.foreign_files" and "transformer/config.json" in refused.message


def test_a_card_edited_on_the_hub_stays(hub: LoopbackHub, built: Path, tmp_path: Path) -> None:
    push(built)
    folder = tmp_path / "edit"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: other\n---\nMy own words.\n")
    hub.seed(REPO, folder)
    outcome = push(built)
    assert outcome.exit_code == 0 and outcome.report is not None
    assert published(hub)["README.md"] == (folder / "README.md").read_bytes()
    (warning,) = outcome.report["warnings"]
    assert warning["code"] == "push.card_kept" and f"hf upload {REPO} {built}/README.md README.md" in warning["message"]
    assert run_mopt("verify", snapshot_download(REPO)).exit_code == 0
    # One that mopt wrote is replaced, and so is the user's own card taken.
    mine = copy_of(built, tmp_path / "mine")
    (mine / "README.md").write_text("---\nlicense: other\n---\nWords for another repo.\n")
    push(built, "alice/two")
    assert push(mine, "alice/two").exit_code == 0
    assert published(hub, "alice/two")["README.md"] == (mine / "README.md").read_bytes()


def test_a_download_can_be_pushed_as_it_lies_in_the_cache(hub: LoopbackHub, built: Path) -> None:
    push(built)
    cached = Path(snapshot_download(REPO))
    assert (cached / "config.json").is_symlink()
    assert push(cached, "alice/two").exit_code == 0 and published(hub, "alice/two") == contents(built)


def test_the_card_says_what_the_hub_asks_for(hub: LoopbackHub, built: Path) -> None:
    push(built)
    card = ModelCard.load(REPO)
    data = card.data.to_dict()
    assert data["base_model"] == "black-forest-labs/FLUX.1-dev" and data["base_model_relation"] == "quantized"
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "text-to-image"
    assert data["tags"] == ["nvfp4", "modelopt", "mopt", "sglang"]
    assert (data["license"], data["license_name"]) == ("other", "flux-1-dev-non-commercial-license")
    assert data["license_link"] == "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
    row = next(line for line in card.content.splitlines() if line.startswith("| `transformer_blocks.*.attn.to_q`"))
    _, _, count, share, mean, largest, _ = (cell.strip() for cell in row.split("|"))
    record = json.loads((built / "mopt.json").read_text())["proof"]["modules"]
    errors = [record[f"transformer_blocks.{block}.attn.to_q"]["relative_error"] for block in (0, 1)]
    assert (count, share, float(largest)) == ("2", "100.00%", max(errors))
    assert abs(float(mean) - sum(errors) / 2) <= 0.0001
    assert "base_model:quantized:black-forest-labs/FLUX.1-dev" in (HfApi().model_info(REPO).tags or [])


def test_people_are_told_where_and_how_to_load_it(hub: LoopbackHub, built: Path, tmp_path: Path) -> None:
    folder = copy_of(built, tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    (folder / ".cache").mkdir()
    outcome = run_mopt("push", folder, REPO, json_report=False)
    assert f"{hub.url}/{REPO}/commit/{hub.head(REPO)}" in outcome.stdout
    load = f"sglang generate --model-path black-forest-labs/FLUX.1-dev --transformer-path {REPO} --prompt"
    assert load in outcome.stdout
    assert "not published: .cache/, notes.txt [push.left_out]" in outcome.stderr
    assert f"(1 of {len(shards_of(folder))})" in outcome.stderr
    assert published(hub) == contents(built)
    quiet = run_mopt("push", folder, "alice/two", "-q", json_report=False)
    assert quiet.stdout == "" and "send" not in quiet.stderr


def test_a_checkpoint_converted_for_comfyui_is_published(hub: LoopbackHub, families: Path, tmp_path: Path) -> None:
    """One file and its record; nothing is said of an engine that loads a folder with a config.json."""
    outcome = run_mopt("convert", families / "wan" / "nvfp4", tmp_path / "out", "--to", "comfyui")
    assert outcome.exit_code == 0, outcome.stderr
    pushed = push(tmp_path / "out")
    assert pushed.exit_code == 0 and pushed.report is not None, pushed.stderr
    assert published(hub) == contents(tmp_path / "out")
    assert pushed.report["pushed"]["load"] is None
