"""The bytes of one output tensor, from its input, in pieces: what does not change never passes through a tensor.

torch is imported only for steps that compute with values.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from modelopt_convert.checkpoint.header import TensorInfo, TensorSpec
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import CHUNK_BYTES, CheckpointReader
from modelopt_convert.formats.finite import FiniteWatch, NotFinite, check_e4m3
from modelopt_convert.formats.nvfp4.stored import reorder_scales, repack_rows, swizzle_scales
from modelopt_convert.plan.plan import Step
from modelopt_convert.run.errors import InputError

if TYPE_CHECKING:
    from modelopt_convert.formats.fp8.codes import Clipped
    from modelopt_convert.proof.judgement import Judgement
    from modelopt_convert.write.gpu import Gpu

_COPIED_BYTES = 1 << 20  # read, hashed and written while it is in a core's cache
_COMPUTED_BYTES = CHUNK_BYTES // 4  # arithmetic makes several wider arrays of a piece


@dataclass(slots=True)
class Made:
    """What else came of one step.

    Attributes:
        clipped: What a scale was too small for, if anything.
        block_scales: Of the codes, in pieces.
        judgement: On the module, where it was compared.
        not_finite: NaN and infinity among unquantized values, if there are any.
    """

    clipped: "Clipped | None" = None
    block_scales: list[memoryview] = field(default_factory=list)
    judgement: "Judgement | None" = None
    not_finite: NotFinite | None = None

    def note_clipped(self, found: "Clipped") -> None:
        """Add what was clipped in one piece of a weight."""
        if found.count:
            self.clipped = found if self.clipped is None else self.clipped.plus(found)

    def watched(self, pieces: Iterator[bytes | memoryview], spec: TensorSpec) -> Iterator[bytes | memoryview]:
        """The same pieces of an unquantized tensor; values that are not finite are noted while they pass."""
        watch = FiniteWatch(spec.dtype, spec.shape)
        for piece in pieces:
            watch.add(piece)
            yield piece
        self.not_finite = watch.found()


def produce(step: Step, reader: CheckpointReader, made: Made, gpu: "Gpu | None" = None) -> Iterator[bytes | memoryview]:
    """The bytes of a step's output, each piece good until the next; memory is one piece, for scales one tensor.

    Args:
        step: What is done.
        reader: Its input.
        made: Gets what else comes of it.
        gpu: Where NVFP4 is quantized; on the CPU unless given.

    Raises:
        InputError: ``export.not_finite`` or ``export.padding``.
        BackendError: ``device.failed``.
    """
    if step.op == "write_scale":
        yield struct.pack("<f", step.value)
        return
    if step.op == "quantize_nvfp4" and gpu is not None:
        assert step.value is not None  # measured by now
        info = reader.tensors[step.output.name]
        if step.compensation is not None:
            pieces = gpu.compensated(reader, info, step.value, step.importance, step.compensation)
        else:
            pieces = gpu.quantized(reader, info, step.value, step.weights, step.importance)
        for codes, scales in pieces:
            made.block_scales.append(memoryview(bytes(scales)))  # theirs is good until the next only
            yield codes
        return
    yield from _produce(step, reader, reader.tensors[step.output.name], made)


def _scale_of(step: Step, reader: CheckpointReader) -> float:
    """The scale of a weight: the step's own, or the one beside the weight."""
    if step.value is not None:
        return step.value
    return float(struct.unpack("<f", reader.read(f"{module_of(step.output.name)}.weight_scale"))[0])


def _produce(step: Step, reader: CheckpointReader, source: TensorInfo, made: Made) -> Iterator[bytes | memoryview]:
    if step.op == "copy":
        yield from reader.buffered(source.name, _COPIED_BYTES)
        return
    try:
        if step.op == "copy_e4m3":
            for chunk in reader.buffered(source.name, _COPIED_BYTES):
                yield check_e4m3(chunk)
        elif step.op == "repack":
            num_rows, half = step.output.shape
            stored_half = source.shape[1]
            height = max(1, _COPIED_BYTES // stored_half)
            for number, stored in enumerate(reader.buffered(source.name, height * stored_half)):
                keep = max(0, min(height, num_rows - number * height))
                yield repack_rows(stored, stored_half, half, keep, swap=step.layout.nibbles == "high")
        elif step.op == "swizzle_scales":
            yield swizzle_scales(reader.read(source.name), source.shape)
        elif step.op == "reorder_scales":
            rows, columns = step.output.shape
            yield reorder_scales(reader.read(source.name), source.shape, rows, columns, step.layout.scales)
        else:
            yield from _computed(step, reader, source, made)
    except ValueError as error:
        where = str(reader.folder / source.file)
        fp8 = step.op in ("copy_e4m3", "quantize_fp8", "dequantize_fp8")
        raise InputError(
            f"{where}: tensor {source.name!r}: {error}",
            code="export.not_finite" if fp8 else "export.padding",
            path=where,
            hint="the export is damaged; export again. Nothing was written"
            if fp8
            else "what would be cut is not padding; export again without padding options. Nothing was written",
        ) from error


def _computed(step: Step, reader: CheckpointReader, source: TensorInfo, made: Made) -> Iterator[bytes | memoryview]:
    """What comes of arithmetic on values."""
    from modelopt_convert.formats import tensor_bytes as raw
    from modelopt_convert.formats.nvfp4.gptq import VALUES, Compensation

    if step.op == "quantize_fp8":
        scale = _scale_of(step, reader)
        for chunk in reader.buffered(source.name, _COMPUTED_BYTES):
            codes, clipped = raw.quantize_chunk(chunk, source.dtype, scale, step.quotient)
            made.note_clipped(clipped)
            yield codes
    elif step.op == "dequantize_fp8":
        scale = _scale_of(step, reader)
        for chunk in reader.buffered(source.name, _COMPUTED_BYTES):
            yield raw.dequantize_chunk(check_e4m3(chunk), scale)
    elif step.op == "quantize_nvfp4":
        assert step.value is not None  # measured by now
        columns = source.shape[1]
        row_bytes, height = source.num_bytes // source.shape[0], _COMPUTED_BYTES
        compensation = None
        if step.compensation is not None:
            compensation, height = Compensation.from_bytes(*step.compensation.read()), VALUES * row_bytes // columns
        how = (step.value, step.weights, step.importance, compensation)
        for chunk in reader.buffered(source.name, max(1, height // row_bytes) * row_bytes):
            codes, scales = raw.quantize_nvfp4_rows(chunk, source.dtype, columns, *how)
            made.block_scales.append(scales)
            yield codes
    else:
        for chunk in reader.buffered(source.name, _COMPUTED_BYTES):  # a multiple of every dtype's size
            yield raw.cast_chunk(chunk, source.dtype, step.output.dtype)
