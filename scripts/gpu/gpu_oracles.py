"""flashinfer's own decoders and swizzle against ours, on a machine with a CUDA GPU of compute capability 9.0 or newer.

    PYTHONPATH=. python scripts/gpu/gpu_oracles.py docs/verify-h200-oracles.json

feeds the same seeded bytes to both sides and writes how many values differ, bit for bit: all codes, and all finite
E4M3 scales of either sign. flashinfer builds its kernels on first use (nvcc and ninja). Before each kernel, memory of
the size of its output is filled with 0xFF and freed, for the allocator to hand out again. Each row has a control: our
side with a planted fault, which must differ. Exit status 1 if a row that must be equal is not, or a control is.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelopt_convert.formats.nvfp4.codes import decode_e2m1, dequantize_nvfp4, swap_nibbles, unpack_e2m1
from modelopt_convert.formats.nvfp4.scales import swizzle_128x4
from modelopt_convert.verification.gemm.nvfp4 import decode_nvfp4

SHAPES = ((128, 64), (16, 16), (150, 80), (200, 272), (1000, 3056), (3072, 3072), (12288, 3072), (3072, 15360))
BITS = {torch.uint8: torch.uint8, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def main() -> None:
    """Compare, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the JSON file to write")
    arguments = parser.parse_args()
    try:
        import flashinfer
    except ImportError as error:
        sys.exit(f"flashinfer cannot be imported: {error}")
    rows = []
    for number, shape in enumerate(SHAPES):
        for row in _rows(flashinfer, *shape, torch.Generator().manual_seed(number)):
            rows.append({"function": row.pop("function"), "shape": list(shape), **row})
            print(json.dumps(rows[-1]), flush=True)
    wrong = [row for row in rows if (row["must_be_equal"] and row["differing"]) or not row["control_differing"]]
    body = ",\n  ".join(json.dumps(row) for row in rows)
    environment = json.dumps(_environment(flashinfer.__version__))
    head = (
        f' "command": "python scripts/gpu/gpu_oracles.py docs/{arguments.output.name}",\n "environment": {environment},'
    )
    text = f'{{\n{head}\n "rows_that_are_wrong": {len(wrong)},\n "rows": [\n  {body}\n ]\n}}\n'
    arguments.output.write_text(text, "utf-8")
    sys.exit(bool(wrong))


def _rows(flashinfer: Any, rows: int, columns: int, seed: torch.Generator) -> Iterator[dict[str, Any]]:
    """Every comparison of one weight; our side runs on the CPU except for the decode of the BF16 backend."""
    packed = torch.randint(256, (rows, columns // 2), generator=seed, dtype=torch.uint8)
    swapped = swap_nibbles(packed)
    raw = torch.randint(254, (rows, columns // 16), generator=seed, dtype=torch.uint8)
    raw += (raw >= 0x7F).to(torch.uint8)  # 0..0x7E and 0x80..0xFE: neither NaN
    scale, one = raw.view(torch.float8_e4m3fn), torch.ones(())
    global_scale = 1e-5 + 1e-3 * torch.rand((), generator=seed)

    blocks = swizzle_128x4(raw)
    straight = torch.zeros_like(blocks)
    straight[:rows, : columns // 16] = raw
    on_gpu = packed.cuda(), raw.cuda()
    _poison(blocks.numel())
    theirs = flashinfer.block_scale_interleave(on_gpu[1])
    yield _row("block_scale_interleave", "swizzle_128x4, padding included", theirs, blocks, straight)

    def decoded(factor: Tensor) -> Tensor:
        factor = factor.reshape(1).cuda()
        _poison(2 * rows * columns)
        values: Tensor = flashinfer.nvfp4_kv_dequantize(*on_gpu, factor)
        return values

    def in_their_order(codes: Tensor) -> Tensor:
        exact = decode_e2m1(unpack_e2m1(codes)) * scale.float().repeat_interleave(16, -1)
        return (exact * global_scale).bfloat16()

    name = "nvfp4_kv_dequantize"
    ours = decode_nvfp4(packed.cuda(), scale.cuda())
    control = decode_nvfp4(swapped.cuda(), scale.cuda())
    yield _row(name, "decode_nvfp4 of the BF16 backend, on the GPU; global scale 1", decoded(one), ours, control)
    ours, control = (dequantize_nvfp4(codes, scale, one).bfloat16() for codes in (packed, swapped))
    yield _row(name, "dequantize_nvfp4 rounded to BF16; global scale 1", decoded(one), ours, control)
    ours, control = in_their_order(packed), in_their_order(swapped)
    theirs, given = decoded(global_scale), {"global_scale": global_scale.item()}
    yield _row(name, "(e2m1 * scale) * global scale in float32, rounded to BF16", theirs, ours, control) | given
    ours, control = (dequantize_nvfp4(codes, scale, global_scale).bfloat16() for codes in (packed, swapped))
    # ModelOpt forms scale * global scale first and so rounds once more: very seldom, a neighbouring BF16.
    row = _row(name, "dequantize_nvfp4 rounded to BF16: another order of products", theirs, ours, control) | given
    distance = (theirs.view(torch.int16).int() - ours.cuda().view(torch.int16).int()).abs().amax()
    yield row | {"must_be_equal": False, "largest_bf16_ulp": int(distance)}

    ours, control = (dequantize_nvfp4(codes, scale, global_scale) for codes in (packed, swapped))
    for layout, stored in (("128x4 scales from swizzle_128x4", blocks), ("row-major scales", raw)):
        theirs = flashinfer.e2m1_and_ufp8sf_scale_to_float(
            packed, stored.reshape(-1), global_scale.reshape(1), 16, 1, stored is blocks
        )
        against = f"dequantize_nvfp4 in float32; {layout}"
        yield _row("e2m1_and_ufp8sf_scale_to_float", against, theirs, ours, control) | given


def _row(function: str, against: str, theirs: Tensor, ours: Tensor, control: Tensor) -> dict[str, Any]:
    expected, found, fault = (tensor.cuda().reshape(-1).view(BITS[ours.dtype]) for tensor in (ours, theirs, control))
    if found.shape != expected.shape or theirs.dtype != ours.dtype:
        raise ValueError(f"{function}: {theirs.dtype} {list(theirs.shape)} for {ours.dtype} {list(ours.shape)}")
    return {
        "function": function,
        "against": against,
        "compared": expected.numel(),
        "differing": int((found != expected).sum()),
        "control_differing": int((found != fault).sum()),
        "must_be_equal": True,
    }


def _poison(size: int) -> None:
    """Fill memory of this size with 0xFF and free it: likely what the allocator hands out next."""
    torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")


def _environment(flashinfer_version: str) -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "flashinfer": flashinfer_version,
        "apache-tvm-ffi": version("apache-tvm-ffi"),
        "gpu": torch.cuda.get_device_name(),
        "compute capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "cuda": torch.version.cuda,
        "driver": subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0],
    }


if __name__ == "__main__":
    main()
