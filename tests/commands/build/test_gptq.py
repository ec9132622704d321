"""``--weights gptq``: what ``calibrate --gptq`` keeps chooses codes, which it proves, and outputs are nearer for it."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import LOOK, TINY, calibrate, damage, edit_calibration
from safetensors.torch import load_file, save_file
from support import Outcome, Tensors, copy, edit, load, packed_in, run_mopt, tree
from torch import Tensor, nn
from verify_support import verify

from modelopt_convert.checkpoint.calibration import read_calibration
from modelopt_convert.checkpoint.record import digest_of
from modelopt_convert.formats.nvfp4.codes import decode_e2m1, unpack_e2m1
from modelopt_convert.run.errors import InputError

RULE = "GPTQ under a sweep weighted by a calibration"
PACKED = "transformer_blocks.0.attn.to_q"
CPU = ("--device", "cpu")


def build(calib: Path, output: Path, *more: str | Path, weights: str = "gptq") -> Outcome:
    words = ("--preset", "flux1-dev", "--base", TINY, "--weights", weights, "--output", output)
    return run_mopt("build-nvfp4", *words, "--calibration", calib, *more)


@pytest.fixture(scope="module")
def made(calib_gptq: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    out = tmp_path_factory.mktemp("gptq") / "out"
    outcome = build(calib_gptq, out)
    assert outcome.exit_code == 0, outcome.stderr
    return out, outcome


def made_of(folder: Path) -> tuple[str | Path, ...]:
    """The command of ``calibrate``, with all that it says."""
    drawn = ("--pipeline", TINY, "--prompts", folder / "prompts.txt", *LOOK, "--device", "cpu")
    return ("calibrate", TINY, *drawn, "--output", folder / "calib")


def without_record(folder: Path) -> Path:
    (folder / "mopt.json").unlink(missing_ok=True)
    return folder


def inputs_of_other_pictures() -> dict[str, Tensor]:
    """Second moments of what goes into each Linear, by hooks of one's own, for prompts that were not calibrated."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(TINY, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> object:
        def add(_: nn.Module, words: tuple[Tensor, ...]) -> None:
            rows = words[0].detach().flatten(0, -2).double()
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + rows.T @ rows

        return add

    for name, module in pipeline.transformer.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(hook(name))
    for seed, prompt in enumerate(("a purple two", "a white nine", "an orange eight")):
        made = torch.Generator().manual_seed(seed)
        pipeline(prompt, num_inference_steps=3, height=32, width=32, generator=made, output_type="latent")
    return sums


def output_errors(tensors: Tensors, base: Tensors, moments: dict[str, Tensor]) -> dict[str, float]:
    """Squared error of each module's outputs over their squares."""
    found = {}
    for module in packed_in(tensors):
        scale, scale_2 = tensors[f"{module}.weight_scale"].float(), tensors[f"{module}.weight_scale_2"]
        values = decode_e2m1(unpack_e2m1(tensors[f"{module}.weight"])) * (scale * scale_2).repeat_interleave(16, 1)
        weight, sums = base[f"{module}.weight"].double(), moments[module]
        off = values.double() - weight
        found[module] = float(((off @ sums) * off).sum() / ((weight @ sums) * weight).sum())
    return found


def test_outputs_are_nearer_on_inputs_that_were_not_calibrated(
    made: tuple[Path, Outcome], calib_gptq: Path, tmp_path: Path
) -> None:
    assert build(calib_gptq, tmp_path / "swept", weights="sweep-weighted").exit_code == 0
    moments, base = inputs_of_other_pictures(), load(TINY / "transformer")
    mine, swept = (output_errors(load(one), base, moments) for one in (made[0], tmp_path / "swept"))
    assert len(mine) == 32
    assert sum(mine[name] < swept[name] for name in mine) >= 0.9 * len(mine)
    assert sum(mine.values()) < 0.7 * sum(swept.values())


def test_with_its_calibration_it_is_reproduced(made: tuple[Path, Outcome], calib_gptq: Path, tmp_path: Path) -> None:
    """At the end of the build, by its record, and without a record."""
    out, outcome = made
    assert outcome.report is not None and outcome.report["weights"] == "gptq"
    bare = without_record(edit(out, tmp_path / "bare", None))
    for report in (
        outcome.report,
        *(verify(one, *CPU, "--base", TINY, "--calibration", calib_gptq).report for one in (out, bare)),
    ):
        assert report is not None and report["exit_code"] == 0
        found = report["verify"]["modules"].values()
        assert {(one["verdict"], one["rule"]) for one in found} == {("reproduced", RULE)}
        assert all(one["codes"] == one["codes_equal"] > 0 for one in found)
    record = json.loads((out / "mopt.json").read_text())
    assert record["weights"] == "gptq" and record["calibration"]["digest"] == read_calibration(calib_gptq).digest
    assert "(`--weights gptq`)" in (out / "README.md").read_text()
    assert f"weights by {RULE}" in verify(out, *CPU).report["verify"]["statement"]


def test_without_it_weights_are_near(made: tuple[Path, Outcome], calib: Path, tmp_path: Path) -> None:
    found = verify(made[0], *CPU, "--base", TINY)
    assert found.exit_code == 1 and found.report is not None and "as --calibration" in found.report["error"]["hint"]
    assert {one["verdict"] for one in found.report["verify"]["modules"].values()} == {"near"}
    assert verify(made[0], *CPU, "--base", TINY, "--accept-near").exit_code == 0
    bare = without_record(edit(made[0], tmp_path / "bare", None))  # of the same inputs, and without what GPTQ needs
    found = verify(bare, *CPU, "--base", TINY, "--calibration", calib)
    assert found.exit_code == 1 and found.report is not None
    assert {one["verdict"] for one in found.report["verify"]["modules"].values()} == {"near"}


@pytest.mark.parametrize("seed", range(6))
def test_a_planted_fault_is_seen(made: tuple[Path, Outcome], calib_gptq: Path, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    module = draw.choice(sorted(packed_in(load(made[0]))))

    def plant(tensors: Tensors) -> None:
        raw = tensors[f"{module}.{draw.choice(('weight', 'weight_scale'))}"].view(torch.uint8).view(-1)
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(7)

    bad = without_record(edit(made[0], tmp_path / "bad", plant))
    found = verify(bad, *CPU, "--base", TINY, "--calibration", calib_gptq)
    assert found.exit_code == 1 and found.report is not None
    modules = found.report["verify"]["modules"]
    assert modules[module]["verdict"] in ("near", "mismatch")
    assert {one["verdict"] for name, one in modules.items() if name != module} == {"reproduced"}


def test_workers_pieces_and_devices_change_no_byte(
    made: tuple[Path, Outcome], calib_gptq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelopt_convert.formats.nvfp4.gptq.VALUES", 3000)
    again = build(calib_gptq, tmp_path / "again", "--workers", "3", "--verify", "off")
    assert again.exit_code == 0 and tree(tmp_path / "again") == tree(made[0])
    monkeypatch.setattr("modelopt_convert.write.gpu._GPTQ_VALUES", 5000)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    real = torch.device
    monkeypatch.setattr("modelopt_convert.write.gpu.torch.device", lambda *_: real("cpu"))
    there = build(calib_gptq, tmp_path / "there", "--device", "cuda", "--verify", "off")
    assert there.exit_code == 0, there.stderr
    theirs, mine = tree(tmp_path / "there"), tree(made[0])
    assert {name: one for name, one in theirs.items() if name.endswith(".safetensors")} == {
        name: one for name, one in mine.items() if name.endswith(".safetensors")
    }


def test_few_inputs_at_a_time_and_shares_are_one_calibration(
    calib_gptq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines with little memory: runs, then inputs, then all together."""
    monkeypatch.setattr("modelopt_convert.fidelity.moments.free_bytes", lambda _: 200_000)
    one, two = tmp_path / "one", tmp_path / "two"
    for _ in range(2):
        for number, place in enumerate((one, two), 1):
            place.mkdir(exist_ok=True)
            part = calibrate(place / "calib", "--gptq", "--share", f"{number}/2")
            assert part.exit_code == 0 and part.report is not None, part.stderr
            assert [warning["code"] for warning in part.report["warnings"]] == ["calibrate.unmerged"]
        for source, target in ((one, two), (two, one)):
            for path in (source / "calib.parts").iterdir():
                if not (target / "calib.parts" / path.name).exists():
                    shutil.copy(path, target / "calib.parts" / path.name)
    monkeypatch.setattr("modelopt_convert.fidelity.moments.Moments.see", None)  # nothing is left to be seen
    merged = run_mopt(*made_of(one), "--gptq", json_report=False)
    assert merged.exit_code == 0 and "--weights gptq --output OUT" in merged.stdout
    assert tree(one / "calib") == tree(calib_gptq) and not (one / "calib.parts").exists()


def test_what_is_kept_is_not_made_again_and_what_is_torn_is(calib_gptq: Path, tmp_path: Path) -> None:
    output, parts = tmp_path / "calib", tmp_path / "calib.parts"
    (tmp_path / "calib.lock").write_text("")
    assert calibrate(output, "--gptq", "--share", "1/1").exit_code == 0
    made = sorted(parts.iterdir())
    before = {path: path.stat().st_ino for path in made}
    torn = made[len(made) // 2]
    torn.write_bytes(torn.read_bytes()[:-1])
    assert calibrate(output, "--gptq", "--share", "1/1").exit_code == 0
    assert {path for path in made if path.stat().st_ino != before[path]} == {torn}
    made[-1].unlink()
    assert calibrate(output, "--gptq").exit_code == 0 and tree(output) == tree(calib_gptq)


def test_parts_of_another_calibration_are_not_mixed_in(tmp_path: Path) -> None:
    assert calibrate(tmp_path / "calib", "--gptq", "--share", "1/1").exit_code == 0
    assert calibrate(tmp_path / "other", "--gptq", "--share", "1/1", "--seeds", "2").exit_code == 0
    last = max((tmp_path / "calib.parts").iterdir())
    shutil.copy(last, tmp_path / "other.parts" / last.name)
    found = calibrate(tmp_path / "other", "--gptq", "--seeds", "2")
    assert found.exit_code == 4 and found.error_code == "calibrate.other_runs"


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_calibration_is_one_line_or_gives_the_same_bytes(
    made: tuple[Path, Outcome], calib_gptq: Path, tmp_path: Path, seed: int
) -> None:
    bad = copy(calib_gptq, tmp_path / "bad")
    words = damage(bad, random.Random(seed))
    found = build(bad, tmp_path / "out", "--verify", "off")
    if found.exit_code == 0:  # of a module that stays in BF16
        assert words.startswith("compensations.safetensors") and tree(tmp_path / "out") == tree(made[0])
    else:
        assert found.exit_code == 3 and str(bad) in found.message, (words, found.message)
        assert not (tmp_path / "out").exists()


def test_what_is_said_of_compensations_is_held_against_the_file(calib_gptq: Path, tmp_path: Path) -> None:
    def module(said: dict) -> dict:  # type: ignore[type-arg]
        return said["transformers"]["transformer"]["modules"][PACKED]  # type: ignore[no-any-return]

    other = "transformer_blocks.0.ff.net.2"
    for number, (change, code) in enumerate(
        [
            (lambda said: module(said).update(compensation=other), "calibration.damaged"),
            (lambda said: module(said).update(compensation="none.such"), "calibration.no_compensation"),
            (lambda said: said.pop("compensations"), "calibration.damaged"),  # the record has them
            (lambda said: said["compensations"].update({"none.such": {}}), "calibration.damaged"),
            (lambda said: said["compensations"].update({other: 5}), "calibration.damaged"),
            (lambda said: said["compensations"][other].update(panels="0" * 32), "calibration.damaged"),
        ]
    ):
        bad = edit_calibration(copy(calib_gptq, tmp_path / f"bad{number}"), change)
        found = build(bad, tmp_path / "out", "--verify", "off")
        assert (found.exit_code, found.error_code) == (3, code), (number, found.message)
        assert str(bad) in found.message and not (tmp_path / "out").exists()


def test_what_was_not_calibrated_for_it_is_refused(calib: Path, tmp_path: Path) -> None:
    found = build(calib, tmp_path / "out")
    assert found.exit_code == 3 and found.error_code == "calibration.no_compensation"
    assert found.report is not None and "--gptq" in found.report["error"]["hint"]
    words = ("build-nvfp4", "--preset", "flux1-dev", "--base", TINY, "--weights", "gptq", "--output", tmp_path / "out")
    found = run_mopt(*words)
    assert found.exit_code == 2 and "writes with --gptq" in found.stdout + found.stderr
    assert not (tmp_path / "out").exists()


def test_moments_that_cannot_be_taken_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelopt_convert.formats.nvfp4.gptq.MOST_COLUMNS", 64)
    found = calibrate(tmp_path / "calib", "--gptq")
    assert found.exit_code == 3 and found.error_code == "calibrate.moments" and "at most 64 columns" in found.message


def forge(calib: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A CALIB whose compensations are others, with every digest right."""
    bad = copy(calib, folder)
    tensors = load_file(bad / "compensations.safetensors")
    change(tensors)
    save_file(tensors, bad / "compensations.safetensors", {"format": "pt"})

    def tell(said: dict) -> None:  # type: ignore[type-arg]
        for name, one in said["compensations"].items():
            for key, ending in (("panels", "compensation"), ("exponents", "compensation_exponents")):
                one[key] = digest_of(tensors[f"{name}.{ending}"].numpy().tobytes())

    return edit_calibration(bad, tell)


@pytest.mark.parametrize("seed", range(4))
def test_a_calibration_that_is_made_up_proves_nothing(calib_gptq: Path, tmp_path: Path, seed: int) -> None:
    """Whoever publishes weights and CALIB chooses both: what comes of it has to be near as well."""
    draw = torch.Generator().manual_seed(seed)

    def change(tensors: dict[str, Tensor]) -> None:
        for name, one in tensors.items():
            if seed == 0 and name.endswith("_exponents"):
                one += 10
            elif seed == 1 and not name.endswith("_exponents"):
                one.fill_(-32768)
            elif seed == 2 and name.endswith("_exponents"):
                one.fill_(32767)
            elif seed == 3 and not name.endswith("_exponents"):
                one.copy_(torch.randint(-32767, 32767, one.shape, generator=draw).short())

    forged = forge(calib_gptq, tmp_path / "forged", change)
    assert build(forged, tmp_path / "none").exit_code == 1 and not (tmp_path / "none").exists()
    assert build(forged, tmp_path / "out", "--verify", "off").exit_code == 0
    found = verify(tmp_path / "out", *CPU, "--base", TINY, "--calibration", forged)
    assert found.exit_code == 1 and found.report is not None
    assert "reproduced" not in {one["verdict"] for one in found.report["verify"]["modules"].values()}


def test_a_compensation_that_is_read_is_the_one_that_was_written(
    made: tuple[Path, Outcome], calib_gptq: Path, tmp_path: Path
) -> None:
    bad = copy(calib_gptq, tmp_path / "bad")
    path = bad / "compensations.safetensors"
    raw = bytearray(path.read_bytes())
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    said = json.loads((bad / "calibration.json").read_text())["transformers"]["transformer"]["modules"][PACKED]
    name = f"{said['compensation']}.compensation"
    raw[8 + int.from_bytes(raw[:8], "little") + header[name]["data_offsets"][0] + 5] ^= 4
    path.write_bytes(raw)
    for found in (
        build(bad, tmp_path / "out", "--verify", "off"),
        verify(made[0], *CPU, "--base", TINY, "--calibration", bad),
    ):
        assert found.exit_code == 3 and found.error_code == "calibration.damaged" and repr(name) in found.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said["prompts"].pop("count"),
        lambda said: said.update(runs=1.5),
        lambda said: said.update(seeds="x"),
        lambda said: said.update(steps=None),
        lambda said: said.update(devices=5),
        lambda said: said.update(pipeline={"commit": 5}),
        lambda said: said.update(compensations=1.5),
        lambda said: said["transformers"]["transformer"]["modules"][PACKED].update(amax=2.0**63),
        lambda said: said["transformers"]["transformer"]["modules"][PACKED].update(amax=1e300),
        lambda said: said["transformers"]["transformer"]["modules"][PACKED].update(n=0),
    ],
)
def test_what_is_said_of_a_calibration_is_held_against_its_files(
    calib_gptq: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    bad = edit_calibration(copy(calib_gptq, tmp_path / "bad"), change)
    found = build(bad, tmp_path / "out")
    assert (found.exit_code, found.error_code) == (3, "calibration.damaged"), found.message
    assert str(bad) in found.message and not (tmp_path / "out").exists()


def test_it_is_replaced_and_nothing_else_is(calib_gptq: Path, tmp_path: Path) -> None:
    output = copy(calib_gptq, tmp_path / "calib")
    assert calibrate(output, "--gptq", "--overwrite").exit_code == 0 and tree(output) == tree(calib_gptq)
    (output / "notes.txt").write_text("mine")
    found = calibrate(output, "--gptq", "--overwrite")
    assert found.exit_code == 4 and "notes.txt" in found.message and "stats.safetensors" not in found.message
    (output / "notes.txt").unlink()
    assert calibrate(output, "--overwrite").exit_code == 0 and not (output / "compensations.safetensors").exists()


def test_what_was_kept_for_it_is_not_thrown_away(tmp_path: Path) -> None:
    part = calibrate(tmp_path / "calib", "--gptq", "--share", "1/1")
    assert part.report is not None and "4 of 4 runs and 34 of 34 inputs for --gptq" in str(part.report["warnings"])
    kept = {path.name for path in (tmp_path / "calib.parts").iterdir()}
    found = calibrate(tmp_path / "calib")
    assert found.exit_code == 4 and found.error_code == "calibrate.other_runs" and "--gptq" in found.message
    assert {path.name for path in (tmp_path / "calib.parts").iterdir()} == kept


def test_of_two_transformers_the_base_says_which(calib_gptq: Path, tmp_path: Path) -> None:
    """Names of folders are the user's: the base's is the pipeline's own."""
    one = read_calibration(calib_gptq)
    both = replace(one, transformers={name: one.transformers["transformer"] for name in ("transformer", "other")})
    assert both.of("other", "transformer") is both.transformers["other"]
    assert both.of("mine", "transformer") is both.transformers["transformer"]
    with pytest.raises(InputError, match="expected a calibration of mine or yours, found those of transformer, other"):
        both.of("mine", "yours")
