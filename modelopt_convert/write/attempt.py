"""Do one shard's task in a process of its own, which may die in the midst of it and be replaced. No torch.

An attempt writes under a name of its own, and only a whole file gets the shard's name. So a task that is done again,
even while a first attempt still runs somewhere, ends with the same file.
"""

import contextlib
import json
import platform
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from modelopt_convert import __version__
from modelopt_convert.plan.plan import Origin
from modelopt_convert.run.errors import InputError, RemoteError
from modelopt_convert.run.progress import Unwatched
from modelopt_convert.run.workers import torch_on_one_thread
from modelopt_convert.stage import fsops
from modelopt_convert.stage.shard_writer import ShardWriter
from modelopt_convert.write.part import PartReader, SourcePart
from modelopt_convert.write.stream import shard_result, write_tensors
from modelopt_convert.write.task import ShardResult, ShardTask

if TYPE_CHECKING:
    from pydantic import TypeAdapter

ATTEMPTS = "attempts"  # a folder of the stage; once it is removed no attempt that was given up can get anywhere


@dataclass(frozen=True, slots=True)
class ShardJob:
    """A task, and where a process that has opened nothing finds what it needs.

    Attributes:
        task: What is to be written.
        parts: What is read of each input.
        stage: The stage, which has the folder ``ATTEMPTS``.
        workers: Tensors that are worked on at a time.
        mode: The permissions of the file; None for what the umask leaves.
    """

    task: ShardTask
    parts: Mapping[Origin, SourcePart]
    stage: Path
    workers: int
    mode: int | None = None


def attempt(job: ShardJob) -> ShardResult:
    """Write the shard; the same file and the same result however often.

    Raises:
        InputError: An input is not the one that was planned with, or not what it claimed.
        RemoteError: ``executor.shared_filesystem``: stage or input are not to be seen from here.
        OSError: The disk failed.
    """
    room = job.stage / ATTEMPTS
    if not room.is_dir():
        raise not_shared(f"{platform.node()} does not see {job.stage}", job.stage)
    path = room / secrets.token_hex(8)
    with contextlib.ExitStack() as stack:
        try:
            readers = {origin: stack.enter_context(PartReader(part)) for origin, part in job.parts.items()}
        except InputError as error:
            if error.code != "input.missing":
                raise
            raise not_shared(f"{platform.node()}: {error.message}", Path(str(error.path))) from error
        if (base := readers.get("base")) is not None:
            base.digest_content()
        shard = job.task.shard
        with ShardWriter(path, shard.tensors, shard.metadata, mode=job.mode) as writer, torch_on_one_thread():
            made = write_tensors(job.task, writer, readers, Unwatched(), job.workers, None)
    # The inputs were looked at once more on the way out of the block.
    fsops.rename(path, job.stage / job.task.file)
    content = base.content.done if base is not None and base.content is not None else {}
    return replace(shard_result(writer, made), content=content)


def attempt_packed(version: str, packed: bytes) -> ShardResult:
    """As ``attempt``, for a job that comes from another machine.

    Args:
        version: Of the mopt that packed it; looked at first, since another version may not even be able to read it.
        packed: The job, by ``pack``.

    Raises:
        RemoteError: ``executor.version``; or as ``attempt``.
    """
    if version != __version__:
        raise RemoteError(
            f"{platform.node()} has mopt {__version__}, this is {version}",
            code="executor.version",
            hint="install the same version on every node",
        )
    return attempt(unpack(packed))


def pack(job: ShardJob) -> bytes:
    """A job as JSON, for another process; no pickle, which could hold anything."""
    return json.dumps(_adapter().dump_python(job, mode="json")).encode()


def unpack(packed: bytes) -> ShardJob:
    """The inverse of ``pack``."""
    return _adapter().validate_python(json.loads(packed))


def _adapter() -> "TypeAdapter[ShardJob]":
    from pydantic import TypeAdapter

    return TypeAdapter(ShardJob)


def not_shared(what: str, path: Path) -> RemoteError:
    """The refusal of a cluster that does not share the file system."""
    return RemoteError(
        what,
        code="executor.shared_filesystem",
        path=str(path),
        hint="inputs and output must lie, under the same paths, on a file system that every node sees",
    )
