"""The errors mopt raises on purpose, one class per exit code, and the exit codes themselves."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Protocol, Self, TypeVar

from modelopt_convert.run.text import few, general, in_ranges


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
        parts: Where one look found several faults, or one in a place that has a name: each with that name, which is a
            module, a tensor, a pattern or a key. A name comes as often as it has faults.
    """

    exit_code: ClassVar[ExitCode]
    report: RunReport | None = None
    parts: "tuple[tuple[str, MoptError], ...]" = ()

    def __init__(self, message: str, *, code: str, path: str | None = None, hint: str | None = None) -> None:
        """Keep the parts apart so that the terminal and the JSON report can each show them."""
        super().__init__(message)
        self.message = message
        self.code = code
        self.path = path
        self.hint = hint

    def at(self, names: Iterable[str]) -> Self:
        """The same failure, with the names of all places that it is about behind its message."""
        return joint([(name, self) for name in names])

    def each(self) -> "list[MoptError]":
        """The faults that it is joint of, or itself alone."""
        return [fault for _, fault in self.parts] or [self]

    def about(self, parts: "Iterable[tuple[str, MoptError]]") -> Self:
        """The same failure in the same words, with what it is about in its report."""
        self.parts = tuple(parts)
        return self

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


Parts = tuple[tuple[str, MoptError], ...]
Failure = TypeVar("Failure", bound=MoptError)
_KINDS = 10  # in one line
_KEPT_NAME = re.compile(r"--keep-bf16 '([^']*)'")
_KEPT = re.compile(r"--keep-bf16 '[^']*'(?: --keep-bf16 '[^']*')*")
_OPTIONS = 20  # in one hint


@dataclass(frozen=True, slots=True)
class Kind:
    """The faults of one kind: with one code, and the same words but for names and numbers.

    Attributes:
        code: Of all.
        line: What is wrong with the first, how many have the fault, and their first names.
        hint: What to do about the first; where that is to keep it in BF16, about all.
        path: The file of the first.
        names: All places, each once, in the order in which they were found.
    """

    code: str
    line: str
    hint: str | None
    path: str | None
    names: tuple[str, ...]


def kinds(parts: Sequence[tuple[str, MoptError]]) -> list[Kind]:
    """The faults of one look kind by kind, in the order of their first ones."""
    grouped: dict[tuple[str, str], dict[str, MoptError]] = {}
    said: dict[str, str] = {}  # one message is one kind, whichever of several names it has in it
    for name, fault in parts:
        words = said.setdefault(fault.message, general(fault.message.replace(name, "") if name else fault.message))
        grouped.setdefault((fault.code, words), {}).setdefault(name, fault)
    found = []
    for (code, _), members in grouped.items():
        first, names = next(iter(members.values())), tuple(filter(None, members))
        line = first.message
        if len({fault.message for fault in members.values()}) == 1:  # of one place, or one failure of several places
            line += f": {few(names)}" if names and names[0] not in line else ""
        elif len(members) > 1:
            line += f"; {len(members)} have this fault: {few(names)}"
        found.append(Kind(code, line, _hint_for([*members.values()]), first.path, names))
    return found


def _hint_for(faults: Sequence[MoptError]) -> str | None:
    """What to do about all faults of a kind: the first one's hint, with all modules that their hints would keep."""
    hint = faults[0].hint
    if hint is None or len(faults) == 1 or not (kept := _KEPT.search(hint)):
        return hint
    modules = dict.fromkeys(name for fault in faults for name in _KEPT_NAME.findall(fault.hint or ""))
    patterns = in_ranges(modules)
    options = " ".join(f"--keep-bf16 '{pattern}'" for pattern in patterns)
    if len(patterns) > _OPTIONS:
        options = "--keep-bf16 for each module that `error.faults` of --json lists, with all of its fused group"
    return f"{hint[: kept.start()]}{options}{hint[kept.end() :]}"


def joint(parts: Sequence[tuple[str, Failure]]) -> Failure:
    """One failure for many: the line of the first kind, and of each other kind the count and the first names.

    Args:
        parts: At least one fault, each with the name of its place. A fault that is a joint one counts as its parts.
    """
    flat = tuple(one for name, fault in parts for one in (fault.parts or ((name, fault),)))
    found, first = kinds(flat), parts[0][1]
    told = [f"{one.code} besides, {len(one.names)}: {few(one.names)}" for one in found[1:_KINDS]]
    told += [f"and {len(found) - _KINDS} kinds more"] if len(found) > _KINDS else []
    head = found[0]
    failure = type(first)("; ".join([head.line, *told]), code=head.code, path=head.path, hint=head.hint)
    failure.parts = flat
    return failure


class Faults:
    """What one run finds wrong. It is raised together once all was looked at, so that one run tells all."""

    def __init__(self) -> None:
        """Nothing is wrong yet."""
        self._found: list[tuple[str, MoptError]] = []
        self._prefix = self._where = ""

    def __bool__(self) -> bool:
        """Whether anything is wrong."""
        return bool(self._found)

    @property
    def names(self) -> frozenset[str]:
        """All places at which something is wrong."""
        return frozenset(one.removeprefix(self._prefix) for one, _ in self._found if one.startswith(self._prefix))

    def names_but(self, codes: Collection[str]) -> frozenset[str]:
        """The places at which anything is wrong that has none of these codes."""
        rest = Faults()
        rest._found, rest._prefix = [one for one in self._found if one[1].code not in codes], self._prefix
        return rest.names

    def parts(self) -> Parts:
        """What is wrong, each with its place."""
        return tuple(self._found)

    def under(self, prefix: str, *, where: str = "") -> "Faults":
        """The same faults, for a look whose places all have a prefix: those of one transformer of several.

        Args:
            prefix: Of the places.
            where: The checkpoint that a fault without a file is about.
        """
        view = Faults()
        view._found, view._prefix, view._where = self._found, f"{self._prefix}{prefix}", where
        return view

    def add(self, name: str, fault: MoptError) -> None:
        """One more, or all parts of a joint one.

        Args:
            name: Of the module, tensor, pattern or key; empty for none.
            fault: What is wrong there.
        """
        parts = fault.parts or ((name, fault),)
        self._found += [(f"{self._prefix}{one}", _at_place(each, self._where)) for one, each in parts]

    @contextmanager
    def taken(self, name: str = "") -> Iterator[None]:
        """Take what is raised inside, and go on behind.

        Args:
            name: Of the place, for a fault without one.
        """
        try:
            yield
        except (InputError, CheckFailedError) as error:
            self.add(name, error)

    def refuse(self) -> None:
        """Raise what was found.

        Raises:
            MoptError: All faults in one, if there are any; the first one's class is the class of all.
        """
        if self._found:
            raise joint(self._found) from self._found[0][1]


@contextmanager
def about(where: str) -> Iterator[None]:
    """Say of what is raised inside without a file that it is about this one.

    Args:
        where: The checkpoint.
    """
    try:
        yield
    except InputError as error:
        faults = Faults().under("", where=where)
        faults.add("", error)
        raise (joint(faults.parts()) if error.parts else faults.parts()[0][1]) from error


def _at_place(fault: MoptError, where: str) -> MoptError:
    if not where or fault.path is not None or not isinstance(fault, InputError):
        return fault
    return InputError(f"{where}: {fault.message}", code=fault.code, path=where, hint=fault.hint)
