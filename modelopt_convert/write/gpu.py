"""Measure and quantize weights on a GPU: the same bytes as on the CPU, with reading, copies and arithmetic overlapped.

An export is compared with what the GPU makes of its base; the comparison itself is the CPU's.

Each worker has two slots, each with page-locked memory and a stream of its own. While one slot's chunk is copied over,
worked on and copied back, the other's is read from disk, or its codes are written. The slots bound the memory: 41 MiB a
worker on the host, about a quarter of a GB on the GPU.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from modelopt_convert.checkpoint.calibration import StoredCompensation
from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.formats.format import Weights
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.formats.nvfp4.gptq import Compensation, compensation
from modelopt_convert.formats.nvfp4.sweep import QUANTIZERS, quantize
from modelopt_convert.formats.tensor_bytes import TORCH_DTYPES, from_bytes, largest_bits, magnitude, to_bytes
from modelopt_convert.proof.tensors import Again
from modelopt_convert.run.errors import BackendError, InconclusiveError, first_line

CHUNK_BYTES = 16 << 20  # far above what a copy costs at least; a multiple of a block of every dtype
_CHECKED_COLUMNS = 512  # several panels
_GPTQ_VALUES = 1 << 26  # of a weight that GPTQ works on at a time, in about 2 GB of the GPU
_CHECKED_SCALES = (3e-5, 1.0, 1e-40)  # as weights have them, and one whose products are subnormal

_Work = Callable[[Tensor, "Slot"], None]


class Slot:
    """Room for one chunk on its way to the device and back.

    Attributes:
        given: The chunk, uint8.
        codes: Of it, two to a byte.
        scales: Of its blocks.
        largest: Its largest magnitude: bits of BF16, or float32.
        num_bytes: Of ``given`` that are in use.
    """

    def __init__(self, device: torch.device) -> None:
        """Take the memory, page-locked if it is for a GPU."""
        on_gpu = device.type == "cuda"
        self._device = device
        with _failures(), torch.inference_mode():
            self.given, self.codes, self.scales, self.largest = (
                torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
                for size in (CHUNK_BYTES, CHUNK_BYTES // 4, CHUNK_BYTES // 2 // BLOCK_SIZE, 4)
            )
            self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
            # Whoever waits sleeps: a core that spins is one that does not read.
            self._done = torch.cuda.Event(blocking=True) if on_gpu else None  # type: ignore[no-untyped-call]
        self.num_bytes = 0

    def launch(self, work: _Work, num_bytes: int) -> None:
        """Have ``work`` done with the first bytes of ``given``; it is done after ``wait``."""
        self.num_bytes = num_bytes
        with _failures(), torch.inference_mode(), self._own_stream():
            work(self.given[:num_bytes].to(self._device, non_blocking=True), self)
            if self._done is not None:
                self._done.record()

    def wait(self) -> None:
        """Until what was launched is done."""
        if self._done is not None:
            with _failures():
                self._done.synchronize()

    def _own_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class Gpu:
    """Where weights are measured and quantized instead of on the CPU; for several threads at a time."""

    def __init__(self, device: torch.device) -> None:
        """Use a device.

        Args:
            device: A GPU; in tests also the CPU.
        """
        self._device = device
        self._idle: list[tuple[Slot, Slot]] = []

    def largest(self, reader: CheckpointReader, info: TensorInfo) -> Iterator[tuple[int, float]]:
        """For each piece of a weight its bytes, and its largest magnitude rounded to BF16.

        Raises:
            ValueError: A value is NaN or infinity, or rounds to infinity.
            BackendError: ``device.failed``.
        """

        def work(given: Tensor, slot: Slot) -> None:
            bits = largest_bits(given.view(TORCH_DTYPES[info.dtype]))
            slot.largest.view(torch.int16)[:1].copy_(bits.reshape(1), non_blocking=True)

        for slot in self._through(reader, info, work):
            yield slot.num_bytes, magnitude(slot.largest.view(torch.int16)[0])

    def quantized(
        self,
        reader: CheckpointReader,
        info: TensorInfo,
        scale: float,
        weights: Weights = "max",
        importance: bytes = b"",
    ) -> Iterator[tuple[memoryview, memoryview]]:
        """Codes and block scales of a weight, as ``quantize_nvfp4_rows`` has them, in pieces good until the next.

        Args:
            reader: Holds the weight.
            info: Its place; K a multiple of 16, so that blocks lie one behind the other.
            scale: The global scale.
            weights: How block scales are chosen.
            importance: For ``sweep-weighted``: how much an error in each column weighs, float32 [K].

        Raises:
            BackendError: ``device.failed``.
        """
        row_bytes = info.num_bytes // info.shape[0]
        elements, height = row_bytes // info.shape[1], None
        counts = from_bytes(importance, "F32", (info.shape[1],)) if importance else None
        if counts is not None:  # of whole rows, so that a chunk begins with the first column
            height = self.height(row_bytes) * row_bytes
        work = _quantizing(info.dtype, "BF16", scale, weights, counts)
        for slot in self._through(reader, info, work, height):
            blocks = slot.num_bytes // elements // BLOCK_SIZE
            yield to_bytes(slot.codes[: blocks * BLOCK_SIZE // 2]), to_bytes(slot.scales[:blocks])

    def compensated(
        self, reader: CheckpointReader, info: TensorInfo, scale: float, importance: bytes, stored: StoredCompensation
    ) -> Iterator[tuple[memoryview, memoryview]]:
        """Codes by GPTQ and block scales, in pieces of whole rows; reading waits for the device, which is the slower.

        Args:
            reader: Holds the weight.
            info: Its place.
            scale: The global scale.
            importance: How much an error in each column weighs, float32 [K].
            stored: What GPTQ needs.

        Raises:
            InputError: ``calibration.damaged``.
            BackendError: ``device.failed``.
        """
        rows, columns = info.shape
        row_bytes, height = info.num_bytes // rows, max(1, _GPTQ_VALUES // columns)
        counts = from_bytes(importance, "F32", (columns,)).to(self._device)
        found = Compensation.from_bytes(*stored.read()).to(self._device)
        factor = torch.full((), scale, dtype=torch.float32, device=self._device)
        for chunk in reader.buffered(info.name, height * row_bytes):
            with _failures(), torch.inference_mode():
                given = from_bytes(chunk, info.dtype, (-1, columns)).to(self._device).to(torch.bfloat16)
                packed, scales = (one.cpu() for one in quantize("gptq", given, factor, counts, found))
            yield to_bytes(packed), to_bytes(scales)

    def height(self, row_bytes: int) -> int:
        """Rows of so many bytes that are worked on at a time; 0 if a row is too long."""
        return CHUNK_BYTES // row_bytes

    def again(self, base: CheckpointReader, info: TensorInfo, cast: str, scale: float, height: int) -> Iterator[Again]:
        """A weight, quantized again as ``quantize_nvfp4`` has it, so many rows at a time.

        Args:
            base: Holds the weight.
            info: Its place; K a multiple of 16.
            cast: The dtype that it is brought to first.
            scale: The global scale.
            height: Rows at a time.

        Raises:
            BackendError: ``device.failed``.
        """
        quantize = _quantizing(info.dtype, cast, scale)

        def work(given: Tensor, slot: Slot) -> None:
            quantize(given, slot)
            amax = given.view(TORCH_DTYPES[info.dtype]).to(TORCH_DTYPES[cast]).abs().amax()
            slot.largest.view(torch.float32).copy_(amax.reshape(1), non_blocking=True)

        columns = info.shape[1]
        for slot in self._through(base, info, work, height * (info.num_bytes // info.shape[0])):
            rows = slot.given[: slot.num_bytes].view(TORCH_DTYPES[info.dtype]).view(-1, columns)
            blocks = rows.numel() // BLOCK_SIZE
            yield Again(
                rows.to(TORCH_DTYPES[cast]),
                slot.codes[: blocks * BLOCK_SIZE // 2].view(len(rows), -1),
                slot.scales[:blocks].view(len(rows), -1),
                float(slot.largest.view(torch.float32)),
            )

    def name(self) -> str:
        """What it is called."""
        return torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type

    def peak_bytes(self) -> int:
        """The most of its memory that was in use so far."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0

    def check(self) -> None:
        """See on every value of 16 bits that the device rounds as the CPU does.

        Raises:
            BackendError: ``device.differs`` or ``device.failed``.
        """
        slot = Slot(self._device)
        counts = torch.logspace(-3, 3, BLOCK_SIZE)
        rules: dict[Weights, Tensor | None] = {**dict.fromkeys(QUANTIZERS), "sweep-weighted": counts}
        for dtype, scale, (weights, importance) in itertools.product(("BF16", "F16"), _CHECKED_SCALES, rules.items()):
            values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(TORCH_DTYPES[dtype])
            rows = values[values.isfinite()].reshape(BLOCK_SIZE, -1)
            blocks = torch.cat([rows.reshape(-1, BLOCK_SIZE), rows.t()])  # of neighbours, and of far apart
            raw = blocks.contiguous().view(torch.uint8).reshape(-1)
            packed, scales = quantize(weights, blocks, torch.tensor(scale, dtype=torch.float32), importance)
            slot.given.numpy()[: raw.numel()] = raw.numpy()
            slot.launch(_quantizing(dtype, dtype, scale, weights, importance), raw.numel())
            slot.wait()
            codes = slot.codes[: packed.numel()]
            _refuse_unless(
                torch.equal(codes, packed.reshape(-1))
                and torch.equal(slot.scales[: scales.numel()], scales.view(torch.uint8).reshape(-1))
            )
        self._check_gptq()

    def _check_gptq(self) -> None:
        """See that sums of products of whole numbers are exact here, too: GPTQ's codes depend on every one."""
        made = torch.Generator().manual_seed(0)
        inputs = torch.randn(64, _CHECKED_COLUMNS, generator=made, dtype=torch.float64)
        weight = torch.randn(64, _CHECKED_COLUMNS, generator=made).to(torch.bfloat16)
        factor, counts = torch.tensor(1e-3), torch.ones(_CHECKED_COLUMNS)
        found, _ = compensation(inputs.T @ inputs)
        expected = quantize("gptq", weight, factor, counts, found)
        with _failures(), torch.inference_mode():
            weight, factor, counts = (one.to(self._device) for one in (weight, factor, counts))
            given = weight, factor, counts, found.to(self._device)
            packed, scales = (one.cpu() for one in quantize("gptq", *given))
        equal = (torch.equal(packed, expected[0]), torch.equal(scales.view(torch.uint8), expected[1].view(torch.uint8)))
        _refuse_unless(all(equal))

    def _through(
        self, reader: CheckpointReader, info: TensorInfo, work: _Work, chunk_bytes: int | None = None
    ) -> Iterator[Slot]:
        """Every chunk of a tensor, in order, after ``work``; a slot is its caller's until the next is taken."""
        chunk_bytes = chunk_bytes or CHUNK_BYTES
        reader.prefetch([(info.name, 0, info.num_bytes)])
        with self._slots() as slots:
            launched: Slot | None = None
            for number, begin in enumerate(range(0, info.num_bytes, chunk_bytes)):
                slot, size = slots[number % 2], min(chunk_bytes, info.num_bytes - begin)
                reader.read_into(info.name, begin, to_bytes(slot.given)[:size])
                slot.launch(work, size)
                if launched is not None:
                    launched.wait()
                    yield launched
                launched = slot
            if launched is not None:
                launched.wait()
                yield launched

    @contextmanager
    def _slots(self) -> Iterator[tuple[Slot, Slot]]:
        try:
            slots = self._idle.pop()
        except IndexError:
            slots = (Slot(self._device), Slot(self._device))
        yield slots
        self._idle.append(slots)  # not where the work broke off: it may still be going on in them


def open_gpu() -> Gpu:
    """The GPU, once it is known to give the CPU's bytes.

    Raises:
        InconclusiveError: ``device.none``.
        BackendError: ``device.differs`` or ``device.failed``.
    """
    if not torch.cuda.is_available():
        raise InconclusiveError(
            "--device cuda: torch sees no GPU",
            code="device.none",
            hint="install the CUDA build of torch on a machine with a GPU, or leave --device out, for the same bytes",
        )
    with _failures():
        gpu = Gpu(torch.device("cuda", torch.cuda.current_device()))
    gpu.check()
    return gpu


def _quantizing(
    dtype: str, cast: str, scale: float, weights: Weights = "max", importance: Tensor | None = None
) -> _Work:
    columns = BLOCK_SIZE if importance is None else len(importance)

    def work(given: Tensor, slot: Slot) -> None:
        rows = given.view(TORCH_DTYPES[dtype]).to(TORCH_DTYPES[cast]).view(-1, columns)
        # On the same device: by a divisor that lies on the CPU, torch divides by multiplying with its reciprocal.
        factor = torch.full((), scale, dtype=torch.float32, device=given.device)
        counts = importance.to(given.device) if importance is not None else None
        packed, scales = quantize(weights, rows, factor, counts)
        slot.codes[: packed.numel()].copy_(packed.reshape(-1), non_blocking=True)
        slot.scales[: scales.numel()].copy_(scales.view(torch.uint8).reshape(-1), non_blocking=True)

    return work


def _refuse_unless(is_equal: bool) -> None:
    if not is_equal:
        raise BackendError(
            "--device cuda: this GPU, or torch's build for it, rounds otherwise than the CPU",
            code="device.differs",
            hint="leave --device out, and report the GPU and torch's version. Nothing was written",
        )


@contextmanager
def _failures() -> Iterator[None]:
    """CUDA's own errors, memory among them, are of the GPU, and not of the checkpoint."""
    try:
        yield
    except RuntimeError as error:
        raise BackendError(
            f"--device cuda: the GPU failed: {first_line(error)}",
            code="device.failed",
            hint="free its memory, take fewer --workers, or leave --device out: the bytes are the same. "
            "Nothing was written",
        ) from error
