"""Inputs on the Hub: the same outputs as from disk, at one commit, and no more bytes than are needed."""

import json
from pathlib import Path

import pytest
import torch
from loopback_hub import LoopbackHub
from safetensors.torch import save_file
from support import Outcome, build, config_of, copy, edit, run_mopt, tree

from modelopt_convert.checkpoint.hub import range_source
from modelopt_convert.checkpoint.hub.ranges import total, union
from modelopt_convert.checkpoint.local_file import LocalFile
from modelopt_convert.checkpoint.location import parse_location
from modelopt_convert.checkpoint.reader import CheckpointReader

SOURCES = ("hf://alice/export", "hf://alice/base")


@pytest.fixture
def filled(hub: LoopbackHub, nvfp4: Path, base: Path) -> LoopbackHub:
    """The Hub with a FLUX.1 and its export, as pipelines."""
    hub.seed("alice/base", base)
    hub.seed("alice/export", nvfp4)
    return hub


def build_from_hub(output: Path, *more: str | Path) -> Outcome:
    return run_mopt(
        "build-nvfp4", "--preset", "flux1-dev", "--export", SOURCES[0], "--base", SOURCES[1], "--output", output, *more
    )


def test_what_is_built_from_the_hub_is_what_is_built_from_disk(
    filled: LoopbackHub, built_nvfp4: Path, tmp_path: Path
) -> None:
    outcome = build_from_hub(tmp_path / "far")
    assert outcome.exit_code == 0, outcome.stderr
    far, near = tree(tmp_path / "far"), tree(built_nvfp4)
    assert far.keys() == near.keys()
    # These name the base.
    assert {name for name in near if near[name] != far[name]} == {"mopt.json", "README.md"}
    record = json.loads((tmp_path / "far" / "mopt.json").read_text())
    assert record["sources"]["base"]["commit"] == filled.head("alice/base")
    assert record["sources"]["export"]["repo"] == "alice/export"
    assert outcome.report is not None
    assert outcome.report["inputs"]["base"]["path"] == "hf://alice/base/transformer"


@pytest.mark.parametrize(("proof", "share"), [("all", 0.9), ("sampled", 0.8)])
def test_only_the_bytes_needed_are_fetched_and_none_twice(
    filled: LoopbackHub,
    nvfp4: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    proof: str,
    share: float,
) -> None:
    """What a build needs is what the same build reads on disk: the base whole, unless the proof is sampled."""
    asked: dict[str, list[tuple[int, int]]] = {}
    read, read_into = LocalFile.read, LocalFile.read_into

    def recording(self: LocalFile, offset: int, num_bytes: int) -> bytes:
        asked.setdefault(self.where, []).append((offset, offset + num_bytes))
        return read(self, offset, num_bytes)

    def recording_into(self: LocalFile, offset: int, target: memoryview) -> None:
        asked.setdefault(self.where, []).append((offset, offset + target.nbytes))
        read_into(self, offset, target)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFile, "read", recording)
        patch.setattr(LocalFile, "read_into", recording_into)
        assert build(nvfp4, base, tmp_path / "near", "--proof", proof).exit_code == 0
    inputs = {path: ranges for path, ranges in asked.items() if str(tmp_path) not in path}
    needed = sum(total(union(ranges)) for path, ranges in inputs.items() if path.endswith(".safetensors"))
    filled.log.clear()
    outcome = build_from_hub(tmp_path / "far", "--proof", proof)
    assert outcome.exit_code == 0 and outcome.report is not None
    fetched = filled.bytes_out("/_cdn/")
    of = sum(one["of_bytes"] for one in outcome.report["network"].values())
    assert needed <= fetched <= needed * 1.05 and fetched < share * of
    assert sum(one["fetched_bytes"] for one in outcome.report["network"].values()) >= fetched
    assert all(one.status == 206 and one.range for one in filled.requests("/_cdn/"))
    assert not any(one.authorized for one in filled.requests("/_cdn/"))


def test_rows_of_a_weight_that_is_fetched_whole_are_not_asked_for_one_by_one(
    filled: LoopbackHub, tmp_path: Path
) -> None:
    counts = {}
    for proof in ("sampled", "all"):
        filled.log.clear()
        assert build_from_hub(tmp_path / proof, "--proof", proof).exit_code == 0
        counts[proof] = len(filled.requests("/_cdn/.*-0000"))  # of the base, which has shards
    assert counts["all"] * 4 < counts["sampled"]


@pytest.mark.parametrize(("proof", "told"), [("all", "5.8 MB of 5.8 MB"), ("sampled", "4.3 MB of 5.8 MB")])
def test_a_dry_run_says_how_much_would_be_fetched(filled: LoopbackHub, tmp_path: Path, proof: str, told: str) -> None:
    """Also what the comparison of all bytes needs."""
    outcome = build_from_hub(tmp_path / "out", "--proof", proof, "--dry-run")
    assert outcome.exit_code == 0 and outcome.report is not None
    planned = outcome.report["network"]["base"]
    headers = filled.bytes_out("/_cdn/")
    text = run_mopt(
        "build-nvfp4", "--preset", "flux1-dev", "--export", SOURCES[0], "--base", SOURCES[1],
        "--output", tmp_path / "out", "--proof", proof, "--dry-run", json_report=False,
    ).stdout  # fmt: skip
    assert f"would fetch {told} of the base, alice/base@" in text
    assert headers < 60_000 and not (tmp_path / "out").exists()
    filled.log.clear()
    assert build_from_hub(tmp_path / "out", "--proof", proof).exit_code == 0
    of_base = sum(one.num_out for one in filled.requests("/_cdn/") if "-0000" in one.path)
    assert of_base == pytest.approx(planned["to_fetch_bytes"], rel=0.05)


def test_large_ranges_of_a_xet_repo_come_through_xet(
    xet_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "big"
    folder.mkdir()
    tensors = {f"blocks.{n}.weight": torch.randn(1024, 2048).to(torch.bfloat16) for n in range(5)}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")
    xet_hub.seed("alice/big", folder)
    xet_hub.log.clear()
    monkeypatch.setattr(range_source, "XET_BYTES", 2 << 20)
    with CheckpointReader(parse_location("hf://alice/big")) as reader:
        for name in ("blocks.1.weight", "blocks.3.weight"):
            assert reader.read(name) == tensors[name].view(torch.uint8).numpy().tobytes()
        assert (
            reader.read_range("blocks.0.weight", 8, 4)
            == tensors["blocks.0.weight"].view(torch.uint8).numpy().tobytes()[8:12]
        )
        fetched, _ = reader.traffic()
    assert 8 << 20 < fetched < 9 << 20
    assert xet_hub.bytes_out("/_cdn/") < 1 << 20  # headers and the small range
    # The loopback Hub itself asks Xet too, for whole files: to serve headers over HTTP.
    ours = [one.num_out for one in xet_hub.requests("/cas/fetch") if one.num_out < 10 << 20]
    assert 6 << 20 < sum(ours) < 9 << 20


def test_the_commit_is_pinned_at_the_first_contact(filled: LoopbackHub, base: Path, tmp_path: Path) -> None:
    location = parse_location("hf://alice/base/transformer")
    with CheckpointReader(location) as reader:
        first = filled.head("alice/base")
        filled.seed("alice/base", edit(base, tmp_path / "changed", lambda tensors: tensors["proj_out.weight"].zero_()))
        assert filled.head("alice/base") != first
        with CheckpointReader(base / "transformer") as local:
            assert reader.read("proj_out.weight") == local.read("proj_out.weight")
        assert reader.identity()["commit"] == first
    assert parse_location(f"hf://alice/base@{first}/transformer").is_dir()


def test_revisions_folders_and_single_files(hub: LoopbackHub, base: Path, tmp_path: Path) -> None:
    single = edit(base, tmp_path / "single")
    hub.seed("alice/flat", single)
    first = hub.head("alice/flat")
    flat = run_mopt("inspect", "hf://alice/flat")
    assert flat.exit_code == 0 and flat.report is not None
    file = run_mopt("inspect", f"hf://alice/flat@{first}/diffusion_pytorch_model.safetensors")
    assert file.report is not None
    assert file.exit_code == 0 and file.report["totals"] == flat.report["totals"]


def test_verify_and_rewrite_take_the_hub_too(hub: LoopbackHub, built_nvfp4: Path, base: Path, tmp_path: Path) -> None:
    hub.seed("alice/built", built_nvfp4)
    hub.seed("alice/base", base)
    assert run_mopt("verify", "hf://alice/built").exit_code == 0
    assert run_mopt("verify", "hf://alice/built", "--base", "hf://alice/base").exit_code == 0
    far = run_mopt("swap-nibbles", "hf://alice/built", tmp_path / "far")
    near = run_mopt("swap-nibbles", built_nvfp4, tmp_path / "swapped")
    assert far.exit_code == near.exit_code == 0
    same = {name for name, digest in tree(tmp_path / "far").items() if tree(tmp_path / "swapped").get(name) == digest}
    assert {name for name in tree(tmp_path / "far") if name.endswith(".safetensors")} <= same
    broken = copy(built_nvfp4, tmp_path / "broken")
    (broken / "config.json").write_text(json.dumps(config_of(broken) | {"num_layers": 3}))
    hub.seed("alice/broken", broken)
    assert run_mopt("verify", "hf://alice/broken").exit_code == 1


def test_a_pickle_of_the_hub_is_fetched_whole(
    hub: LoopbackHub, old: Path, good: Path, base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "ckpt"
    folder.mkdir()
    (folder / "transformer.pt").write_bytes(good.read_bytes())
    hub.seed("alice/old", old)
    hub.seed("alice/ckpt", folder)
    sources = ("--export", "hf://alice/old", "--base", base, "--preset", "flux1-dev")
    far = run_mopt("convert-fp8", *sources, "--checkpoint", "hf://alice/ckpt", "--output", tmp_path / "far")
    assert far.exit_code == 0, far.stderr
    near = (
        "--export",
        old,
        "--base",
        base,
        "--preset",
        "flux1-dev",
        "--checkpoint",
        good,
        "--output",
        tmp_path / "near",
    )
    assert run_mopt("convert-fp8", *near).exit_code == 0
    assert tree(tmp_path / "far")["config.json"] == tree(tmp_path / "near")["config.json"]
    name = "diffusion_pytorch_model.safetensors"
    assert tree(tmp_path / "far")[name] == tree(tmp_path / "near")[name]
