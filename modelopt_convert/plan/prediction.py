"""What a plan will read, and the memory that it will take, from the plan alone.

The Hub is asked for everything at once, a dry run tells how much that is, and the proof's progress is measured by it.
"""

from collections.abc import Iterable, Iterator, Mapping

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import CHUNK_BYTES, Reading
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.rows import SAMPLED_ROWS, sample_rows
from modelopt_convert.plan.plan import BuildPlan, Origin, Step

# Eight requests of this size fill a line of 1 Gbit/s where an answer takes 50 ms to begin.
GROWN_BYTES = 1 << 20


def proof_readings(plan: BuildPlan, role: Origin, tensors: Mapping[str, TensorInfo]) -> Iterator[Reading]:
    """What the proof reads of one input; a few rows more where two orders of the scales are to be told apart.

    Args:
        plan: What will be built.
        role: Which input.
        tensors: Its tensors.
    """
    if is_compared(plan):
        for name in (*plan.must_equal, *plan.may_differ):
            if name in tensors:
                yield name, 0, tensors[name].num_bytes
    for module in plan.modules.values():
        if role == "export":
            yield from scale_readings(module)
        if is_compared(plan):
            yield from row_readings(module, tensors)


def whole_readings(plan: BuildPlan, role: Origin, tensors: Mapping[str, TensorInfo]) -> Iterator[Reading]:
    """What is read of one input where all of what is written is compared: the weights of modules that stay packed."""
    for module in (plan.modules[name] for name in plan.packed if is_compared(plan)):
        if module.weight.name in tensors:
            yield module.weight.name, 0, tensors[module.weight.name].num_bytes


def grown(readings: Iterable[Reading], wholes: Iterable[Reading]) -> Iterator[Reading]:
    """Readings with what lies around each, of tensors that will be read whole: to ask takes longer than to send a row.

    Args:
        readings: What is read first.
        wholes: What is read later, whole tensors; nothing else is added.
    """
    sizes = {name: count for name, _, count in wholes}
    for name, begin, count in readings:
        first = begin // GROWN_BYTES * GROWN_BYTES if name in sizes else begin
        end = min(-(-(begin + count) // GROWN_BYTES) * GROWN_BYTES, sizes.get(name, begin + count))
        yield name, first, end - first


def is_compared(plan: BuildPlan) -> bool:
    """Whether there is a base to compare an export with."""
    return "base" in plan.ledger


def scale_readings(module: PackedModule) -> Iterator[Reading]:
    """All scales of a module."""
    for scale in module.scales.values():
        yield scale.name, 0, scale.num_bytes


def row_readings(module: PackedModule, tensors: Mapping[str, TensorInfo]) -> Iterator[Reading]:
    """The rows of a module's weight that the proof looks at, in one input."""
    weight = tensors.get(module.weight.name)
    if weight is not None:
        row_bytes = weight.num_bytes // weight.shape[0]
        for row in sample_rows(min(module.rows, weight.shape[0]), SAMPLED_ROWS):
            yield weight.name, row * row_bytes, row_bytes


def num_bytes(readings: Iterable[Reading]) -> int:
    """Bytes of readings, for the progress bar."""
    return sum(count for _, _, count in readings)


def peak_bytes(plan: BuildPlan, workers: int) -> int:
    """Working memory beyond start-up: for each worker chunks in flight, or the proof of the largest module.

    With a GPU the chunks in flight are the slots of gpu.py, which are smaller; its own memory, about a quarter of a GB
    a worker, is not counted here.
    """
    # Scale bytes twice (as read and as masks), and about a dozen float32 or int64 arrays of the sampled rows.
    proofs = (
        2 * num_bytes(reading for reading in scale_readings(module) if reading[0].endswith(".weight_scale"))
        + 64 * (SAMPLED_ROWS + 2) * module.columns
        for module in plan.modules.values()
    )
    computed = any(step.op.startswith(("quantize_", "dequantize_")) for step in plan.steps.values())
    # The block scales of one weight wait for the last of its codes.
    waiting = max((step.output.num_bytes for step in plan.steps.values() if step.op == "block_scales"), default=0)
    # Of 36 builds by one worker that quantized, the largest took 8.1 chunks.
    return workers * max((9 if computed else 3) * CHUNK_BYTES + waiting, max(proofs, default=0) + 2 * waiting)


def step_readings(steps: Mapping[str, Step], role: Origin, tensors: Mapping[str, TensorInfo]) -> Iterator[Reading]:
    """What the steps that build from one input read of it.

    Args:
        steps: By output tensor.
        role: Which input.
        tensors: Its tensors.
    """
    for name, step in steps.items():
        if step.origin == role and name in tensors:
            yield name, 0, tensors[name].num_bytes
            scale = tensors.get(f"{module_of(name)}.weight_scale")
            if step.op in ("quantize_fp8", "dequantize_fp8") and scale is not None:
                yield scale.name, 0, scale.num_bytes
