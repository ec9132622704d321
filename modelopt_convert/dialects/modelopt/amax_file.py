"""Amax values from the ``.pt`` that ModelOpt's quantize.py saves: the only place where a pickle is opened.

A pickle can run code and a zip can lie about its size. So the archive is checked first, torch then unpickles a copy of
it with ``weights_only``, in bounded memory, and what it refuses stays refused. Only amax values are touched.
"""

import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelopt_convert.checkpoint.location import Location, names, on_disk
from modelopt_convert.checkpoint.pipeline import COMPONENTS
from modelopt_convert.checkpoint.torch_archive import COPIED_BYTES, private_copy, refusal
from modelopt_convert.dialects.calibration import Amax

_ROLES = {".weight_quantizer._amax": "weight_scale", ".input_quantizer._amax": "input_scale"}
# What unpickling may take beside the mapped copy: torch's safe pickles may still ask for any amount.
_MEMORY_BYTES = 1 << 30


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
        raise refusal(path, "missing", "no such file", "give the .pt of --quantized-torch-ckpt-save-path")
    found = sorted((path / name for name in names(path) if name.endswith(".pt")), key=str)
    named = [one for one in found if one.name == f"{component}.pt"]
    of_another = [one for one in found if one.name.removesuffix(".pt") in COMPONENTS and one not in named]
    if len(named) != 1 and (len(found) != 1 or of_another):
        listed = ", ".join(one.name for one in found) or "none"
        raise refusal(path, "missing", f"expected one .pt or {component}.pt, found {listed}", "name the file itself")
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
    with private_copy(path) as (copy, num_bytes):
        return _amax_of(path, _unpickled(path, copy, num_bytes), name_of)


def _unpickled(path: Path, copy: str, num_bytes: int) -> Any:
    import torch

    try:
        with _bounded_memory(num_bytes + _MEMORY_BYTES):
            return torch.load(copy, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a hostile pickle makes torch raise
        # Not all of what torch says: it goes on to tell how to load the file without protection.
        cause = re.search(r"Unsupported (?:global|operand)[^\n]{0,160}", str(error))
        reason = cause[0] if cause else type(error).__name__
        raise refusal(
            path,
            "refused",
            f"torch.load(weights_only=True) refuses it: {reason}",
            "do not use this file; quantize again",
        ) from error


@contextmanager
def _bounded_memory(num_bytes: int) -> Iterator[None]:
    """Whatever takes so much more address space than there is now ends in an error of its own, not in that of all."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + num_bytes
    limit = min([limit, *(one for one in (soft, hard) if one != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _amax_of(
    path: Path, content: Any, name_of: Callable[[str], str | None]
) -> tuple[dict[str, dict[str, Amax]], dict[str, str]]:
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise refusal(path, "content", "holds no model_state_dict", "give the .pt that quantize.py saved")
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
        raise refusal(path, "content", "holds no amax", "calibration never ran; quantize again")
    return found, names


def _amax(path: Path, key: str, value: Any) -> Amax:
    import torch

    dtypes = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    plain = isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.layout == torch.strided
    if not plain or value.numel() != 1 or value.dtype not in dtypes:
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise refusal(
            path,
            "content",
            f"{key[:200]!r}: expected one number, found {found[:200]}",
            "quantize again with --format fp8",
        )
    needed = (value.storage_offset() + 1) * value.element_size()
    if needed > COPIED_BYTES:
        found = f"one at byte {needed} of a tensor that it shares"
        raise refusal(path, "content", f"{key[:200]!r}: expected a number of its own, found {found}", "quantize again")
    return Amax(float(value), dtypes[value.dtype])
