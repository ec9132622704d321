"""Where the config of a transformer comes from when no folder with a config.json is given. No torch."""

from collections.abc import Mapping
from typing import Any

from modelopt_convert.checkpoint.location import Location, read_small
from modelopt_convert.checkpoint.strict_json import parse_json_object
from modelopt_convert.run.errors import InputError

CONFIG = "config.json"
MAX_CONFIG_BYTES = 16_000_000
_CLASS = "_class_name"
_COMPONENTS = ("transformer", "transformer_2")
# What `config_from` of a report says.
OWN, GIVEN, HEADER, BESIDE, EXPORT = "config.json", "--config", "header", "beside the file", "export"


def parse_config(raw: bytes, path: str) -> dict[str, Any]:
    """The object that a config.json holds.

    Raises:
        InputError: With a ``config.*`` code.
    """
    return parse_json_object(raw, code="config", path=path)


def locate_config(place: Location) -> Location:
    """The file that ``--config`` names: the file itself, that of a folder, or that of a pipeline's one transformer.

    Raises:
        InputError: ``input.missing``, or ``input.ambiguous`` for a pipeline with two transformers.
    """
    if place.is_file():
        return place
    if (place / CONFIG).is_file():
        return place / CONFIG
    found = [place / name / CONFIG for name in _COMPONENTS if (place / name / CONFIG).is_file()]
    if len(found) == 1:
        return found[0]
    raise InputError(
        f"config {place}: expected one {CONFIG} here or in transformer/, found {len(found) or 'none'}",
        code="input.ambiguous" if found else "input.missing",
        path=str(place),
        hint="name the file that is meant: --config FOLDER/config.json",
    )


def config_in_header(metadata: Mapping[str, str], path: str) -> dict[str, Any] | None:
    """The config that a .safetensors file carries: JSON under the metadata key ``config``.

    Trainers that write one file put the whole model's config there, with the transformer's under ``transformer``.

    Args:
        metadata: Of the header.
        path: The file, for messages.

    Returns:
        The config; None where there is none that names a class of diffusers.
    """
    if "config" not in metadata:
        return None
    try:
        found = parse_config(metadata["config"].encode(), path)
    except InputError:  # metadata is free text: another tool may mean something else by the word
        return None
    for one in (found.get("transformer"), found):
        if isinstance(one, dict) and isinstance(one.get(_CLASS), str):
            return one
    return None


def config_beside(folder: Location) -> tuple[bytes, dict[str, Any]] | None:
    """The config.json in the folder of a file, with its bytes; None where there is none that names a class.

    Raises:
        InputError: With a ``config.*`` code: it is there and cannot be read.
    """
    place = folder / CONFIG
    if not place.is_file():
        return None
    raw = read_small(place, MAX_CONFIG_BYTES, code="config")
    found = parse_config(raw, str(place))
    return (raw, found) if isinstance(found.get(_CLASS), str) else None


def read_config(place: Location) -> dict[str, Any]:
    """What ``--config`` names.

    Raises:
        InputError: With an ``input.*`` or ``config.*`` code.
    """
    file = locate_config(place)
    return parse_config(read_small(file, MAX_CONFIG_BYTES, code="config"), str(file))


def no_config(what: str, place: Location) -> InputError:
    """That an input has no config, and what to do."""
    return InputError(
        f"{what} {place}: expected a config.json, found none, nor a config in the file's header",
        code="input.no_config",
        path=str(place),
        hint="give --config PATH: the config.json of the transformer, its folder, or hf://ORGANIZATION/NAME",
    )
