"""A planned conversion on its way to the disk, and read back from there."""

from pathlib import Path

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.commands.closing import Closed, opened_stage, structure_checked, written_faults
from modelopt_convert.commands.convert.output import ConvertPlan
from modelopt_convert.commands.convert.proof import Compared, compare
from modelopt_convert.dialects.source import describe
from modelopt_convert.run.progress import Progress
from modelopt_convert.stage.directory import StagingDir
from modelopt_convert.write.stream import Executor, Streamed, stream


def stream_converted(
    stage: StagingDir, reader: CheckpointReader, plan: ConvertPlan, progress: Progress, workers: int, executor: Executor
) -> Streamed:
    """Write the shards; the reader presents what it did before once this returns."""
    raw = reader.tensors
    reader.present(plan.written.tensors)
    try:
        return stream(stage, plan, {"export": reader}, progress, workers=workers, executor=executor)
    finally:
        reader.present(raw)


def read_back(
    folder: Path, reader: CheckpointReader, plan: ConvertPlan, to: str, workers: int
) -> tuple[Compared | None, list[Closed]]:
    """Reopen what was written, and compare all of it with the source; nothing is compared if its headers are wrong.

    Args:
        folder: Where it was written.
        reader: The source.
        plan: What was to be written.
        to: The target.
        workers: Tensors that are compared at a time.

    Raises:
        CheckFailedError: ``check.structure``: no reader would take it.
    """
    with opened_stage(folder, need_config=plan.config is not None) as written:
        closed = structure_checked(written_faults(written, plan.steps, plan.shards))
        if closed.failure is not None:
            return None, [closed]
        again = describe(written, to, plan.settled.tensors)
        found = compare(reader, plan.expected, written, again.described, workers)
    check = {"name": "converted", "status": "fail" if found.failures else "pass", "failures": found.failures[:10]}
    failure = f"read back, {found.failures[0]} ({len(found.failures)} in all)" if found.failures else None
    return found, [closed, Closed(check, failure)]
