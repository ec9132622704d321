"""Where what the system or a library says becomes one of mopt's errors, with its documented code. No torch."""

import errno
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from modelopt_convert.run.errors import BUG_HINT, ExitCode, InputError, MoptError, StorageError, first_line

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})
# Python's threads and torch's allocator have no exception of their own.
_SCARCE_WORDS = ("can't start new thread", "can't allocate memory", "Cannot allocate memory", "bad alloc", "bad_alloc")
# Before the first tensor: more than the libraries were seen to take, in all and for each core.
_LEAST_BYTES = {
    resource.RLIMIT_AS: ("address space", "v", 1 << 30, 128 << 20),
    resource.RLIMIT_DATA: ("data", "d", 256 << 20, 32 << 20),
}
_MOST_CORES = 16
_PACKAGE = __name__.partition(".")[0]
_LIBRARY = "check its installation, the environment variables that it reads, and the limits of the process"
_LIMITS = "free some memory, or raise the limits of the process (ulimit -v, -n, -u), then run again"


@contextmanager
def bounded(inputs: Sequence[Path], *, needs_libraries: bool = True) -> Iterator[None]:
    """The work of a command: whatever goes wrong there, but for a bug of mopt, is a MoptError.

    Args:
        inputs: Files and folders that are only read: what fails there is bad input, and no failure of the storage.
        needs_libraries: Whether those of mathematics may be loaded, which need a working folder and room.

    Raises:
        MoptError: What the work raised, or what ``foreseen`` makes of it.
    """
    try:
        if needs_libraries:
            _need_what_libraries_need()
        yield
    except Exception as error:
        known = foreseen(error, inputs)
        if known is None or known is error:
            raise
        raise known from error


def foreseen(error: Exception, inputs: Sequence[Path] = (), where: str = "the system") -> MoptError | None:
    """An exception as an error of mopt's; None if it can only be a bug.

    Args:
        error: Any exception.
        inputs: See ``bounded``.
        where: What an error that names no file is about.
    """
    said = ": ".join(dict.fromkeys([type(error).__name__, first_line(error)]))
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # pathlib's, up to Python 3.12
        error = error.__context__ if isinstance(error.__context__, OSError) else OSError(errno.ELOOP, said)
    match error:
        case MoptError():
            return error
        case OSError():
            path = None if error.filename is None else os.fsdecode(error.filename)
            if path is None or error.errno in _SCARCE or not _lies_in(path, inputs):
                return storage_error(error, where)
            return InputError(
                f"{path}: {error.strerror} ({_name(error)})",
                code="input.unreadable",
                path=path,
                hint="check that the path is right and that you may read it, then run again",
            )
        case RecursionError():
            return InputError(
                "something in an input is nested too deeply",
                code="input.too_deep",
                hint="no model's files are nested so deeply; do not use this checkpoint",
            )
        case MemoryError():
            return StorageError(f"memory ran out: {said}", code="storage.limits", hint=_LIMITS)
        case RuntimeError() if any(word in str(error) for word in _SCARCE_WORDS):
            return StorageError(f"memory ran out: {said}", code="storage.limits", hint=_LIMITS)
        case RuntimeError() if "home directory" in str(error):
            return StorageError(
                "there is no home folder: HOME is not set, and the system does not know this user",
                code="storage.home",
                hint="set HOME (for the Hub alone: HF_HOME) to a folder that can be written, then run again",
            )
        case ImportError() if not (error.name or "").startswith(_PACKAGE):
            return StorageError(f"a library cannot be loaded: {said}", code="storage.library", hint=_LIBRARY)
        case _ if _is_of_an_import(error):
            return StorageError(f"a library cannot be loaded: {said}", code="storage.library", hint=_LIBRARY)
        case _:
            return None


def last_words(error: Exception, where: str) -> int:
    """Say on stderr, in two lines, what nobody handled.

    Args:
        error: With ``MOPT_DEBUG=1`` it is raised again.
        where: See ``foreseen``.

    Returns:
        The exit code.
    """
    if debugging():
        raise error
    known = foreseen(error, where=where)
    message, code, hint = (
        (f"{type(error).__name__}: {error}", "internal", BUG_HINT)
        if known is None
        else (known.message, known.code, known.hint)
    )
    with suppress(OSError, AttributeError):  # it is full, or there is none
        # ascii() and not our own escaping, which may be what failed.
        sys.stderr.write(f"error: {ascii(message[:4000])[1:-1]} [{code}]\nhint: {hint}\n")
        sys.stderr.flush()
    return known.exit_code if known is not None else ExitCode.INTERNAL


def debugging() -> bool:
    """Whether the user asked for tracebacks."""
    return os.environ.get("MOPT_DEBUG") == "1"


def storage_error(error: OSError, where: Path | str) -> StorageError:
    """The StorageError for what the kernel says: path, errno by name, and what to do.

    Args:
        error: What it says.
        where: What it is about, if the error names no file.
    """
    path = os.fsdecode(error.filename) if error.filename is not None else str(where)
    message = f"{path}: {error.strerror or first_line(error)} ({_name(error)})"
    if error.errno in _FULL:
        return StorageError(message, code="storage.no_space", path=path, hint="free some space, then run again")
    if error.errno in _SCARCE:
        return StorageError(message, code="storage.limits", path=path, hint=_LIMITS)
    hint = "check the disk and its permissions, then run again"
    return StorageError(message, code="storage.failed", path=path, hint=hint)


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turn what the kernel says of a write into one clear line with the path and the errno."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, where) from error


def _is_of_an_import(error: Exception) -> bool:
    """Whether somebody else's module, or the interpreter, failed while something was being imported."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    inside = [number for number, frame in enumerate(frames) if frame.f_code.co_filename.startswith("<frozen importlib")]
    later = frames[inside[-1] :] if inside else []
    return bool(later) and not any(frame.f_globals.get("__name__", "").startswith(_PACKAGE) for frame in later)


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "unknown")


def _lies_in(path: str, inputs: Sequence[Path]) -> bool:
    """Whether it is one of the inputs or lies in one, as they are spelled or as links lead."""
    whole = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow what cannot be followed
    spelled = [Path(os.path.abspath(one)) for one in inputs]  # noqa: PTH100
    return any(whole.is_relative_to(one) for one in (*spelled, *(Path(os.path.realpath(one)) for one in spelled)))


def _need_what_libraries_need() -> None:
    """Those of mathematics end the process, with codes of their own, where there is no working folder or no room."""
    try:
        os.getcwd()  # noqa: PTH109
    except OSError as error:
        raise StorageError(
            f"the working folder cannot be used: {error.strerror}",
            code="storage.working_folder",
            hint="it was removed, or may not be read: cd into another one, then run again",
        ) from error
    for number, (what, flag, in_all, a_core) in _LEAST_BYTES.items():
        limit, _ = resource.getrlimit(number)
        least = in_all + a_core * min(os.cpu_count() or 1, _MOST_CORES)
        if limit != resource.RLIM_INFINITY and limit < least:
            raise StorageError(
                f"the process may have {limit} bytes of {what}, expected at least {least}",
                code="storage.limits",
                hint=f"ulimit -{flag} {least // 1024}, or no limit; containers limit memory better",
            )
