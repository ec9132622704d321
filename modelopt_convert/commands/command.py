"""What every command has: a clock, opened inputs, warnings; and what of its report is the same for all. No torch."""

import ast
import platform
import re
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from modelopt_convert import __version__
from modelopt_convert.checkpoint.companions import Companions, open_companions
from modelopt_convert.checkpoint.config import BASE, FAMILY, read_config
from modelopt_convert.checkpoint.header import TensorInfo, TensorSpec
from modelopt_convert.checkpoint.location import Location, OpenFile
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.presented import Presented, stands_for
from modelopt_convert.formats.finite import NotFinite, not_finite_words
from modelopt_convert.report.report import ErrorReport, FaultReport, InputReport, NetworkReport, OutputReport, Status
from modelopt_convert.run.errors import (
    BUG_HINT,
    BackendError,
    CheckFailedError,
    ExitCode,
    InconclusiveError,
    InternalError,
    Interrupted,
    MoptError,
    RemoteError,
    StorageError,
    kinds,
)
from modelopt_convert.run.progress import Progress
from modelopt_convert.run.text import few, runnable
from modelopt_convert.stage.directory import Published
from modelopt_convert.stage.ownership import in_words
from modelopt_convert.write.task import StreamPlan

Reported = TypeVar("Reported", covariant=True)
Warned = tuple[str, str]
"""The code of a warning, and what it says."""

_TENSOR = re.compile(r"\btensor ('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")")  # repr() of a name
_STATUS: dict[type[MoptError], Status] = {
    CheckFailedError: "mismatch",
    InconclusiveError: "inconclusive",
    StorageError: "error",
    RemoteError: "error",
    InternalError: "error",
    BackendError: "error",
}


class Command(Protocol[Reported]):
    """What a request asks for, ready to be done: all that the API and the command line know of a command."""

    def run(self, progress: Progress) -> None:
        """Do the work, and keep what its steps returned.

        Raises:
            MoptError: One of its kinds.
        """

    def report(self, error: BaseException | None = None) -> Reported:
        """Put the report together from what the steps returned so far, and from the error that ended the work."""


class Clock:
    """Seconds by phase.

    Attributes:
        seconds: Of every phase so far; of one that came several times, the sum.
    """

    def __init__(self) -> None:
        """Nothing took any time yet."""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the time that a phase takes."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] = round(self.seconds.get(what, 0.0) + time.monotonic() - begin, 3)


class Inputs:
    """The checkpoints that a command has opened, by name; a context manager that closes them.

    Attributes:
        readers: As they are opened.
        presented: What those stand for that are in another naming or dialect than builds and proofs read.
        to_fetch: Bytes that are still to be fetched of those on the Hub, as far as it is known.
    """

    def __init__(
        self, config: Location | None = None, variant: str | None = None, *, variant_of_base: bool = False
    ) -> None:
        """Nothing is open yet.

        Args:
            config: ``--config``: stands in where an input has no config.json.
            variant: ``--variant``: which weights of a folder are read.
            variant_of_base: Whether the variant is one of bases, and of nothing else.
        """
        self._config = config
        self._given: dict[str, Any] | None = None
        self._variant = variant
        self._variant_of_base = variant_of_base
        self.readers: dict[str, CheckpointReader] = {}
        self.presented: dict[str, Presented] = {}
        self.to_fetch: dict[str, int] = {}
        self._found: dict[str, InputReport] = {}
        self._traffic: dict[str, tuple[int, int]] = {}
        self._copied: dict[str, tuple[Location, Collection[OpenFile]]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """The inputs themselves."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Note what came over the network, however the work ended, and close."""
        self._traffic = {name: reader.traffic() for name, reader in self.readers.items()}
        for name, (_, files) in self._copied.items():
            self._traffic[name] = sum(one.fetched for one in files), sum(one.requests for one in files)
        self._stack.__exit__(kind, error, trace)

    def open(self, name: str, path: Location, *, is_base: bool = False) -> CheckpointReader:
        """Open a checkpoint: a folder, or one .safetensors file.

        Args:
            name: What the report calls it.
            path: Where it lies.
            is_base: Whether its bytes are digested as they are read, since its identity is what others are proven
                against.

        Raises:
            InputError: It cannot be opened.
        """
        if self._config is not None and self._given is None:
            self._given = read_config(self._config)
        given = without_quantization(self._given) if self._given is not None and is_base else self._given
        variant = self._variant if is_base or not self._variant_of_base else None
        reader = self._stack.enter_context(CheckpointReader(path, need_config=False, variant=variant, config=given))
        if is_base:
            reader.digest_content()
        self.readers[name] = reader
        self._found[name] = InputReport(
            path=str(reader.path),
            identity=reader.identity(),
            tensors=len(reader.tensors),
            bytes=reader.num_bytes,
            files=list(reader.files),
            skipped_files=list(reader.skipped),
        )
        return reader

    def present(self, name: str, known: Mapping[str, TensorInfo] | None = None) -> list[Warned]:
        """Go on with what an opened checkpoint stands for, if its names or its dialect are others than ours.

        Args:
            name: Of the input.
            known: The model's tensors under diffusers' names, as far as another input tells them.

        Returns:
            What was recognised, in words; nothing where the checkpoint is read as it lies.

        Raises:
            InputError: ``naming.*``, ``family.*`` or ``dialect.*``.
        """
        reader = self.readers[name]
        found = stands_for(reader, known or {})
        if found is None:
            return []
        self.presented[name] = found
        reader.present(found.tensors)
        reader.config = dict(found.config)
        if found.other_class is not None:
            reader.config_from = None
        return [("input.read_as", f"{name} {reader.path}: {found.words()}")]

    def lend_config(self, name: str, base: CheckpointReader | None) -> None:
        """Complete the config of an input that is presented and has none: from its base, or by its family's class."""
        reader, found = self.readers[name], self.presented.get(name)
        if found is None or found.found is None or reader.config_from is not None:
            return
        if base is not None and base.config_from is not None:
            reader.config, reader.config_from = without_quantization(base.config) | reader.config, BASE
        else:
            reader.config = {"_class_name": found.found.family.class_names[0], **reader.config}
            reader.config_from = FAMILY

    def open_beside(self, name: str, root: Location, built: Collection[str]) -> Companions:
        """Open what stands beside the transformers of a pipeline. The report's ``network`` calls it ``name``.

        Raises:
            InputError: What ``open_companions`` raises.
        """
        found = open_companions(root, built, self._stack)
        self._copied[name] = root, found.files.values()
        self.to_fetch[name] = sum(one.unfetched([(0, one.num_bytes)]) for one in found.files.values())
        return found

    def left_aside(self) -> list[Warned]:
        """What of each folder's weights was not read."""
        return [
            ("input.left_aside", left_aside_words(str(reader.path), reader.left_aside))
            for reader in self.readers.values()
            if reader.left_aside
        ]

    def check_unchanged(self) -> None:
        """Compare all files with what they were at opening.

        Raises:
            InputError: ``input.changed``.
        """
        for reader in self.readers.values():
            reader.check_unchanged()
        for _, files in self._copied.values():
            for file in files:
                file.check_unchanged()

    def reports(self) -> dict[str, InputReport]:
        """Every input as it was opened, with what is known of its identity by now."""
        found: dict[str, InputReport] = {}
        for name, one in self._found.items():
            reader = self.readers[name]
            presented = self.presented.get(name)
            known = {
                "renamed": presented.renamed() if presented is not None else {},
                "identity": reader.identity(),
                "config_from": reader.config_from,
            }
            found[name] = one.model_copy(update=known)
        return found

    def network(self) -> dict[str, NetworkReport]:
        """What inputs that do not lie on disk cost to read."""
        sizes = {name: (reader.path, self._found[name].bytes) for name, reader in self.readers.items()}
        for name, (root, files) in self._copied.items():
            sizes[name] = root, sum(one.num_bytes for one in files)
        found: dict[str, NetworkReport] = {}
        for name, (place, num_bytes) in sizes.items():
            if not isinstance(place, Path):
                fetched, requests = self._traffic.get(name, (0, 0))
                identity = place.identity()
                found[name] = NetworkReport(
                    repo=identity["repo"],
                    commit=identity["commit"],
                    of_bytes=num_bytes,
                    to_fetch_bytes=self.to_fetch.get(name),
                    fetched_bytes=fetched,
                    requests=requests,
                )
        return found


def output_report(
    path: str,
    shards: Mapping[str, Sequence[TensorSpec]],
    copied: Mapping[str, int],
    published: Published | None,
    error: BaseException | None,
) -> OutputReport:
    """What stands, or was planned to stand, at OUT, by how it came there and what ended the run."""
    stands = error if isinstance(error, StorageError) else None
    sizes = {file: sum(spec.num_bytes for spec in specs) for file, specs in shards.items()}
    return OutputReport(
        path=path,
        tensors=sum(len(specs) for specs in shards.values()),
        bytes=sum(sizes.values()),
        shards=[{"file": file, "bytes": size} for file, size in sizes.items()],
        copied=[{"file": file, "bytes": size} for file, size in copied.items()],
        published=published is not None or (stands is not None and stands.published),
        method=published and published.method,
        durable=published.durable if published is not None else None,
        kept_at=stands.kept_at if stands is not None else None,
    )


def throughput(clock: Clock, plans: Sequence[StreamPlan]) -> int | None:
    """Tensor bytes of the output by the seconds of streaming; None of so few that they say nothing."""
    seconds = clock.seconds.get("stream")
    total = sum(spec.num_bytes for plan in plans for shard in plan.shards for spec in shard.tensors)
    return round(total / seconds) if seconds else None


def not_finite_warnings(written: Mapping[str, NotFinite], prefix: str = "") -> list[Warned]:
    """What a checkpoint holds that is no number, as its input did.

    Args:
        written: By tensor.
        prefix: Of the transformer's names.
    """
    found = {f"{prefix}{name}": one for name, one in written.items()}
    return [("tensor.not_finite", not_finite_words(found))] if found else []


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config for a base: one that serves an export, too, declares what only the export has."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def not_compared(made: CheckpointReader, base: CheckpointReader) -> list[Warned]:
    """That the configs of a checkpoint and its base are not compared, since one of the two is not there."""
    lacking = [str(one.path) for one in (made, base) if one.config_from is None]
    if not lacking:
        return []
    words = f"no config at {' and '.join(lacking)}: the two configs are not compared"
    return [("config.not_compared", words)]


def left_aside_words(folder: str, names: Sequence[str]) -> str:
    """That weights of a folder are not read."""
    count = f"{len(names)} file{'' if len(names) == 1 else 's'} of weights"
    return f"{folder}: {count} left aside, of a variant or not named by the index: {few(names)}"


def published_warnings(published: Published | None) -> list[Warned]:
    """What could not be cleaned up, and what went that no record of mopt listed."""
    if published is None:
        return []
    return [("output.old_not_removed", text) for text in published.warnings] + foreign_warnings(published.foreign)


def foreign_warnings(names: Sequence[str], verb: str = "went") -> list[Warned]:
    """What goes with an old checkpoint by the consent of ``--overwrite-foreign``."""
    return [("output.foreign_replaced", f"with the old checkpoint {verb}: {in_words(names)}")] if names else []


def peak_rss_bytes() -> int | None:
    """The process's own peak; ``ru_maxrss`` would begin with that of whoever started it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def warnings_of(warned: list[Warned]) -> list[dict[str, str]]:
    """Warnings as they stand in a report."""
    return [{"code": code, "message": message} for code, message in warned]


def versions() -> dict[str, str]:
    """What took part in the run."""
    torch = sys.modules.get("torch")  # not imported for its version's sake
    found = {"mopt": __version__, "python": platform.python_version()}
    return found | ({"torch": str(torch.__version__)} if torch is not None else {})


def _faults(error: BaseException) -> list[FaultReport]:
    """All that a failure names, kind by kind; a failure of one tensor names it in its message, as all messages do."""
    if not isinstance(error, MoptError):
        return []
    named = _TENSOR.search(error.message)
    parts = error.parts or ([(ast.literal_eval(named[1]), error)] if named is not None else [])
    return [
        FaultReport(
            code=one.code,
            message=one.line,
            hint=runnable(one.hint or "") or None,
            path=one.path,
            names=list(one.names),
        )
        for one in kinds(parts)
    ]


def ending(error: BaseException | None, status: Status = "ok") -> dict[str, Any]:
    """How a run ended: ``status`` (the given one if without error), ``exit_code`` and ``error`` of its report."""
    if error is None:
        return {"status": status, "exit_code": int(ExitCode.OK), "error": None}
    status, exit_code, code, message = "error", ExitCode.INTERNAL, "internal", f"{type(error).__name__}: {error}"
    hint, path = BUG_HINT, None
    if isinstance(error, MoptError):
        status = _STATUS.get(type(error), "refused")
        exit_code, code, message, hint, path = error.exit_code, error.code, error.message, error.hint or "", error.path
    elif isinstance(error, Interrupted):
        status, code, message, hint = "interrupted", "interrupted", f"stopped by signal {error.signum}", ""
        exit_code = ExitCode(128 + error.signum)
    told = ErrorReport(code=code, message=message, hint=runnable(hint) or None, path=path, faults=_faults(error))
    return {"status": status, "exit_code": int(exit_code), "error": told}
