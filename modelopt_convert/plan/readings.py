"""What will be read, from the plan alone: the Hub is asked for all at once, and a dry run can tell how much it is."""

from collections.abc import Iterator, Mapping

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import Reading
from modelopt_convert.formats.rows import SAMPLED_ROWS, sample_rows
from modelopt_convert.plan.plan import BuildPlan, Origin, Step


def proof_readings(plan: BuildPlan, role: Origin, tensors: Mapping[str, TensorInfo]) -> Iterator[Reading]:
    """What the proof reads of one input; a few rows more where two orders of the scales are to be told apart.

    Args:
        plan: What will be built.
        role: Which input.
        tensors: Its tensors.
    """
    compared = "base" in plan.ledger
    for name in (*plan.must_equal, *plan.may_differ):
        if compared and name in tensors:
            yield name, 0, tensors[name].num_bytes
    for module in plan.modules.values():
        if role == "export":
            for scale in module.scales.values():
                yield scale.name, 0, scale.num_bytes
        weight = tensors.get(module.weight.name)
        if compared and weight is not None:
            row_bytes = weight.num_bytes // weight.shape[0]
            for row in sample_rows(min(module.rows, weight.shape[0]), SAMPLED_ROWS):
                yield weight.name, row * row_bytes, row_bytes


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
