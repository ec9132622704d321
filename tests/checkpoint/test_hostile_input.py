"""Rules for input that no other file has a row for: odd files, code beside the weights, names that act on terminals.

Headers have theirs in test_header.py, folders in test_reader.py, ``.pt`` files in test_torch_archive.py.
"""

import json
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from archives import Bomb
from checkpoint_folders import INDEX, WEIGHT_MAP, A, B, reader_refusal, write
from figures import note
from fp8_support import convert, small_fp8_pair, two_weights
from safetensors.torch import save_file
from support import run_mopt

from modelopt_convert import cli
from modelopt_convert.checkpoint.local_file import LocalFile
from modelopt_convert.run.errors import InputError

HOSTILE = "evil\x1b[2J\x9b31m\x07\u202e\u2066\r\x00[red]"
# Characters that a terminal acts on, line breaks of our own apart.
ACTING = frozenset("\x1b\x9b\x07\u202e\u2066\r\x00")


def _socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path may have 107 bytes
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def _link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def _deep(path: Path) -> None:
    path.write_text('{"weight_map":' * 50_000 + "0" + "}" * 50_000)


def _latin1(path: Path) -> None:
    path.rename(path.parent / os.fsdecode(b"\xe9.safetensors"))


def _map(folder: Path, changes: dict[str, object]) -> None:
    write(folder, {}, WEIGHT_MAP | changes)


# (what, the change to a sharded checkpoint, the code)
REFUSED: list[tuple[str, Callable[[Path], object], str]] = [
    ("a socket", lambda f: _socket(f / A), "input.unreadable"),
    ("a socket as config", lambda f: _socket(f / "config.json"), "input.unreadable"),
    ("a link to a device", lambda f: _link(f / A, "/dev/zero"), "input.symlink_escape"),
    ("a link to a password file", lambda f: _link(f / "config.json", "/etc/passwd"), "input.symlink_escape"),
    ("a link upwards", lambda f: _link(f / A, "../../../../../etc/passwd"), "input.symlink_escape"),
    ("a link to nothing", lambda f: _link(f / A, "gone"), "input.missing"),
    ("a link to itself", lambda f: _link(f / A, A), "input.unreadable"),
    ("a link to the folder", lambda f: _link(f / A, "."), "input.not_regular"),
    ("a pipe as index", lambda f: [(f / INDEX).unlink(), os.mkfifo(f / INDEX)], "input.not_regular"),
    ("a file name that is not UTF-8", lambda f: _latin1(f / A), "input.name"),
    ("a deep index", lambda f: _deep(f / INDEX), "index.json"),
    ("a deep config", lambda f: _deep(f / "config.json"), "config.json"),
    ("a number of 5,000 digits", lambda f: (f / "config.json").write_text('{"a":%s}' % ("9" * 5000)), "config.json"),
    ("an index that goes up", lambda f: _map(f, {"x": "../../etc/passwd"}), "index.path_escape"),
    ("an index that goes up twice", lambda f: _map(f, {"x": "../a/../b.safetensors"}), "index.path_escape"),
    ("an index with a long name", lambda f: _map(f, {"x" * 1_000_000: B}), "index.mismatch"),
    ("an index with a long file", lambda f: _map(f, {"x": "y" * 1_000_000 + ".safetensors"}), "index.path_escape"),
    ("a key of a million characters twice",
     lambda f: (f / INDEX).write_text('{"' + '":1,"'.join(["x" * 1_000_000] * 2) + '":1}'), "index.duplicate_key"),
    ("an index of two million lists",
     lambda f: (f / INDEX).write_text('{"weight_map":[%s[]]}' % ("[]," * (2 << 20))), "index.too_large"),
    ("a config of two million lists",
     lambda f: (f / "config.json").write_text('{"a":[%s[]]}' % ("[]," * (2 << 20))), "config.too_large"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "code"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(change: Callable[[Path], object], code: str, sharded: Path) -> None:
    change(sharded)
    error = reader_refusal(sharded)
    note(5, rows=1, code=error.code)
    assert error.code == code
    assert len(error.message) < 1000


@pytest.mark.parametrize("file", [A, INDEX, "config.json"])
def test_json_that_memory_does_not_suffice_for_is_refused(
    file: str, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is to blame, and not mopt: no model needs so much."""
    real, content = json.loads, (sharded / file).read_bytes()

    def loads(text: str, **options: Any) -> Any:
        if text.encode() in content:
            raise MemoryError
        return real(text, **options)

    monkeypatch.setattr(json, "loads", loads)
    error = reader_refusal(sharded)
    assert error.code == {A: "header.too_large", INDEX: "index.too_large"}.get(file, "config.too_large")
    assert "more memory than there is" in error.message


def test_a_device_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        LocalFile(Path("/dev"), "zero")
    assert caught.value.code == "input.not_regular"


@pytest.mark.parametrize("special", ["/dev/zero", "/dev/null", "pipe"])
def test_what_is_named_itself_must_be_a_file_or_a_folder(special: str, tmp_path: Path) -> None:
    if special == "pipe":
        os.mkfifo(tmp_path / special)
    outcome = run_mopt("inspect", tmp_path / special)
    assert (outcome.exit_code, outcome.error_code) == (3, "input.missing")


def test_no_code_beside_the_weights_is_run(sharded: Path, tmp_path: Path) -> None:
    """What transformers would import and torch.load unpickle is listed at most."""
    fired = tmp_path / "fired"
    bomb = pickle.dumps(Bomb(fired))
    names = [f"pytorch_model.{ending}" for ending in ("bin", "pth", "pt", "ckpt", "pkl", "npz", "npy")]
    for name in names:
        (sharded / name).write_bytes(bomb)
    (sharded / "modeling_evil.py").write_text(f"from pathlib import Path\nPath({str(fired)!r}).touch()\n")
    config = {"_class_name": "X", "auto_map": {"AutoModel": "modeling_evil.Evil"}, "custom_pipeline": "modeling_evil"}
    (sharded / "config.json").write_text(json.dumps(config))
    assert run_mopt("inspect", sharded).exit_code == 0
    assert run_mopt("verify", sharded).exit_code in {3, 6}
    assert run_mopt("build-nvfp4", "--export", sharded, "--base", sharded, "-n", "--output", tmp_path / "out")
    assert not fired.exists()
    pickle.loads(bomb)
    assert fired.exists()  # the bomb is a real one


def hostile_export(folder: Path) -> Path:
    """Packed modules of hostile names, each with something to complain of."""
    name = f"{HOSTILE}.{'x' * 300}"
    tensors = {
        f"{HOSTILE}.weight": torch.zeros(32, 16, dtype=torch.uint8),
        f"{HOSTILE}.weight_scale": torch.zeros(32, 2).to(torch.float8_e4m3fn),
        f"{name}.weight": torch.zeros(4, 4, dtype=torch.uint8),
        f"{HOSTILE}.plain.weight": torch.ones(4, 4),
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt", HOSTILE: HOSTILE})
    config: dict[str, Any] = {"_class_name": HOSTILE}
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": [HOSTILE], HOSTILE: 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("json_report", [False, True])
@pytest.mark.parametrize("command", ["inspect", "verify", "build-nvfp4", "swap-nibbles"])
def test_no_line_acts_on_the_terminal(command: str, json_report: bool, tmp_path: Path) -> None:
    source = hostile_export(tmp_path / "export")
    base = write(tmp_path / "base", {"model.safetensors": {f"{HOSTILE}.weight": torch.ones(32, 32)}})
    (base / "config.json").write_text(json.dumps({"_class_name": HOSTILE}))
    output = tmp_path / "out"
    more: dict[str, tuple[str | Path, ...]] = {
        "build-nvfp4": (command, "--preset", "none", "--export", source, "--base", base, "--output", output, "-v"),
        "swap-nibbles": (command, source, output, "-v"),
    }
    outcome = run_mopt(*more.get(command, (command, source)), json_report=json_report)
    shown = outcome.stdout + outcome.stderr
    assert not ACTING & set(shown)
    assert "evil\\x1b" in shown or "evil\\u001b" in shown


def test_the_lines_of_a_build_do_not_act_on_the_terminal(tmp_path: Path) -> None:
    names = dict(zip((HOSTILE, "other"), two_weights().values(), strict=True))
    export, base = small_fp8_pair(tmp_path, names, {})
    outcome = convert(export, base, tmp_path / "out", "-v", preset="none")
    assert outcome.exit_code == 0, outcome.stderr
    assert "evil\\x1b" in outcome.stderr and not ACTING & set(outcome.stdout + outcome.stderr)
    verified = run_mopt("verify", tmp_path / "out", json_report=False)
    assert verified.exit_code == 0 and not ACTING & set(verified.stdout + verified.stderr)


@pytest.mark.parametrize("command", ["inspect", "build-nvfp4"])
def test_a_value_of_a_million_characters_is_cut_in_the_line(command: str, tmp_path: Path) -> None:
    source = hostile_export(tmp_path / "export")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["quant_algo"] = "x" * 1_000_000
    (source / "config.json").write_text(json.dumps(config))
    more = ("--export", source, "--base", source, "--preset", "none", "--output", tmp_path / "out")
    outcome = run_mopt(command, *(more if command == "build-nvfp4" else (source,)), json_report=False)
    shown = outcome.stdout + outcome.stderr
    assert max(map(len, shown.splitlines())) < 5000
    assert " characters more" in shown


def test_the_last_resort_does_not_act_on_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError(HOSTILE)

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(cli, "_allow_open_files", lambda: None)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 70
    shown = capsys.readouterr().err
    assert "RuntimeError: evil\\x1b" in shown and not ACTING & set(shown)


def test_a_record_that_names_a_pipe_or_a_folder_does_not_hang_verify(tmp_path: Path) -> None:
    export, base = small_fp8_pair(tmp_path, two_weights(), {})
    output = tmp_path / "out"
    assert convert(export, base, output, preset="none").exit_code == 0
    os.mkfifo(output / "pipe")
    (output / "folder").mkdir()
    (output / "linked").symlink_to("/etc/passwd")
    record = json.loads((output / "mopt.json").read_text())
    names = ("pipe", "folder", "linked")
    record["digests"]["files"] |= dict.fromkeys(names, "0" * 32)
    (output / "mopt.json").write_text(json.dumps(record))
    outcome = run_mopt("verify", output)
    assert (outcome.exit_code, outcome.error_code) == (1, "check.verify")
    assert all(f"file {name} is not what was recorded" in outcome.stdout for name in names)
