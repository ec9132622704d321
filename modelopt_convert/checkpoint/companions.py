"""What stands beside the transformers of a pipeline: all that its model_index.json lists. No torch."""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from modelopt_convert.checkpoint.config import MAX_CONFIG_BYTES
from modelopt_convert.checkpoint.header import PREFIX_BYTES, parse_header, read_header_length
from modelopt_convert.checkpoint.location import Location, OpenFile, check_name, is_file, names, open_file, read_small
from modelopt_convert.checkpoint.pipeline import COMPONENTS
from modelopt_convert.checkpoint.reader import INDEX_SUFFIX, MAX_INDEX_BYTES
from modelopt_convert.checkpoint.strict_json import parse_json_object
from modelopt_convert.run.errors import InputError

MODEL_INDEX = "model_index.json"
_LFS_POINTER = b"version https://git-lfs"
_MOST_OF_A_POINTER = 1024  # bytes; git-lfs takes no longer file for a pointer
_SHARD = re.compile(r"[^.]+-\d{5}-of-\d{5}\.safetensors")  # of the plain weights, which no loader finds unlisted
# Weights of which a pipeline needs one kind; a pickle runs code when it is loaded.
OTHER_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".msgpack", ".h5", ".onnx", ".gguf", ".npz")


@dataclass(frozen=True, slots=True)
class Companions:
    """What is copied beside built transformers.

    Attributes:
        index: The bytes of model_index.json.
        folders: Of the components, by the names that model_index.json gives them.
        files: Every file in them, opened, by its path in the pipeline; also licenses beside model_index.json.
        left_out: Paths of weights in other files than safetensors.
        unlisted: Folders that model_index.json has as null, so that no loader looks there.
    """

    index: bytes
    folders: tuple[str, ...]
    files: Mapping[str, OpenFile]
    left_out: tuple[str, ...]
    unlisted: tuple[str, ...]


def folders_of(paths: Iterable[str]) -> list[str]:
    """The folders in which files lie, each after the one around it."""
    found = {str(parent) for path in paths for parent in PurePosixPath(path).parents} - {"."}
    return sorted(found, key=lambda path: (path.count("/"), path))


def pipeline_root(base: Location) -> Location:
    """The folder of the pipeline that the user means: ``base`` itself, or the one around a transformer.

    Raises:
        InputError: ``pipeline.none``.
    """
    for place in (base, base.parent) if base.name in COMPONENTS else (base,):
        if is_file(place / MODEL_INDEX):
            return place
    raise InputError(
        f"base {base}: expected a pipeline with {MODEL_INDEX}, found none",
        code="pipeline.none",
        path=str(base),
        hint="a whole pipeline needs the folder that holds model_index.json, or the repo on the Hub, as --base",
    )


def places_read(base: Location) -> list[Path]:
    """What of a pipeline is an input on disk: all of its folder, and what lies elsewhere and is linked anywhere in it.

    Raises:
        InputError: ``pipeline.none``.
    """
    root = pipeline_root(base)
    if not isinstance(root, Path):
        return []
    found = (Path(folder, name) for folder, folders, files in os.walk(root) for name in (*folders, *files))
    return [root, *filter(Path.is_symlink, found)]


def open_companions(root: Location, built: Collection[str], stack: ExitStack) -> Companions:
    """Open all of a pipeline but the transformers that are built.

    Args:
        root: The pipeline.
        built: Folders that are not copied.
        stack: Closes the files.

    Raises:
        InputError: ``pipeline.index``, ``pipeline.not_listed``, ``pipeline.incomplete``, ``pipeline.link`` or
            ``input.name``; or what opening a file raises.
    """
    listed, unlisted, index = _listed(root)
    for name in sorted(set(built) - set(listed)):
        raise InputError(
            f"{root / MODEL_INDEX}: expected {name} among the components, found {', '.join(listed)}",
            code="pipeline.not_listed",
            path=str(root / MODEL_INDEX),
            hint="no loader would look for the transformer; give the pipeline that it belongs to",
        )
    files: dict[str, OpenFile] = {}
    left_out: list[str] = []
    folders = tuple(name for name in listed if name not in built)
    for name in folders:
        found = list(_files(root / name, name))
        copied = [path for path in found if not path.lower().endswith(OTHER_WEIGHTS)]
        left_out += [path for path in found if path.lower().endswith(OTHER_WEIGHTS)]
        weights = [path for path in copied if path.endswith(".safetensors")]
        if not copied or (len(copied) < len(found) and not weights):
            what = f"weights in {PurePosixPath(left_out[-1]).suffix} alone" if copied or found else "no such folder"
            raise InputError(
                f"{root / name}: {MODEL_INDEX} lists it; expected its files, weights as safetensors, found {what}",
                code="pipeline.incomplete",
                path=str(root / name),
                hint="download the whole pipeline; a pickle runs code when it is loaded, and is not copied",
            )
        for path in copied:
            files[path] = _opened(root, path, stack)
        _check_whole(root, name, *listed[name], files)
    for name in sorted(names(root)):
        if name.startswith("LICENSE") and is_file(root / name):
            check_name(root, name)
            files[name] = _opened(root, name, stack)
    return Companions(index, folders, files, tuple(left_out), unlisted)


def _listed(root: Location) -> tuple[dict[str, tuple[str, str]], tuple[str, ...], bytes]:
    """Library and class of each component by its folder, folders of those that are null, and model_index.json."""
    where = str(root / MODEL_INDEX)
    raw = read_small(root / MODEL_INDEX, MAX_CONFIG_BYTES, code="pipeline")
    if raw.startswith(_LFS_POINTER):
        raise _pointer(where)
    found = parse_json_object(raw, code="pipeline", path=where)
    if not isinstance(found.get("_class_name"), str):
        raise InputError(
            f"{where}: _class_name: expected the name of a class, found {ascii(found.get('_class_name'))[:80]}",
            code="pipeline.index",
            path=where,
            hint="a pipeline with code of its own is not copied; build the transformer without --pipeline-output",
        )
    entries = {name: value for name, value in found.items() if not name.startswith("_")}
    listed = {name: (value[0], value[1]) for name, value in entries.items() if _is_component(value)}
    # Only what the folder lists: a name of the index may be any text.
    folders = {name for name in entries.keys() & set(names(root)) if (root / name).is_dir()}
    # diffusers makes them arguments of a function. So they are no paths, and forge nothing in a card.
    odd = [name for name in listed if not (name.isascii() and name.isidentifier())]
    odd += [name for name, value in entries.items() if name not in listed and _is_odd(value, name in folders)]
    if odd or not listed:
        raise InputError(
            f"{where}: expected names of folders with [library, class], found {ascii(odd[0])[:80] if odd else 'none'}",
            code="pipeline.index",
            path=where,
            hint="this is not what diffusers writes; download the pipeline again",
        )
    return listed, tuple(sorted(folders - listed.keys())), raw


def _is_component(value: Any) -> bool:
    """Whether it is [library, class]; [null, null] is a component that the pipeline does without."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(one, str) for one in value)


def _is_odd(value: Any, has_folder: bool) -> bool:
    """Whether what is no component is no setting either: text in a list, or anything but [null, null] for a folder."""
    has_text = isinstance(value, list) and any(isinstance(one, str) for one in value)
    return has_text or (has_folder and value != [None, None])


def _check_whole(root: Location, name: str, library: str, class_name: str, files: Mapping[str, OpenFile]) -> None:
    """Require all that a component is loaded from: whole safetensors files, those that an index names, and a config.

    Raises:
        InputError: ``pipeline.incomplete``, or what a header or a config is refused for.
    """
    again = "download the whole pipeline"
    mine = {path: file for path, file in files.items() if path.startswith(f"{name}/")}
    weights = {path: file for path, file in mine.items() if path.endswith(".safetensors")}
    for file in weights.values():
        head = file.read(0, min(file.num_bytes, PREFIX_BYTES))
        length = read_header_length(head, file=file.where, file_bytes=file.num_bytes)
        parse_header(file.read(PREFIX_BYTES, length), file=file.where, file_bytes=file.num_bytes)
    shards: set[str] = set()
    for path, file in mine.items():
        if path.endswith(INDEX_SUFFIX):
            raw = read_small(root / path, MAX_INDEX_BYTES, code="index")
            found = parse_json_object(raw, code="index", path=file.where).get("weight_map")
            folder = path.rpartition("/")[0]
            named = {f"{folder}/{one}" for one in found.values()} if isinstance(found, dict) else set()
            for shard in sorted(named - weights.keys()):
                raise _incomplete(file.where, f"no {shard.rpartition('/')[2][:80]!r}, which it lists", again)
            shards |= named
    for path in sorted(weights.keys() - shards):
        if _SHARD.fullmatch(path.rpartition("/")[2]):
            raise _incomplete(weights[path].where, "no index that lists it", again)
    if re.search("Tokenizer|Processor|Scheduler|Extractor", class_name):
        return
    config = mine.get(f"{name}/config.json")
    if config is not None and not weights:
        raise _incomplete(str(root / name), "a config.json alone", again)
    if config is None and any(path.count("/") == 1 for path in weights):
        raise _incomplete(str(root / name), "no config.json beside them", again)
    if config is not None and library == "diffusers":
        says = parse_json_object(
            config.read(0, min(config.num_bytes, MAX_CONFIG_BYTES)), code="config", path=config.where
        )
        if not isinstance(says.get("_class_name"), str):
            raise _incomplete(config.where, f"no _class_name, which should be {class_name[:80]!r}", again)


def _pointer(where: str) -> InputError:
    return _incomplete(where, "a pointer of git-lfs", "run `git lfs pull` there, or download it again")


def _incomplete(where: str, found: str, hint: str) -> InputError:
    return InputError(
        f"{where}: expected a whole component, found {found}",
        code="pipeline.incomplete",
        path=where,
        hint=hint,
    )


def _files(folder: Location, prefix: str) -> Iterator[str]:
    """Paths of all files in a folder and below; names with a dot first are those of downloads and of git."""
    for name in sorted(names(folder)):
        path = folder / name
        if name.startswith("."):
            continue
        check_name(folder, name)
        if not path.is_dir():
            yield f"{prefix}/{name}"
            continue
        if isinstance(path, Path) and path.is_symlink():
            raise InputError(
                f"{path}: a link to a folder inside a component",
                code="pipeline.link",
                path=str(path),
                hint="replace the link by the folder itself",
            )
        yield from _files(path, f"{prefix}/{name}")


def _opened(root: Location, path: str, stack: ExitStack) -> OpenFile:
    """A file of the pipeline, which ``stack`` closes.

    Raises:
        InputError: ``pipeline.incomplete``: a pointer of git-lfs; or what opening a file raises.
    """
    folder, _, name = path.rpartition("/")
    place = root
    for part in folder.split("/") if folder else []:
        place = place / part
    file = open_file(place, name)
    stack.callback(file.close)
    if len(_LFS_POINTER) <= file.num_bytes < _MOST_OF_A_POINTER and file.read(0, len(_LFS_POINTER)) == _LFS_POINTER:
        raise _pointer(file.where)
    return file
