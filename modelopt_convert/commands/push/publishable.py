"""Which files of a checkpoint are published, and whether they may be. Nothing is asked of the Hub.

Small files are read here, once: what was looked at is what is sent.
"""

import hashlib
import os
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelopt_convert.checkpoint.companions import MODEL_INDEX, folders_of
from modelopt_convert.checkpoint.local_file import check_link
from modelopt_convert.checkpoint.location import is_there, read_small
from modelopt_convert.checkpoint.pipeline import transformers_of
from modelopt_convert.checkpoint.reader import MAX_INDEX_BYTES, CheckpointReader
from modelopt_convert.checkpoint.record import RECORD, copied_files, read_pipeline
from modelopt_convert.checkpoint.strict_json import parse_json_object
from modelopt_convert.commands.push.leaks import holds_token, local_path, strings_of
from modelopt_convert.run.errors import InputError

CARD = "README.md"
_PICKLES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
_OF_A_TRANSFORMER = frozenset({"config.json", "hf_quant_config.json"})
_OF_ANY_FOLDER = frozenset({CARD, RECORD})
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Upload:
    """One file to publish.

    Attributes:
        path: In the repo.
        source: Where a shard lies, or the bytes of a small file.
        num_bytes: Its size.
        stamp: Which file on disk the shard was when it was opened; None for a small file.
    """

    path: str
    source: Path | bytes
    num_bytes: int
    stamp: tuple[int, ...] | None = None

    @property
    def is_shard(self) -> bool:
        """Whether it is sent from disk, on its own."""
        return isinstance(self.source, Path)

    def sha256(self, advance: Callable[[int], None]) -> str:
        """Digest by which the Hub knows large files."""
        return self._fed(hashlib.sha256(), advance)

    def git_sha1(self, advance: Callable[[int], None]) -> str:
        """Digest by which the Hub knows small files, also those that are sent from disk."""
        return self._fed(hashlib.sha1(b"blob %d\0" % self.num_bytes, usedforsecurity=False), advance)

    def _fed(self, digest: "hashlib._Hash", advance: Callable[[int], None]) -> str:
        if isinstance(self.source, bytes):
            digest.update(self.source)
            return digest.hexdigest()
        with self.source.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                advance(len(chunk))
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Publishable:
    """What is published of a checkpoint.

    Attributes:
        files: In the order in which they are sent.
        left_out: What else the folder holds.
        readers: The opened transformers.
        components: Folders of the transformers; empty where the checkpoint itself is one.
        is_pipeline: Whether all else that a pipeline needs is there too.
        record: mopt.json of the first transformer, or an empty object.
    """

    files: tuple[Upload, ...]
    left_out: tuple[str, ...]
    readers: tuple[CheckpointReader, ...]
    components: tuple[str, ...]
    is_pipeline: bool
    record: dict[str, Any]

    @property
    def paths(self) -> frozenset[str]:
        """Every path in the repo."""
        return frozenset(file.path for file in self.files)

    def check_unchanged(self) -> None:
        """Compare the shards with what they were when they were opened.

        Also by their names, by which they are sent: a build with --overwrite puts another folder in their place.

        Raises:
            InputError: ``input.changed``.
        """
        for reader in self.readers:
            reader.check_unchanged()
        for file in self.files:
            if isinstance(file.source, Path) and _stamp(file.source) != file.stamp:
                raise InputError(
                    f"{file.source}: another file took its place while it was published",
                    code="input.changed",
                    path=str(file.source),
                    hint="wait until whatever writes the checkpoint has finished, then push again",
                )


def publishable(checkpoint: Path, token: Callable[[], str | None], stack: ExitStack) -> Publishable:
    """The files of a checkpoint, opened and searched for what must not be published.

    Args:
        checkpoint: A transformer folder, or the folder above ``transformer`` and ``transformer_2``.
        token: Gives the access token in use; asked only once the checkpoint is opened.
        stack: Keeps the checkpoint open.

    Raises:
        InputError: ``push.folder``, ``push.pickle``, ``push.secret``, ``push.local_path``, or what opening raises.
    """
    if checkpoint.is_file():
        raise InputError(
            f"{checkpoint}: expected the folder of a checkpoint, found a file",
            code="push.folder",
            path=str(checkpoint),
            hint="give the folder that mopt wrote: its record and its card are published with the weights",
        )
    copied = copied_files(read_pipeline(checkpoint))
    transformers = [one for one in transformers_of(checkpoint, None) if f"{one[0]}/config.json" not in copied]
    files: list[Upload] = []
    left_out: list[str] = []
    readers: list[CheckpointReader] = []
    if [name for name, _, _ in transformers] != ["."]:
        beside = {name for name, _, _ in transformers} | {path.partition("/")[0] for path in copied}
        wanted = _OF_ANY_FOLDER | ({MODEL_INDEX} if copied else set())
        names = _sorted_out(checkpoint, "", wanted, left_out, known=beside)
        files += [_small(checkpoint, "", name) for name in names]
        files += [_copy(checkpoint, path) for path in copied]
        left_out += _beside_copies(checkpoint, copied)
    for name, _, _ in transformers:
        folder = checkpoint if name == "." else checkpoint / name
        prefix = "" if name == "." else f"{name}/"
        # What mopt converts for ComfyUI is one file, and has no config.json.
        reader = stack.enter_context(CheckpointReader(folder, need_config=not is_there(folder / RECORD)))
        readers.append(reader)
        known = _OF_ANY_FOLDER | _OF_A_TRANSFORMER | set(reader.indexes)
        names = _sorted_out(folder, prefix, known, left_out, known=reader.files)
        files += [_shard(folder, prefix, one) for one in reader.files]
        files += [_small(folder, prefix, one) for one in names]
    _refuse_leaks(checkpoint, files, readers, token())
    records = [one for one in files if Path(one.path).name == RECORD]
    return Publishable(
        files=tuple(sorted(files, key=lambda one: (not one.is_shard, one.path))),
        left_out=tuple(left_out),
        readers=tuple(readers),
        components=tuple(name for name, _, _ in transformers if name != "."),
        is_pipeline=bool(copied),
        record=_parsed(min(records, key=lambda one: one.path.count("/"))) if records else {},
    )


def _sorted_out(
    folder: Path, prefix: str, wanted: Collection[str], left_out: list[str], known: Collection[str]
) -> list[str]:
    """Names of the small files to publish; what else there is goes to ``left_out``, but for what is ``known``."""
    names: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name in known:
            continue
        if path.suffix.lower() in _PICKLES:
            raise InputError(
                f"{path}: a pickle, which runs code when it is loaded, is never published",
                code="push.pickle",
                path=str(path),
                hint="move it out of the checkpoint; serving engines do not read it",
            )
        if path.is_file() and (path.name in wanted or path.name.startswith("LICENSE")):
            names.append(path.name)
        else:
            name = path.name.encode(errors="backslashreplace").decode()
            left_out.append(f"{prefix}{name}/" if path.is_dir() else f"{prefix}{name}")
    return names


def _copy(checkpoint: Path, path: str) -> Upload:
    """A file of a whole pipeline; what may say where it came from is read, and looked through."""
    if path.endswith("config.json"):
        return _small(checkpoint, "", path)
    check_link(checkpoint, checkpoint / path)
    return _shard(checkpoint, "", path)


def _beside_copies(checkpoint: Path, copied: Collection[str]) -> list[str]:
    """What else stands in the folders of copies."""
    folders = {path.rpartition("/")[0] for path in copied} - {""}
    known = {*copied, *folders_of(copied)}
    beside = sorted(f"{folder}/{one.name}" for folder in folders for one in (checkpoint / folder).glob("*"))
    return [path.encode(errors="backslashreplace").decode() for path in beside if path not in known]


def _shard(folder: Path, prefix: str, name: str) -> Upload:
    path = folder / name
    return Upload(f"{prefix}{name}", path, path.stat().st_size, _stamp(path))


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Which file bears that name; None if none does."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _small(folder: Path, prefix: str, name: str) -> Upload:
    data = read_small(folder / name, MAX_INDEX_BYTES, code="push")
    return Upload(f"{prefix}{name}", data, len(data))


def _parsed(file: Upload) -> dict[str, Any]:
    assert isinstance(file.source, bytes)
    return parse_json_object(file.source, code="push", path=file.path)


def _refuse_leaks(
    checkpoint: Path, files: Sequence[Upload], readers: Sequence[CheckpointReader], token: str | None
) -> None:
    own = (str(checkpoint.resolve()), str(checkpoint.absolute()), os.environ.get("HOME", ""))
    for file in files:
        if isinstance(file.source, bytes):
            text = file.source.decode(errors="replace")
            _refuse_token(file.path, text, token)
            said = strings_of(_parsed(file)) if file.path.endswith(".json") else [("", text)]
            for key, value in said:
                _refuse_path(file.path, key, value, own)
    for reader in readers:
        for name, metadata in reader.metadata.items():
            for key, value in metadata.items():
                _refuse_token(name, value, token)
                _refuse_path(name, f"__metadata__.{key}", value, own)


def _refuse_token(name: str, text: str, token: str | None) -> None:
    if holds_token(text, token):
        raise InputError(
            f"{name}: holds an access token; nothing was sent",
            code="push.secret",
            path=name,
            hint="take it out, and revoke it at https://huggingface.co/settings/tokens if anyone may have seen it",
        )


def _refuse_path(name: str, key: str, text: str, own: Sequence[str]) -> None:
    if (found := local_path(text, own)) is None:
        return
    mend = "edit the card" if Path(name).name == CARD else "take it out of the export, and build again"
    raise InputError(
        f"{name}: {f'{key} holds' if key else 'holds'} a path of this machine: {found[:200]!r}",
        code="push.local_path",
        path=name,
        hint=f"{mend}; nothing was sent",
    )
