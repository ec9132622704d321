"""Load what mopt wrote ``--to torchao`` and ``--to bf16`` with diffusers, and compare it with what it was made from.

python converted_in_diffusers.py OUT ...
"""

import json
from pathlib import Path

import comparison
import diffusers
import torch
from comparison import Tensors, stored


def load(checkpoint: Path) -> tuple[Tensors, Tensors]:
    """What diffusers holds and what it should hold."""
    name = json.loads((checkpoint / "config.json").read_text())["_class_name"]
    state = getattr(diffusers, name).from_pretrained(checkpoint, torch_dtype=torch.bfloat16).state_dict()
    packed = {name for name, one in state.items() if hasattr(one, "tensor_data_names")}
    held = {name: one.dequantize(torch.float32) if name in packed else one for name, one in state.items()}
    narrow = {name for name, one in stored(checkpoint) if one.dtype == torch.bfloat16}
    scaled = {name for name, _ in stored(checkpoint / comparison.EXPORT) if name.endswith(".weight_scale")}
    return comparison.told_apart(held, packed or {name.removesuffix("_scale") for name in scaled}, narrow, checkpoint)


if __name__ == "__main__":
    comparison.main(lambda: None, load)
