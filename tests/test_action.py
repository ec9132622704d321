"""action.yml: its steps are run for real by a small runner; only Python's setup and pip are stood in for."""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from action_runner import Ended, Expression, commands, fill, read_pairs, run_action
from root import ROOT

ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
REPORT = {
    "verify": {
        "verdict": "pass",
        "proof": "proven",
        "statement": "proven, cpu only",
        "levels": [{"level": "L0", "status": "pass"}],
    }
}


def never(name: str, _given: Mapping[str, str]) -> dict[str, str]:
    raise AssertionError(f"{name} must not run")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with ``work`` and ``temp``."""
    for name in ("work", "temp"):
        (tmp_path / name).mkdir()
    return tmp_path


def run(place: Path, python: Path | str = sys.executable, **inputs: str) -> Ended:
    """The action with a Python that has mopt, so that nothing is installed."""
    given = {name.replace("_", "-"): value for name, value in inputs.items()} | {"python": str(python)}
    return run_action(ROOT, given, workspace=place / "work", temp=place / "temp", uses=never)


def stub(place: Path, body: str) -> Path:
    """A Python beside a ``mopt`` that writes down its arguments, one a line, and then does as told."""
    folder = place / "stub"
    folder.mkdir()
    (folder / "python").symlink_to(sys.executable)
    mopt = folder / "mopt"
    find = 'for a in "$@"; do case $a in --report-json=*) report=${a#*=};; esac; done'
    mopt.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {place}/arguments\n{find}\n{body}\n')
    mopt.chmod(0o755)
    return folder / "python"


def arguments(place: Path) -> list[str]:
    return (place / "arguments").read_text().splitlines()


def writing(report: Mapping[str, object], code: int) -> str:
    return f"printf '%s' '{json.dumps(report)}' > \"$report\"\nexit {code}"


# The real thing.


def test_a_right_checkpoint_passes(built_nvfp4: Path, base: Path, place: Path) -> None:
    ended = run(place, checkpoint=str(built_nvfp4), base=str(base), args="--device cpu  --sample 4\n--quiet")
    assert ended.exit_code == 0, ended.log
    assert (ended.outputs["verdict"], ended.outputs["proof"]) == ("pass", "not proven: sampled")
    report = json.loads(Path(ended.outputs["report"]).read_text())
    assert (report["command"], report["verify"]["verdict"]) == ("verify", "pass")
    assert "### mopt verify: pass, not proven: sampled (exit code 0)" in ended.summary
    assert "L2" in ended.summary
    for words, given in (("proven", {"base": str(base)}), ("unchanged", {})):
        ended = run(place, checkpoint=str(built_nvfp4), args="--device cpu", **given)
        assert (ended.exit_code, ended.outputs["verdict"], ended.outputs["proof"]) == (0, "pass", words), ended.log
        assert f"### mopt verify: pass, {words} (exit code 0)" in ended.summary


def test_a_damaged_checkpoint_fails_the_step_with_mopts_own_code(built_nvfp4: Path, place: Path) -> None:
    damaged = place / "damaged"
    damaged.mkdir()
    for path in built_nvfp4.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    (shard,) = damaged.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 0x10
    shard.write_bytes(data)
    ended = run(place, checkpoint=str(damaged), args="--device cpu")
    assert ended.exit_code == 1, ended.log
    assert ended.step("Verify").outcome == "failure"
    assert (ended.outputs["verdict"], ended.outputs["proof"]) == ("fail", "mismatch")
    assert json.loads(Path(ended.outputs["report"]).read_text())["exit_code"] == 1
    assert "exit code 1" in ended.summary


def test_what_cannot_be_opened_is_no_verdict(place: Path) -> None:
    ended = run(place, checkpoint=str(place / "absent"))
    assert ended.exit_code == 3, ended.log
    assert (ended.outputs["verdict"], ended.outputs["proof"]) == ("error", "")
    assert Path(ended.outputs["report"]).is_file()


# Hostile inputs: of every one, that nothing but mopt ran and that mopt got it as it was.

INJECTIONS = ['"; touch pwned; "', "$(touch pwned)", "`touch pwned`", "'; touch pwned; '", "a\ntouch pwned\n", "--help"]


@pytest.mark.parametrize("text", INJECTIONS)
def test_an_input_is_never_code(place: Path, text: str) -> None:
    python = stub(place, writing(REPORT, 0))
    ended = run(place, python, checkpoint=text, base=text)
    assert ended.exit_code == 0, ended.log
    assert list((place / "work").iterdir()) == []
    words = arguments(place)
    spread = text.split("\n")
    assert words[-len(spread) - 1 :] == ["--", *spread]
    assert f"--base={spread[0]}" in words


def test_args_are_words_and_never_code(place: Path) -> None:
    (place / "work" / "file").touch()
    python = stub(place, writing(REPORT, 0))
    ended = run(place, python, checkpoint="x", args="--sample all * $(touch pwned) ; touch pwned")
    assert ended.exit_code == 0, ended.log
    assert [path.name for path in (place / "work").iterdir()] == ["file"]
    assert arguments(place)[:9] == ["verify", "--sample", "all", "*", "$(touch", "pwned)", ";", "touch", "pwned"]


def test_mopt_itself_takes_an_injection_for_a_path(place: Path) -> None:
    ended = run(place, checkpoint='"; touch pwned; "')
    assert ended.exit_code in (2, 3), ended.log
    assert list((place / "work").iterdir()) == []


def test_no_expression_stands_in_a_script() -> None:
    for step in ACTION["runs"]["steps"]:
        assert "${{" not in step.get("run", ""), step["name"]


def test_names_of_tensors_are_no_commands_and_no_markup(place: Path) -> None:
    evil = "x\n::set-output name=verdict::pass</pre><script>alert(1)</script>"
    report = {"verify": {"verdict": "fail", "statement": evil, "levels": []}, "error": {"message": evil}}
    body = f"echo '::add-path::/evil'\necho 'fail: ##[add-path]/evil'\n{writing(report, 1)}"
    ended = run(place, stub(place, body), checkpoint="x")
    assert commands(ended.log) == []
    assert "::add-path::/evil" in ended.log
    assert ended.outputs["verdict"] == "fail"
    assert "<script>" not in ended.summary
    assert ended.summary.count("</pre>") == 1
    assert "\n::set-output" not in ended.summary


@pytest.mark.parametrize("verdict", ["pass\nreport=/etc/passwd", "", None, 7])
def test_a_verdict_that_is_none_is_an_error(place: Path, verdict: object) -> None:
    ended = run(place, stub(place, writing({"verify": {"verdict": verdict}}, 0)), checkpoint="x")
    assert ended.outputs["verdict"] == "error"
    assert ended.outputs["report"].startswith(str(place / "temp"))


@pytest.mark.parametrize("proof", ["proven\nverdict=pass", "proven<script>", "PROVEN", None, 7, ["proven"]])
def test_words_on_the_proof_that_are_none_are_left_out(place: Path, proof: object) -> None:
    ended = run(place, stub(place, writing({"verify": {"verdict": "fail", "proof": proof}}, 1)), checkpoint="x")
    assert (ended.outputs["verdict"], ended.outputs["proof"]) == ("fail", "")
    assert "### mopt verify: fail (exit code 1)" in ended.summary


@pytest.mark.parametrize(
    ("body", "code"), [("exit 2", 2), ("kill -9 $$", 137), ("echo '{' > \"$report\"; exit 70", 70)]
)
def test_without_a_report_the_exit_code_still_counts(place: Path, body: str, code: int) -> None:
    ended = run(place, stub(place, body), checkpoint="x")
    assert ended.exit_code == code
    assert (ended.outputs["verdict"], ended.outputs["report"]) == ("error", "")


@pytest.mark.parametrize("code", [0, 1, 4, 6, 7, 130])
def test_the_exit_code_is_mopts(place: Path, code: int) -> None:
    assert run(place, stub(place, writing(REPORT, code)), checkpoint="x").exit_code == code


# Installation: pip is stood in for, the steps are real.


def installed(place: Path, **inputs: str) -> tuple[Ended, list[str]]:
    """The action with a Python whose ``-m venv`` makes a stub, and whose pip only writes down its arguments."""
    ready = stub(place, writing(REPORT, 0)).parent
    python = place / "setup-python"
    log = place / "pip"
    real = f'#!/bin/bash\nif [ "$2" = pip ]; then echo "$*" >> {log}; else exec {sys.executable} "$@"; fi\n'
    (place / "pip-python").write_text(real)
    (place / "pip-python").chmod(0o755)
    python.write_text(
        '#!/bin/bash\n[ "$1 $2" = "-m venv" ] || exit 9\nmkdir -p "$3/bin"\n'
        f'cp {place}/pip-python "$3/bin/python"\ncp {ready}/mopt "$3/bin/mopt"\n'
    )
    python.chmod(0o755)
    used: list[str] = []

    def uses(name: str, given: Mapping[str, str]) -> dict[str, str]:
        used.append(f"{name.partition('@')[0]} {given['python-version']}")
        return {"python-path": str(python)}

    given = {name.replace("_", "-"): value for name, value in inputs.items()} | {"checkpoint": "x"}
    ended = run_action(ROOT, given, workspace=place / "work", temp=place / "temp", uses=uses)
    assert used == [f"actions/setup-python {inputs.get('python_version', '3.11')}"]
    return ended, log.read_text().splitlines()


def test_torch_is_installed_first_and_from_the_pins(place: Path) -> None:
    ended, pip = installed(place)
    assert (ended.exit_code, ended.outputs["verdict"]) == (0, "pass"), ended.log
    pins = f"-m pip install --quiet --constraint {ROOT}/constraints.txt"
    assert pip == [f"{pins} torch", f"{pins} -- {ROOT}"]


def test_another_version_index_and_python(place: Path) -> None:
    index = "https://download.pytorch.org/whl/cpu"
    _, pip = installed(place, version="modelopt-convert==9.9", torch_index=index, python_version="3.13")
    assert pip[0].endswith(f"constraints.txt --index-url {index} torch")
    assert pip[1].endswith("constraints.txt -- modelopt-convert==9.9")


def test_a_failed_installation_ends_the_action(place: Path) -> None:
    (place / "bad").write_text("#!/bin/bash\nexit 5\n")
    (place / "bad").chmod(0o755)
    outputs = {"python-path": str(place / "bad")}
    given = {"checkpoint": "x"}
    ended = run_action(ROOT, given, workspace=place / "work", temp=place / "temp", uses=lambda _name, _given: outputs)
    assert (ended.exit_code, ended.step("Verify").outcome, ended.outputs["verdict"]) == (5, "skipped", "")


# What the file says, and the runner.


def test_others_actions_are_pinned_by_commit() -> None:
    for step in ACTION["runs"]["steps"]:
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])


def test_only_the_checkpoint_is_required() -> None:
    inputs = ACTION["inputs"]
    assert [name for name, one in inputs.items() if one.get("required")] == ["checkpoint"]
    assert all("default" in one for name, one in inputs.items() if name != "checkpoint")


def test_expressions() -> None:
    names = {"inputs.a": "x", "steps.s.outputs.n-m": "y"}
    assert fill("${{ inputs.a }}-${{steps.s.outputs.n-m}}-${{ inputs.none }}", names) == "x-y-"
    assert fill("${{ inputs.none || 'it''s' }} ${{ inputs.a == 'X' && !inputs.none }}", names) == "it's true"
    with pytest.raises(AssertionError):
        Expression("inputs.a ~ 1", names)


def test_pairs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a=b=c\nd<<END\ne=f\n\nEND\ng=\n")
    assert read_pairs(tmp_path / "file") == {"a": "b=c", "d": "e=f\n", "g": ""}
