"""Every command that reads what it is given, with inputs that it takes; and mopt run from outside."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from typer.main import get_command

from modelopt_convert.cli import app
from modelopt_convert.run.errors import ExitCode

MOPT = [sys.executable, "-m", "modelopt_convert"]
# A command that has no row here fails every test over all commands.
_DRAWN = "--pipeline {tiny} --prompts {prompts} --steps 1 --size 32"
WORDS = {
    "advise": f"{{tiny}}/transformer {_DRAWN} --effective-bits 6 --scored 1 --points 0 --output {{mine}}",
    "build-nvfp4": "--preset flux1-dev --export {nvfp4} --base {base} --output {out}",
    "calibrate": f"{{tiny}}/transformer {_DRAWN} --output {{out}}",
    "compare": "{built} --base {base} --seeds 1",
    "convert": "{nvfp4} {out} --to comfyui --inexact bf16 --base {base}",
    "convert-fp8": "--preset flux1-dev --export {fp8} --base {base} --output {out}",
    "explain": "header.foreign",
    "inspect": "{base} --base {base}",
    "presets": "{preset}",
    "push": "{built} alice/it",
    "swap-nibbles": "{nvfp4} {out}",
    "unswizzle-scales": "{nvfp4} {out} --reverse",
    "verify": "{built} --base {base}",
}
# Conversions, by whether they move bytes alone or decode weights too.
CONVERSIONS = {
    "convert --to torchao": "{nvfp4} {out} --to torchao",
    "convert --to bf16": "{nvfp4} {out} --to bf16",
}
# Those that are given nothing to read have tests of their own.
ALONE = {"demo", "doctor"}
COMMANDS = sorted(get_command(app).commands.keys() - ALONE)  # type: ignore[attr-defined]
INPUTS = ("nvfp4", "fp8", "base", "built", "preset")
# Those that a caller may meet; 70 is a bug, and 1 a failed check.
FORESEEN = set(ExitCode) - {ExitCode.INTERNAL, ExitCode.MISMATCH}


def words_of(command: str, places: Mapping[str, Path]) -> list[str]:
    """The command line of a command or conversion that succeeds, but for push, which asks the Hub."""
    words = (WORDS | CONVERSIONS)[command]
    return [command.split()[0], *(word.format(**places) for word in words.split())]


def slots() -> list[tuple[str, str]]:
    """Every place of every command in which a path stands."""
    names = (*INPUTS, "out")
    return [(command, name) for command in COMMANDS for name in names if f"{{{name}}}" in WORDS.get(command, "")]


def run_outside(
    words: Sequence[str | Path], *, script: str = '"$@"', environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run mopt in a process of its own, by way of a line of bash in which ``"$@"`` is mopt's command line."""
    command = ["bash", "-c", script, "bash", *MOPT, *map(str, words)]
    variables = buffered(os.environ if environment is None else environment)
    return subprocess.run(command, capture_output=True, text=True, errors="replace", env=variables, check=False)


def buffered(environment: Mapping[str, str]) -> dict[str, str]:
    """As most users have it: what a stream refuses is then still there when the process ends."""
    return {name: value for name, value in environment.items() if name != "PYTHONUNBUFFERED"}


def errors_in(stderr: str) -> list[str]:
    """The lines that say why a run failed."""
    return [line for line in stderr.splitlines() if line.startswith(("error: ", "Error: "))]
