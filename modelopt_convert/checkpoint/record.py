"""The record of a checkpoint, ``mopt.json``: how it is read, and what it says. No torch.

A record is what its author claims. What is proven is proven by bytes.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import xxhash

from modelopt_convert import __version__
from modelopt_convert.checkpoint.content import CONTENT
from modelopt_convert.checkpoint.digests import headers_digest
from modelopt_convert.checkpoint.header import TensorSpec
from modelopt_convert.checkpoint.location import Location, is_there, read_small
from modelopt_convert.checkpoint.reader import MAX_INDEX_BYTES
from modelopt_convert.checkpoint.strict_json import json_bytes, parse_json_object
from modelopt_convert.formats.format import WEIGHTS_WORDS
from modelopt_convert.report.words import CALIBRATED_WORDS, PROOFS, QUANTIZED_HERE
from modelopt_convert.run.errors import InputError

RECORD = "mopt.json"
_SCHEMA = "mopt.manifest/1"
_ALGORITHM = "xxh3-128"
_SHOWN = 12  # digits of a digest, in words
# Statuses of the proof at build after which the bytes are known to be the base's.
_KNOWN = {"pass": "proven at build against", QUANTIZED_HERE: "quantized at build, not calibrated, from"}
# What is found of modules that were quantized by such a rule; without their calibration weighted ones are near.
_SEARCHED: Mapping[str, tuple[str, str | None]] = {
    "sweep": ("nearest", WEIGHTS_WORDS["sweep"]),
    "sweep-weighted": ("nearest", None),
    "gptq": ("near", None),
}
_CALIBRATED = "quantized at build, with input scales of `mopt calibrate`, from"


def digest_of(data: bytes) -> str:
    """The digest of a small file, as records have it."""
    return xxhash.xxh3_128_hexdigest(data)


def write_record(
    command: str,
    more: Mapping[str, Any],
    *,
    tensors: Mapping[str, str],
    files: Mapping[str, bytes],
    headers: tuple[Iterable[TensorSpec], Mapping[str, Mapping[str, str]]] | None,
) -> bytes:
    """The record of a checkpoint, the same bytes for the same input.

    Args:
        command: The command of mopt that wrote the checkpoint.
        more: The keys that only this command writes.
        tensors: The digest of each tensor's bytes, by the tensor's name.
        files: The small files beside the record.
        headers: Every tensor, and the header metadata of every shard by its name; None where there are no shards.
    """
    digests: dict[str, Any] = {
        "algorithm": _ALGORITHM,
        "tensors": dict(sorted(tensors.items())),
        "files": {name: digest_of(data) for name, data in sorted(files.items())},
    }
    if headers is not None:
        specs, shards = headers
        digests |= {"headers": headers_digest(specs, shards.values()), "shards": sorted(shards)}
    head = {"schema": _SCHEMA, "tool": {"name": "mopt", "version": __version__}, "command": command}
    return json_bytes(head | dict(more) | {"digests": digests})


def is_record(record: Mapping[str, Any] | None) -> bool:
    """Whether a JSON object is a record that mopt wrote."""
    return record is not None and str(record.get("schema")).startswith(_SCHEMA.partition("/")[0] + "/")


def read_record(folder: Location) -> dict[str, Any] | None:
    """mopt.json of a checkpoint that mopt built, or None where there is none.

    Raises:
        InputError: With a ``record.*`` or ``input.*`` code: it is there and cannot be used.
    """
    path = folder / RECORD
    if not is_there(path):
        return None
    record = parse_json_object(read_small(path, MAX_INDEX_BYTES, code="record"), code="record", path=str(path))
    digests = record.get("digests")
    known = digests if isinstance(digests, dict) and digests.get("algorithm") == _ALGORITHM else {}
    if record.get("schema") != _SCHEMA or not all(_names(known.get(key)) for key in ("tensors", "files")):
        found = str(record.get("schema"))[:40]
        raise InputError(
            f"{path}: expected {_SCHEMA} with xxh3-128 digests of tensors and files, found {found!r}",
            code="record.content",
            path=str(path),
            hint="the record was edited or is of a newer mopt; give --base to prove the checkpoint again",
        )
    return record


def _names(found: object) -> bool:
    return isinstance(found, dict) and all(isinstance(value, str) for value in found.values())


def part_digest(folder: Location) -> str:
    """What identifies one transformer among several: its record."""
    path = folder / RECORD
    return digest_of(read_small(path, MAX_INDEX_BYTES, code="record")) if is_there(path) else ""


def read_pipeline(checkpoint: Location) -> dict[str, Any]:
    """The record above several transformers, or of a whole pipeline; empty where there is none.

    The record of one transformer names its shards: a rewritten file has no config.json beside it.

    Raises:
        InputError: With a ``record.*`` or ``input.*`` code: it is there and cannot be used.
    """
    path = checkpoint / RECORD
    if not is_there(path) or (checkpoint / "config.json").is_file():
        return {}
    record = parse_json_object(read_small(path, MAX_INDEX_BYTES, code="record"), code="record", path=str(path))
    digests = record.get("digests")
    return {} if isinstance(digests, dict) and digests.get("shards") else record


def parts_of(record: Mapping[str, Any]) -> dict[str, str]:
    """The transformers of a checkpoint that has folders for them, with the digest of each one's record; else empty."""
    return _texts(record.get("parts"))


def copied_files(record: Mapping[str, Any]) -> dict[str, str]:
    """What was copied from the base's pipeline, with the digest of each file; no path leads out of the checkpoint."""
    return {
        path: digest
        for path, digest in _texts(record.get("copied")).items()
        if not {"", ".", ".."} & {*path.split("/")}
    }


def _texts(found: object) -> dict[str, str]:
    return {name: str(one) for name, one in found.items()} if isinstance(found, dict) else {}


def recorded_verdicts(record: Mapping[str, Any] | None) -> dict[str, tuple[str, str | None]]:
    """The verdict of the proof at build and its rule, if it was told, by module; empty where no record has them.

    What was quantized by mopt itself is to be found as the rule of the build leaves it.
    """
    proof = record.get("proof") if record is not None else None
    modules = proof.get("modules") if isinstance(proof, dict) and str(proof.get("status")) in _KNOWN else None
    if record is None or not isinstance(modules, dict):
        return {}
    here, found = _SEARCHED.get(str(record.get("weights")), ("reproduced", None)), dict[str, tuple[str, str | None]]()
    for name, one in modules.items():
        if isinstance(one, dict):
            verdict, rule = str(one.get("verdict")), one.get("rule")
            found[name] = here if verdict == QUANTIZED_HERE else (verdict, rule if isinstance(rule, str) else None)
    return found


def calibration_of(record: Mapping[str, Any] | None) -> str | None:
    """The digest of the calibration that a checkpoint was built with, as its record has it."""
    found = record.get("calibration") if record is not None else None
    return str(found["digest"]) if isinstance(found, dict) and "digest" in found else None


def recorded_preset(record: Mapping[str, Any] | None) -> str:
    """The name of the preset that a record claims; empty where it claims none."""
    preset = record.get("preset") if record is not None else None
    name = preset.get("name") if isinstance(preset, dict) else None
    return name if isinstance(name, str) else ""


def other_base(record: Mapping[str, Any] | None, identity: Mapping[str, str]) -> list[str]:
    """In words, that a base is not the very one that a record names; empty where it is, or where one is not known.

    A base may differ in its files, or by a cast, and prove the same: so this is told, and decides nothing.

    Args:
        record: Of a checkpoint, or None.
        identity: Of the base.
    """
    sources = record.get("sources") if record is not None else None
    base = sources.get("base") if isinstance(sources, dict) else None
    recorded, found = base.get(CONTENT) if isinstance(base, dict) else None, identity.get(CONTENT)
    if recorded is None or found is None or recorded == found:
        return []
    return [
        f"the base is not, byte for byte, the one that the record names: its weight files have the digest "
        f"{found[:_SHOWN]}, recorded {str(recorded)[:_SHOWN]}"
    ]


def claim(record: Mapping[str, Any]) -> str:
    """What the record says of its proof: quoted, since nobody has verified who wrote it."""
    proof = record.get("proof")
    sources = record.get("sources")
    base = sources.get("base") if isinstance(sources, dict) else None
    known = _KNOWN.get(str(proof.get("status"))) if isinstance(proof, dict) else None
    if isinstance(proof, dict) and proof.get("words") == CALIBRATED_WORDS:
        known = _CALIBRATED
    if known is None or not isinstance(base, dict):
        words = proof.get("words") if isinstance(proof, dict) else None
        why = words if words in PROOFS and str(words).startswith("not proven") else "not proven"
        said = f"{record.get('command', 'mopt')} published it as {why}"
    else:
        claimed = record.get("base_claimed")
        named = f", said to be {claimed}" if isinstance(claimed, str) else ""
        how = next((words for one, words in WEIGHTS_WORDS.items() if one == record.get("weights") != "max"), None)
        said = f"{known} {_name_of(base)}{named}{f', weights by {how}' if how is not None else ''}"
    return f"its record claims (the author is not verified): {said}"


def _name_of(base: Mapping[str, Any]) -> str:
    """What was observed of a base."""
    commit = base.get("commit")
    if commit is None:
        what = CONTENT if isinstance(base.get(CONTENT), str) else "headers_sha256"
        return f"a local folder ({what.partition('_')[0]} {str(base.get(what))[:_SHOWN]})"
    return f"{base['repo']}@{commit}" if base.get("repo") else f"a download of commit {commit}"
