"""safetensors files for tests: made byte by byte, read by our parser and by safetensors."""

import json
import random
from typing import Any

import torch
from safetensors import deserialize
from safetensors.torch import load

from modelopt_convert.checkpoint.header import Header, parse_header, read_header_length

Specs = dict[str, tuple[str, tuple[int, ...]]]
Contents = dict[str, tuple[str, tuple[int, ...], bytes]]

TORCH = {
    "BOOL": torch.bool,
    "F4": torch.float4_e2m1fn_x2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
LOADABLE = TORCH.keys() - {"F4", "F8_E8M0"}  # safetensors.torch can save these two and not load them

ODD_NAMES = (
    "",
    " ",
    '"',
    "\\",
    '\\"',
    "\x00",
    "\x1f\x7f\n",
    "/",
    "\u2028",
    "\U0001f600",
    "\u0130.weight",
    "\u00e9" * 99,
)


def make(specs: Specs, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, bytes]]:
    """Tensors of random bits, and the bits."""
    source = random.Random(seed)
    tensors, content = {}, {}
    for name, (dtype, shape) in specs.items():
        size = torch.empty(shape, dtype=torch.uint8).numel() * TORCH[dtype].itemsize
        content[name] = bytes(bit & 1 for bit in source.randbytes(size)) if dtype == "BOOL" else source.randbytes(size)
        tensor = torch.empty(shape, dtype=TORCH[dtype])
        tensor.untyped_storage().copy_(torch.UntypedStorage(list(content[name])))
        tensors[name] = tensor
    return tensors, content


def parse(file: bytes) -> Header:
    """Parse a whole file, in the two steps in which the reader does."""
    length = read_header_length(file[:8], file="f", file_bytes=len(file))
    return parse_header(file[8 : 8 + length], file="f", file_bytes=len(file))


def pack(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    """A file with a right length in front, whatever the header says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def content_of(file: bytes) -> Contents:
    """What our parser makes of a file."""
    tensors = parse(file).tensors
    return {n: (t.dtype, t.shape, file[t.start : t.start + t.num_bytes]) for n, t in tensors.items()}


def reference(file: bytes) -> Contents:
    """What safetensors makes of it; raises if it refuses."""
    found = {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in deserialize(file)}
    if all(dtype in LOADABLE for dtype, _, _ in found.values()):
        loaded = load(file)
        assert loaded.keys() == found.keys()
        for name, tensor in loaded.items():
            raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert (tensor.dtype, tuple(tensor.shape), raw) == (TORCH[found[name][0]], *found[name][1:])
    return found
