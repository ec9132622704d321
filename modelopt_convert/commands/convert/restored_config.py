"""The config.json that a record says a checkpoint had: used only where nothing at hand says otherwise. No torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.strict_json import parse_json_object
from modelopt_convert.commands.command import without_quantization
from modelopt_convert.commands.convert.way_back import Claim
from modelopt_convert.dialects.form import Canonical, Form, ReadBytes, constant
from modelopt_convert.families.family import Family
from modelopt_convert.formats.layout import CANONICAL, declared_layout
from modelopt_convert.run.errors import InputError

_CONFIG = "config.json"
_QUANTIZATION = "quantization_config"
_LEFT_OUT = ("_name_or_path", _QUANTIZATION)
_UNREAD = frozenset({"producer"})  # no engine reads who wrote it
_BITS = {"nvfp4": {"num_bits": 4, "type": "float", "group_size": 16}, "fp8": {"num_bits": 8, "type": "float"}}


@dataclass(frozen=True, slots=True)
class ClaimedConfig:
    """What of a claimed config.json can be used.

    Attributes:
        text: The text; None where the output's own is written.
        not_used: Why, in words.
    """

    text: str | None
    not_used: tuple[str, ...] = ()


def claimed_config(
    claim: Claim, known: Mapping[str, Any], written: Canonical, target: Form, family: Family, read: ReadBytes
) -> ClaimedConfig:
    """Judge the claimed text of config.json.

    Args:
        claim: The claim.
        known: The config of SOURCE or, where it has none, of the base; empty if there is neither.
        written: What is written, under the names of the output.
        target: The form of the output.
        family: Of the model.
        read: Reads tensors.
    """
    if claim.config is None:
        return ClaimedConfig(None)
    try:
        said = parse_json_object(claim.config.encode(), code="config", path=_CONFIG)
        why = _contradiction(said, claim, known, written, target, family, read)
    except (InputError, UnicodeEncodeError) as error:
        why = str(error)
    if why is not None:
        return ClaimedConfig(None, (f"{_CONFIG}: {why}",))
    return ClaimedConfig(claim.config)


def claimed_architecture(claim: Claim, family: Family) -> dict[str, Any]:
    """What a claimed config.json says of the model, for an output that is quantized otherwise than it says.

    Args:
        claim: The claim, of the very bytes at hand.
        family: Of the model.

    Returns:
        The config without what it says of quantization; empty where it is none of the family's.
    """
    try:
        said = parse_json_object((claim.config or "").encode(), code="config", path=_CONFIG)
    except (InputError, UnicodeEncodeError):
        return {}
    return without_quantization(said) if said.get("_class_name") in family.class_names else {}


def _contradiction(
    said: Mapping[str, Any],
    claim: Claim,
    known: Mapping[str, Any],
    written: Canonical,
    target: Form,
    family: Family,
    read: ReadBytes,
) -> str | None:
    """What in a claimed config the checkpoint at hand contradicts, in words."""
    rest = {key: value for key, value in said.items() if key not in _LEFT_OUT}
    at_hand = {key: value for key, value in known.items() if key not in _LEFT_OUT}
    differing = sorted(key for key in rest.keys() | at_hand.keys() if rest.get(key) != at_hand.get(key))
    if at_hand and differing:
        return f"the record has another {differing[0]} than SOURCE or the base"
    if said.get("_class_name") not in family.class_names:
        return f"the record has the class {str(said.get('_class_name'))[:40]!r}, and the names are of {family.title}"
    # What the record gives back counts, too: without input scales a config says that inputs are scaled as they come.
    tensors = {**_given_back(claim, written), **written.tensors}
    made = target.write(replace(written, tensors=tensors, config=rest, quantization={}), read).config or {}
    mine, claimed = made.get(_QUANTIZATION), said.get(_QUANTIZATION)
    if mine is None or claimed is None or claimed == mine:
        return None if claimed == mine else f"the record {'declares' if mine is None else 'lacks'} {_QUANTIZATION}"
    if not isinstance(claimed, dict):
        return f"the record has no {_QUANTIZATION} that can be read"
    if declared_layout(claimed).over(CANONICAL) != declared_layout(mine).over(CANONICAL):
        return "the record declares another layout"
    layout = CANONICAL.config_keys().keys()
    for key in sorted((claimed.keys() | mine.keys()) - _UNREAD - layout):
        if not _agrees(key, claimed, mine, written):
            return f"the record's {_QUANTIZATION} has another {key} than the tensors are of"
    return None


def _given_back(claim: Claim, written: Canonical) -> dict[str, TensorInfo]:
    return {
        name: constant(name, dtype, shape, data, file)
        for file, (_, claimed) in claim.files.items()
        for name, (dtype, shape, data) in claimed.items()
        if data is not None and name.endswith(".input_scale") and module_of(name) in written.modules
    }


def _agrees(key: str, claimed: Mapping[str, Any], mine: Mapping[str, Any], written: Canonical) -> bool:
    """Whether a key of the claimed ``quantization_config`` says what the rebuilt one or the tensors say."""
    if key == "ignore":
        return _is_ignore(claimed.get(key), written.modules, mine.get(key, []))
    if key == "config_groups" and key not in mine:
        return _are_groups(claimed[key], written)
    if key in ("quant_type", "group_size") and key not in claimed:  # ModelOpt's own exports lack them
        return True
    return bool(claimed.get(key) == mine.get(key))


def _is_ignore(found: object, modules: Iterable[str], kept: Iterable[str]) -> bool:
    """Whether patterns match every module that is kept, and none that is quantized."""
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        return False

    def matches(name: str) -> bool:
        return any(fnmatchcase(name, one) for one in found)

    return all(map(matches, kept)) and not any(map(matches, modules))


def _are_groups(found: object, written: Canonical) -> bool:
    """Whether ModelOpt's ``config_groups`` are one group of the format that the modules are in."""
    (algorithm,) = {one.algorithm for one in written.modules.values()}  # ModelOpt's checkpoints have one
    bits = _BITS.get(algorithm)
    group = found.get("group_0") if isinstance(found, dict) and len(found) == 1 else None
    if bits is None or not isinstance(group, dict) or group.get("targets") != ["Linear"]:
        return False
    if not group.keys() <= {"targets", "weights", "input_activations"}:
        return False
    inputs = group.get("input_activations", {**bits, "dynamic": False})
    return bool(group.get("weights") == {**bits, "dynamic": False} and inputs in (None, {**bits, "dynamic": False}))
