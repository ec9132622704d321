"""Stream a plan's tensors from their inputs into the stage, several at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING

from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.plan.plan import Origin, Step
from modelopt_convert.plan.prediction import step_readings
from modelopt_convert.run.progress import Progress
from modelopt_convert.run.workers import in_order, until
from modelopt_convert.stage.directory import StagingDir
from modelopt_convert.stage.shard_writer import ShardWriter
from modelopt_convert.write.pieces import Made, produce
from modelopt_convert.write.task import ShardResult, ShardTask, StreamPlan, shard_tasks

if TYPE_CHECKING:
    from modelopt_convert.formats.fp8.codes import Clipped
    from modelopt_convert.write.gpu import Gpu


# Does every task into the stage, tensors of a task on so many threads; the results come in the order of the tasks.
Executor = Callable[
    [StagingDir, Sequence[ShardTask], Mapping[Origin, CheckpointReader], Progress, int, "Gpu | None"],
    Iterable[ShardResult],
]


@dataclass(slots=True)
class Streamed:
    """What came of streaming.

    Attributes:
        digests: xxh3-128 of each tensor by name.
        clipped: What a scale was too small for, by module; only where there was any.
    """

    digests: dict[str, str] = field(default_factory=dict)
    clipped: dict[str, "Clipped"] = field(default_factory=dict)


def stream(
    stage: StagingDir,
    plan: StreamPlan,
    readers: Mapping[Origin, CheckpointReader],
    progress: Progress,
    folder: str = "",
    *,
    workers: int,
    executor: Executor,
    gpu: "Gpu | None" = None,
) -> Streamed:
    """Write every shard, into a folder of the stage if one is named; who does it, and where, changes no byte."""
    done = Streamed()
    for role, reader in readers.items():
        reader.prefetch(step_readings(plan.steps, role, reader.tensors))
    tasks = list(shard_tasks(plan, folder))
    for result in executor(stage, tasks, readers, progress, workers, gpu):
        stage.finish_shard(durable=result.durable)
        done.digests |= result.digests
        done.clipped |= result.clipped
    return done


def on_threads(
    stage: StagingDir,
    tasks: Sequence[ShardTask],
    readers: Mapping[Origin, CheckpointReader],
    progress: Progress,
    workers: int,
    gpu: "Gpu | None",
) -> Iterator[ShardResult]:
    """The executor of this very process: one shard after another, tensors at the same time."""
    for task in tasks:
        progress.begin(f"write {task.file}", task.data_bytes)
        with stage.shard(task.file, task.shard.tensors, task.shard.metadata) as writer:
            clipped = write_tensors(task, writer, readers, progress, workers, gpu)
        yield ShardResult(writer.num_bytes, writer.durable, writer.digests, clipped)


def write_tensors(
    task: ShardTask,
    writer: ShardWriter,
    readers: Mapping[Origin, CheckpointReader],
    progress: Progress,
    workers: int,
    gpu: "Gpu | None",
) -> dict[str, "Clipped"]:
    """Write all tensors of a shard.

    Returns:
        What a scale was too small for, by module.
    """
    write = _Writing(writer, task.steps, readers, progress, task.file, gpu)
    # Block scales come with the codes.
    names = [spec.name for spec in writer.layout if task.steps[spec.name].op != "block_scales"]
    made = dict(zip(names, in_order(names, write, workers), strict=True))
    return {module_of(name): one.clipped for name, one in made.items() if one.clipped is not None}


@dataclass(frozen=True, slots=True)
class _Writing:
    """Writes one tensor of a shard after another; several threads may each write one."""

    writer: ShardWriter
    steps: Mapping[str, Step]
    readers: Mapping[Origin, CheckpointReader]
    progress: Progress
    file: str
    gpu: "Gpu | None"

    def __call__(self, name: str, stopped: Event) -> Made:
        """Write the tensor, and the block scales that come with it."""
        step, made = self.steps[name], Made()
        self.progress.detail(f"{self.file}: {name}: {step.op} from {step.origin}")
        extent = self.readers[step.origin].extent(name) if step.op == "copy" else None
        pieces = self._counted(produce(step, self.readers[step.origin], made, self.gpu))
        self.writer.write(name, until(stopped, pieces), extent)
        if step.op == "quantize_nvfp4":
            self.writer.write(f"{module_of(name)}.weight_scale", self._counted(made.block_scales))
        return made

    def _counted(self, pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        for piece in pieces:
            yield piece
            self.progress.advance(memoryview(piece).nbytes)
