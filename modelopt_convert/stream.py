"""Stream a plan's tensors from their inputs into the stage, several at a time."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Protocol

from modelopt_convert.checkpoint import CheckpointReader
from modelopt_convert.patterns import module_of
from modelopt_convert.plan import Origin, ShardPlan, Step
from modelopt_convert.produce import Layouts, Made, produce
from modelopt_convert.reads import step_readings
from modelopt_convert.shard_writer import ShardWriter
from modelopt_convert.staging import StagingDir
from modelopt_convert.workers import Stopped, in_order

if TYPE_CHECKING:
    from modelopt_convert.on_device import Gpu
    from modelopt_convert.transforms.fp8 import Clipped


class Progress(Protocol):
    """What the work tells whoever watches."""

    def begin(self, what: str, total_bytes: int) -> None:
        """A phase begins."""

    def advance(self, num_bytes: int) -> None:
        """So many more bytes are done."""

    def announce(self, text: str) -> None:
        """One line that is to be read before the work."""

    def detail(self, text: str) -> None:
        """One line for those who asked for more."""


class StreamPlan(Protocol):
    """What streaming needs of a plan."""

    @property
    def shards(self) -> tuple[ShardPlan, ...]:
        """The output files."""

    @property
    def steps(self) -> Mapping[str, Step]:
        """One step per output tensor."""


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
    layouts: Layouts,
    progress: Progress,
    folder: str = "",
    *,
    workers: int,
    gpu: "Gpu | None" = None,
) -> Streamed:
    """Write every shard, into a folder of the stage if one is named; ``workers`` and ``gpu`` change no byte."""
    done = Streamed()
    for role, reader in readers.items():
        reader.prefetch(step_readings(plan.steps, role, reader.tensors))
    for shard in plan.shards:
        file = f"{folder}{shard.file}"
        progress.begin(f"write {file}", sum(spec.num_bytes for spec in shard.tensors))
        with stage.shard(file, shard.tensors, shard.metadata) as writer:
            write = _Writing(writer, plan.steps, readers, layouts, progress, file, gpu)
            # Block scales come with the codes.
            names = [spec.name for spec in writer.layout if plan.steps[spec.name].op != "block_scales"]
            for name, made in zip(names, in_order(names, write, workers), strict=True):
                if made.clipped is not None:
                    done.clipped[module_of(name)] = made.clipped
        stage.finish_shard(writer)
        done.digests |= writer.digests
    return done


@dataclass(frozen=True, slots=True)
class _Writing:
    """Writes one tensor of a shard after another; several threads may each write one."""

    writer: ShardWriter
    steps: Mapping[str, Step]
    readers: Mapping[Origin, CheckpointReader]
    layouts: Layouts
    progress: Progress
    file: str
    gpu: "Gpu | None"

    def __call__(self, name: str, stopped: Event) -> Made:
        """Write the tensor, and the block scales that come with it."""
        step, made = self.steps[name], Made()
        self.progress.detail(f"{self.file}: {name}: {step.op} from {step.origin}")
        extent = self.readers[step.origin].extent(name) if step.op == "copy" else None
        self.writer.write(name, self._watched(step, made, stopped), extent)
        if step.op == "quantize_nvfp4":
            self.writer.write(f"{module_of(name)}.weight_scale", self._counted(made.block_scales))
        return made

    def _watched(self, step: Step, made: Made, stopped: Event) -> Iterator[bytes | memoryview]:
        for piece in self._counted(produce(step, self.readers[step.origin], self.layouts, made, self.gpu)):
            if stopped.is_set():
                raise Stopped
            yield piece

    def _counted(self, pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        for piece in pieces:
            yield piece
            self.progress.advance(memoryview(piece).nbytes)
