"""Where people run mopt: the GitLab job, the image, the git hook and the notebook, as far as a shell can show them."""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from root import ROOT

EXAMPLES = ROOT / "examples"
JOB = yaml.safe_load((EXAMPLES / "mopt.gitlab-ci.yml").read_text())[".mopt-verify"]
DOCKERFILE = re.findall(r"^([A-Z]+) (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)


def stub(path: Path, body: str) -> Path:
    """A program that writes its arguments to ``$LOG``, one line a call, and then does as told."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> "$LOG"\n{body}\n')
    path.chmod(0o755)
    return path


def shell(script: str, place: Path, **given: str) -> subprocess.CompletedProcess[str]:
    """A script as CI and docker run it: it ends with the first line that fails."""
    path = f"{place / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        ["sh", "-ec", script],
        cwd=place,
        env=os.environ | {"LOG": str(place / "log"), "PATH": path} | given,
        capture_output=True,
        text=True,
    )


def logged(place: Path) -> list[str]:
    return (place / "log").read_text().splitlines()


def python_that_makes(place: Path, mopt: str) -> None:
    """A ``python3 -m venv FOLDER`` that leaves a Python and a mopt there, in place of pip's downloads."""
    made = "\n".join(
        f"printf '%s\\n' '#!/bin/sh' 'echo {name} \"$@\" >> \"$LOG\"' '{body}' > \"$3/bin/{name}\""
        for name, body in (("python", "true"), ("pip", "true"), ("mopt", mopt))
    )
    stub(place / "bin" / "python3", f'mkdir -p "$3/bin"\n{made}\nchmod +x "$3"/bin/*')


def run_job(place: Path, mopt: str, **given: str) -> subprocess.CompletedProcess[str]:
    python_that_makes(place, mopt)
    return shell("\n".join(JOB["script"]), place, **JOB["variables"] | given)


def test_the_gitlab_job_verifies_and_keeps_the_report(built_nvfp4: Path, base: Path, tmp_path: Path) -> None:
    real = f'PYTHONPATH={ROOT} exec {sys.executable} -m modelopt_convert "$@"'
    ended = run_job(tmp_path, real, MOPT_CHECKPOINT=str(built_nvfp4), MOPT_BASE=str(base))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("proven\n")
    (report,) = JOB["artifacts"]["paths"]
    assert json.loads((tmp_path / report).read_text())["verify"]["proof"] == "proven"


@pytest.mark.parametrize(
    ("given", "index", "words"),
    [
        ({}, " --index-url https://download.pytorch.org/whl/cpu", ""),
        ({"TORCH_INDEX": "", "MOPT_BASE": "a b"}, "", "--base=a b "),
    ],
)
def test_the_gitlab_job_ends_with_mopts_code(given: Mapping[str, str], index: str, words: str, tmp_path: Path) -> None:
    ended = run_job(tmp_path, "exit 6", **given)
    assert ended.returncode == 6
    assert logged(tmp_path) == [
        "-m venv .mopt",
        f"python -m pip install --quiet{index} torch",
        "python -m pip install --quiet -- mopt",
        f"mopt verify {words}--report-json mopt-verify.json -- out",
    ]


@pytest.mark.parametrize("index", ["https://download.pytorch.org/whl/cpu", ""])
def test_the_steps_of_the_image_run(index: str, tmp_path: Path) -> None:
    variables = dict(words.split("=", 1) for kind, words in DOCKERFILE if kind == "ARG")
    assert variables["TORCH_INDEX"] == "https://download.pytorch.org/whl/cpu"
    python_that_makes(tmp_path, "true")
    steps = [words.replace("/opt/mopt", f"{tmp_path}/opt") for kind, words in DOCKERFILE if kind == "RUN"]
    for step in steps:
        ended = shell(step, tmp_path, TORCH_INDEX=index)
        assert ended.returncode == 0, ended.stderr
    option = f"--index-url {index} " if index else ""
    assert logged(tmp_path) == [
        f"-m venv {tmp_path}/opt",
        f"pip install --no-cache-dir -c /src/constraints.txt {option}torch",
        "pip install --no-cache-dir -c /src/constraints.txt /src",
    ]


def test_the_image_gets_all_that_a_wheel_is_made_of(tmp_path: Path) -> None:
    taken = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [words.split()[:-1] for kind, words in DOCKERFILE if kind == "COPY"]
    names = [name for sources in copied for name in sources]
    assert set(names) == taken
    source = tmp_path / "src"
    source.mkdir()
    for name in names:
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert {"modelopt_convert/cli/__init__.py", "modelopt_convert/preset/toml/ltx2.toml"} <= set(
        zipfile.ZipFile(wheel).namelist()
    )


def test_the_source_distribution_has_the_versions_that_were_tested(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (made,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {"constraints.txt", "README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "presets/ltx2.toml"}
    assert not [name for name in names if name.startswith("tests/")]


def test_the_hook_verifies_every_record_before_a_push(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    for name in ("one/mopt.json", "two words/mopt.json", "mopt.json", "other/config.json"):
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text("{}")
    (tmp_path / "home").mkdir()
    who = {f"GIT_{role}_{what}": "a@b" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    given = who | {"HOME": str(tmp_path / "home"), "GIT_CONFIG_NOSYSTEM": "1"}
    hook = f'cp "{EXAMPLES}/pre-push" .git/hooks/pre-push'
    made = shell(
        f"git init -q --bare far; cd repo; git init -q; {hook}; git add .; git commit -qm x; git remote add far ../far",
        tmp_path,
        **given,
    )
    assert made.returncode == 0, made.stderr
    push = "cd repo && git push -q far HEAD:main"
    mopt = tmp_path / "bin" / "mopt"
    stub(mopt, 'case "$*" in *words*) exit 1;; esac')
    assert shell(push, tmp_path, **given).returncode != 0
    assert shell("git -C far rev-parse main", tmp_path, **given).returncode != 0, "it was pushed all the same"
    (tmp_path / "log").unlink()
    stub(mopt, "cat > /dev/null")  # whoever reads stdin gets none of the list
    ended = shell(push, tmp_path, **given)
    assert ended.returncode == 0, ended.stderr
    assert logged(tmp_path) == [f"verify --device cpu -- {folder}" for folder in (".", "one", "two words")]
    (repo / "mopt.json").write_text("[]")
    refused = shell(push.replace("main", "again"), tmp_path, **given)
    assert refused.returncode != 0 and "commit or stash first" in refused.stderr


def test_the_notebook_runs(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = json.loads((EXAMPLES / "first-repo.ipynb").read_text())["cells"]
    (tmp_path / "demo").mkdir()
    for name in ("nvfp4", "base"):
        (tmp_path / "demo" / name).symlink_to(exports / name)
    monkeypatch.chdir(tmp_path)
    known: dict[str, object] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), known)
    said = capsys.readouterr().out
    assert "modelopt low linear proven" in said
    assert "\nproven\n" in said
    assert "check.verify" in said.splitlines()[-1]
