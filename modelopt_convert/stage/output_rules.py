"""Where mopt will not write: OUT must be free or a plain checkpoint, and no input. No torch.

Paths are compared by inode up both parent chains, since links and bind mounts are other names for the same folder.
Paths are also compared by their place in the file system: above a bind mount of a subfolder of an input, the input is
not among the parents.
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from modelopt_convert.run.errors import OutputRefusedError
from modelopt_convert.stage.mounts import mount_table, place_of, places_below

# What a model repo holds. Anything else in OUT is somebody's work, and OUT is then not replaced.
ALLOWED_SUFFIXES = frozenset({".safetensors", ".json", ".md"})
ALLOWED_NAMES = frozenset({".gitattributes", "LICENSE", "LICENSE.txt", "LICENSE.md"})
ALLOWED_FOLDERS = frozenset({"transformer", "transformer_2"})
MANIFEST_NAMES = ("config.json", "model_index.json", "mopt.json")
_STAGE_SUFFIX = ".mopt-stage-00000000"
_MAX_NAME_BYTES = 255  # the longest file name on every Linux file system in use


def check_output_allowed(output: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse an OUT that must not be written; called before any tensor is read, and again before the swap.

    Args:
        output: Where the checkpoint shall stand.
        inputs: Folders that are read: OUT may not be one, lie in one, or hold one.
        overwrite: The user's consent to replace an existing checkpoint.

    Raises:
        OutputRefusedError: With an ``output.*`` code.
    """
    output = canonical_output(output)
    parent = output.parent
    if len(os.fsencode(f".{output.name}{_STAGE_SUFFIX}")) > _MAX_NAME_BYTES:
        raise _refuse(output, "has too long a name for a stage beside it", "name_too_long", "give a shorter --output")
    if output.is_symlink():
        raise _refuse(output, "is a symlink", "symlink", "give the folder itself")
    if not parent.is_dir():
        raise _refuse(output, f"has no parent folder: {parent} does not exist", "no_parent", f"mkdir -p {parent}")
    for source in inputs:
        if source.exists():  # an input that was removed meanwhile cannot be harmed
            _refuse_overlap(output, source)
    if not output.exists():
        return
    if not output.is_dir():
        raise _refuse(output, "is a file", "not_a_directory", "give a folder name that is free")
    here = _inode(output)
    if os.path.ismount(output):
        raise _refuse(output, "is a mount point or the root folder", "mount_point", "give a folder inside it")
    if here in {_inode(place) for place in _special_folders() if place.exists()}:
        raise _refuse(output, "is the home or the current folder", "special_folder", "give a folder inside it")
    if not overwrite:
        raise _refuse(output, "exists", "exists", "give another --output, or --overwrite to replace a checkpoint")
    if stranger := find_stranger(output):
        raise _refuse(output, stranger, "not_a_checkpoint", "move it away yourself, or give another --output")


def _special_folders() -> list[Path]:
    home = os.path.expanduser("~")  # noqa: PTH111 - Path.home() fails for a user whom the system does not know
    named = [Path(home)] if home != "~" else []
    try:
        return [*named, Path.cwd()]
    except FileNotFoundError:  # the current folder was removed
        return named


def canonical_output(output: Path) -> Path:
    """OUT with its parent resolved and its own name kept, so that a link is seen; ``.`` and ``x/..`` are resolved.

    Raises:
        OutputRefusedError: ``output.no_parent``: a relative path where the current folder was removed.
    """
    try:
        if output.name in {"", ".."}:
            return output.resolve()
        return output.parent.resolve() / output.name
    except FileNotFoundError as error:
        hint = "cd into a folder that exists, or give an absolute path"
        raise _refuse(output, "has no parent folder: the current folder was removed", "no_parent", hint) from error


def find_stranger(folder: Path) -> str | None:
    """What makes ``folder`` something else than a plain checkpoint, in words; None if nothing does."""
    if not any((folder / name).is_file() for name in MANIFEST_NAMES):
        return f"is not a checkpoint: it has none of {', '.join(MANIFEST_NAMES)}"
    if not any(folder.rglob("*.safetensors")):
        return "is not a checkpoint: it holds no .safetensors file"
    return foreign_entry(folder)


def foreign_entry(folder: Path) -> str | None:
    """The first thing in ``folder`` that no checkpoint holds, in words; None if there is none."""
    for entry in sorted(folder.iterdir()):
        inner = sorted(entry.iterdir()) if entry.name in ALLOWED_FOLDERS and _is_real_dir(entry) else [entry]
        for item in inner:
            known = item.suffix in ALLOWED_SUFFIXES or item.name in ALLOWED_NAMES
            try:
                plain = stat.S_ISREG(item.lstat().st_mode)
            except FileNotFoundError:  # a tree that another run is removing
                continue
            if not known or not plain:
                return f"holds {item.relative_to(folder)}, which does not belong to a transformer checkpoint"
    return None


def _refuse(output: Path, what: str, kind: str, hint: str) -> OutputRefusedError:
    return OutputRefusedError(f"output {output}: {what}", code=f"output.{kind}", path=str(output), hint=hint)


def _inode(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _chain(path: Path) -> list[tuple[int, int]]:
    """Inodes of ``path`` and of every folder above it in the real tree, so that links are seen through."""
    real = path.resolve()
    return [_inode(place) for place in (real, *real.parents) if place.exists()]


def _refuse_overlap(output: Path, source: Path) -> None:
    out_chain, source_chain = _chain(output), _chain(source)
    if output.exists() and out_chain[0] == source_chain[0]:
        raise _refuse(output, f"is the input {source}", "is_input", "give another --output; inputs are never changed")
    if source_chain[0] in out_chain or _lies_in(output, source):
        raise _refuse(output, f"lies inside the input {source}", "inside_input", "give an --output outside it")
    if output.exists() and (out_chain[0] in source_chain or _lies_in(source, output)):
        raise _refuse(output, f"holds the input {source}", "around_input", "give an --output beside it")


def _lies_in(inner: Path, outer: Path) -> bool:
    """Whether what stands at ``inner``, or would stand there in its parent, is reached by going down from ``outer``."""
    table = mount_table()
    place = place_of(inner if inner.exists() else inner.parent, table)
    return place is not None and any(one.holds(place) for one in places_below(outer, table))


def _is_real_dir(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
