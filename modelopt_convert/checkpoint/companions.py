"""What stands beside the transformers of a pipeline: all that its model_index.json lists. No torch."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from modelopt_convert.checkpoint.location import Location, OpenFile, is_file, names, open_file
from modelopt_convert.checkpoint.pipeline import COMPONENTS
from modelopt_convert.checkpoint.reader import MAX_CONFIG_BYTES
from modelopt_convert.checkpoint.strict_json import parse_json_object
from modelopt_convert.run.errors import InputError

MODEL_INDEX = "model_index.json"
# Weights of which a pipeline needs one kind; a pickle runs code when it is loaded.
_OTHER_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".msgpack", ".h5", ".onnx", ".gguf", ".npz")


@dataclass(frozen=True, slots=True)
class Companions:
    """What is copied beside built transformers.

    Attributes:
        index: The bytes of model_index.json.
        folders: Of the components, by the names that model_index.json gives them.
        files: Every file in them, opened, by its path in the pipeline; also licenses beside model_index.json.
        left_out: Paths of weights in other files than safetensors.
    """

    index: bytes
    folders: tuple[str, ...]
    files: Mapping[str, OpenFile]
    left_out: tuple[str, ...]


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


def open_companions(root: Location, built: Collection[str], stack: ExitStack) -> Companions:
    """Open all of a pipeline but the transformers that are built.

    Args:
        root: The pipeline.
        built: Folders that are not copied.
        stack: Closes the files.

    Raises:
        InputError: ``pipeline.index``, ``pipeline.not_listed``, ``pipeline.incomplete`` or ``pipeline.link``; or what
            opening a file raises.
    """
    listed, index = _listed(root)
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
        copied = [path for path in found if not path.lower().endswith(_OTHER_WEIGHTS)]
        left_out += [path for path in found if path.lower().endswith(_OTHER_WEIGHTS)]
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
    for name in sorted(names(root)):
        if name.startswith("LICENSE") and is_file(root / name):
            files[name] = _opened(root, name, stack)
    return Companions(index, folders, files, tuple(left_out))


def _listed(root: Location) -> tuple[list[str], bytes]:
    """The components that a pipeline has, and the bytes of its model_index.json."""
    where = str(root / MODEL_INDEX)
    file = open_file(root, MODEL_INDEX)
    try:
        raw = file.read(0, min(file.num_bytes, MAX_CONFIG_BYTES))
    finally:
        file.close()
    found = parse_json_object(raw, code="pipeline", path=where)
    listed = [name for name, one in found.items() if not name.startswith("_") and _is_component(one)]
    odd = [name for name in listed if PurePosixPath(name).name != name]
    if odd or not listed:
        raise InputError(
            f"{where}: expected names of folders with [library, class], found {ascii(odd[0])[:80] if odd else 'none'}",
            code="pipeline.index",
            path=where,
            hint="this is not what diffusers writes; download the pipeline again",
        )
    return listed, raw


def _is_component(value: Any) -> bool:
    """Whether it is [library, class]; [null, null] is a component that the pipeline does without."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(one, str) for one in value)


def _files(folder: Location, prefix: str) -> Iterator[str]:
    """Paths of all files in a folder and below; names with a dot first are those of downloads and of git."""
    for name in sorted(names(folder)):
        path = folder / name
        if name.startswith("."):
            continue
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
    folder, _, name = path.rpartition("/")
    place = root
    for part in folder.split("/") if folder else []:
        place = place / part
    file = open_file(place, name)
    stack.callback(file.close)
    return file
