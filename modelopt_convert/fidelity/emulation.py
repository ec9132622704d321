"""Quantized linear layers as an engine computes them, on any device.

A product of two 4-bit values with their block scales has few bits: code times block scale fits BF16 (8 x 127 products),
E4M3 fits BF16, and a product of two BF16 values fits float32. So one GEMM of BF16 operands that adds in float32 is the
quantized GEMM, but for the order of additions. What follows is SGLang's (0.5.23, ``modelopt_quant.py``): the sum times
``input_scale * weight_scale``, rounded to the activations' dtype, and then plus the bias, rounded again.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from modelopt_convert.fidelity.activations import Quantized, quantizer_of
from modelopt_convert.verification.gemm.operands import Weight

Rule = Literal["static", "dynamic", "weight-only"]
"""Whether activations are quantized by a calibrated scale, by one of their own, or not at all."""


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T``, added in float32.

    Args:
        left: BF16 [M, K].
        right: BF16 [N, K].

    Returns:
        float32 [M, N].
    """
    if left.device.type == "cuda":
        return torch.mm(left, right.t(), out_dtype=torch.float32)
    return left.to(torch.float32) @ right.to(torch.float32).t()


class Emulated(nn.Module):
    """One quantized linear layer, as the engine runs it.

    Codes and scales are no parameters. They go where the module is moved to; where layers are offloaded one by one,
    they go to the device of the activations with each call.

    Attributes:
        packed: Its weight as it is stored.
        rule: How activations are quantized.
        input_scale: Of the checkpoint; None where the rule needs none.
        weight: Nothing, in the dtype of the layer; pipelines ask layers for their dtype and device.
    """

    def __init__(
        self,
        packed: Weight,
        rule: Rule,
        input_scale: float | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        keep: bool = False,
        compiled: bool = False,
    ) -> None:
        """Take a layer's weight.

        Args:
            packed: Codes, scales and bias.
            rule: How activations are quantized.
            input_scale: For ``static``.
            dtype: Of the layer's output, where it is asked before it runs.
            keep: Whether the decoded weight is kept after the first call.
            compiled: Whether it runs by the kernels of its format, if that has any.

        Raises:
            ValueError: ``static`` without a finite positive scale.
        """
        super().__init__()
        if rule == "static" and not (input_scale is not None and 0.0 < input_scale < float("inf")):
            raise ValueError(f"expected a finite positive input_scale, found {input_scale}")
        self.packed, self.rule, self.input_scale = packed, rule, input_scale
        self.out_features, self.in_features = packed.shape
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        self._keep, self._quantizer = keep, quantizer_of(packed.algorithm)
        name = self._quantizer.kernels if compiled else None
        self._kernels: Any = import_module(name) if name is not None else None
        self._decoded: Tensor | None = None
        self._scale: Tensor | None = None

    def forward(self, values: Tensor) -> Tensor:
        """The layer's output [..., N] of activations [..., K], in their dtype."""
        rows = values.reshape(-1, self.in_features)
        bias = self.packed.bias.to(rows.device, values.dtype) if self.packed.bias is not None else None
        if self.rule == "weight-only":  # a plain linear layer, which rounds once
            output = functional.linear(rows, self.decoded(rows.device).to(rows.dtype), bias)
        else:
            found = self.quantized(rows)
            product = multiply(found.operand, self.decoded(rows.device))
            scale = found.scale * self.packed.tensor_scale
            if self._kernels is not None:
                output = self._kernels.finish(product, scale, bias, values.dtype)
            else:
                output = product.mul_(scale).to(values.dtype)
                output = output if bias is None else output + bias
        return output.view(*values.shape[:-1], self.out_features)

    def quantized(self, rows: Tensor) -> Quantized:
        """Activations [M, K] as the rule has them; not for ``weight-only``."""
        scale = self._quantizer.own_scale(rows) if self.rule == "dynamic" else self._calibrated(rows.device)
        if self._kernels is not None:
            return Quantized(self._kernels.quantize(rows.contiguous(), scale), scale, self._quantizer.limit(scale))
        return self._quantizer.static(rows, scale)

    def decoded(self, device: torch.device) -> Tensor:
        """BF16 [N, K]: codes times block scales; for ``weight-only`` times the tensor's scale, too, and rounded."""
        if self._decoded is not None and self._decoded.device == device:
            return self._decoded
        packed = self.packed.to(device)
        found: Tensor = packed.in_bf16() if self._kernels is None else self._kernels.decode(packed)
        if self.rule == "weight-only":
            found = (found.to(torch.float32) * packed.tensor_scale).to(torch.bfloat16)
        if self._keep:
            self._decoded = found
        return found

    def _calibrated(self, device: torch.device) -> Tensor:
        """The input scale, float32 []; made once a device, since each copy to a GPU waits for it."""
        if self._scale is None or self._scale.device != device:
            self._scale = torch.tensor(self.input_scale, dtype=torch.float32, device=device)
        return self._scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Emulated":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.packed = self.packed.to(self.weight.device)
        if self._decoded is not None:
            self._decoded = self._decoded.to(self.weight.device)
        return self


@contextmanager
def emulated(
    transformer: nn.Module,
    modules: Mapping[str, Weight],
    rule: Rule,
    input_scales: Mapping[str, float],
    *,
    keep: bool = False,
    compiled: bool = False,
) -> Iterator[nn.Module]:
    """Put emulated layers in the place of linear ones, and these back at the end.

    Args:
        transformer: Has the layers; it is changed in place.
        modules: Weights by the names of the layers.
        rule: How activations are quantized.
        input_scales: By the same names, for ``static``; others are left out.
        keep: As for ``Emulated``.
        compiled: As for ``Emulated``.

    Yields:
        The transformer.

    Raises:
        ValueError: A name is not that of a linear layer of the weight's shape, or has no usable scale.
    """
    layers = dict(transformer.named_modules())
    before: dict[str, nn.Linear] = {}
    made: dict[str, Emulated] = {}
    for name, weight in modules.items():
        found = layers.get(name)
        if not isinstance(found, nn.Linear) or tuple(found.weight.shape) != weight.shape:
            raise ValueError(f"{name}: expected a linear layer {list(weight.shape)}, found {found}")
        before[name] = found
        dtype, scale = found.weight.dtype, input_scales.get(name)
        made[name] = Emulated(weight, rule, scale, dtype=dtype, keep=keep, compiled=compiled).to(found.weight.device)
    try:
        for name, one in made.items():
            transformer.set_submodule(name, one)
        yield transformer
    finally:
        for name, layer in before.items():
            transformer.set_submodule(name, layer)
