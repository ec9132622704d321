"""Load checkpoints with diffusers' ``from_pretrained``, and compare what it holds.

python load_diffusers.py CHECKPOINT ...
"""

import json
from pathlib import Path

import comparison
import diffusers
import torch
from comparison import Tensors, decoded


def load(checkpoint: Path) -> tuple[Tensors, Tensors]:
    """What diffusers holds and what it should hold."""
    name = json.loads((checkpoint / "config.json").read_text())["_class_name"]
    model = getattr(diffusers, name).from_pretrained(checkpoint, torch_dtype=torch.bfloat16)
    return dict(model.state_dict()), decoded(checkpoint)


if __name__ == "__main__":
    comparison.main(lambda: None, load)
