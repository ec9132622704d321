"""Stage and publish one tiny checkpoint: what the crash and race tests run, kill and starve. No torch: starts at once.

    crash_driver.py OUT VERSION [--components] [--no-overwrite] [--two-renames] [--wait] [--pause] [--signal] [--thread]
                                [--kill=CALL:NTH]

It ends as mopt does, with the exit code of the error, and tells on stdout in one line of JSON what happened.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import xxhash

from modelopt_convert.checkpoint.companions import folders_of
from modelopt_convert.checkpoint.header import TensorSpec, build_header
from modelopt_convert.checkpoint.record import digest_of, write_record
from modelopt_convert.run.errors import ExitCode, Interrupted, MoptError, StorageError
from modelopt_convert.stage import directory, fsops
from modelopt_convert.stage.file_copy import copy_file
from modelopt_convert.stage.shard_writer import METADATA

SHARD = "diffusion_pytorch_model.safetensors"
FOLDERS = ("transformer", "transformer_2")  # of a pipeline with two transformers
COPIES = {"vae/model.safetensors": b"copied from the base" * 99}  # beside those two
SPECS = (TensorSpec("a.weight", "BF16", (16, 64)), TensorSpec("b.weight", "U8", (32, 32)))


def tensor_bytes(version: str, spec: TensorSpec) -> bytes:
    """The data of one tensor of one version."""
    word = f"{version}:{spec.name};".encode()
    return (word * (spec.num_bytes // len(word) + 1))[: spec.num_bytes]


def small_files(version: str) -> dict[str, bytes]:
    """The files beside the shard: with a record as mopt writes it, by which it knows its own checkpoint again."""
    files = {"config.json": json.dumps({"version": version}).encode()}
    digests = {spec.name: xxhash.xxh3_128_hexdigest(tensor_bytes(version, spec)) for spec in SPECS}
    record = write_record("test", {}, tensors=digests, files=files, headers=(SPECS, {SHARD: METADATA}))
    return files | {"mopt.json": record}


def pipeline_files(version: str) -> dict[str, bytes]:
    """The files above the folders of several transformers."""
    parts = dict.fromkeys(FOLDERS, digest_of(small_files(version)["mopt.json"]))
    more = {"parts": parts, "copied": {name: digest_of(data) for name, data in COPIES.items()}}
    return {"mopt.json": write_record("test", more, tensors={}, files={}, headers=None)}


class Bytes:
    """A file that is copied."""

    def __init__(self, data: bytes) -> None:
        """Of this content."""
        self.data, self.where, self.num_bytes, self.fetched, self.requests = data, "", len(data), 0, 0

    def read(self, offset: int, num_bytes: int) -> bytes:
        """As of any file."""
        return self.data[offset : offset + num_bytes]

    def prefetch(self, _ranges: object) -> None:
        """It is here."""

    def fileno(self) -> None:
        """It has no descriptor."""


def files_of(version: str, folders: Sequence[str] = ()) -> dict[str, bytes]:
    """Every file of a version, as it must stand on disk; folders end in a slash."""
    head, placed, _ = build_header(SPECS, METADATA)
    shard = head + b"".join(tensor_bytes(version, spec) for spec, _ in placed)
    one = {SHARD: shard} | small_files(version)
    if not folders:
        return one
    parts = {f"{folder}/{name}": data for folder in folders for name, data in one.items()}
    beside = {f"{folder}/": b"" for folder in folders_of(COPIES)} | COPIES
    return {f"{folder}/": b"" for folder in folders} | parts | beside | pipeline_files(version)


def lay(folder: Path, version: str, folders: Sequence[str] = ()) -> Path:
    """Put a version there without any of mopt's care."""
    folder.mkdir()
    for name, data in files_of(version, folders).items():
        if name.endswith("/"):
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)
    return folder


def held_by(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, as ``files_of`` says it; empty if there is no such folder."""
    held: dict[str, bytes] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        held |= {f"{name}/": b""} if path.is_dir() else {name: path.read_bytes()}
    return held


def fill(stage: directory.StagingDir, version: str, folders: Sequence[str] = ()) -> None:
    """Write a version into a stage, as a build does."""
    for folder in folders or [""]:
        prefix = f"{folder}/" if folder else ""
        if folder:
            stage.add_folder(folder)
        with stage.shard(f"{prefix}{SHARD}", SPECS) as writer:
            for spec in writer.layout:
                data = tensor_bytes(version, spec)
                writer.write(spec.name, [data[:100], memoryview(data)[100:]])
        stage.written(f"{prefix}{SHARD}", durable=writer.durable)
        for name, data in small_files(version).items():
            stage.write_file(f"{prefix}{name}", data)
    if folders:
        for folder in folders_of(COPIES):
            stage.add_folder(folder)
        for name, data in COPIES.items():
            done = copy_file(Bytes(data), stage.path / name, stage.mode_for(name), lambda _: None)  # type: ignore[arg-type]
            stage.written(name, durable=done.durable)
        for name, data in pipeline_files(version).items():
            stage.write_file(name, data)


def refuse_with(number: int) -> Callable[[Path, Path], None]:
    """A rename that the file system refuses."""

    def refused(_source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number), str(target))

    return refused


def forbid_renameat2(number: int) -> None:
    """From now on this process cannot exchange names, as on NFS."""
    fsops.exchange = fsops.rename_noreplace = refuse_with(number)


def signal_after(name: str) -> None:
    """SIGTERM right after the first call of an fsops function, with time for it to arrive."""
    original = getattr(fsops, name)

    def with_signal(source: Path, target: Path) -> None:
        original(source, target)
        if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            setattr(fsops, name, original)
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(50):
                time.sleep(0.001)

    setattr(fsops, name, with_signal)


def pause_before_removal() -> None:
    """Say so and wait for the test before the first tree is removed."""
    original = fsops.remove_tree

    def remove_tree(path: Path) -> None:
        fsops.remove_tree = original
        sys.stdout.write("paused\n")
        sys.stdout.flush()
        sys.stdin.read()
        original(path)

    fsops.remove_tree = remove_tree


def kill_before(call: str, nth: int) -> None:
    """SIGKILL before the ``nth`` call of this name that changes the disk; ``any`` counts them all."""
    count = 0

    def counted(original: Callable[..., object]) -> Callable[..., object]:
        def with_count(*values: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*values, **options)

        return with_count

    making = ("make_dir", "create_file", "preallocate", "write_all", "sync", "set_mode")
    of_fsops = (*making, "rename", "rename_noreplace", "exchange")
    for name in (*of_fsops, "unlink", "rmdir"):  # the last two of every file and folder that is removed
        if call in {name, "any"}:
            module = fsops if name in of_fsops else os
            setattr(module, name, counted(getattr(module, name)))


def stop(signum: int, _frame: FrameType | None) -> None:
    """As mopt's own handler."""
    raise Interrupted(signum)


def main(words: list[str]) -> int:
    """Run once."""
    switches = {word for word in words if word.startswith("--")}
    out, version = (word for word in words if word not in switches)
    if "--two-renames" in switches:
        import errno

        forbid_renameat2(errno.EINVAL)
    if "--signal" in switches:
        signal.signal(signal.SIGTERM, stop)
        for name in ("exchange", "rename_noreplace", "rename"):
            signal_after(name)
    if "--thread" in switches:
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    for word in switches:
        if word.startswith("--kill="):
            call, _, nth = word.removeprefix("--kill=").partition(":")
            kill_before(call, int(nth))
    if "--pause" in switches:
        pause_before_removal()
    overwrite = "--no-overwrite" not in switches
    folders = FOLDERS if "--components" in switches else ()
    copies = COPIES if folders else ()
    stage = directory.StagingDir(Path(out), (), overwrite=overwrite, need_bytes=10_000, copies=copies)
    if "--wait" in switches:
        sys.stdin.read()  # all racers leave when the test closes the pipe
    told: dict[str, object] = {}
    code = ExitCode.OK
    try:
        with stage:
            fill(stage, version, folders)
            published = stage.publish()
            told |= {"method": published.method, "warnings": published.warnings}
    except MoptError as error:
        code = error.exit_code
        told |= {"code": error.code, "message": error.message, "hint": error.hint}
        if isinstance(error, StorageError):
            told |= {"published": error.published, "kept_at": error.kept_at}
    except Interrupted as error:
        code = ExitCode(128 + error.signum)
    except Exception:
        code = ExitCode.INTERNAL
        told["message"] = traceback.format_exc()
    told["in_place"] = stage.published is not None
    sys.stdout.write(json.dumps(told) + "\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
