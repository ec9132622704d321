"""Stream a plan's tensors from their inputs into the stage, several at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from types import MappingProxyType
from typing import TYPE_CHECKING

from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.formats.finite import NotFinite
from modelopt_convert.formats.layout import CANONICAL
from modelopt_convert.plan.plan import Origin, Step
from modelopt_convert.plan.prediction import step_readings
from modelopt_convert.proof.due import Due, due_readings
from modelopt_convert.run.progress import Progress
from modelopt_convert.run.workers import in_order, until
from modelopt_convert.stage.directory import StagingDir
from modelopt_convert.stage.shard_writer import ShardWriter
from modelopt_convert.write.pieces import Made, produce
from modelopt_convert.write.task import ShardResult, ShardTask, StreamPlan, shard_tasks

if TYPE_CHECKING:
    from modelopt_convert.formats.fp8.codes import Clipped
    from modelopt_convert.proof.judgement import Judgement
    from modelopt_convert.write.gpu import Gpu


# Steps that write values which no proof of packed modules looks at.
_UNQUANTIZED = frozenset({"copy", "cast_bf16", "dequantize_fp8"})
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
        judgements: On modules that were due, by name.
        not_finite: NaN and infinity among what was written, by tensor; only where there was any.
    """

    digests: dict[str, str] = field(default_factory=dict)
    clipped: dict[str, "Clipped"] = field(default_factory=dict)
    judgements: dict[str, "Judgement"] = field(default_factory=dict)
    not_finite: dict[str, NotFinite] = field(default_factory=dict)


def stream(
    stage: StagingDir,
    plan: StreamPlan,
    readers: Mapping[Origin, CheckpointReader],
    progress: Progress,
    folder: str = "",
    *,
    workers: int,
    executor: Executor,
    due: Mapping[str, Due] = MappingProxyType({}),
    gpu: "Gpu | None" = None,
) -> Streamed:
    """Write every shard, into a folder of the stage if one is named; who does it, and where, changes no byte.

    Args:
        stage: Gets the shards.
        plan: What is written.
        readers: The inputs.
        progress: Told what is written.
        folder: Of the stage, with its slash; empty for the stage itself.
        workers: Tensors that are worked on at a time.
        executor: Who writes.
        due: Modules to be compared with the base while they are written, by name. The comparison decides how a module
            is read.
        gpu: Where the base is quantized, also for the comparison; on the CPU unless given.
    """
    done = Streamed()
    for role, reader in readers.items():
        reader.prefetch([*step_readings(plan.steps, role, reader.tensors), *due_readings(due, role, reader.tensors)])
    tasks = list(shard_tasks(plan, due, folder))
    durable = True
    for result in executor(stage, tasks, readers, progress, workers, gpu):
        durable = durable and result.durable
        done.digests |= result.digests
        done.clipped |= result.clipped
        done.judgements |= result.judgements
        done.not_finite |= result.not_finite
        for name, digest in result.content.items():
            readers["base"].take_content(name, digest)
    stage.written(*(task.file for task in tasks), durable=durable)
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
            made = write_tensors(task, writer, readers, progress, workers, gpu)
        yield shard_result(writer, made)


def write_tensors(
    task: ShardTask,
    writer: ShardWriter,
    readers: Mapping[Origin, CheckpointReader],
    progress: Progress,
    workers: int,
    gpu: "Gpu | None",
) -> dict[str, Made]:
    """Write all tensors of a shard.

    Returns:
        What else came of it, by tensor.
    """
    write = _Writing(writer, task, readers, progress, gpu)
    # Block scales come with the codes.
    coming = {info.name for one in task.due.values() for info in one.block_scales()}
    coming |= {name for name, step in task.steps.items() if step.op == "block_scales"}
    names = [spec.name for spec in writer.layout if spec.name not in coming]
    return dict(zip(names, in_order(names, write, workers), strict=True))


def shard_result(writer: ShardWriter, made: Mapping[str, Made]) -> ShardResult:
    """What came of a shard.

    Args:
        writer: Of the file, which is finished.
        made: By ``write_tensors``.
    """
    named = [(module_of(name), one) for name, one in made.items()]
    clipped = {name: one.clipped for name, one in named if one.clipped is not None}
    judgements = {name: one.judgement for name, one in named if one.judgement is not None}
    broken = {name: one.not_finite for name, one in made.items() if one.not_finite is not None}
    return ShardResult(writer.num_bytes, writer.durable, writer.digests, clipped, judgements, broken)


@dataclass(frozen=True, slots=True)
class _Writing:
    """Writes one tensor of a shard after another; several threads may each write one."""

    writer: ShardWriter
    task: ShardTask
    readers: Mapping[Origin, CheckpointReader]
    progress: Progress
    gpu: "Gpu | None"

    def __call__(self, name: str, stopped: Event) -> Made:
        """Write the tensor, and the block scales that come with it."""
        step, made = self.task.steps[name], Made()
        due = self.task.due.get(module_of(name))
        if due is not None and due.module.weight.name == name:
            self._compared(due, made, stopped)
            return made
        self._write(step, made, stopped)
        if step.op == "quantize_nvfp4":
            self.writer.write(f"{module_of(name)}.weight_scale", self._counted(made.block_scales))
            made.block_scales.clear()  # what came of a tensor is kept until the shard is written
        return made

    def _compared(self, due: Due, made: Made, stopped: Event) -> None:
        """Compare a module with the base, and write it under the reading that the comparison found."""
        import torch

        from modelopt_convert.proof.judgement import format_proof

        self.progress.detail(f"{self.task.file}: {due.module.name}: compared with the base")
        export, base = self.readers["export"], self.readers["base"]
        with torch.inference_mode():  # of each thread
            made.judgement = format_proof(due.algorithm).compare(export, base, due, stopped, None, self.gpu)
        layout = made.judgement.reading or CANONICAL
        for info in (due.module.weight, *due.block_scales()):
            self._write(self.task.steps[info.name].laid(info.shape, layout), made, stopped)

    def _write(self, step: Step, made: Made, stopped: Event) -> None:
        name, reader = step.output.name, self.readers[step.origin]
        self.progress.detail(f"{self.task.file}: {name}: {step.op} from {step.origin}")
        extent = reader.extent(name) if step.op == "copy" else None
        pieces = produce(step, reader, made, self.gpu)
        if step.op in _UNQUANTIZED and step.output.dtype in HALF_AND_FLOAT:
            pieces = made.watched(pieces, step.output)
        self.writer.write(name, until(stopped, self._counted(pieces)), extent)

    def _counted(self, pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        for piece in pieces:
            yield piece
            self.progress.advance(memoryview(piece).nbytes)
