"""Modules of nunchaku's engine, packed element by element from the definition of its tiles.

Where an element lies is worked out by division, as the kernels' threads do; nothing is taken from mopt.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from support import Tensors

Kind = Literal["int4", "nvfp4"]
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
SHIFT = 0.171875


def mixed(count: int, salt: int) -> torch.Tensor:
    """Integers of 16 bits that look random, by arithmetic that is the same everywhere."""
    n = torch.arange(count, dtype=torch.int64) + salt * 1_000_003
    n = (n * 2654435761) & 0xFFFFFFFF
    n = n ^ (n >> 15)
    n = (n * 2246822519) & 0xFFFFFFFF
    return (n ^ (n >> 13)) & 0xFFFF


def halves(shape: tuple[int, ...], salt: int, low: float, high: float) -> torch.Tensor:
    """BF16 between two values, in steps of a 256th of the way."""
    count = torch.Size(shape).numel()
    return (low + (mixed(count, salt) % 256).float() / 256 * (high - low)).bfloat16().reshape(shape)


def _grid(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(rows)[:, None], torch.arange(columns)[None, :]


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """W4A4's qweight: nibbles of a tile of 128 x 64, thread by thread of 16 x 64."""
    rows, columns = codes.shape
    n, k = _grid(rows, columns)
    tile = (n // 128) * (columns // 64) + k // 64
    lane = (n % 8) * 4 + (k % 32) // 8
    register = (n % 16 // 8) * 2 + k % 64 // 32
    at = ((tile * 8 + n % 128 // 16) * 32 + lane) * 32 + register * 8 + k % 8
    nibbles = torch.zeros(rows * columns, dtype=torch.uint8)
    nibbles[at.reshape(-1)] = (codes & 15).to(torch.uint8).reshape(-1)
    return (nibbles[::2] | nibbles[1::2] << 4).view(torch.int8).reshape(rows, columns // 2)


def pack_scales(scales: torch.Tensor) -> torch.Tensor:
    """INT4's wscales [N, groups]: each lane of four holds two pairs of the 16 rows of a step."""
    rows, groups = scales.shape
    n, g = _grid(rows, groups)
    at = ((n // 128) * groups + g) * 128 + n % 128 // 16 * 16 + n % 8 // 2 * 4 + n % 16 // 8 * 2 + n % 2
    return _placed(scales, at).reshape(groups, rows)


def pack_vector(vector: torch.Tensor) -> torch.Tensor:
    return pack_scales(vector[:, None]).reshape(-1)


def pack_micro(scales: torch.Tensor) -> torch.Tensor:
    """NVFP4's wscales [N, K/16]: four of a row in a word, and a lane has the words of four rows 32 apart."""
    rows, groups = scales.shape
    n, g = _grid(rows, groups)
    lane = n % 8 * 4 + n % 32 // 8
    at = (((n // 128) * (groups // 4) + g // 4) * 32 + lane) * 16 + n % 128 // 32 * 4 + g % 4
    return _placed(scales, at).reshape(groups, rows)


def pack_low_rank(matrix: torch.Tensor, *, down: bool) -> torch.Tensor:
    """Down [R, K] or up [N, R]: tiles of 16 x 16, all of 16 columns or rows of the weight together."""
    rows, columns = matrix.shape
    n, k = _grid(rows, columns)
    tile = (k // 16) * (rows // 16) + n // 16 if down else (n // 16) * (columns // 16) + k // 16
    lane = n % 8 * 4 + k % 8 // 2
    at = (tile * 32 + lane) * 8 + n % 16 // 8 * 4 + k % 16 // 8 * 2 + k % 2
    return _placed(matrix, at).reshape((columns, rows) if down else (rows, columns))


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """W4A16's qweight: four rows take turns by 64 columns; a word of 16 bits has every eighth of 32."""
    rows, columns = codes.shape
    n, k = _grid(rows, columns)
    word = ((n // 4 * (columns // 64) + k // 64) * 4 + n % 4) * 16 + k % 64 // 32 * 8 + k % 8
    nibbles = torch.zeros(rows * columns, dtype=torch.uint8)
    nibbles[(word * 4 + k % 32 // 8).reshape(-1)] = codes.to(torch.uint8).reshape(-1)
    return (nibbles[::2] | nibbles[1::2] << 4).view(torch.int32).reshape(rows // 4, columns // 2)


def _placed(values: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    found = torch.zeros(values.numel(), dtype=values.dtype)
    found.view(torch.uint8 if values.element_size() == 1 else torch.int16)[at.reshape(-1)] = (
        values.contiguous().view(torch.uint8 if values.element_size() == 1 else torch.int16).reshape(-1)
    )
    return found


@dataclass(frozen=True)
class Made:
    """A packed module, and what the engine computes with."""

    tensors: Tensors
    weight: torch.Tensor
    bias: torch.Tensor | None


def w4a4(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kind: Kind,
    smooth: torch.Tensor,
    *,
    rank: int = 16,
    shifted: bool = False,
    fused: bool = False,
) -> Made:
    """A Linear as SVDQuant makes it: smoothed, some directions taken out, the rest in 4 bits.

    Args:
        weight: [N, K].
        bias: [N], or nothing.
        kind: INT4 or NVFP4.
        smooth: What inputs are divided by, BF16 [K].
        rank: Of the low-rank part; 0 for none.
        shifted: Whether inputs are shifted; they are if the kind is INT4.
        fused: Whether the layer before divides by ``smooth`` instead of the engine.
    """
    rows, columns = weight.shape
    scaled = weight.double() * smooth.double()
    down, up = torch.zeros(0, columns).bfloat16(), torch.zeros(rows, 0).bfloat16()
    if rank:
        up = torch.linalg.qr(scaled @ halves((columns, rank), 0, -1, 1).double()).Q.bfloat16()
        down = (up.double().T @ scaled).bfloat16()
        scaled = scaled - up.double() @ down.double()
        if not fused:
            down = (down.double() / smooth.double()).bfloat16()
    group = 64 if kind == "int4" else 16
    blocks = scaled.reshape(rows, -1, group)
    amax = blocks.abs().amax(-1).clamp(min=1e-6)
    tensors: Tensors = {}
    if kind == "int4":
        scales = (amax / 7).bfloat16()
        codes = (blocks / scales.double()[..., None]).round().clamp(-8, 7).long()
        values = codes * scales.double()[..., None]
        tensors["wscales"] = pack_scales(scales)
    else:
        factor = (amax.max() / (6 * 448)).float()
        by_row = torch.linspace(0.75, 1.5, rows).bfloat16()
        wide = (factor * by_row.float())[:, None].double()
        scales = (amax / 6 / wide).clamp(max=448).to(torch.float8_e4m3fn)
        whole = (scales.double() * wide)[..., None].clamp(min=1e-12)
        ratio = blocks / whole
        codes = torch.bucketize(ratio.abs(), (E2M1[:7] + E2M1[1:8]).double() / 2) + 8 * (ratio < 0)
        values = E2M1.double()[codes] * (scales.double() * wide)[..., None]
        tensors |= {"wscales": pack_micro(scales), "wtscale": factor.reshape(1), "wcscales": pack_vector(by_row)}
    used = torch.ones_like(smooth) if fused else smooth
    residual = values.reshape(rows, columns) / used.double()
    found = residual + up.double() @ down.double()
    stored = bias
    is_shifted = shifted and kind == "int4"
    if is_shifted and bias is not None:
        lost = weight.double().sum(1) - (up.double() @ down.double()).sum(1)
        stored = (bias.double() - SHIFT * lost).bfloat16()
    meant = None
    if stored is not None:
        tensors["bias"] = pack_vector(stored.bfloat16())
        meant = stored.bfloat16().double() + (SHIFT * residual.sum(1) if is_shifted else 0)
    tensors |= {"qweight": pack_codes(codes.reshape(rows, columns)), "smooth": pack_vector(used)}
    tensors["smooth_orig"] = pack_vector(smooth)
    if rank:
        tensors |= {"lora_down": pack_low_rank(down, down=True), "lora_up": pack_low_rank(up, down=False)}
    return Made(tensors, found, meant)


def w4a16(weight: torch.Tensor, bias: torch.Tensor, parts: int) -> Made:
    """A Linear that makes the vectors of a modulation, whose rows take turns."""
    rows, columns = weight.shape
    turned = weight.double().reshape(parts, -1, columns).transpose(0, 1).reshape(rows, columns)
    blocks = turned.reshape(rows, -1, 64)
    low, high = blocks.amin(-1), blocks.amax(-1)
    scales = ((high - low) / 15).clamp(min=1e-6).bfloat16()
    zeros = low.bfloat16()
    codes = ((blocks - zeros.double()[..., None]) / scales.double()[..., None]).round().clamp(0, 15).long()
    values = (codes * scales.double()[..., None] + zeros.double()[..., None]).reshape(rows, columns)
    added = torch.zeros(parts, 1, dtype=torch.float64)
    added[1] = added[-2] = 1
    stored = (bias.double().reshape(parts, -1) + added).bfloat16()
    tensors = {
        "qweight": pack_awq(codes.reshape(rows, columns)),
        "wscales": scales.T.contiguous(),
        "wzeros": zeros.T.contiguous(),
        "bias": stored.T.reshape(-1).contiguous(),
    }
    back = values.reshape(-1, parts, columns).transpose(0, 1).reshape(rows, columns)
    return Made(tensors, back, (stored.double() - added).reshape(-1))
