"""Measure a base before it is quantized: the tensor scale of every weight, and whether it has one."""

from collections.abc import Callable, Iterator, Mapping
from threading import Event
from typing import TYPE_CHECKING

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.tensor_bytes import largest_of_chunk
from modelopt_convert.plan.keeps import with_keep
from modelopt_convert.plan.plan import BuildPlan
from modelopt_convert.proof.judgement import format_proof
from modelopt_convert.run.errors import Faults, InputError
from modelopt_convert.run.workers import all_in_order, until

if TYPE_CHECKING:
    from modelopt_convert.write.gpu import Gpu

_MEASURED_BYTES = 1 << 22  # many workers wait for Python's lock between smaller ones; a multiple of every dtype's size


def measure(
    base: CheckpointReader, plan: BuildPlan, workers: int, advance: Callable[[int], None], gpu: "Gpu | None" = None
) -> dict[str, float]:
    """Tensor scales by max calibration, by the largest magnitude of each weight, or of the group that shares one.

    Args:
        base: Read whole, in pieces.
        plan: Says which weights, and which share.
        workers: Weights measured at a time.
        advance: Called with the number of bytes just read.
        gpu: Where it is done; on the CPU unless given.

    Returns:
        The tensor scale of every packed module; a float holds a float32 exactly.

    Raises:
        InputError: ``base.not_finite`` or ``base.all_zero``.
        BackendError: ``device.failed``.
    """
    base.prefetch((plan.modules[name].weight.name, 0, plan.modules[name].weight.num_bytes) for name in plan.packed)

    scale_of = format_proof(plan.format.algorithm).scale_of

    def measured(name: str, stopped: Event) -> float:
        found = _largest(base, plan.modules[name], advance, stopped, gpu)
        if scale_of(found) == 0.0:
            info = plan.modules[name].weight
            where = str(base.folder / info.file)
            raise InputError(
                f"{where}: tensor {info.name!r}: expected values to scale, found none above {found}",
                code="base.all_zero",
                path=where,
                hint=f"the base is damaged or not trained; download it again, or build with --keep-bf16 '{name}'",
            )
        return found

    largest, faults = dict[str, float](), Faults()
    for name, found in zip(plan.packed, all_in_order(plan.packed, measured, workers), strict=True):
        if isinstance(found, InputError):
            faults.add(name, with_keep(found, name, plan.fused))
        else:
            largest[name] = found
    faults.refuse()
    groups = {module: group for group in plan.shared for module in group}
    return {name: scale_of(max(largest[one] for one in groups.get(name, (name,)))) for name in largest}


def measured_bytes(base: CheckpointReader, plan: BuildPlan) -> int:
    """Bytes that ``measure`` will report as read, for the progress bar."""
    return sum(base.tensors[plan.modules[name].weight.name].num_bytes for name in plan.packed)


def differing_groups(plan: BuildPlan, scales: Mapping[str, float]) -> dict[str, float]:
    """Groups that the runtime may fuse whose scales differ, with the largest ratio."""
    values = {", ".join(group): [scales[name] for name in group] for group in plan.fused}
    return {group: max(found) / min(found) for group, found in values.items() if len(set(found)) > 1}


def _pieces(base: CheckpointReader, info: TensorInfo) -> Iterator[tuple[int, float]]:
    for chunk in base.buffered(info.name, _MEASURED_BYTES):
        yield len(chunk), largest_of_chunk(chunk, info.dtype)


def _largest(
    base: CheckpointReader,
    module: PackedModule,
    advance: Callable[[int], None],
    stopped: Event,
    gpu: "Gpu | None",
) -> float:
    info = module.weight
    where = str(base.folder / info.file)
    found = 0.0
    try:
        pieces = gpu.largest(base, info) if gpu is not None else _pieces(base, info)
        for num_bytes, largest in until(stopped, pieces):
            found = max(found, largest)
            advance(num_bytes)
    except ValueError as error:
        raise InputError(
            f"{where}: tensor {info.name!r}: {error}",
            code="base.not_finite",
            path=where,
            hint="the base is damaged; download it again. Nothing was written",
        ) from error
    return found
