"""Small checkpoint folders for tests of the reader, in one file and in shards."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import Tensors

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.run.errors import InputError

SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = f"{SINGLE}.index.json"
A, B, C = (f"diffusion_pytorch_model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3))
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS: dict[str, Tensors] = {
    A: {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor(3.5, dtype=torch.bfloat16)},
    B: {"b.weight": torch.arange(5, dtype=torch.uint8), "b.empty": torch.zeros(0, 3)},
    C: {"c.weight": torch.arange(7.0).to(torch.float8_e4m3fn)},
}
WEIGHT_MAP = {name: file for file, tensors in SHARDS.items() for name in tensors}


def write(folder: Path, shards: dict[str, Tensors], weight_map: object = None) -> Path:
    """A checkpoint folder with a config, the shards and, if given, an index with this ``weight_map``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"_class_name": "X"}')
    for file, tensors in shards.items():
        save_file(tensors, folder / file, {"format": "pt"})
    if weight_map is not None:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


def open_fds(folder: Path) -> list[str]:
    """Files of the folder that this process holds open."""
    fds = Path("/proc/self/fd")
    links = [str((fds / fd).readlink()) for fd in os.listdir(fds) if (fds / fd).is_symlink()]
    return [link for link in links if link.startswith(str(folder))]


def reader_refusal(folder: Path) -> InputError:
    """How the folder is refused; no file may be left open."""
    with pytest.raises(InputError) as caught:
        CheckpointReader(folder)
    assert open_fds(folder) == []
    assert caught.value.hint
    return caught.value
