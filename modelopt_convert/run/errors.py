"""The errors mopt raises on purpose, one class per exit code, and the exit codes themselves."""

from collections.abc import Mapping
from enum import IntEnum
from typing import Any, ClassVar, Protocol

from modelopt_convert.run.text import few


class ExitCode(IntEnum):
    """What the process tells its caller; docs/exit-codes.md documents each code."""

    OK = 0
    MISMATCH = 1
    USAGE = 2
    INPUT = 3
    OUTPUT = 4
    STORAGE = 5
    INCONCLUSIVE = 6
    BACKEND = 7
    INTERNAL = 70
    HUNG_UP = 129
    INTERRUPTED = 130
    TERMINATED = 143


BUG_HINT = "this is a bug in mopt; report it with the traceback that MOPT_DEBUG=1 shows"


def first_line(error: Exception) -> str:
    """What a library said, cut to a line."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


class RunReport(Protocol):
    """What the report of every run has: ``Report`` and ``InspectReport`` have more."""

    @property
    def status(self) -> str:
        """How the run ended, in a word."""

    @property
    def exit_code(self) -> int:
        """What the command line ends with."""

    def model_dump(self) -> dict[str, Any]:
        """The report as a dict."""

    def to_json(self) -> str:
        """The report as one line."""


class MoptError(Exception):
    """A failure with a stable dotted ``code``; the message may change between releases, the code may not.

    Args:
        message: What failed, what was expected and what was found, in one line.
        code: Stable name such as ``header.size_mismatch``, for scripts and tests.
        path: The file concerned, if one is.
        hint: What to do about it.

    Attributes:
        report: The report of the run that ended so, where there was a run: not of a UsageError, nor of ``presets`` and
            ``new_preset``.
    """

    exit_code: ClassVar[ExitCode]
    report: RunReport | None = None

    def __init__(self, message: str, *, code: str, path: str | None = None, hint: str | None = None) -> None:
        """Keep the parts apart so that the terminal and the JSON report can each show them."""
        super().__init__(message)
        self.message = message
        self.code = code
        self.path = path
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """Come whole out of another process; Exception's own way calls the class with the message alone."""
        return type(self).__new__, (type(self), self.message), self.__dict__


class UsageError(MoptError, ValueError):
    """A value is not one that its option takes, or two options exclude each other. Nothing was read.

    Args:
        flag: The option or argument concerned, as the command line spells it.
        reason: What is wrong with it.
    """

    exit_code = ExitCode.USAGE

    def __init__(self, flag: str, reason: str) -> None:
        """Keep the two apart: a command line shows the flag in its own way."""
        super().__init__(f"{flag}: {reason}", code="usage")
        self.flag = flag
        self.reason = reason


class InputError(MoptError):
    """The source, the base or the preset is malformed, unsupported or unsafe."""

    exit_code = ExitCode.INPUT


class OutputRefusedError(MoptError):
    """mopt does not write to OUT: it exists, is no checkpoint, overlaps an input, or another run works on it."""

    exit_code = ExitCode.OUTPUT


class StorageError(MoptError):
    """The disk, the file system or the limits of the system stopped the run.

    Args:
        published: Whether the new checkpoint is already in place.
        kept_at: Where a finished but unpublished checkpoint was left.
    """

    exit_code = ExitCode.STORAGE

    def __init__(
        self,
        message: str,
        *,
        code: str,
        path: str | None = None,
        hint: str | None = None,
        published: bool = False,
        kept_at: str | None = None,
    ) -> None:
        """As MoptError, with what stands on disk after the failure."""
        super().__init__(message, code=code, path=path, hint=hint)
        self.published = published
        self.kept_at = kept_at


class RemoteError(MoptError):
    """The Hub or a cluster, or the way to it, failed: nothing is wrong with the request, and it may work later."""

    exit_code = ExitCode.STORAGE


class CheckFailedError(MoptError):
    """Everything ran, and a check failed: nothing was published."""

    exit_code = ExitCode.MISMATCH


class InconclusiveError(MoptError):
    """Nothing is known to be wrong, and nothing proves the weights right; or what was required did not run."""

    exit_code = ExitCode.INCONCLUSIVE


class BackendError(MoptError):
    """A GEMM backend or a GPU failed, or backends disagree: the checkpoint is not what failed."""

    exit_code = ExitCode.BACKEND


class InternalError(MoptError):
    """A bug in mopt: what was planned and what was done disagree."""

    exit_code = ExitCode.INTERNAL


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived; context managers unwind and remove the stage."""

    def __init__(self, signum: int) -> None:
        """Remember which signal, for the exit code 128 + signum."""
        super().__init__(signum)
        self.signum = signum


def joint(faults: Mapping[str, InputError]) -> InputError:
    """One refusal for many: the first fault, how many have one of its kind, and their first names.

    Args:
        faults: By the module or tensor that has the fault, at least one. Faults of a kind have one code.

    Returns:
        The first fault as it is, if it is the only one.
    """
    first = next(iter(faults.values()))
    kinds: dict[str, list[str]] = {}
    for name, fault in faults.items():
        kinds.setdefault(fault.code, []).append(name)
    same = kinds.pop(first.code)
    told = [f"{len(same)} have this fault: {few(same)}"] if len(same) > 1 else []
    told += [f"{code} besides, {len(names)}: {few(names)}" for code, names in kinds.items()]
    return InputError("; ".join([first.message, *told]), code=first.code, path=first.path, hint=first.hint)
