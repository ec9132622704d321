"""Stream a plan's tensors from their inputs into the stage: bytes that do not change never pass through a tensor.

torch is imported only for steps that change bytes.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from modelopt_convert.checkpoint import CheckpointReader
from modelopt_convert.errors import InputError
from modelopt_convert.header import TensorInfo
from modelopt_convert.patterns import module_of
from modelopt_convert.plan import CHUNK_BYTES, Origin, ShardPlan, Step
from modelopt_convert.reads import step_readings
from modelopt_convert.staging import StagingDir

if TYPE_CHECKING:
    from modelopt_convert.transforms.fp8 import Clipped


_COMPUTED_BYTES = CHUNK_BYTES // 4  # arithmetic makes several wider arrays of a piece


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


@dataclass(slots=True)
class Streamed:
    """What came of streaming.

    Attributes:
        digests: xxh3-128 of each tensor by name.
        clipped: What a scale was too small for, by module; only where there was any.
        block_scales: Of the weight whose codes were written last, in pieces, until they are written.
    """

    digests: dict[str, str] = field(default_factory=dict)
    block_scales: list[memoryview] = field(default_factory=list)
    clipped: dict[str, "Clipped"] = field(default_factory=dict)

    def note_clipped(self, module: str, found: "Clipped") -> None:
        """Add what was clipped in one piece of a weight."""
        if found.count:
            before = self.clipped.get(module)
            self.clipped[module] = found if before is None else before.plus(found)


def stream(
    stage: StagingDir,
    plan: StreamPlan,
    readers: Mapping[Origin, CheckpointReader],
    layouts: Layouts,
    progress: Progress,
    folder: str = "",
) -> Streamed:
    """Write every shard, into a folder of the stage if one is named."""
    done = Streamed()
    for role, reader in readers.items():
        reader.prefetch(step_readings(plan.steps, role, reader.tensors))
    for shard in plan.shards:
        file = f"{folder}{shard.file}"
        progress.begin(f"write {file}", sum(spec.num_bytes for spec in shard.tensors))
        with stage.shard(file, shard.tensors, shard.metadata) as writer:
            for spec in writer.layout:
                step = plan.steps[spec.name]
                if step.op == "block_scales":
                    continue  # they come with the codes
                progress.detail(f"{file}: {spec.name}: {step.op} from {step.origin}")
                writer.write(spec.name, _chunks(step, readers[step.origin], layouts, progress, done))
                if step.op == "quantize_nvfp4":
                    scales = f"{module_of(spec.name)}.weight_scale"
                    writer.write(scales, done.block_scales)
                    done.block_scales.clear()
                    progress.advance(plan.steps[scales].output.num_bytes)
        stage.finish_shard(writer)
        done.digests |= writer.digests
    return done


def _chunks(
    step: Step, reader: CheckpointReader, layouts: Layouts, progress: Progress, done: Streamed
) -> Iterator[bytes | memoryview]:
    """The bytes of one output tensor, in pieces; a step's memory is one piece, for scales one tensor."""
    if step.op == "write_scale":
        yield struct.pack("<f", step.value)
        return
    for chunk in _produce(step, reader, reader.tensors[step.output.name], layouts, done):
        yield chunk
        progress.advance(len(chunk))


def _scale_of(step: Step, reader: CheckpointReader) -> float:
    """The scale of a weight: the step's own, or the one beside the weight."""
    if step.value is not None:
        return step.value
    return float(struct.unpack("<f", reader.read(f"{module_of(step.output.name)}.weight_scale"))[0])


def _produce(
    step: Step, reader: CheckpointReader, source: TensorInfo, layouts: Layouts, done: Streamed
) -> Iterator[bytes | memoryview]:
    if step.op == "copy":
        yield from reader.chunks(source.name, CHUNK_BYTES)
        return
    from modelopt_convert.transforms import raw

    module = module_of(source.name)
    try:
        if step.op == "copy_e4m3":
            for chunk in reader.chunks(source.name, CHUNK_BYTES):
                yield raw.check_e4m3(chunk)
        elif step.op == "quantize_fp8":
            scale = _scale_of(step, reader)
            for chunk in reader.chunks(source.name, _COMPUTED_BYTES):
                codes, clipped = raw.quantize_chunk(chunk, source.dtype, scale)
                done.note_clipped(module, clipped)
                yield codes
        elif step.op == "dequantize_fp8":
            scale = _scale_of(step, reader)
            for chunk in reader.chunks(source.name, _COMPUTED_BYTES):
                yield raw.dequantize_chunk(raw.check_e4m3(chunk), scale)
        elif step.op == "quantize_nvfp4":
            assert step.value is not None  # measured by now
            columns = source.shape[1]
            row_bytes = source.num_bytes // source.shape[0]
            for chunk in reader.chunks(source.name, max(1, _COMPUTED_BYTES // row_bytes) * row_bytes):
                codes, scales = raw.quantize_nvfp4_rows(chunk, source.dtype, columns, step.value)
                done.block_scales.append(scales)
                yield codes
        elif step.op == "cast_bf16":
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
        fp8 = step.op in ("copy_e4m3", "quantize_fp8", "dequantize_fp8")
        raise InputError(
            f"{where}: tensor {source.name!r}: {error}",
            code="export.not_finite" if fp8 else "export.padding",
            path=where,
            hint="the export is damaged; export again. Nothing was written"
            if fp8
            else "what would be cut is not padding; export again without padding options. Nothing was written",
        ) from error
