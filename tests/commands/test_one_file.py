"""One .safetensors file as export, base, source and checkpoint; where its config is from; OUT beside it."""

import json
import random
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file
from support import Outcome, Tensors, build, config_of, inspected, load, run_mopt, same_bits, tree

NAME = "model.safetensors"


def one_file(source: Path, folder: Path, header: dict[str, str] | None = None) -> Path:
    """The weights of a transformer in one file, alone in a folder."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in load(source / "transformer").items()}
    save_file(tensors, folder / NAME, {"format": "pt", **(header or {})})
    return folder / NAME


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(same_bits(left[name], right[name]) for name in left)


def codes(outcome: Outcome) -> list[str]:
    assert outcome.report is not None
    return [one["code"] for one in outcome.report["warnings"]]


def ends(outcome: Outcome) -> dict[str, str]:
    """Where the config of each input is from, after a run that went well."""
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    return {name: one["config_from"] for name, one in outcome.report["inputs"].items()}


@pytest.mark.parametrize("where", ["--config", "header", "beside the file"])
def test_an_export_in_one_file_is_built(where: str, nvfp4: Path, base: Path, built_nvfp4: Path, tmp_path: Path) -> None:
    config = config_of(nvfp4 / "transformer")
    header = {"config": json.dumps({"transformer": config, "vae": {}})} if where == "header" else None
    export = one_file(nvfp4, tmp_path / "export", header)
    more: list[str | Path] = []
    if where == "--config":
        # Also over a config beside the file, which is another's.
        shutil.copy(base / "transformer" / "config.json", export.parent)
        more = ["--config", nvfp4]
    elif where == "beside the file":
        shutil.copy(nvfp4 / "transformer" / "config.json", export.parent)
    outcome = build(export, one_file(base, tmp_path / "base"), tmp_path / "out", *more)
    assert ends(outcome) == {"export": where, "base": "--config" if more else "export"}
    assert ("base.no_config" in codes(outcome)) is not bool(more)
    assert outcome.report is not None and outcome.report["proof"]["status"] == "pass"
    assert same(load(tmp_path / "out"), load(built_nvfp4)) and config_of(tmp_path / "out") == config_of(built_nvfp4)


def test_what_has_no_config_is_told_of_the_flag(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    export, single = one_file(nvfp4, tmp_path / "export"), one_file(base, tmp_path / "base")
    for given in (build(export, base, tmp_path / "out"), build(None, single, tmp_path / "out")):
        assert given.exit_code == 3 and given.error_code == "input.no_config" and "--config" in given.message
    # A folder with the file alone is no other thing than the file.
    outcome = build(nvfp4, single.parent, tmp_path / "out", "--dry-run")
    assert ends(outcome) == {"export": "config.json", "base": "export"}
    assert not (tmp_path / "out").exists()


def test_a_base_in_one_file_is_looked_at(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    single = one_file(base, tmp_path / "base")
    report = inspected(nvfp4, "--base", single)
    assert report["layout"]["basis"] == "proven"
    assert report["components"]["transformer"]["config_from"] == "config.json"
    outcome = run_mopt("verify", nvfp4, "--base", single, "--device", "cpu")
    assert outcome.exit_code == 0, outcome.stderr
    assert "config.not_compared" in codes(outcome)
    assert inspected(single, "--config", base)["components"]["."]["config_from"] == "--config"


@pytest.mark.parametrize("metadata", ["{", "[]", '"x"', '{"transformer": 1}', '{"width": 8}'])
def test_a_header_that_holds_no_config_is_not_taken(metadata: str, base: Path, tmp_path: Path) -> None:
    single = one_file(base, tmp_path / "base", {"config": metadata})
    assert inspected(single)["components"]["."]["config_from"] is None


def test_out_of_a_file_is_read_by_every_command(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """With OUT a new folder beside the file; the file is as it was."""
    source = one_file(nvfp4, tmp_path / "room")
    before = source.read_bytes()
    swapped = tmp_path / "room" / "swapped"
    outcome = run_mopt("swap-nibbles", source, swapped)
    assert outcome.exit_code == 0, outcome.stderr
    assert source.read_bytes() == before and sorted(one.name for one in source.parent.iterdir()) == [NAME, "swapped"]
    assert sorted(one.name for one in swapped.iterdir()) == [NAME, "mopt.json"]
    assert inspected(swapped, "--base", base)["layout"]["nibble_order"] == "high"
    assert run_mopt("unswizzle-scales", swapped, tmp_path / "swizzled", "--reverse").exit_code == 0
    outcome = run_mopt("swap-nibbles", swapped, tmp_path / "back", "--base", base)
    assert outcome.exit_code == 0, outcome.stderr
    assert "config.not_compared" in codes(outcome)
    assert same(load(tmp_path / "back"), load(nvfp4 / "transformer"))
    outcome = run_mopt("verify", tmp_path / "back", "--base", base, "--config", nvfp4, "--device", "cpu")
    assert outcome.exit_code == 0, outcome.stderr
    outcome = build(tmp_path / "back", base, tmp_path / "out", "--config", nvfp4)
    assert ends(outcome) == {"export": "--config", "base": "config.json"}


@pytest.mark.parametrize("seed", range(6))
def test_out_is_never_the_file_nor_around_it(seed: int, nvfp4: Path, tmp_path: Path) -> None:
    """However the file and OUT are spelled: through links, from above, at random depths."""
    dice = random.Random(seed)
    deep = tmp_path.joinpath(*(f"d{number}" for number in range(dice.randint(1, 4))))
    source = one_file(nvfp4, deep / "room")
    (tmp_path / "link").symlink_to(deep / "room")
    (tmp_path / "named").mkdir()
    named = tmp_path / "named" / NAME
    named.symlink_to(source)
    spelled = dice.choice([source, tmp_path / "link" / NAME, named])
    above = [one for one in source.parents if tmp_path in one.parents]
    places = [source, tmp_path / "link" / NAME, dice.choice(above), deep / "room", deep / "x" / ".." / "room"]
    (deep / "x").mkdir()
    if spelled == named:
        places.append(tmp_path / "named")
    before = tree(tmp_path)
    for place in places:
        for consent in ([], ["--overwrite"], ["--overwrite-foreign"]):
            outcome = run_mopt("swap-nibbles", spelled, place, *consent)
            assert outcome.exit_code != 0 and (outcome.error_code or "").startswith("output."), (place, outcome.stderr)
    assert tree(tmp_path) == before
