"""Weights of a base as a build would write them, in memory."""

import torch

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.plan.plan import BuildPlan
from modelopt_convert.proof.tensors import load, load_weight
from modelopt_convert.verification.gemm.operands import Weight, operand_format


def packed_weight(base: CheckpointReader, plan: BuildPlan, name: str) -> Weight:
    """One packed module of a build without an export.

    Args:
        base: The unquantized transformer.
        plan: Of the build, once its scales are known (``BuildPlan.with_scales``).
        name: The module.

    Raises:
        MoptError: What reading raises.
    """
    module, step = plan.modules[name], plan.steps[f"{name}.weight"]
    assert step.value is not None  # its scale is known
    values = load_weight(base, module.weight.name).to(torch.bfloat16)
    bias = load(base, module.bias.name).to(torch.bfloat16) if module.bias is not None else None
    if step.quotient == "F32":
        values = values.to(torch.float32)
    return operand_format(plan.format.algorithm).quantized(values, bias, step.value)
