"""Record what mopt does to the disk below one folder: every call that changes or syncs anything, in order. No torch."""

import errno
import itertools
import os
import re
import secrets
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import modelopt_convert
from modelopt_convert.stage import fsops

PACKAGE = str(Path(modelopt_convert.__file__).parent)
# What mopt does not call; powerloss_model.py knows nothing of them.
UNKNOWN = ("link", "symlink", "replace", "truncate", "ftruncate", "write", "writev", "pwritev", "copy_file_range")


@dataclass(frozen=True, slots=True)
class Event:
    """One call that succeeded.

    Attributes:
        op: What was done.
        path: To what, relative to the folder; ``.`` is the folder itself.
        site: The function of mopt that asked for it.
        target: The other name of a rename or an exchange.
        offset: Where ``data`` was written.
        data: What really was written.
        number: The size of ``allocate``; the mode of ``mkdir``, ``create`` and ``chmod``.
    """

    op: str
    path: str
    site: str
    target: str = ""
    offset: int = 0
    data: bytes = b""
    number: int = 0

    @property
    def label(self) -> str:
        """Site and path without the run's part of the name."""
        path = re.sub(r"[.]out[.]mopt-(stage|old|mark)-[0-9a-f]{8}", r"<\1>", self.path)
        return f"{self.site} {path}"


class Trace:
    """The events of one run after another; after ``limit`` events nothing gets through any more, as after a kill."""

    def __init__(self, place: Path, limit: int | None = None) -> None:
        self.place = place.resolve()
        self.events: list[Event] = []
        self.limit = limit
        self._count = itertools.count(1)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Listen to this process, whose random names become a count from now on."""
        patch.setattr(secrets, "token_hex", lambda size: f"{next(self._count):0{2 * size}x}")
        listeners: dict[str, Callable[..., list[Event]]] = {
            "mkdir": lambda path, *_, **how: self._named("mkdir", path, **how),
            "unlink": lambda path, **how: self._named("unlink", path, **how),
            "rmdir": lambda path, **how: self._named("rmdir", path, **how),
            "chmod": lambda path, mode, **how: self._named("chmod", path, **how),
            "fchmod": lambda fd, mode: self._open("chmod", fd),
            "rename": lambda source, target, **_: self._two("rename", source, target),
            "fsync": lambda fd: self._open("fsync", fd),
            "posix_fallocate": lambda fd, offset, size: self._open("allocate", fd, number=offset + size),
            "pwrite": lambda fd, data, offset: self._open("write", fd, data=bytes(data), offset=offset),
        }
        for name, listener in listeners.items():
            self._wrap(patch, os, name, listener)
        self._wrap(patch, os, "open", self._created)
        for name in ("rename_noreplace", "exchange"):
            op = name.removesuffix("_noreplace")
            self._wrap(patch, fsops, name, lambda source, target, op=op: self._two(op, source, target))
        for name in UNKNOWN:
            self._wrap(patch, os, name, self._unknown)

    def _wrap(self, patch: pytest.MonkeyPatch, module: Any, name: str, listener: Callable[..., list[Event]]) -> None:
        original = getattr(module, name)

        def call(*values: Any, **how: Any) -> Any:
            events = listener(*values, **how)  # first: afterwards the name may be gone
            if events and self.limit is not None and len(self.events) >= self.limit:
                raise OSError(errno.EIO, "killed")
            result = original(*values, **how)
            for event in events:
                self.events.append(self._with_result(event, result))
            return result

        patch.setattr(module, name, call)

    def _with_result(self, event: Event, result: Any) -> Event:
        site, number, data = _site(), event.number, event.data
        if event.op in {"mkdir", "create", "chmod"}:
            number = stat.S_IMODE((self.place / event.path).lstat().st_mode)
        elif event.op == "write":
            data = data[:result]
        return Event(event.op, event.path, site, event.target, event.offset, data, number)

    def _relative(self, path: Any, dir_fd: int | None = None) -> str | None:
        full = Path(path) if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink() / path
        return str(full.relative_to(self.place)) if full.is_relative_to(self.place) else None

    def _named(self, op: str, path: Any, *, dir_fd: int | None = None, **_: Any) -> list[Event]:
        found = self._relative(path, dir_fd)
        return [] if found is None else [Event(op, found, "")]

    def _two(self, op: str, source: Path, target: Path) -> list[Event]:
        one, two = self._relative(source), self._relative(target)
        return [] if one is None or two is None else [Event(op, one, "", two)]

    def _open(self, op: str, fd: int, *, offset: int = 0, data: bytes = b"", number: int = 0) -> list[Event]:
        found = self._relative(Path(f"/proc/self/fd/{fd}").readlink())
        return [] if found is None else [Event(op, found, "", "", offset, data, number)]

    def _created(self, path: Any, flags: int, *_: Any, dir_fd: int | None = None, **__: Any) -> list[Event]:
        return self._named("create", path, dir_fd=dir_fd) if flags & os.O_CREAT else []

    def _unknown(self, *values: Any, **_: Any) -> list[Event]:
        paths = [Path(f"/proc/self/fd/{one}").readlink() if isinstance(one, int) else one for one in values[:1]]
        assert all(self._relative(path) is None for path in paths), f"the model does not know this call: {values[:2]}"
        return []


def _site() -> str:
    """The innermost function of mopt, fsops aside, that is running."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE) and not file.endswith("fsops.py"):
            return f"{Path(file).stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    raise AssertionError("not called by mopt")
