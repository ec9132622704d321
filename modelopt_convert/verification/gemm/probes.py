"""The probes of a backend: identity, random, sweep over M, poison. Each compares with the exact product.

The activations are packed here, in kernel order: packed by the same wrong packer as the weight, a nibble swap would
cancel.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from modelopt_convert.verification.gemm.backends.base import Backend
from modelopt_convert.verification.gemm.backends.reference import exact, spread
from modelopt_convert.verification.gemm.metrics import Metrics, measure
from modelopt_convert.verification.gemm.operands import Weight, random_activations

SWEEP = (1, 8, 32, 64, 128, 512)
RANDOM_ROWS = 64
_TILE_ROWS = 1024
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
    """

    probe: str
    status: str
    detail: str = ""
    metrics: Metrics | None = None
    rows: tuple[int, ...] = field(default=())
    columns: tuple[int, ...] = field(default=())


def identity_probe(backend: Backend, weight: Weight, device: torch.device) -> ProbeResult:
    """Multiply by the identity: what comes out must be the decoded weight, bit for bit.

    It localises a fault to rows and columns, and is the only probe that sees a single flipped bit of the preparation.
    """
    plain = weight.without_bias()
    prepared = backend.prepare(plain, poison=False)
    num_rows, num_columns = weight.shape
    bad_rows = torch.zeros(num_rows, dtype=torch.bool, device=device)
    bad_columns = torch.zeros(num_columns, dtype=torch.bool, device=device)
    for begin in range(0, num_columns, _TILE_ROWS):
        end = min(begin + _TILE_ROWS, num_columns)
        found = backend.gemm(prepared, plain.one_hot(begin, end, device), 1.0, None).T
        for top in range(0, num_rows, _TILE_ROWS):
            wanted = plain.decode(top, top + _TILE_ROWS)[:, begin:end].to(torch.bfloat16)
            # + 0.0: a GEMM of -0 with zeros gives +0.
            wrong = (found[top : top + _TILE_ROWS] + 0.0) != (wanted + 0.0)
            bad_rows[top : top + _TILE_ROWS] |= wrong.any(dim=1)
            bad_columns[begin:end] |= wrong.any(dim=0)
    rows, columns = bad_rows.nonzero().flatten().tolist(), bad_columns.nonzero().flatten().tolist()
    if not rows:
        return ProbeResult("identity", "pass")
    detail = f"{len(rows)} of {num_rows} rows and {len(columns)} of {num_columns} columns are not the decoded weight's"
    return ProbeResult("identity", "fail", detail, rows=tuple(rows[:_SHOWN]), columns=tuple(columns[:_SHOWN]))


def random_probe(backend: Backend, weight: Weight, device: torch.device, *, poison: bool = False) -> ProbeResult:
    """Multiply seeded activations with the real scales and bias."""
    return _compare("poison" if poison else "random", backend, weight, [RANDOM_ROWS], device, poison=poison)


def sweep_probe(backend: Backend, weight: Weight, device: torch.device) -> ProbeResult:
    """The random probe at several M: kernels differ by it, and one returned zeros at some (flashinfer#3398)."""
    return _compare("sweep", backend, weight, SWEEP, device, poison=False)


def poison_probe(backend: Backend, weight: Weight, device: torch.device) -> ProbeResult:
    """NaN in the scales' padding, which no kernel may read, and in the output, which it must overwrite."""
    return random_probe(backend, weight, device, poison=True)


def _compare(
    probe: str, backend: Backend, weight: Weight, sizes: Sequence[int], device: torch.device, *, poison: bool
) -> ProbeResult:
    prepared = backend.prepare(weight, poison=poison)
    worst: tuple[int, Metrics] | None = None
    for num_rows in sizes:
        activations = random_activations(weight, num_rows, device)
        alpha = weight.tensor_scale * activations.tensor_scale
        out = (
            torch.full((num_rows, weight.shape[0]), torch.nan, dtype=torch.bfloat16, device=device) if poison else None
        )
        output = backend.gemm(prepared, activations, alpha, out)
        metrics = measure(output, exact(weight, activations, alpha), spread(weight, activations, alpha))
        if worst is None or _rank(metrics) > _rank(worst[1]):
            worst = num_rows, metrics
    assert worst is not None
    at, metrics = worst
    if metrics.status == "pass":
        return ProbeResult(probe, "pass", metrics=metrics)
    detail = (
        f"M = {at}: calc_diff {metrics.calc_diff:.2g}, gain {metrics.gain:.4f}, worst column {metrics.worst_column:.2g}"
        if metrics.finite
        else f"M = {at}: not finite"
    )
    return ProbeResult(probe, metrics.status, detail, metrics)


def _rank(metrics: Metrics) -> tuple[int, float]:
    return ("pass", "warn", "fail").index(metrics.status), metrics.calc_diff if metrics.finite else float("inf")
