"""Amax values from the ``.pt`` that ModelOpt's quantize.py saves: the only place where a pickle is opened.

A pickle can run code and a zip can lie about its size. So the archive is checked first, torch then unpickles with
``weights_only``, and what it refuses stays refused. Tensors are mapped, and only amax values are touched.
"""

import re
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from modelopt_convert.components import COMPONENTS
from modelopt_convert.dialects.fp8 import Amax
from modelopt_convert.errors import InputError
from modelopt_convert.sources import Location, names, on_disk

_ROLES = {".weight_quantizer._amax": "weight_scale", ".input_quantizer._amax": "input_scale"}
_HEADER_BYTES = 30  # the fixed part of a member's local header


def resolve_checkpoint(path: Location, component: str) -> Path:
    """The ``.pt`` that a user means: the file itself, or the one in a folder; of the Hub, once it is in its cache.

    Args:
        path: As given.
        component: ``transformer`` or ``transformer_2``: of several files, the one of that name is taken.

    Raises:
        InputError: ``pickle.missing``.
    """
    try:
        is_dir, is_file = path.is_dir(), path.is_file()
    except OSError:  # a name that no file system takes
        is_dir = is_file = False
    if is_file:
        return on_disk(path)
    if not is_dir:
        raise _error(path, "missing", "no such file", "give the .pt of --quantized-torch-ckpt-save-path")
    found = sorted((path / name for name in names(path) if name.endswith(".pt")), key=str)
    named = [one for one in found if one.name == f"{component}.pt"]
    of_another = [one for one in found if one.name.removesuffix(".pt") in COMPONENTS and one not in named]
    if len(named) != 1 and (len(found) != 1 or of_another):
        listed = ", ".join(one.name for one in found) or "none"
        raise _error(path, "missing", f"expected one .pt or {component}.pt, found {listed}", "name the file itself")
    return on_disk(named[0] if named else found[0])


def read_amax(path: Path, name_of: Callable[[str], str | None]) -> tuple[dict[str, dict[str, Amax]], dict[str, str]]:
    """The amax of every quantizer in a ``.pt``.

    Args:
        path: The file.
        name_of: The model's name for a module of the file, None for one that is not part of the model.

    Returns:
        Amax values by module and by the role of the scale they make; and for each the name it has in the file.

    Raises:
        InputError: With a ``pickle.*`` code.
    """
    _check_archive(path)
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a hostile pickle makes torch raise
        # Not all of what torch says: it goes on to tell how to load the file without protection.
        cause = re.search(r"Unsupported (?:global|operand)[^\n]{0,160}", str(error))
        reason = cause[0] if cause else type(error).__name__
        raise _error(
            path,
            "refused",
            f"torch.load(weights_only=True) refuses it: {reason}",
            "do not use this file; quantize again",
        ) from error
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise _error(path, "content", "holds no model_state_dict", "give the .pt that quantize.py saved")
    found: dict[str, dict[str, Amax]] = {}
    names: dict[str, str] = {}
    for key, value in state.items():
        ending = next((ending for ending in _ROLES if isinstance(key, str) and key.endswith(ending)), None)
        module = name_of(key.removesuffix(ending)) if ending is not None else None
        if ending is None or module is None:
            continue
        found.setdefault(module, {})[_ROLES[ending]] = _amax(path, key, value)
        names[key] = f"{module}.{_ROLES[ending]}"
    if not found:
        raise _error(path, "content", "holds no amax", "calibration never ran; quantize again")
    return found, names


def _amax(path: Path, key: str, value: Any) -> Amax:
    import torch

    dtypes = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    plain = isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.layout == torch.strided
    if not plain or value.numel() != 1 or value.dtype not in dtypes:
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise _error(
            path, "content", f"{key!r}: expected one number, found {found}", "quantize again with --format fp8"
        )
    return Amax(float(value), dtypes[value.dtype])


def _check_archive(path: Path) -> None:
    """Refuse what is not a plain torch archive: members stored one after the other, as large as they say."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise _error(path, "not_zip", f"not a zip archive: {error}", "old and tar formats are not read") from error
    with archive:
        members, size = archive.infolist(), archive.start_dir  # members end where the directory begins
    names = Counter(member.filename for member in members)
    if min((member.header_offset for member in members), default=-1) != 0:
        raise _error(path, "member", "something lies before the first member", "do not use it")
    end = 0
    for member in sorted(members, key=lambda one: one.header_offset):
        parts = PurePosixPath(member.filename).parts
        plain = not member.filename.startswith("/") and ".." not in parts and "\\" not in member.filename
        if not plain or names[member.filename] > 1:
            raise _error(path, "member", f"member {member.filename!r} has no plain name of its own", "do not use it")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise _error(path, "compressed", f"member {member.filename!r} is compressed", "torch.save stores plainly")
        if member.header_offset < end:
            raise _error(path, "member", f"member {member.filename!r} overlaps another", "do not use it")
        end = member.header_offset + _HEADER_BYTES + len(member.orig_filename.encode()) + member.file_size
        if member.file_size != member.compress_size or end > size:
            raise _error(path, "size", f"member {member.filename!r} is larger than the file", "the file is cut")


def _error(path: Location, kind: str, found: str, hint: str) -> InputError:
    return InputError(f"{path}: {found}", code=f"pickle.{kind}", path=str(path), hint=hint)
