"""What a repo holds against what is published: what to send, what to delete, whose card stays. Pure.

Two checkpoints in one folder are misread or rejected by engines, so the shards of the one before must go; but nothing
is deleted that mopt did not write.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from modelopt_convert.checkpoint.companions import OTHER_WEIGHTS
from modelopt_convert.checkpoint.hub.answers import HubFile
from modelopt_convert.checkpoint.pipeline import COMPONENTS
from modelopt_convert.checkpoint.reader import INDEX_SUFFIX
from modelopt_convert.checkpoint.record import RECORD, copied_files, digest_of, is_record
from modelopt_convert.checkpoint.strict_json import parse_json_object
from modelopt_convert.commands.push.publishable import CARD, Publishable, Upload
from modelopt_convert.run.errors import InputError

_FOLDERS = frozenset({".", *COMPONENTS})
_OURS = re.compile(r"diffusion_pytorch_model(-[0-9]{5}-of-[0-9]{5})?\.safetensors(\.index\.json)?")


@dataclass(frozen=True, slots=True)
class Changes:
    """What a commit shall do.

    Attributes:
        send: Files that differ or are missing there.
        same: Paths that are equal there.
        delete: Paths that belong to the checkpoint before.
        kept_cards: Cards that somebody edited there; ours is not sent.
    """

    send: tuple[Upload, ...]
    same: tuple[str, ...]
    delete: tuple[str, ...]
    kept_cards: tuple[str, ...]


def compare(
    local: Publishable,
    there: Mapping[str, HubFile],
    fetch: Callable[[str], bytes],
    advance: Callable[[int], None],
    repo_id: str,
) -> Changes:
    """What to change so that the repo holds the checkpoint, and no second one; ``advance`` counts bytes read here.

    Raises:
        InputError: ``push.foreign_files``.
    """
    records: dict[str, dict[str, Any]] = {}
    for path in there:
        if _folder(path) in _FOLDERS and PurePosixPath(path).name == RECORD:
            records[_folder(path)] = _record(fetch(path), f"hf://{repo_id}/{path}")
    delete = _stale(local, there, records, repo_id)
    send: list[Upload] = []
    same: list[str] = []
    kept: list[str] = []
    for file in local.files:
        remote = there.get(file.path)
        if remote is not None and _equal(file, remote, advance):
            same.append(file.path)
        elif remote is not None and _is_card(file.path) and _edited(fetch(file.path), records.get(_folder(file.path))):
            kept.append(file.path)
        else:
            send.append(file)
    return Changes(tuple(send), tuple(same), tuple(delete), tuple(kept))


def _equal(file: Upload, remote: HubFile, advance: Callable[[int], None]) -> bool:
    if file.num_bytes != remote.num_bytes:
        return False
    return (file.git_sha1 if remote.is_small else file.sha256)(advance) == remote.etag


def _stale(
    local: Publishable, there: Mapping[str, HubFile], records: Mapping[str, Mapping[str, Any]], repo_id: str
) -> list[str]:
    """What to delete of the checkpoint before.

    A record goes with the weights that it speaks of. config.json in a folder that gets none means another layout, in
    which the old one would be found first.
    """
    foreign: list[str] = []
    stale: list[str] = []
    copied = copied_files(records.get(".", {})) if is_record(records.get(".")) else {}
    looked_at = _FOLDERS | {_folder(path) for path in (*local.paths, *copied)}
    for path in sorted(there.keys() - local.paths):
        name = PurePosixPath(path).name
        if _folder(path) not in looked_at:
            continue
        ours = is_record(records.get(_folder(path)))
        if path in copied or (ours and (_OURS.fullmatch(name) or name == RECORD)):
            stale.append(path)
        elif name.lower().endswith((".safetensors", INDEX_SUFFIX, *OTHER_WEIGHTS)) or (
            name == "config.json" and _folder(path) in _FOLDERS
        ):
            foreign.append(path)
    if foreign:
        more = f" and {len(foreign) - 10} more" if len(foreign) > 10 else ""
        raise InputError(
            f"hf://{repo_id}: holds files of another checkpoint, which mopt did not write or which lie elsewhere: "
            f"{', '.join(foreign[:10])}{more}",
            code="push.foreign_files",
            path=f"hf://{repo_id}",
            hint=f"push to another repo, or remove them: `hf repos delete-files {repo_id} {foreign[0]} ...`",
        )
    return stale


def _edited(card: bytes, record: Mapping[str, Any] | None) -> bool:
    """Whether a card is not the one that mopt wrote beside that record."""
    digests = record.get("digests") if record is not None else None
    files = digests.get("files") if isinstance(digests, dict) else None
    return not isinstance(files, dict) or files.get(CARD) != digest_of(card)


def _record(raw: bytes, path: str) -> dict[str, Any]:
    """A record that cannot be read is nobody's: nothing is deleted on its word."""
    try:
        return parse_json_object(raw, code="record", path=path)
    except InputError:
        return {}


def _is_card(path: str) -> bool:
    return PurePosixPath(path).name == CARD


def _folder(path: str) -> str:
    return str(PurePosixPath(path).parent)
