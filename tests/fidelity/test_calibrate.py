"""``mopt calibrate``: what it refuses, and how it goes on where it was stopped."""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
from calibrated import LOOK, PROMPTS, TINY, calibrate, write_prompts
from forks import Forks
from support import Tensors, edit, run_mopt, tree

from modelopt_convert.run.errors import StorageError

# A whole calibration, so that a run which is struck waits for no import.
IMPORTS = """
import os, tempfile
from pathlib import Path
from calibrated import calibrate
with tempfile.TemporaryDirectory() as folder:
    assert calibrate(Path(folder) / "calib", "--quiet").exit_code == 0
"""
# SIGPROF ends a process as SIGKILL does, with nothing of Python run; its timer counts the processor's seconds.
STRUCK = """
import signal, sys
signal.setitimer(signal.ITIMER_PROF, float(sys.argv.pop(1)))
from modelopt_convert.cli import main
main()
"""


def test_shares_together_are_one_run(calib: Path, tmp_path: Path) -> None:
    """Two machines, the parts of one copied to the other: the same bytes."""
    for number, place in enumerate(("one", "two"), 1):
        (tmp_path / place).mkdir()
        part = calibrate(tmp_path / place / "calib", "--share", f"{number}/2")
        assert part.exit_code == 0 and part.report is not None, part.stderr
        assert part.report["calibrated"]["runs_here"] == part.report["calibrated"]["runs_done"] == 2
        assert [one["code"] for one in part.report["warnings"]] == ["calibrate.unmerged"]
        assert not (tmp_path / place / "calib").exists()
    for path in (tmp_path / "two" / "calib.parts").iterdir():
        shutil.copy(path, tmp_path / "one" / "calib.parts" / path.name)
    whole = calibrate(tmp_path / "one" / "calib")
    assert whole.report is not None and whole.report["calibrated"]["runs_here"] == 0
    assert tree(tmp_path / "one" / "calib") == tree(calib)
    assert not (tmp_path / "one" / "calib.parts").exists()


def test_killed_at_any_moment_it_goes_on_and_gives_the_same_bytes(calib: Path, tmp_path: Path) -> None:
    prompts, output = write_prompts(tmp_path), tmp_path / "calib"
    words = ["calibrate", str(TINY), "--pipeline", str(TINY), "--prompts", str(prompts), "--output", str(output)]
    draw, killed, parts = random.Random(0), 0, set[str]()  # each lives longer than the one before, in the mean
    forks = Forks(IMPORTS, STRUCK, os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        while not output.exists() and killed < 40:
            code, _, said = forks.run([str(draw.uniform(0.01, 0.2 + 0.1 * killed)), *words, *LOOK, "--device", "cpu"])
            assert code in (0, -signal.SIGPROF), said
            killed += code != 0
            now = {path.name for path in output.with_suffix(".parts").glob("part-*")}
            assert now >= parts or output.exists()  # what is finished stays
            parts = now
    finally:
        forks.close()
    assert killed > 0 and tree(output) == tree(calib)


def test_a_part_that_was_torn_is_run_again(calib: Path, tmp_path: Path) -> None:
    assert calibrate(tmp_path / "calib", "--share", "1/4").exit_code == 0
    part = tmp_path / "calib.parts" / "part-00000"
    part.write_bytes(part.read_bytes()[:-5])
    again = calibrate(tmp_path / "calib")
    assert again.report is not None and again.report["calibrated"]["runs_here"] == len(PROMPTS)
    assert tree(tmp_path / "calib") == tree(calib)


def test_a_part_that_goes_before_it_is_merged_is_told(tmp_path: Path) -> None:
    from modelopt_convert.fidelity.runs import KeptRuns
    from modelopt_convert.stage.resumable import Parts

    assert calibrate(tmp_path / "calib", "--share", "1/4").exit_code == 0
    runs = KeptRuns(Parts(tmp_path / "calib"), PROMPTS[:1], 1, (1, 1))
    (tmp_path / "calib.parts" / "part-00000").unlink()
    with pytest.raises(StorageError) as refused:
        runs.merged()
    assert refused.value.code == "calibrate.run_lost"


def test_parts_of_another_calibration_are_not_mixed_in(tmp_path: Path) -> None:
    assert calibrate(tmp_path / "calib", "--share", "1/4").exit_code == 0
    before = tree(tmp_path)
    other = run_mopt(
        "calibrate", TINY, "--pipeline", TINY, "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "calib",
        "--steps", "1", "--size", "32", "--share", "1/4",
    )  # fmt: skip
    assert other.error_code == "calibrate.other_runs" and other.exit_code == 4
    assert "steps: expected 1, found 2" in other.message and tree(tmp_path) == before


def test_a_folder_of_somebody_is_not_taken_for_parts(tmp_path: Path) -> None:
    (tmp_path / "calib.parts").mkdir()
    (tmp_path / "calib.parts" / "thesis.txt").write_text("mine")
    found = calibrate(tmp_path / "calib")
    assert found.error_code == "parts.foreign" and "'thesis.txt'" in found.message
    shutil.rmtree(tmp_path / "calib.parts")
    (tmp_path / "calib.parts").write_text("mine")
    assert calibrate(tmp_path / "calib").error_code == "parts.foreign"
    assert (tmp_path / "calib.parts").read_text() == "mine"


def test_what_cannot_be_removed_is_told(calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelopt_convert.stage.resumable import Parts

    def no(_: Parts) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Parts, "remove", no)
    made = calibrate(tmp_path / "calib")
    assert made.exit_code == 0 and made.report is not None
    assert "parts.not_removed" in [one["code"] for one in made.report["warnings"]]
    assert tree(tmp_path / "calib") == tree(calib)
    refused = calibrate(tmp_path / "calib")
    assert refused.error_code == "output.exists"
    monkeypatch.undo()
    again = calibrate(tmp_path / "calib", "--overwrite", "--headroom", "1")
    assert again.report is not None and again.report["calibrated"]["runs_here"] == 0
    assert json.loads((tmp_path / "calib" / "calibration.json").read_text())["headroom"] == 1
    assert not (tmp_path / "calib.parts").exists()


def _with_nan(tensors: Tensors) -> None:
    tensors["transformer_blocks.0.ff.net.0.proj.bias"][0] = float("nan")


def test_nan_is_told_by_module_and_step(tmp_path: Path) -> None:
    base = edit(TINY / "transformer", tmp_path / "base", _with_nan)
    found = calibrate(tmp_path / "calib", base=base)
    assert found.error_code == "calibrate.not_finite" and found.exit_code == 3
    assert "'transformer_blocks.0.ff.net.2'" in found.message and "in step 1 of prompt 'a red seven'" in found.message
    assert not (tmp_path / "calib").exists() and list((tmp_path / "calib.parts").iterdir()) == []


def test_wrong_inputs_get_one_line(calib: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    index = json.loads((other / "model_index.json").read_text())
    index["transformer"][1] = "SD3Transformer2DModel"
    (other / "model_index.json").write_text(json.dumps(index))
    assert calibrate(tmp_path / "calib", pipeline=other).error_code == "pipeline.other_model"
    assert calibrate(tmp_path / "calib", pipeline=TINY / "vae").error_code == "pipeline.missing"
    shutil.rmtree(tmp_path / "calib.parts")
    prompts = tmp_path / "prompts.txt"
    for text, code in ((b"\n \n", "prompts.none"), (b"\xff", "prompts.not_text")):
        prompts.write_bytes(text)
        assert calibrate(tmp_path / "calib").error_code == code
    words = ("--pipeline", TINY, "--output", tmp_path / "calib")
    gone = run_mopt("calibrate", TINY, "--prompts", tmp_path / "gone", *words)
    assert gone.error_code == "prompts.missing"
    quantized = run_mopt("build-nvfp4", "--preset", "flux1-dev", "--base", TINY, "--output", tmp_path / "out")
    assert quantized.exit_code == 0
    write_prompts(tmp_path)
    assert calibrate(tmp_path / "calib", base=tmp_path / "out").error_code == "base.quantized"
    for share in ("0/2", "3/2", "1", "x/2"):
        assert run_mopt("calibrate", TINY, "--prompts", prompts, *words, "--share", share).exit_code == 2
    assert not (tmp_path / "calib").exists()


def test_a_pipeline_whose_files_changed_is_another(tmp_path: Path) -> None:
    """The transformer is the base's; a text encoder of other bytes draws other pictures."""
    pipeline = tmp_path / "pipeline"
    shutil.copytree(TINY, pipeline)
    assert calibrate(tmp_path / "calib", "--share", "1/4", pipeline=pipeline).exit_code == 0
    (weights,) = (pipeline / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes() + b"\0")  # nothing of it runs
    assert calibrate(tmp_path / "calib", "--share", "1/4", pipeline=pipeline).exit_code == 0
    (encoder,) = (pipeline / "text_encoder").glob("*.safetensors")
    raw = bytearray(encoder.read_bytes())
    raw[-1] ^= 1
    encoder.write_bytes(raw)
    other = calibrate(tmp_path / "calib", "--share", "2/4", pipeline=pipeline)
    assert other.exit_code == 4 and other.error_code == "calibrate.other_runs" and "pipeline: expected" in other.message


def test_equal_prompts_run_once_and_images_have_no_frames(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red seven\n" * 3)
    made = calibrate(tmp_path / "calib")
    assert made.exit_code == 0 and made.report is not None and made.report["calibrated"]["runs"] == 1
    assert "prompts.repeated" in [one["code"] for one in made.report["warnings"]]
    said = json.loads((tmp_path / "calib" / "calibration.json").read_text())
    assert said["frames"] is None and said["prompts"]["count"] == 1


def test_a_quantized_base_is_one_error(tmp_path: Path) -> None:
    assert run_mopt("build-nvfp4", "--preset", "flux1-dev", "--base", TINY, "--output", tmp_path / "out").exit_code == 0
    refused = calibrate(tmp_path / "calib", base=tmp_path / "out")
    assert refused.report is not None and len(refused.report["error"]["faults"]) <= 1
    assert "besides" not in refused.message


@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe", b"[1]", b'{"_class_name": "os.system"}'], ids=["cut", "no text", "list", "class"]
)
def test_a_damaged_pipeline_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_bytes(content)
    found = calibrate(tmp_path / "calib", pipeline=tmp_path / "pipeline")
    assert found.exit_code == 3 and found.error_code in ("pipeline.json", "pipeline.index")
