"""Every command line of mopt that README and the pages show, run where a user would run it, on small data."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from calibrated import TINY, calibrate
from fp8_support import checkpoint_of, old_export
from loopback_hub import LoopbackHub
from nunchaku_models import merged, packed, small
from pipelines import make_pipeline
from root import ROOT
from safetensors.torch import save_file
from support import run_mopt
from tiny_flux1 import inputs_of

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Behind ``$`` stands a command with lines that it prints.
SHOWN = {
    line.split(" > ")[0].removeprefix("$ ").strip(): page.name
    for page in PAGES
    for block in re.findall(r"^```(?:\w+)?\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if re.match(r"(\$ )?mopt [a-z]", line) and "[OPTIONS]" not in line
}
# What cannot be run here, or is by another test.
ELSEWHERE = {
    "mopt verify OUT --backend all --require native": "a GPU with native FP4",
    "mopt verify --self-test --backend all --json": "minutes without a GPU; tests/verification has it",
    "mopt verify OUT --base FLUX.1-dev --backend all --report verify.html": "likewise",
    "mopt build-nvfp4 --preset flux1-dev --export EXPORT --base BASE --output OUT --executor ray": "tests/write has it",
    "mopt verify OUT --base BASE --calibration CALIB": "tests/commands/build/test_weighted.py",
    "mopt compare OUT --base BASE --pipeline PIPELINE --prompts prompts.txt --report pictures.html": "tests/fidelity",
    "mopt compare OUT OUT2 OUT3 --base BASE --pipeline PIPELINE --prompts prompts.txt --seeds 8": "likewise",
    "mopt compare OUT --base BASE --pipeline PIPELINE --prompts prompts.txt "
    "--require 'cosine>=0.99,psnr>=26'": "likewise",
    "mopt compare demo/nvfp4-pictures demo/fp8-pictures demo/advised-pictures --base tests/data/tiny_flux1 "
    "--pipeline tests/data/tiny_flux1 --prompts demo/prompts.txt --seeds 2 --steps 6 --size 32 "
    "--report demo/pictures.html": "likewise, and make demo",
    **dict.fromkeys(
        (line for line in SHOWN if line.startswith(("mopt calibrate ", "mopt advise "))),
        "tests/fidelity has it, with fewer pixels",
    ),
}
EXPORTS, BASES = ("EXPORT", "out/hf"), ("BASE", "FLUX.1-dev", "base")
SWAPPED, SWIZZLED = ("swap-nibbles", "high-first"), ("unswizzle-scales", "post-processed")


@pytest.fixture(scope="session")
def rewritten(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export with the other order of nibbles, or of scales, as the folders ``swapped`` and ``swizzled``."""
    folder = tmp_path_factory.mktemp("rewritten")
    for command, name, *more in (("swap-nibbles", "swapped"), ("unswizzle-scales", "swizzled", "--reverse")):
        outcome = run_mopt(command, exports / "nvfp4", folder / name, *more)
        assert outcome.exit_code == 0, outcome.stderr
    return folder


@pytest.fixture(scope="session")
def converted(families: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for ComfyUI, of a model whose modules it does not join."""
    folder = tmp_path_factory.mktemp("converted") / "out"
    outcome = run_mopt("convert", families / "qwen_image" / "nvfp4", folder, "--to", "comfyui")
    assert outcome.exit_code == 0, outcome.stderr
    (file,) = folder.glob("*.safetensors")
    return file


@pytest.fixture(scope="session")
def of_nunchaku(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of nunchaku's engine."""
    model, folder = small("qwen_image"), tmp_path_factory.mktemp("nunchaku")
    config = {**model.config, "_class_name": "QwenImageTransformer2DModel"}
    return merged(packed("qwen_image", model.state_dict(), "int4"), folder / "in", config, "int4", "X")


@pytest.fixture
def here(exports: Path, built_nvfp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, with what every page takes for given."""
    folder = tmp_path / "here"
    links = {name: exports / "base" for name in BASES} | {"CHECKPOINT": built_nvfp4}
    for name, target in links.items():
        link(folder / name, target)
    monkeypatch.chdir(folder)
    return folder


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def copy_file(path: Path, source: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source.read_bytes())


def provide(line: str, here: Path, exports: Path, built: Path, rewritten: Path) -> None:
    """What this one line takes for given beside that."""
    words = shlex.split(line)
    export = exports / ("fp8" if words[1] == "convert-fp8" else "nvfp4")
    reads = words[1] in ("verify", "push", "compare")  # else these are where a build writes
    for name in ("OUT", "out", "flux1-dev-nvfp4") if reads else EXPORTS:
        link(here / name, built if reads else export)
    if words[1] in (SWAPPED[0], SWIZZLED[0]):
        source = rewritten / ("swapped" if words[1] == SWAPPED[0] else "swizzled")
        if "--reverse" in words:
            source = exports / "nvfp4"
        name = here / words[2]
        name.unlink(missing_ok=True)  # CHECKPOINT is a right one, which is not rewritten
        (shard,) = source.rglob("*.safetensors")
        copy_file(name, shard) if name.suffix else link(name, source)
    elif words[1] == "inspect" and words[2] == "OUT":
        link(here / "OUT", built)
    elif words[1] == "inspect" and words[2].endswith(".safetensors"):
        (shard,) = (exports / "nvfp4").rglob("*.safetensors")
        copy_file(here / words[2], shard)
    if words[1] == "compare":
        save_file(inputs_of(exports / "base" / "transformer"), here / "captured.safetensors")
    if "--calibration" in words:
        provide_calibration(here)
    if "--checkpoint" in words:
        for folder in ("OLD_EXPORT", "old/hf"):
            old_export(exports / "fp8", here / folder)
        for name in ("CKPT/backbone.pt", "old/ckpt/backbone.pt"):
            link(here / name, checkpoint_of(exports / "fp8"))
    if "--pipeline-output" in words:
        (here / "BASE").unlink()
        make_pipeline(exports / "base", here / "BASE")


def provide_calibration(here: Path) -> None:
    """The trained base, and CALIB as its own command writes it."""
    (here / "BASE").unlink()
    link(here / "BASE", TINY)
    assert calibrate(here / "CALIB", "--gptq").exit_code == 0


def provide_another_model(here: Path, comfy: Path, families: Path) -> None:
    """What a conversion takes for given; FLUX.1's modules are joined in ComfyUI, which is refused."""
    (here / "BASE").unlink()
    for name, target in {"BASE": "base", "EXPORT": "nvfp4"}.items():
        link(here / name, families / "qwen_image" / target)
    copy_file(here / "comfy.safetensors", comfy)


def fill(hub: LoopbackHub, exports: Path, built: Path, empty: Path) -> None:
    """The repos that the pages name: those that are read, and those that the user may write to."""
    (shard,) = (exports / "nvfp4").rglob("*.safetensors")
    single = empty / "single"
    copy_file(single / "flux2-dev-nvfp4.safetensors", shard)
    nothing = empty / "nothing"
    nothing.mkdir()
    for repo, folder in {
        "me/flux1-dev-export": exports / "nvfp4",
        "black-forest-labs/FLUX.1-dev": exports / "base",
        "black-forest-labs/FLUX.2-dev-NVFP4": single,
        "me/flux1-dev-nvfp4": built,
        "ORGANIZATION/NAME": nothing,
        "me/FLUX.1-dev-nvfp4": nothing,
        "org/FLUX.1-dev-nvfp4": nothing,
    }.items():
        hub.seed(repo, folder)


def test_the_lines_are_found() -> None:
    assert len(SHOWN) > 40
    assert ELSEWHERE.keys() <= SHOWN.keys()


@pytest.mark.parametrize("line", sorted(SHOWN.keys() - ELSEWHERE.keys()))
def test_a_line_runs_as_shown(
    line: str,
    here: Path,
    exports: Path,
    built_nvfp4: Path,
    rewritten: Path,
    hub: LoopbackHub,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if "nunchaku.safetensors" in line:
        copy_file(here / "nunchaku.safetensors", request.getfixturevalue("of_nunchaku"))
    elif shlex.split(line)[1] == "convert":
        provide_another_model(here, request.getfixturevalue("converted"), request.getfixturevalue("families"))
    else:
        provide(line, here, exports, built_nvfp4, rewritten)
    if "hf://" in line or "push" in line or "--base" not in line:
        fill(hub, exports, built_nvfp4, tmp_path / "repos")
    outcome = run_mopt(*shlex.split(line)[1:], json_report=False)
    assert outcome.exit_code == 0, f"{SHOWN[line]}: {outcome.stderr}"


def test_a_record_is_validated_as_shown(built_nvfp4: Path, here: Path) -> None:
    (line,) = re.findall(r"^python (-m jsonschema .*)$", (ROOT / "docs" / "reports.md").read_text(), re.MULTILINE)
    copy_file(here / "mopt.json", built_nvfp4 / "mopt.json")
    link(here / "docs", ROOT / "docs")
    # Its own deprecation is told on stderr; what it finds is its exit code.
    subprocess.run([sys.executable, *shlex.split(line)], check=True, capture_output=True)


def test_the_readme_shows_what_is_printed(here: Path, exports: Path) -> None:
    link(here / "EXPORT", exports / "nvfp4")
    (block,) = re.findall(r"^```\n(\$ .*?)^```$", PAGES[0].read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    printed: list[str] = []
    shown = []
    for line in block.splitlines():
        if line.startswith("$ "):
            outcome = run_mopt(*shlex.split(line)[2:], json_report=False)
            printed += [line, *outcome.stdout.replace(f"{here}/", "").splitlines()]
        shown.append(line)
    rest = iter(printed)
    assert [line for line in shown if line not in rest] == [], "shown, and not printed in this order"


def test_the_readme_s_python_runs(here: Path, exports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link(here / "EXPORT", exports / "nvfp4")
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGES[0].read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    exec(compile(code, "README.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == f"proven {here / 'OUT'}\n"
