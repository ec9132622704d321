"""Which folders of a pipeline hold the transformers that a user means. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modelopt_convert.checkpoint.config import CONFIG, MAX_CONFIG_BYTES, parse_config
from modelopt_convert.checkpoint.hub.hub_path import hub_address
from modelopt_convert.checkpoint.location import (
    NO_FOLDER,
    Location,
    as_written,
    fault_of_folder,
    foreign_address,
    hint_if_missing,
    is_file,
    names,
    read_small,
)
from modelopt_convert.checkpoint.variants import is_index
from modelopt_convert.run.errors import InputError
from modelopt_convert.run.text import few

_WHICH = "give the transformer itself, or the pipeline that holds transformer/; on the Hub, hf://ORGANIZATION/NAME"
COMPONENTS = ("transformer", "transformer_2")
_MOST_NAMES = 1000  # are looked into for a hint


@dataclass(frozen=True, slots=True)
class Component:
    """One transformer to build.

    Attributes:
        name: One of ``COMPONENTS``, or None where the export's folder is called otherwise.
        export: Its folder in the export, if there is an export.
        base: Its folder in the base, if there is a base.
    """

    name: str | None
    export: Location | None
    base: Location | None


def resolve_component(path: Location, *, what: str) -> Location:
    """The one transformer that a user means: ``path``, called ``what`` in messages, or its ``transformer/``.

    A transformer is a folder with a config.json, a folder with weights alone, or one file.

    Raises:
        InputError: Not there, nothing in it to load, or two transformers to choose from.
    """
    found = _found(path, what=what)
    if len(found) == 1:
        return found[0]
    raise InputError(
        f"{what} {path}: expected one transformer, found {' and '.join(one.name for one in found)}",
        code="input.ambiguous",
        path=str(path),
        hint=f"name the one you mean: {found[0]}",
    )


def resolve_components(export: Location | None, base: Location | None, wanted: Sequence[str]) -> list[Component]:
    """The transformers to build: those wanted, or every one that the export quantized; without an export, the base's.

    Raises:
        InputError: ``input.missing`` or ``input.ambiguous``.
    """
    if export is None:
        assert base is not None  # the command requires one of both
        chosen = _wanted(base, wanted, what="base")
        return [Component(one.name if one.name in COMPONENTS else None, None, one) for one in chosen]
    chosen = _wanted(export, wanted, what="export")
    if not wanted and len(chosen) > 1:
        # If none is quantized, the first is opened, and the opening refuses it for that.
        chosen = [one for one in chosen if _is_quantized(one)] or chosen[:1]
    names = [one.name if one.name in COMPONENTS else None for one in chosen]
    return [
        Component(name, one, _base_of(base, name, several=len(chosen) > 1) if base is not None else None)
        for name, one in zip(names, chosen, strict=True)
    ]


def _wanted(path: Location, wanted: Sequence[str], *, what: str) -> list[Location]:
    """The transformer folders of a pipeline that are wanted, or all."""
    found = _found(path, what=what)
    missing = sorted(set(wanted) - {one.name for one in found})
    if missing:
        raise InputError(
            f"{what} {path}: expected {missing[0]}, found {', '.join(one.name for one in found)}",
            code="input.missing",
            path=str(path),
            hint=f"--component names a transformer folder of the {what}'s pipeline",
        )
    return [one for one in found if not wanted or one.name in wanted]


def transformers_of(source: Location, base: Location | None) -> list[tuple[str, Location, Location | None]]:
    """Every transformer of a checkpoint that is only looked at, with its base: ``.`` names the source itself.

    Raises:
        InputError: ``input.missing`` or ``input.ambiguous``.
    """
    try:
        alone = source.is_file() or (source / CONFIG).is_file()
    except OSError:  # a name that no file system takes
        return [(".", resolve_component(source, what="source"), None)]
    if alone:
        return [(".", source, resolve_component(base, what="base") if base else None)]
    found = [name for name in COMPONENTS if (source / name / CONFIG).is_file()]
    if not found:
        path = (
            source
            if any(name.endswith(".safetensors") for name in names(source))
            else resolve_component(source, what="source")
        )
        return [(".", path, resolve_component(base, what="base") if base else None)]
    pairs: list[tuple[str, Location, Location | None]] = []
    for name in found:
        beside = base / name if base and (base / name / CONFIG).is_file() else None
        if base and beside is None and len(found) == 1:
            beside = resolve_component(base, what="base")
        if base and beside is None:
            raise InputError(
                f"base {base}: expected {name}/ as in the source, found none",
                code="input.missing",
                path=str(base),
                hint="give the base pipeline, or one component at a time",
            )
        pairs.append((name, source / name, beside))
    return pairs


def _base_of(base: Location, name: str | None, *, several: bool) -> Location:
    found = _found(base, what="base")
    named = [one for one in found if one.name == name]
    if named and found != [base]:
        return named[0]
    if several:
        raise InputError(
            f"base {base}: expected a pipeline with {name}, as the export has, found no such transformer",
            code="input.missing",
            path=str(base),
            hint="give the pipeline that the export was made from, or build one transformer with --component",
        )
    return resolve_component(base, what="base")


def _found(path: Location, *, what: str) -> list[Location]:
    """``path`` itself if it is a transformer, or those in it; at least one."""
    if is_file(path):
        return [path]
    fault = fault_of_folder(path)
    if fault is not None:
        absent = fault == NO_FOLDER
        repo = hub_address(str(path))
        hint = f"give a folder that exists, or {repo} if the repo on the Hub is meant" if repo is not None else _WHICH
        if repo is None and absent and (address := foreign_address(path)) is not None:
            what_it_is, hint = address
            fault = f"expected a path or hf://ORGANIZATION/NAME, found {what_it_is}"
            hint += "; download the file first" if "web" in what_it_is else ""
        if absent and is_file(path):
            fault = "expected a folder, found a file"
            hint = "give the transformer folder that its config.json lies in"
            hint += f": {path.parent}" if _holds(path.parent) else ""
        raise InputError(
            f"{what} {as_written(path)}: {fault}",
            code="input.missing" if absent else "input.unreadable",
            path=str(path),
            hint=hint_if_missing(path, hint) if absent else "check that the path is right and that you may read it",
        )
    if (path / CONFIG).is_file():
        return [path]
    found = [path / name for name in COMPONENTS if (path / name / CONFIG).is_file()]
    if not found and any(name.endswith(".safetensors") or is_index(name) for name in names(path)):
        return [path]  # whoever needs a config says that there is none
    if not found:
        hint = "give a diffusers transformer folder, or the pipeline that holds transformer/"
        near = sorted(names(path))[:_MOST_NAMES] if isinstance(path, Path) else []
        if inside := [str(path / name) for name in near if _holds(path / name)]:
            hint = f"did you mean {few(inside)}?"
        raise InputError(
            f"{what} {path}: expected config.json here or in transformer/, found neither",
            code="input.missing",
            path=str(path),
            hint=hint_if_missing(path, hint),
        )
    return found


def _holds(folder: Location) -> bool:
    """Whether a folder is a transformer's, or a pipeline's with one."""
    return any(is_file(one / "config.json") for one in (folder, *(folder / name for name in COMPONENTS)))


def _is_quantized(folder: Location) -> bool:
    path = folder / CONFIG
    raw = read_small(path, MAX_CONFIG_BYTES, code="config")
    return parse_config(raw, str(path)).get("quantization_config") is not None
