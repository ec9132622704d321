"""The comparison of what is written for other engines: diffusers' own loader, and faults that it sees.

ComfyUI's loader, all families: `make engines`.
"""

import shutil
from pathlib import Path

import pytest
import torch
from comparison import BASE, EXPORT, compare, decoded, packed_modules, told_apart
from conversions import Key, make
from converted_in_diffusers import load
from kit import KEYS, converted
from safetensors.torch import load_file, save_file

TORCHAO: Key = ("diffusers", "torchao", "convert", "flux1", "nvfp4")


@pytest.fixture
def made(families: Path, tmp_path: Path) -> Path:
    return make(families, TORCHAO, tmp_path)


def test_diffusers_holds_what_the_record_says(made: Path) -> None:
    found = compare(*load(made), packed_modules(made))
    row = converted()[TORCHAO]
    assert {key: found[key] for key in KEYS if found.get(key) not in (None, [])} == {
        key: row[key] for key in KEYS if key in row
    }


@pytest.mark.parametrize("fault", ["nibbles", "one bit of a kept weight"])
def test_a_planted_fault_is_seen(made: Path, tmp_path: Path, fault: str) -> None:
    """Exchanged nibbles of one module, and the last bit of one value that is kept."""
    held, wanted = load(made)
    assert compare(held, wanted, 1)["outcome"] == "right"
    name = "transformer_blocks.0.attn.to_q.weight" if fault == "nibbles" else "x_embedder.weight"
    other = tmp_path / "other"
    shutil.copytree(made, other, symlinks=True)
    source, at = (EXPORT, other / EXPORT) if fault == "nibbles" else (BASE, other / BASE)
    folder = at.resolve()
    at.unlink()
    shutil.copytree(folder, at)
    for file in (other / source).glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            if fault == "nibbles":
                tensors[name] = (tensors[name] >> 4) | (tensors[name] << 4)
            else:
                tensors[name].view(torch.int16)[0, 0] ^= 1
            save_file(tensors, file, {"format": "pt"})
    found = compare(*load(other), 1)
    assert (found["outcome"], found["off"], found["first"]) == ("wrong", 1, name)


def test_what_is_not_packed_is_the_bases_rounded_once(made: Path) -> None:
    held = {name: one.float() for name, one in decoded(made / BASE).items()}
    _, wanted = told_apart(held, set(), set(held), made)
    assert all(torch.equal(one.float(), held[name].bfloat16().float()) for name, one in wanted.items())
