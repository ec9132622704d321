"""Any system call of any command may fail: a documented code, one line, and OUT old or whole."""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import CONVERSIONS, FORESEEN, errors_in, words_of
from forks import Forks
from root import LONG
from support import copy, tree
from tracing import CHANGING, OPENING, READING, calls_under, mopt_forks, need_strace, strike

ERRORS = ["EIO", "EACCES", "ESTALE", "ENOMEM", "EMFILE", "ENAMETOOLONG", "ELOOP", "ENOSPC"]
COMMANDS = ["build-nvfp4", *CONVERSIONS, "convert-fp8", "inspect", "swap-nibbles", "verify"]
POINTS = 12 if LONG else 1
ENVIRONMENT = os.environ | {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture(scope="module")
def server() -> Iterator[Forks]:
    need_strace()
    forks = mopt_forks(ENVIRONMENT)
    yield forks
    forks.close()


@pytest.mark.parametrize("command", COMMANDS)
def test_any_call_that_touches_inputs_or_out_may_fail(
    exports: Path, built: Path, tmp_path: Path, command: str, server: Forks
) -> None:
    top = tmp_path / "top"
    top.mkdir()
    places = {name: copy(exports / name, top / name) for name in ("nvfp4", "fp8", "base")}
    places |= {"built": copy(built, top / "built"), "out": top / "out"}
    words = [*words_of(command, places), "--json"]
    if str(places["out"]) in words:
        words += ["--workers", "1"]
    inputs = tree(top)
    _, found = calls_under(server, words, top, tmp_path / "log", (*CHANGING, *OPENING, *READING))
    whole = {name: digest for name, digest in tree(top).items() if name not in inputs}
    chance = random.Random(command)
    for number in range(POINTS):
        call, error = chance.choice(found), ERRORS[(number + len(command)) % len(ERRORS)]
        if places["out"].exists():
            shutil.rmtree(places["out"])
        ended = strike(server, words, call, f"error={error}", top, tmp_path / "log")
        where = (call, error, ended.stderr)
        assert ended.code in FORESEEN, where
        assert "Traceback" not in ended.stderr, where
        assert len(errors_in(ended.stderr)) == (ended.code != 0), where
        assert ended.told["exit_code"] == ended.code, where
        left = tree(top)
        assert {name: digest for name, digest in left.items() if name in inputs} == inputs
        new = {name: digest for name, digest in left.items() if name not in inputs and name.startswith("out/")}
        assert sorted(new) in ([], sorted(whole)), where
        if "output" in ended.told:
            assert ended.told["output"]["published"] is bool(new), where
