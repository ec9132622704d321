"""What is odd about the input scales of a checkpoint's modules. Pure, no torch.

An ``input_scale`` is an activation's amax over 2688 (NVFP4) or 448 (FP8). No base tells it, so it is never proven: it
is held against the scales of the other modules.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from statistics import median

from modelopt_convert.formats.dtypes import E4M3_MAX

# So few modules may have one value, or lie anywhere.
_FEW = 4
_FAR = 3.0  # decades from the median
_RAW_AMAX = 6.0 * E4M3_MAX
_SAME = 1.5  # a scale that is this near a figure is taken for it


def odd_input_scales(
    inputs: Mapping[str, float], weights: Mapping[str, float], fused: Iterable[Collection[str]]
) -> Iterator[str]:
    """What is odd, in words, with the figure; nothing where all is as calibration makes it.

    Args:
        inputs: ``input_scale`` by module, positive and finite.
        weights: The tensor scale of the weight by module.
        fused: Groups of modules that read one and the same input.
    """
    copied = [name for name, value in inputs.items() if value == weights.get(name)]
    if copied:
        yield (
            f"{copied[0]} first: the input_scale of {len(copied)} modules is their weight's scale, "
            f"{inputs[copied[0]]:.6g}: copied, and not calibrated"
        )
    for group in fused:
        values = {inputs[name] for name in group if name in inputs}
        if len(values) > 1:
            ratio = max(values) / min(values)
            yield f"{', '.join(group)}: they read one input, and their input scales differ {ratio:.3f}x"
    if len(inputs) < _FEW:
        return
    if len(set(inputs.values())) == 1:
        yield f"all {len(inputs)} modules have one input_scale, {next(iter(inputs.values())):.6g}: not calibrated"
        return
    middle = median(inputs.values())
    for name, value in inputs.items():
        if 1 / _SAME < value / middle / _RAW_AMAX < _SAME:
            yield f"{name}: input_scale {value:.6g} is 448 * 6 times the median {middle:.6g}: an amax, and not a scale"
        elif abs(math.log10(value / middle)) > _FAR:
            yield f"{name}: input_scale {value:.6g} lies more than three decades from the median {middle:.6g}"
