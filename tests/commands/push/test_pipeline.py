"""A whole pipeline on the Hub: as a base that is fetched, and as what is published."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi, snapshot_download
from loopback_hub import LoopbackHub
from pipelines import make_pipeline
from push_support import REPO, contents, copy_of, published, push, touched_nothing
from support import Outcome, edit_json, run_mopt, tree

BASE = "black-forest-labs/FLUX.1-dev"


def make(exports: Path, base: Path | str, output: Path, *more: str) -> Outcome:
    where = ("--export", exports / "nvfp4", "--base", base, "--output", output)
    return run_mopt("build-nvfp4", "--preset", "flux1-dev", *where, "--pipeline-output", *more)


@pytest.fixture(scope="module")
def pipeline(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(exports / "base", tmp_path_factory.mktemp("pipeline") / "base")


@pytest.fixture(scope="module")
def whole(exports: Path, pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never write there."""
    output = tmp_path_factory.mktemp("whole") / "out"
    outcome = make(exports, pipeline, output, "--base-model", BASE)
    assert outcome.exit_code == 0, outcome.stderr
    return output


def test_the_whole_pipeline_is_published(any_hub: LoopbackHub, whole: Path, tmp_path: Path) -> None:
    outcome = push(whole)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert published(any_hub) == contents(whole)
    pushed = outcome.report["pushed"]
    assert pushed["load"] == f"sglang generate --model-path {REPO} --model-id FLUX.1-dev --prompt '...'"
    got = Path(snapshot_download(REPO, local_dir=tmp_path / "got"))
    assert run_mopt("verify", got).exit_code == 0
    again = push(whole)
    assert again.report is not None and again.report["pushed"]["sent"] == []


def test_what_was_copied_before_and_is_no_more_goes(
    hub: LoopbackHub, exports: Path, whole: Path, tmp_path: Path
) -> None:
    push(whole)
    base = make_pipeline(exports / "base", tmp_path / "base")
    shutil.rmtree(base / "tokenizer")
    edit_json(base / "model_index.json", lambda index: index.update({"tokenizer": [None, None]}))
    assert make(exports, base, tmp_path / "out", "--base-model", BASE).exit_code == 0
    outcome = push(tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert published(hub) == contents(tmp_path / "out")
    assert outcome.report["pushed"]["deleted"] == ["tokenizer/nested/deeper/merges.txt", "tokenizer/vocab.json"]


@pytest.mark.parametrize("name", ["vae/other.safetensors", "text_encoder/pytorch_model.bin"])
def test_weights_of_somebody_else_in_a_component_are_refused(hub: LoopbackHub, whole: Path, name: str) -> None:
    HfApi().create_repo(REPO)
    HfApi().upload_file(path_or_fileobj=b"?", path_in_repo=name, repo_id=REPO)
    head = hub.head(REPO)
    outcome = push(whole)
    assert (outcome.exit_code, outcome.error_code) == (3, "push.foreign_files") and name in outcome.message
    assert hub.head(REPO) == head


def test_notes_beside_copies_stay_here_and_are_named(hub: LoopbackHub, whole: Path, tmp_path: Path) -> None:
    folder = copy_of(whole, tmp_path / "out")
    (folder / "tokenizer" / "notes.txt").write_text("mine")
    outcome = push(folder)
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    assert "tokenizer/notes.txt" in outcome.report["pushed"]["not_published"]
    assert published(hub) == contents(whole)


@pytest.mark.parametrize("how", ["link", "config", "changed", "index", "no index"])
def test_nothing_else_leaves_by_the_name_of_a_copy(hub: LoopbackHub, whole: Path, tmp_path: Path, how: str) -> None:
    folder = copy_of(whole, tmp_path / "out")
    secret = tmp_path / "secret"
    secret.write_bytes((folder / "vae/diffusion_pytorch_model.safetensors").read_bytes())
    name, code = "vae/diffusion_pytorch_model.safetensors", "input.symlink_escape"
    if how == "link":
        (folder / name).unlink()
        (folder / name).symlink_to(secret)
    elif how == "config":  # as it was copied, and with a path of the machine that it was saved on
        data = b'{"_name_or_path": "/home/me/t5"}'
        (folder / "text_encoder/config.json").write_bytes(data)
        code = "push.local_path"
    elif how == "index":
        edit_json(folder / "model_index.json", lambda index: index.update({"boundary_ratio": 0.1}))
        code = "check.verify"
    elif how == "no index":
        (folder / "model_index.json").unlink()
        code = "check.verify"
    else:
        (folder / name).write_bytes(b"?" * secret.stat().st_size)
        code = "check.verify"
    outcome = push(folder)
    assert outcome.error_code == code, outcome.stderr
    assert touched_nothing(hub)


def test_a_base_on_the_hub_is_fetched_whole_and_counted(
    hub: LoopbackHub, exports: Path, pipeline: Path, whole: Path, tmp_path: Path
) -> None:
    HfApi().create_repo(BASE)
    HfApi().upload_folder(folder_path=pipeline, repo_id=BASE)
    planned = make(exports, f"hf://{BASE}", tmp_path / "out", "--dry-run")
    outcome = make(exports, f"hf://{BASE}", tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None and planned.report is not None, outcome.stderr
    beside = {name: one for name, one in tree(tmp_path / "out").items() if not name.startswith("transformer/")}
    assert {
        name: one
        for name, one in tree(whole).items()
        if name in json.loads((whole / "mopt.json").read_text())["copied"]
    }.items() <= beside.items()
    size = sum(one["bytes"] for one in outcome.report["output"]["copied"])
    assert 0.9 * size < planned.report["network"]["pipeline"]["to_fetch_bytes"] < size  # headers are here already
    assert outcome.report["network"]["pipeline"]["fetched_bytes"] == size
    assert outcome.report["network"]["pipeline"]["of_bytes"] == size
