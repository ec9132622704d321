"""The probes of a backend: identity, random, sweep over M, poison. Each compares with the exact product.

The activations are packed here, in kernel order: packed by the same wrong packer as the weight, a nibble swap would
cancel.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modelopt_convert.verification.gemm.backends.base import Backend
from modelopt_convert.verification.gemm.backends.reference import exact, spread, tile_rows
from modelopt_convert.verification.gemm.metrics import Metrics, measure
from modelopt_convert.verification.gemm.operands import (
    RANDOM_ROWS,
    Activations,
    Weight,
    probing_values,
    random_values,
)

# Sizes of whole tiles and one past them; 512 text tokens with an image's 4096 make 4608.
SWEEP = (1, 8, 17, 32, 33, 64, 128, 512, 1000, 4096, 4608)
_TILE_COLUMNS = 1024
_JUDGED_ROWS = 512  # at a time: bounds float64 memory, and a few wrong rows do not vanish among thousands
# On a CPU: M * N * K of the exact product beyond 512 rows; a second or so.
_CPU_ROWS, _CPU_WORK = 512, 1 << 32
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What one probe found.

    Attributes:
        probe: ``identity``, ``random``, ``sweep`` or ``poison``.
        status: ``pass``, ``warn``, ``fail`` or ``skipped``.
        detail: What failed, or why it was skipped; empty for a pass.
        metrics: The worst, where the probe has any.
        rows: Output features that are wrong, the first few.
        columns: Input features that are wrong, the first few.
        sizes: Every M that was multiplied, and all of whose rows were compared.
    """

    probe: str
    status: str
    detail: str = ""
    metrics: Metrics | None = None
    rows: tuple[int, ...] = field(default=())
    columns: tuple[int, ...] = field(default=())
    sizes: tuple[int, ...] = field(default=())


def identity_probe(backend: Backend, weight: Weight, device: torch.device) -> ProbeResult:
    """Multiply by the identity: what comes out must be the decoded weight, bit for bit.

    It localises a fault to rows and columns, and is the only probe that sees a single flipped bit of the preparation.
    """
    plain = weight.without_bias()
    prepared = backend.prepare(plain, poison=False)
    num_rows, num_columns = weight.shape
    bad_rows = torch.zeros(num_rows, dtype=torch.bool, device=device)
    bad_columns = torch.zeros(num_columns, dtype=torch.bool, device=device)
    for begin in range(0, num_columns, _TILE_COLUMNS):
        end = min(begin + _TILE_COLUMNS, num_columns)
        activations = plain.one_hot(begin, end, device)
        _soil(end - begin, num_rows, device)
        found = backend.gemm(prepared, activations, 1.0, None).T
        height, strip = tile_rows(end - begin, device), plain.columns(begin, end)
        for top in range(0, num_rows, height):
            wanted = strip.decode(top, top + height).to(torch.bfloat16)
            # + 0.0: a GEMM of -0 with zeros gives +0.
            wrong = (found[top : top + height] + 0.0) != (wanted + 0.0)
            bad_rows[top : top + height] |= wrong.any(dim=1)
            bad_columns[begin:end] |= wrong.any(dim=0)
    rows, columns = bad_rows.nonzero().flatten().tolist(), bad_columns.nonzero().flatten().tolist()
    if not rows:
        return ProbeResult("identity", "pass")
    detail = f"{len(rows)} of {num_rows} rows and {len(columns)} of {num_columns} columns are not the decoded weight's"
    return ProbeResult("identity", "fail", detail, rows=tuple(rows[:_SHOWN]), columns=tuple(columns[:_SHOWN]))


def random_probe(backend: Backend, weight: Weight, device: torch.device, *, poison: bool = False) -> ProbeResult:
    """Multiply seeded activations with the real scales and bias."""
    name = "poison" if poison else "random"
    return _compare(name, backend, weight, probing_values(weight.shape[1]), [RANDOM_ROWS], device, poison=poison)


def sweep_probe(
    backend: Backend, weight: Weight, device: torch.device, *, sizes: Sequence[int] | None = None
) -> ProbeResult:
    """The random probe at several M: kernels differ by it, and one returned zeros at some (flashinfer#3398).

    Args:
        backend: Which.
        weight: The weight, on the device.
        device: Where.
        sizes: Some of ``sweep_sizes``; None for all.
    """
    whole = sweep_sizes(weight.shape, device)
    # As many whatever the sizes: an M has the same activations in every sweep of a layer.
    values = random_values(whole[-1], weight.shape[1])
    return _compare("sweep", backend, weight, values, whole if sizes is None else sizes, device, poison=False)


def sweep_sizes(shape: tuple[int, int], device: torch.device) -> tuple[int, ...]:
    """Every M that a layer of N x K is multiplied with: ``SWEEP``; on a CPU, of large layers, those up to 512."""
    if device.type != "cpu":
        return SWEEP
    return tuple(size for size in SWEEP if size <= _CPU_ROWS or size * shape[0] * shape[1] <= _CPU_WORK)


def poison_probe(backend: Backend, weight: Weight, device: torch.device) -> ProbeResult:
    """NaN in the scales' padding, which no kernel may read, and in the output, which it must overwrite."""
    return random_probe(backend, weight, device, poison=True)


def _compare(
    probe: str,
    backend: Backend,
    weight: Weight,
    values: Tensor,
    sizes: Sequence[int],
    device: torch.device,
    *,
    poison: bool,
) -> ProbeResult:
    prepared, num_features = backend.prepare(weight, poison=poison), weight.shape[0]
    worst: tuple[str, Metrics] | None = None
    values = values.to(device)
    for num_rows in sizes:
        # The last rows: a row lies elsewhere at every M, so that what is left of another output is wrong here.
        activations = weight.activations(values[-num_rows:])
        alpha = weight.tensor_scale * activations.tensor_scale
        out = torch.full((num_rows, num_features), torch.nan, dtype=torch.bfloat16, device=device) if poison else None
        _soil(num_rows, num_features, device)
        output = backend.gemm(prepared, activations, alpha, out)
        if tuple(output.shape) != (num_rows, num_features):
            words = f"M = {num_rows}: the output is {list(output.shape)}, not {[num_rows, num_features]}"
            return ProbeResult(probe, "fail", words, sizes=tuple(sizes))
        for begin in range(0, num_rows, _JUDGED_ROWS):
            end = min(begin + _JUDGED_ROWS, num_rows)
            metrics = _judge(output, weight, activations, alpha, begin, end)
            if worst is None or _rank(metrics) > _rank(worst[1]):
                worst = f"M = {num_rows}, rows {begin} to {end - 1}", metrics
    assert worst is not None
    at, metrics = worst
    detail = "" if metrics.status == "pass" else f"{at}: not finite"
    if detail and metrics.finite:
        detail = (
            f"{at}: calc_diff {metrics.calc_diff:.2g}, gain {metrics.gain:.4f}, "
            f"worst row {metrics.worst_row:.2g}, worst column {metrics.worst_column:.2g}"
        )
    return ProbeResult(probe, metrics.status, detail, metrics, sizes=tuple(sizes))


def _judge(output: Tensor, weight: Weight, activations: Activations, alpha: float, begin: int, end: int) -> Metrics:
    """Of rows ``begin`` to ``end``."""
    some = activations.part(begin, end)
    return measure(output[begin:end], exact(weight, some, alpha), spread(weight, some, alpha))


def _soil(num_rows: int, num_features: int, device: torch.device) -> None:
    """Leave NaN in the memory that an output gets next.

    It may hold what another backend rightly returned, which a kernel that writes nothing would return again.
    """
    torch.full((num_rows, num_features), torch.nan, dtype=torch.bfloat16, device=device)


def _rank(metrics: Metrics) -> tuple[int, float]:
    return ("pass", "warn", "fail").index(metrics.status), metrics.calc_diff if metrics.finite else float("inf")
