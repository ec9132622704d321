"""Stream a plan's tensors from their inputs into the stage: bytes that do not change never pass through a tensor.

torch is imported only for steps that change bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from modelopt_convert.checkpoint import CheckpointReader
from modelopt_convert.errors import InputError
from modelopt_convert.header import TensorInfo
from modelopt_convert.patterns import module_of
from modelopt_convert.plan import CHUNK_BYTES, ShardPlan, Step
from modelopt_convert.staging import StagingDir


class Progress(Protocol):
    """What the work tells whoever watches."""

    def begin(self, what: str, total_bytes: int) -> None:
        """A phase begins."""

    def advance(self, num_bytes: int) -> None:
        """So many more bytes are done."""

    def detail(self, text: str) -> None:
        """One line for those who asked for more."""


@dataclass(frozen=True, slots=True)
class Layouts:
    """Modules that are not stored as ModelOpt writes them.

    Attributes:
        swapped: The high nibble holds the even column.
        swizzled: The scales lie in the 128x4 order.
    """

    swapped: frozenset[str]
    swizzled: frozenset[str]


class StreamPlan(Protocol):
    """What streaming needs of a plan."""

    @property
    def shards(self) -> tuple[ShardPlan, ...]:
        """The output files."""

    @property
    def steps(self) -> Mapping[str, Step]:
        """One step per output tensor."""


def stream(
    stage: StagingDir,
    plan: StreamPlan,
    readers: Mapping[str, CheckpointReader],
    layouts: Layouts,
    progress: Progress,
) -> dict[str, str]:
    """Write every shard; xxh3-128 of each tensor by name."""
    digests: dict[str, str] = {}
    for shard in plan.shards:
        progress.begin(f"write {shard.file}", sum(spec.num_bytes for spec in shard.tensors))
        with stage.shard(shard.file, shard.tensors, shard.metadata) as writer:
            for spec in writer.layout:
                step = plan.steps[spec.name]
                progress.detail(f"{shard.file}: {spec.name}: {step.op} from {step.origin}")
                writer.write(spec.name, _chunks(step, readers[step.origin], layouts, progress))
        stage.finish_shard(writer)
        digests |= writer.digests
    return digests


def _chunks(step: Step, reader: CheckpointReader, layouts: Layouts, progress: Progress) -> Iterator[bytes | memoryview]:
    """The bytes of one output tensor, in pieces; a step's memory is one piece, for scales one tensor."""
    for chunk in _produce(step, reader, reader.tensors[step.output.name], layouts):
        yield chunk
        progress.advance(len(chunk))


def _produce(
    step: Step, reader: CheckpointReader, source: TensorInfo, layouts: Layouts
) -> Iterator[bytes | memoryview]:
    if step.op == "copy":
        yield from reader.chunks(source.name, CHUNK_BYTES)
        return
    from modelopt_convert.transforms import raw

    module = module_of(source.name)
    try:
        if step.op == "cast_bf16":
            for chunk in reader.chunks(source.name, CHUNK_BYTES):  # a multiple of every dtype's size
                yield raw.cast_chunk(chunk, source.dtype, step.output.dtype)
        elif step.op == "repack":
            num_rows, half = step.output.shape
            stored_rows, stored_half = source.shape
            height = max(1, CHUNK_BYTES // stored_half)
            for top in range(0, stored_rows, height):
                chunk = reader.read_range(source.name, top * stored_half, min(height, stored_rows - top) * stored_half)
                keep = max(0, min(height, num_rows - top))
                yield raw.repack_rows(chunk, stored_half, half, keep, swap=module in layouts.swapped)
        elif step.op == "swizzle_scales":
            yield raw.swizzle_scales(reader.read(source.name), source.shape)
        else:
            order = "128x4" if module in layouts.swizzled else "linear"
            rows, columns = step.output.shape
            yield raw.reorder_scales(reader.read(source.name), source.shape, rows, columns, order)
    except ValueError as error:
        where = str(reader.path / source.file)
        raise InputError(
            f"{where}: tensor {source.name!r}: {error}",
            code="export.padding",
            path=where,
            hint="what would be cut is not padding; export again without padding options. Nothing was written",
        ) from error
