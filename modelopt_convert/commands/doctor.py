"""``mopt doctor``: what there is on this machine, and what of mopt works with it. Nothing here fails: it is all data.

torch is imported inside functions, and a library that is broken is a finding.
"""

import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modelopt_convert import __version__
from modelopt_convert.commands.command import ending
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.run.errors import MoptError, first_line
from modelopt_convert.run.text import runnable, unicode_text

if TYPE_CHECKING:
    import torch

    from modelopt_convert.verification.gemm.backends.base import Backend

Status = Literal["ok", "missing", "broken"]
# What mopt is installed with, and what extras and engines bring.
_NEEDED = ("torch", "numpy", "safetensors", "huggingface_hub", "pydantic", "typer", "rich", "xxhash", "llvmlite")
_NO_TOKEN = "no token: public repos can be read; `hf auth login` makes one"
_ANSWER_S = 5.0  # of the Hub
_LEAST_FREE = 100_000_000  # bytes: less than the smallest model takes
_MORE = ("triton", "flashinfer-python", "sgl-kernel", "ray", "nvidia-modelopt", "diffusers", "sglang", "vllm-omni")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        part: ``version``, ``gpu``, ``backend``, ``hub``, ``disk`` or ``works``.
        name: What it is.
        status: ``ok``; ``missing`` if it is not there or does not run here; ``broken`` if it is there and fails.
        found: What was found, or why not.
    """

    part: str
    name: str
    status: Status
    found: str


def examine(place: Path) -> Iterator[Finding]:
    """Look at everything, and give each finding as soon as it is known.

    Args:
        place: The folder whose disk is looked at; it need not exist.
    """
    looks: tuple[tuple[str, str, Callable[[], Iterable[Finding]]], ...] = (
        ("version", "mopt", _versions),
        ("disk", str(place), lambda: _disk(place)),
        ("gpu", "torch", _gpu),
        ("backend", "GEMM", _backends),
        ("hub", "cache", _cache),
        ("hub", "login", _hub),
    )
    found: list[Finding] = []
    for part, name, look in looks:
        for one in _asked(part, name, look):
            found.append(one)
            yield one
    yield from _works(found)


def as_data(findings: Sequence[Finding], error: BaseException | None = None) -> dict[str, Any]:
    """The findings as one object, with what stopped the search for more."""
    ended = ending(error)
    told = ended["error"]
    return {
        "schema": "mopt.doctor/1",
        **ended,
        "error": None if told is None else told.model_dump(),
        "findings": [{key: unicode_text(value) for key, value in asdict(one).items()} for one in findings],
    }


def _asked(part: str, name: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What a look finds; whatever a library raises, on import or later, is a finding."""
    try:
        return list(look())
    except MoptError as error:
        return [Finding(part, name, "broken", error.message)]
    except Exception as error:
        return [Finding(part, name, "broken", f"{type(error).__name__}: {first_line(error)}")]


def _versions() -> Iterator[Finding]:
    yield Finding("version", "mopt", "ok", __version__)
    yield Finding("version", "python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in (*_NEEDED, *_MORE):
        try:
            yield Finding("version", name, "ok", version(name))
        except PackageNotFoundError:
            yield Finding("version", name, "missing", "not installed")


def _gpu() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        return [
            Finding("gpu", "cuda", "missing", "torch sees none: everything works but GPU kernels and --device cuda")
        ]
    found = []
    for number in range(torch.cuda.device_count()):
        one = torch.cuda.get_device_properties(number)
        found.append(
            Finding("gpu", f"cuda:{number}", "ok", f"{one.name}, SM{one.major}{one.minor}, {_bytes(one.total_memory)}")
        )
    return found


def _backends() -> list[Finding]:
    import torch

    from modelopt_convert.verification.gemm.backends import BACKENDS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [
        finding
        for one in BACKENDS
        for algorithm in sorted(one.formats)
        for finding in _asked(
            "backend", f"{one.name} {algorithm}, {one.kind}", partial(_backend, one, algorithm, device)
        )
    ]


def _backend(one: "Backend", algorithm: str, device: "torch.device") -> list[Finding]:
    why = one.unavailable(device)
    name = f"{one.name} {algorithm}, {one.kind}"
    return [Finding("backend", name, "ok" if why is None else "missing", why or f"runs on {device.type}")]


def _cache() -> list[Finding]:
    """Whether what is fetched can be stored: HF_HOME, or what stands in for it."""
    from huggingface_hub import constants

    place = Path(constants.HF_HOME)
    there = next(one for one in (place, *place.absolute().parents) if os.path.lexists(one))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "cannot be written" if there.is_dir() else "is no folder"
        return [Finding("hub", "cache", "broken", f"{there} {what}; set HF_HOME to a folder that can be written")]
    return [Finding("hub", "cache", "ok", str(place))]


def _hub() -> list[Finding]:
    """Whether there is a token, and whose it is: never the token."""
    from huggingface_hub import constants, get_token

    if get_token() is None:
        return [Finding("hub", "login", "missing", runnable(_NO_TOKEN))]
    if constants.HF_HUB_OFFLINE:
        return [Finding("hub", "login", "ok", "there is a token; HF_HUB_OFFLINE is set, and nobody was asked whose")]
    from modelopt_convert.checkpoint.hub.client import ask_once, hub_api, hub_errors

    try:
        with hub_errors("login", "run again"):
            me = ask_once(hub_api().whoami, _ANSWER_S)
    except MoptError as error:
        why = error.message.removeprefix("hf://login: ")
        return [Finding("hub", "login", "broken", f"there is a token, and the Hub did not say whose: {why}")]
    return [Finding("hub", "login", "ok", f"logged in as {me['name']}")]


def _disk(place: Path) -> list[Finding]:
    whole = place.absolute()
    there = next(one for one in (whole, *whole.parents) if one.is_dir())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        return [Finding("disk", str(place), "broken", f"{there} cannot be written, {_bytes(free)} free")]
    if free < _LEAST_FREE:
        return [Finding("disk", str(place), "broken", f"the disk is full: {_bytes(free)} free")]
    return [Finding("disk", str(place), "ok", f"{_bytes(free)} free")]


def _works(findings: list[Finding]) -> list[Finding]:
    """What follows for what mopt does, by what each kind of work needs."""
    known = {(one.part, one.name): one for one in findings}
    runs = [one.name for one in findings if one.part == "backend" and one.status == "ok"]
    torch_fails = next((one for one in findings if one.part == "gpu" and one.status == "broken"), None)
    broken = f"torch cannot be used: {torch_fails.found}" if torch_fails is not None else ""
    login, modelopt = known.get(("hub", "login")), known[("version", "nvidia-modelopt")]
    disk = next(one for one in findings if one.part == "disk")
    ray = known[("version", "ray")]
    gpu = any(one.part == "gpu" and one.status == "ok" for one in findings)
    rows = {
        "build, convert, rewrite": broken or (f"{disk.name}: {disk.found}" if disk.status != "ok" else ""),
        "verify against a base": broken,
        "--device cuda": broken or ("" if gpu else "torch sees no GPU"),
        "--executor ray": "" if ray.status == "ok" else f"ray: {ray.found}",
        "mopt push": "" if login is not None and login.status == "ok" else f"login: {login.found if login else ''}",
        "making exports": "" if modelopt.status == "ok" else "nvidia-modelopt is not installed",
    }
    found = [Finding("works", name, "missing" if why else "ok", why or "yes") for name, why in rows.items()]
    for algorithm in FORMATS:
        native = [name.partition(" ")[0] for name in runs if name.endswith(f" {algorithm}, native")]
        words = ", ".join(native) or broken or "no native kernel runs here"
        found.append(Finding("works", f"native {algorithm} kernels", "ok" if native else "missing", words))
    return found


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
