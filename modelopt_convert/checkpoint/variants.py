"""Which weight files of a folder are read: those of the index, the plain ones, or a variant of them. No torch.

A variant is diffusers' word for the same weights in another precision. Its name stands in the name of each file:
``X.fp16.safetensors``, ``X.fp16-00001-of-00002.safetensors``, formerly ``X-00001-of-00002.fp16.safetensors``, with the
index ``X.safetensors.index.fp16.json``.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from modelopt_convert.checkpoint.index import index_of, without_variants
from modelopt_convert.run.errors import InputError

_NUMBER = r"-\d{5}-of-\d{5}"
_FILE = re.compile(rf"(?P<stem>.+?)(?:{_NUMBER})?(?:\.(?P<variant>[^.]+?))?(?:{_NUMBER})?\.safetensors")
_INDEX = re.compile(r"(?P<stem>.+?)(?:\.(?P<front>[^.]+))?\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json")
# Early checkpoints of nunchaku's engine, which has these names in itself (``nunchaku/models/transformers/utils.py``).
_TWO = {"transformer_blocks.safetensors", "unquantized_layers.safetensors"}
_SHOWN = 10
_MOVE = "move the files that do not belong to this checkpoint out of the folder"
_WHOSE = "--variant chooses in the base where there is one, else in the source"


class Weights(NamedTuple):
    """The weight files that are read.

    Attributes:
        listing: The index that names them; None where there is none.
        files: They, where there is no index: one, or the two of nunchaku.
    """

    listing: str | None
    files: tuple[str, ...] = ()


def is_index(name: str) -> bool:
    """Whether a file is named as an index is, also that of a variant."""
    return _INDEX.fullmatch(name) is not None


def choose_weights(where: str, files: Sequence[str], indexes: Sequence[str], variant: str | None) -> Weights:
    """The weights of a folder that are read: an index comes first, plain names come before variants.

    Args:
        where: The folder, for messages.
        files: Names of all .safetensors files in the folder.
        indexes: Names of all indexes in the folder.
        variant: The variant that is asked for; None for the plain weights, or the only variant.

    Raises:
        InputError: ``input.missing``, ``input.variant``, ``input.ambiguous`` or ``index.missing``.
    """
    if not files:
        raise InputError(
            f"{where}: expected a .safetensors file, found none",
            code="input.missing",
            path=where,
            hint="give the folder that holds the weights; .bin and .pt files are not read",
        )
    if variant is not None:
        return _variant(where, files, indexes, variant)
    listed = [name for name in indexes if not _has_plain(name, files, indexes)]
    if len(listed) == 1 and _index_variant(listed[0]) is None:
        return Weights(listed[0])
    plain = [name for name in files if _file_variant(name) is None]
    if listed and not plain:
        return Weights(_only(where, listed, "one index"))
    if listed:
        _refuse_unlisted(where, plain, listed)
    return Weights(None, _whole(where, without_variants(files, indexes)))


def _variant(where: str, files: Sequence[str], indexes: Sequence[str], variant: str) -> Weights:
    """The weights of one variant."""
    listed = [name for name in indexes if variant in _INDEX.fullmatch(name).group("front", "variant")]  # type: ignore[union-attr]
    if listed:
        return Weights(_only(where, listed, f"one index of the variant {variant}"))
    found = [name for name in files if _file_variant(name) == variant]
    if not found:
        known = _variants(files, indexes)
        raise InputError(
            f"{where}: expected weights of the variant {variant}, found {', '.join(known) or 'no variant'}",
            code="input.variant",
            path=where,
            hint=f"name one that is there, or leave --variant out for the plain weights; {_WHOSE}",
        )
    return Weights(None, _whole(where, found))


def _whole(where: str, files: Sequence[str]) -> tuple[str, ...]:
    """What is a whole checkpoint, where no index is there: one file, but for nunchaku's two."""
    if len(files) == 1 or set(files) == _TWO:
        return tuple(sorted(files))
    variants = _variants(files, ())
    index = index_of(files)
    if index is None and len(variants) == 1 and all(_file_variant(name) for name in files):
        stems = {_FILE.fullmatch(name)["stem"] for name in files}  # type: ignore[index]
        index = f"{stems.pop()}.safetensors.index.{variants[0]}.json" if len(stems) == 1 else None
    if index is not None:
        raise _no_index(where, index, len(files), "")
    raise InputError(
        f"{where}: expected one .safetensors file or an index, found {', '.join(files[:_SHOWN])}",
        code="input.ambiguous",
        path=where,
        hint=_hint(variants),
    )


def _only(where: str, indexes: Sequence[str], expected: str) -> str:
    if len(indexes) == 1:
        return indexes[0]
    raise InputError(
        f"{where}: expected {expected}, found {', '.join(indexes[:_SHOWN])}",
        code="input.ambiguous",
        path=where,
        hint=_hint(_variants((), indexes)),
    )


def _refuse_unlisted(where: str, plain: Sequence[str], indexes: Sequence[str]) -> None:
    """Refuse to choose between plain files and an index that is not theirs."""
    if len(indexes) > 1:
        _only(where, indexes, "one index")
    variant = _index_variant(indexes[0])
    index = index_of(plain)
    if index is not None:
        raise _no_index(where, index, len(plain), f", or choose the other weights with --variant {variant}")
    raise InputError(
        f"{where}: expected one checkpoint, found {', '.join([*plain[:_SHOWN], *indexes])}",
        code="input.ambiguous",
        path=where,
        hint=_hint(_variants((), indexes)),
    )


def _no_index(where: str, index: str, count: int, other: str) -> InputError:
    return InputError(
        f"{where}: expected {index} beside {count} shards, found none: the index is missing",
        code="index.missing",
        path=where,
        hint=f"fetch {index} from where the shards are from, or export again{other}",
    )


def _hint(variants: Sequence[str]) -> str:
    if not variants:
        return f"{_MOVE}; of weights in several precisions, --variant NAME chooses one"
    return f"choose with --variant {' or '.join(variants[:_SHOWN])}, or {_MOVE}; {_WHOSE}"


def _file_variant(name: str) -> str | None:
    found = _FILE.fullmatch(name)
    return found["variant"] if found else None


def _index_variant(name: str) -> str | None:
    """Of an index that is named so behind; before ``.safetensors`` a word may as well be part of a plain name."""
    found = _INDEX.fullmatch(name)
    return found["variant"] if found else None


def _variants(files: Sequence[str], indexes: Sequence[str]) -> list[str]:
    of_indexes = (found["variant"] or found["front"] for found in map(_INDEX.fullmatch, indexes) if found)
    return sorted({one for one in (*map(_file_variant, files), *of_indexes) if one is not None})


def _has_plain(index: str, files: Sequence[str], indexes: Sequence[str]) -> bool:
    """Whether an index is that of a variant beside plain weights."""
    found = _INDEX.fullmatch(index)
    if found is None or found.group("front", "variant") == (None, None):
        return False
    # Of a name like X.v2.safetensors.index.fp16.json only the last word is the variant.
    stem = found["stem"] if found["variant"] is None or not found["front"] else f"{found['stem']}.{found['front']}"
    return f"{stem}.safetensors.index.json" in indexes or f"{stem}.safetensors" in files
