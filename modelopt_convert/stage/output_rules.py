"""Where mopt will not write: OUT must be free or known to be a checkpoint, and no input. No torch.

Paths are compared by inode up both parent chains, since links and bind mounts are other names for the same folder.
Paths are also compared by their place in the file system: above a bind mount of a subfolder of an input, the input is
not among the parents.
"""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from modelopt_convert.checkpoint.location import as_written, foreign_address
from modelopt_convert.run.boundary import storage_error
from modelopt_convert.run.errors import OutputRefusedError
from modelopt_convert.stage.mounts import is_mounted_below, mount_table, place_of, places_below
from modelopt_convert.stage.ownership import Standing, in_words, standing_at

MANIFEST_NAMES = ("config.json", "model_index.json", "mopt.json")
_STAGE_SUFFIX = ".mopt-stage-00000000"
_MAX_LINKS = 40  # more are not followed by Linux
_MAX_NAME_BYTES = 255  # the longest file name on every Linux file system in use


def check_output_allowed(
    output: Path, inputs: Sequence[Path], *, overwrite: bool, overwrite_foreign: bool | None = False
) -> Standing | None:
    """Refuse an OUT that must not be written; called before any tensor is read, and again once the run holds OUT.

    Args:
        output: Where the checkpoint shall stand.
        inputs: What is read: OUT may not be one, lie in one, or hold one.
        overwrite: The user's consent to replace what is known to be a checkpoint.
        overwrite_foreign: The user's consent to lose what else it holds, too; None where no flag asks for it.

    Returns:
        What stands there and would be replaced, if anything does.

    Raises:
        OutputRefusedError: With an ``output.*`` code.
        StorageError: What stands there cannot be read.
    """
    output = canonical_output(output)
    check_place(output, inputs)
    if not output.exists():
        return None
    if not overwrite and not overwrite_foreign:
        raise _refuse(output, "exists", "exists", "give another OUT, or --overwrite to replace a checkpoint")
    try:
        if what := _other_than_checkpoint(output):
            raise _refuse(output, what, "not_a_checkpoint", "move it away yourself, or give another OUT")
        standing = standing_at(output)
    except PermissionError as error:
        hint = "make it readable, or give another OUT"
        raise _refuse(output, f"{error.filename} in it may not be read", "unreadable", hint) from error
    except OSError as error:
        raise storage_error(error, output) from error
    if standing.foreign and not overwrite_foreign:
        raise _refuse(
            output,
            f"holds what no record of mopt lists, or what is not as recorded: {in_words(standing.foreign)}",
            "foreign",
            "move it away, or give another OUT"
            if overwrite_foreign is None
            else "move it away, give another OUT, or --overwrite-foreign to lose it with the old checkpoint",
        )
    return standing


def check_place(output: Path, inputs: Sequence[Path]) -> None:
    """Refuse a place at which no checkpoint may stand, whatever the user consents to.

    Raises:
        OutputRefusedError: With an ``output.*`` code.
    """
    parent = output.parent
    if len(os.fsencode(f".{output.name}{_STAGE_SUFFIX}")) > _MAX_NAME_BYTES:
        raise _refuse(output, "has too long a name for a stage beside it", "name_too_long", "give OUT a shorter name")
    if output.is_symlink():
        raise _refuse(output, "is a symlink", "symlink", "give the folder itself")
    if not parent.is_dir():
        what, hint = _no_folder(parent)
        raise _refuse(output, what, "no_parent", hint)
    for source in inputs:
        if source.exists():  # an input that was removed meanwhile cannot be harmed
            refuse_overlap(output, source)
    if not output.exists():
        return
    if not output.is_dir():
        raise _refuse(output, "is a file", "not_a_directory", "give a folder name that is free")
    here = _inode(output)
    if os.path.ismount(output):
        raise _refuse(output, "is a mount point or the root folder", "mount_point", "give a folder inside it")
    if is_mounted_below(output):
        raise _refuse(output, "has something mounted inside", "mount_point", "unmount it, or give another OUT")
    if here in {_inode(place) for place in _special_folders() if place.exists()}:
        raise _refuse(output, "is the home or the current folder", "special_folder", "give a folder inside it")


def _no_folder(parent: Path) -> tuple[str, str]:
    """What is wrong with a parent that is no folder, and what to do: below a file none can be made."""
    standing = next(one for one in (parent, *parent.parents) if one.exists())
    if not standing.is_dir():
        return f"has no parent folder: {standing} is a file", "give an OUT in a folder"
    return f"has no parent folder: {parent} does not exist", f"mkdir -p {shlex.quote(str(parent))}"


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
        OutputRefusedError: ``output.no_parent``: a relative path where the current folder was removed;
            ``output.address``: a web address, a file: address or a Windows path, of which Path makes odd folders.
    """
    if (address := foreign_address(output)) is not None:
        what, hint = address
        shown = as_written(output)
        message = f"output {shown}: expected a path, found {what}"
        raise OutputRefusedError(message, code="output.address", path=shown, hint=hint)
    try:
        if output.name in {"", ".."}:
            return output.resolve()
        return output.parent.resolve() / output.name
    except FileNotFoundError as error:
        hint = "cd into a folder that exists, or give an absolute path"
        raise _refuse(output, "has no parent folder: the current folder was removed", "no_parent", hint) from error


def _other_than_checkpoint(folder: Path) -> str | None:
    """What makes ``folder`` something else than a checkpoint, in words; None if nothing does."""
    if not any((folder / name).is_file() for name in MANIFEST_NAMES):
        return f"is not a checkpoint: it has none of {', '.join(MANIFEST_NAMES)}"
    if not any(folder.rglob("*.safetensors")):
        return "is not a checkpoint: it holds no .safetensors file"
    if os.path.lexists(folder / ".git"):
        return "is not a checkpoint alone: it is a git repository"
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


def refuse_overlap(output: Path, source: Path) -> None:
    """Refuse a place that is an existing input, lies in one, or holds one.

    An input may be one file: then the file is protected, and OUT may be a new folder beside the file.

    Raises:
        OutputRefusedError: ``output.is_input``, ``output.inside_input`` or ``output.around_input``.
    """
    out_chain, source_chain = _chain(output), _chain(source)
    if output.exists() and out_chain[0] == source_chain[0]:
        raise _refuse(output, f"is the input {source}", "is_input", "give another OUT; inputs are never changed")
    if source_chain[0] in out_chain or _lies_in(output, source):
        raise _refuse(output, f"lies inside the input {source}", "inside_input", "give an OUT outside it")
    if output.exists() and (out_chain[0] in {*source_chain, *_around_links(source)} or _lies_in(source, output)):
        raise _refuse(output, f"holds the input {source}", "around_input", "give an OUT beside it")


def _around_links(source: Path) -> set[tuple[int, int]]:
    """Inodes of the folders above each link by which a file is named: without the link its name leads nowhere."""
    found: set[tuple[int, int]] = set()
    place = source.absolute()
    for _ in range(_MAX_LINKS):
        if place.is_dir() or not place.is_symlink():
            return found
        found.update(_chain(place.parent))
        place = place.parent / place.readlink()
    return found


def _lies_in(inner: Path, outer: Path) -> bool:
    """Whether what stands at ``inner``, or would stand there in its parent, is reached by going down from ``outer``."""
    table = mount_table()
    place = place_of(inner if inner.exists() else inner.parent, table)
    return place is not None and any(one.holds(place) for one in places_below(outer, table))
