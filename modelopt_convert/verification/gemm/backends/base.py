"""What a backend is: something that multiplies quantized operands. One file each, and a line in ``__init__``."""

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from modelopt_convert.formats.format import Algorithm

Kind = Literal["reference", "emulated", "native"]


class Backend(Protocol):
    """A GEMM.

    Attributes:
        name: As ``--backend`` takes it.
        kind: ``native`` if the kernel itself takes the quantized format.
        formats: What it multiplies.
    """

    name: str
    kind: Kind
    formats: frozenset[Algorithm]

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run here, or None. Asked by calling, not by version: libraries are imported inside."""

    def prepare(self, weight: Any, *, poison: bool) -> Any:
        """Bring a weight into the form that the kernel takes, exactly as a runtime would.

        Args:
            weight: ``Nvfp4Weight`` or ``Fp8Weight``, as ``formats`` says; on the device, in the canonical layout.
            poison: Fill the rows of the scales past N, which reach no output, with NaN in place of zeros. Columns past
                K/16 stay zero: kernels multiply them with zero codes.
        """

    def gemm(self, prepared: Any, activations: Any, alpha: float, out: Tensor | None) -> Tensor:
        """``alpha * activations @ weight.T + bias``.

        Args:
            prepared: From ``prepare``.
            activations: Of the same format, on the device.
            alpha: Product of both tensor scales.
            out: BF16 [M, N] to write into, where the kernel can; others may ignore it and return a new one.

        Returns:
            BF16 [M, N].
        """
