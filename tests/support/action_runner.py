"""Runs the steps of a composite GitHub action as GitHub's runner does, for real and on this machine.

It knows expressions over inputs, steps and github, ``if``, ``env``, bash steps with their environment files, and
``uses`` steps, which are not run but answered with outputs given by the test.
"""

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_TOKEN = re.compile(r"\s*(?:(?P<text>'(?:[^']|'')*')|(?P<sign>==|!=|&&|\|\||!|\(|\))|(?P<name>[A-Za-z_][\w.-]*))")
_EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}", re.DOTALL)


@dataclass
class Step:
    """How one step ended; ``skipped`` if it did not run."""

    name: str
    outcome: str
    exit_code: int = 0
    log: str = ""
    outputs: dict[str, str] = field(default_factory=dict)
    summary: str = ""
    given: dict[str, str] = field(default_factory=dict)


@dataclass
class Ended:
    """How the action ended."""

    exit_code: int
    outputs: dict[str, str]
    steps: list[Step]

    @property
    def log(self) -> str:
        """Everything that the steps printed."""
        return "".join(step.log for step in self.steps)

    @property
    def summary(self) -> str:
        """What the page of the run shows."""
        return "".join(step.summary for step in self.steps)

    def step(self, name: str) -> Step:
        """A step by its name."""
        return next(step for step in self.steps if step.name == name)


class Expression:
    """One ``${{ }}``: names, strings, ``== != ! && ||``, parentheses, ``always()``. An unknown name is empty text."""

    def __init__(self, source: str, names: Mapping[str, str]) -> None:
        self._tokens = self._split(source.strip())
        self._names = names

    @staticmethod
    def _split(source: str) -> list[tuple[str, str]]:
        found, at = [], 0
        while at < len(source):
            match = _TOKEN.match(source, at)
            assert match and match.lastgroup, f"not understood: {source!r}"
            found.append((match.lastgroup, match[match.lastgroup]))
            at = match.end()
        return found

    def value(self) -> str | bool:
        result = self._either()
        assert not self._tokens, f"left over: {self._tokens}"
        return result

    def _next(self, *signs: str) -> str | None:
        if self._tokens and self._tokens[0][0] == "sign" and self._tokens[0][1] in signs:
            return self._tokens.pop(0)[1]
        return None

    def _either(self) -> str | bool:
        left = self._both()
        while self._next("||"):
            right = self._both()
            left = left or right
        return left

    def _both(self) -> str | bool:
        left = self._compared()
        while self._next("&&"):
            right = self._compared()
            left = left and right
        return left

    def _compared(self) -> str | bool:
        left = self._one()
        while sign := self._next("==", "!="):
            # GitHub compares text without regard to case.
            same = str(left).lower() == str(self._one()).lower()
            left = same if sign == "==" else not same
        return left

    def _one(self) -> str | bool:
        if self._next("!"):
            return not self._one()
        if self._next("("):
            inner = self._either()
            assert self._next(")")
            return inner
        kind, word = self._tokens.pop(0)
        if kind == "text":
            return word[1:-1].replace("''", "'")
        assert kind == "name", word
        if word in ("always", "success"):
            assert self._next("(") and self._next(")")
            return self._names["job.status"] == "success" if word == "success" else True
        return {"true": True, "false": False}.get(word, self._names.get(word, ""))


def fill(template: str, names: Mapping[str, str]) -> str:
    """Text with its expressions replaced by their values."""

    def one(match: re.Match[str]) -> str:
        value = Expression(match[1], names).value()
        return str(value).lower() if isinstance(value, bool) else value

    return _EXPRESSION.sub(one, template)


def read_pairs(path: Path) -> dict[str, str]:
    """GITHUB_OUTPUT and GITHUB_ENV: ``name=value``, or ``name<<WORD``, lines and WORD."""
    found: dict[str, str] = {}
    lines = path.read_text().splitlines()
    while lines:
        line = lines.pop(0)
        if (match := re.fullmatch(r"([^=<]+)<<(.+)", line)) is not None:
            end = lines.index(match[2])
            found[match[1]] = "\n".join(lines[:end])
            del lines[: end + 1]
        elif line:
            name, sign, value = line.partition("=")
            assert sign, f"not a pair: {line!r}"
            found[name] = value
    return found


def commands(log: str) -> list[str]:
    """The lines of a log that GitHub would obey, but for those that stop and resume obeying."""
    found, stopped = [], None
    for line in log.splitlines():
        if stopped is not None:
            stopped = None if line == f"::{stopped}::" else stopped
        elif line.startswith("::stop-commands::"):
            stopped = line.removeprefix("::stop-commands::")
        elif line.lstrip().startswith("::") or "##[" in line:
            found.append(line)
    assert stopped is None, "commands were never resumed"
    return found


def run_action(
    action: Path,
    inputs: Mapping[str, str],
    *,
    workspace: Path,
    temp: Path,
    uses: Callable[[str, Mapping[str, str]], Mapping[str, str]],
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run it.

    Args:
        action: The folder of action.yml.
        inputs: As a workflow gives them; the rest takes its default.
        workspace: Where the steps run.
        temp: RUNNER_TEMP.
        uses: Given the action's name and its inputs, the outputs of a ``uses`` step.
        environment: More variables.
    """
    described = yaml.safe_load((action / "action.yml").read_text())
    assert described["runs"]["using"] == "composite"
    known = described["inputs"]
    assert set(inputs) <= set(known), "unknown inputs"
    names = {f"inputs.{name}": str(inputs.get(name, known[name].get("default", ""))) for name in known}
    names |= {"github.action_path": str(action), "github.workspace": str(workspace), "job.status": "success"}
    base = {**os.environ, **(environment or {})}
    base |= {"GITHUB_ACTIONS": "true", "GITHUB_ACTION_PATH": str(action), "GITHUB_WORKSPACE": str(workspace)}
    base |= {"RUNNER_TEMP": str(temp), "RUNNER_OS": "Linux"}
    ended = Ended(0, {}, [])
    for number, step in enumerate(described["runs"]["steps"]):
        done = _run_step(step, number, names, base, workspace, temp, uses)
        ended.steps.append(done)
        for name, value in done.outputs.items():
            names[f"steps.{step.get('id', number)}.outputs.{name}"] = value
        if done.outcome == "failure" and ended.exit_code == 0:
            ended.exit_code, names["job.status"] = done.exit_code, "failure"
    ended.outputs = {name: fill(one["value"], names) for name, one in described["outputs"].items()}
    return ended


def _run_step(
    step: Mapping[str, Any],
    number: int,
    names: Mapping[str, str],
    base: dict[str, str],
    workspace: Path,
    temp: Path,
    uses: Callable[[str, Mapping[str, str]], Mapping[str, str]],
) -> Step:
    condition = str(step.get("if", "success()"))
    condition = condition.strip().removeprefix("${{").removesuffix("}}")
    if "always()" not in condition and names["job.status"] != "success":
        return Step(step["name"], "skipped")
    if not Expression(condition, names).value():
        return Step(step["name"], "skipped")
    if "uses" in step:
        given = {name: fill(str(value), names) for name, value in step.get("with", {}).items()}
        return Step(step["name"], "success", outputs=dict(uses(step["uses"], given)), given=given)
    assert step["shell"] == "bash", "a run step of a composite action must name its shell"
    files = {name: temp / f"{name.lower()}.{number}" for name in ("OUTPUT", "STEP_SUMMARY", "ENV", "PATH")}
    for path in files.values():
        path.write_text("")
    script = temp / f"step.{number}.sh"
    script.write_text(fill(step["run"], names))
    environment = base | {f"GITHUB_{name}": str(path) for name, path in files.items()}
    environment |= {name: fill(str(value), names) for name, value in step.get("env", {}).items()}
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", str(script)],
        cwd=workspace,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    base |= read_pairs(files["ENV"])
    for line in files["PATH"].read_text().splitlines():
        base["PATH"] = f"{line}:{base['PATH']}"
    outcome = "failure" if done.returncode else "success"
    summary = files["STEP_SUMMARY"].read_text()
    return Step(step["name"], outcome, done.returncode, done.stdout, read_pairs(files["OUTPUT"]), summary)
