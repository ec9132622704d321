"""Descriptions of small modules with random bytes, and files in memory in any dialect."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.recipe import recipe_of
from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.dialects.form import Algorithm, Canonical, Form, Quantized, Written
from modelopt_convert.formats.dtypes import num_bytes

TORCH = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
NAMES = {dtype: name for name, dtype in TORCH.items()}
CONFIG = {"_class_name": "SomeTransformer"}


@dataclass
class Files:
    """Files in memory, one for each tensor."""

    files: dict[str, bytes] = field(default_factory=dict)

    def fetch(self, file: str, start: int, target: memoryview) -> None:
        assert 0 <= start <= start + target.nbytes <= len(self.files[file]), (file, start, target.nbytes)
        target[:] = self.files[file][start : start + target.nbytes]

    def read(self, info: TensorInfo, begin: int, count: int) -> bytes:
        found = bytearray(b"?" * count)
        recipe_of(info).fill(begin, memoryview(found), self.fetch)
        return bytes(found)

    def whole(self, info: TensorInfo) -> bytes:
        return self.read(info, 0, info.num_bytes)

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        return torch.frombuffer(bytearray(self.whole(info)), dtype=TORCH[info.dtype]).reshape(info.shape)

    def add(self, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> TensorInfo:
        assert len(data) == num_bytes(dtype, shape), name
        self.files[name] = data
        return TensorInfo(name, dtype, shape, name, 0, len(data))

    def put(self, name: str, tensor: torch.Tensor) -> TensorInfo:
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return self.add(name, NAMES[tensor.dtype], tuple(tensor.shape), raw)


@dataclass(frozen=True)
class Module:
    """One quantized module to be made."""

    algorithm: Algorithm
    rows: int
    columns: int
    bias: bool = True
    by_row: bool = False
    calibrated: bool = True
    factor: float = 0.0123


def description(
    modules: Mapping[str, Module], files: Files, seed: int, config: Mapping[str, Any] = CONFIG
) -> Canonical:
    """Modules with random codes and scales, and two plain tensors."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    def codes(*shape: int) -> torch.Tensor:
        return random(*shape).where(random(*shape) > 255, random(*shape) & 0xF7) & 0xFB  # no NaN, no infinity of E5M2

    tensors = [files.put("norm.weight", torch.ones(7, dtype=torch.bfloat16))]
    tensors.append(files.put("plain.weight", torch.ones(5, 16, dtype=torch.bfloat16)))
    for name, one in modules.items():
        shape = (one.rows, one.columns)
        scalar = torch.tensor(one.factor, dtype=torch.float32)
        if one.algorithm == "nvfp4":
            tensors.append(files.put(f"{name}.weight", random(one.rows, one.columns // 2) | 1))
            scale = (random(one.rows, one.columns // 16) % 0x7E + 1).view(torch.float8_e4m3fn)
            tensors.append(files.put(f"{name}.weight_scale", scale))
            tensors.append(files.put(f"{name}.weight_scale_2", scalar))
        elif one.algorithm == "mxfp8":
            tensors.append(files.put(f"{name}.weight", (codes(*shape) | 1).view(torch.float8_e4m3fn)))
            scale = random(one.rows, -(-one.columns // 32)) % 12 + 118
            tensors.append(files.put(f"{name}.weight_scale", scale))
        else:
            dtype = torch.float8_e5m2 if one.algorithm == "fp8_e5m2" else torch.float8_e4m3fn
            tensors.append(files.put(f"{name}.weight", codes(*shape).view(dtype)))
            by_row = torch.rand(one.rows, generator=generator) + 0.01
            tensors.append(files.put(f"{name}.weight_scale", by_row if one.by_row and one.rows > 1 else scalar))
        if one.bias:
            tensors.append(files.put(f"{name}.bias", torch.rand(one.rows, generator=generator).bfloat16()))
        if one.calibrated and one.algorithm != "mxfp8":
            tensors.append(files.put(f"{name}.input_scale", scalar * 3))
    quantized = {name: Quantized(one.algorithm, one.rows, one.columns) for name, one in modules.items()}
    return Canonical({info.name: info for info in tensors}, quantized, {}, config)


def written_out(written: Written, files: Files) -> tuple[Headers, Files]:
    """What a reader of the output sees, as files in memory."""
    stored = Files()
    infos = {
        name: stored.add(name, info.dtype, info.shape, files.whole(info)) for name, info in written.tensors.items()
    }
    assert all(name == info.name for name, info in written.tensors.items())
    return Headers(infos, {"f": dict(written.metadata)}, dict(written.config or {}), ()), stored


def read_back(
    form: Form, written: Written, files: Files, shapes: Mapping[str, tuple[int, int]]
) -> tuple[Canonical, Files]:
    headers, stored = written_out(written, files)
    found = form.read(headers, stored.read, shapes, "OUT")
    lost = headers.tensors.keys() - found.tensors.keys() - found.fates.keys()
    assert not lost and found.fates.keys() | found.keep.keys() <= headers.tensors.keys()
    return found, stored


def same(left: Canonical, files: Files, right: Canonical, others: Files) -> None:
    """Both descriptions have the same tensors, bit for bit, and the same modules."""
    assert left.tensors.keys() == right.tensors.keys()
    for name, info in left.tensors.items():
        other = right.tensors[name]
        assert (name, info.dtype, info.shape) == (other.name, other.dtype, other.shape)
        assert files.whole(info) == others.whole(other), name
    assert left.modules == right.modules


def save(written: Written, files: Files, path: Path) -> Path:
    """One .safetensors file, laid out as the format says; its order of tensors is that of the names."""
    header: dict[str, Any] = {"__metadata__": dict(written.metadata)}
    data, at = [], 0
    for name, info in sorted(written.tensors.items(), key=lambda one: (-TORCH[one[1].dtype].itemsize, one[0])):
        data.append(files.whole(info))
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [at, at + info.num_bytes]}
        at += info.num_bytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(data))
    return path
