"""The index of a checkpoint of several files: what it may name, and whether the headers say the same. No torch."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.run.errors import InputError

SHOWN_CHARS = 200
_MAX_FILE_NAME = 255  # bytes, as Linux takes them
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")
# Weights of another precision, as diffusers names them: a word before the suffix, or before the number of a shard.
_VARIANT = re.compile(r"(.+?)(-\d{5}-of-\d{5})?\.[^.]+?(-\d{5}-of-\d{5})?\.safetensors")


def check_index(where: str, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    """Require that an index and the headers of its files name the same tensors, in the same files.

    Args:
        where: The index, for messages.
        weight_map: Of the index.
        tensors: Of the files.

    Raises:
        InputError: ``index.mismatch``.
    """
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise InputError(
                f"{where}: tensor {cut(name)} should be in {file[:SHOWN_CHARS]}, its header does not list it",
                code="index.mismatch",
                path=where,
                hint="the index is stale; rebuild it, or export again",
            )
    for name, info in tensors.items():
        if name not in weight_map:
            raise InputError(
                f"{where}: {info.file} holds tensor {cut(name)}, the index does not list it",
                code="index.mismatch",
                path=where,
                hint="the index is stale; rebuild it, or export again",
            )


def cut(name: str) -> str:
    """A name for a message: it may have a hundred million characters."""
    return repr(name[:SHOWN_CHARS])


def index_of(shards: Sequence[str]) -> str | None:
    """The index that several files want which are the shards of one checkpoint by their names; None if they are not."""
    found = {one[1] if (one := _SHARD.fullmatch(name)) else None for name in shards}
    name = found.pop() if len(shards) > 1 else None
    return f"{name}.safetensors.index.json" if name is not None and not found else None


def is_shard_name(name: str) -> bool:
    """Whether an index may name such a file: one that lies beside it."""
    plain = name.endswith(".safetensors") and not name.startswith(".") and not set(name) & {"/", "\\", "\0", ":"}
    return plain and len(name.encode()) <= _MAX_FILE_NAME and PurePosixPath(name).name == name


def without_variants(shards: Sequence[str], indexes: Iterable[str]) -> list[str]:
    """The weight files that diffusers takes unless it is asked for a variant; all, where there are only variants.

    Args:
        shards: Names of all weight files in a folder.
        indexes: Names of the indexes there.
    """
    plain = {*shards, *(name.removesuffix(".index.json") for name in indexes)}
    variants = {name for name in shards if (one := _VARIANT.fullmatch(name)) and f"{one[1]}.safetensors" in plain}
    return [name for name in shards if name not in variants] or list(shards)
