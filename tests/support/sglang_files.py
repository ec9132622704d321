"""Headers as SGLang looks at them, and what the table says that it believes."""

import json
from typing import Any

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.engines.belief import Belief
from modelopt_convert.engines.sglang import believe

FILE = "model.safetensors"
UNSIZED: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
MODELOPT = UNSIZED | {"group_size": 16}
SWIZZLED = {"checkpoint_weight_scale_layout": "swizzled"}
SWAPPED = {"swap_weight_nibbles": True}
Tensors = dict[str, TensorInfo]


def tensor(name: str, dtype: str, shape: tuple[int, ...], file: str = FILE) -> Tensors:
    return {name: TensorInfo(name, dtype, shape, file, 0, 0)}


def packed(
    module: str = "blocks.0.to_q",
    weight: tuple[int, ...] = (160, 80),
    scale: tuple[int, ...] = (160, 10),
    file: str = FILE,
    scale_file: str | None = None,
    scale_dtype: str = "F8_E4M3",
) -> Tensors:
    return tensor(f"{module}.weight", "U8", weight, file) | tensor(
        f"{module}.weight_scale", scale_dtype, scale, scale_file or file
    )


def marker(module: str = "blocks.0.to_q") -> Tensors:
    return tensor(f"{module}.comfy_quant", "U8", (18,))


UNPACKED = tensor("blocks.0.to_q.weight", "BF16", (160, 160))


def believed(
    tensors: Tensors, config: dict[str, Any] | None = None, header: dict[str, Any] | None = None, file: str = FILE
) -> Belief:
    """Of a component whose config.json has this quantization_config and whose header these JSON entries."""
    entries = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (header or {}).items()}
    return believe(
        tensors, {file: {"format": "pt", **entries}}, {} if config is None else {"quantization_config": config}
    )


def layout(belief: Belief) -> tuple[str, str]:
    return belief.layout.nibbles, belief.layout.scales
