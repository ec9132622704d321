"""How SGLang 0.5.23 prepares an NVFP4 weight for ``mm_fp4``, copied from it: tests compare bytes with this.

``ModelOptFp4LinearMethod._process_backend_weights`` of multimodal_gen/runtime/layers/quantization/modelopt_quant.py and
``pad_nvfp4_weight`` of srt/layers/quantization/modelopt_quant.py (Apache-2.0), without the parts for other paths.
"""

from typing import Any

import torch
from torch import Tensor


def round_up(count: int, multiple: int) -> int:
    return (count + multiple - 1) // multiple * multiple


def pad_nvfp4_weight(weight: Tensor, n_alignment: int = 32, k_alignment: int = 32) -> tuple[Tensor, int]:
    weight_current_rows = weight.shape[0]
    weight_current_col_bytes = weight.shape[1]
    pad_rows = 0
    if n_alignment > 0 and weight_current_rows % n_alignment != 0:
        pad_rows = round_up(weight_current_rows, n_alignment) - weight_current_rows
    weight_current_col_elements = weight_current_col_bytes * 2
    pad_cols_bytes = 0
    if k_alignment > 0 and weight_current_col_elements % k_alignment != 0:
        pad_cols = round_up(weight_current_col_elements, k_alignment) - weight_current_col_elements
        pad_cols_bytes = pad_cols // 2
    if pad_rows > 0 or pad_cols_bytes > 0:
        weight = torch.nn.functional.pad(weight, (0, pad_cols_bytes, 0, pad_rows)).contiguous()
    return weight, pad_cols_bytes


def process_backend_weights(
    weight: Tensor, scales: Tensor, backend: str, flashinfer: Any
) -> tuple[Tensor, Tensor, int]:
    """``layer.weight``, ``layer.weight_scale_interleaved`` and ``layer.weights_padding_cols``."""
    if backend == "trtllm":
        weight, _ = pad_nvfp4_weight(weight, n_alignment=128, k_alignment=0)
        if scales.shape[0] != weight.shape[0]:
            pad_n = weight.shape[0] - scales.shape[0]
            # SGLang pads float8 as it is; the CPU's pad does not know it.
            scales = torch.nn.functional.pad(scales.view(torch.uint8), (0, 0, 0, pad_n))
        scale_k = scales.shape[1]
        weights_padding_cols = 0
        if scale_k % 4 != 0:
            padded_scale_k = round_up(scale_k, 4)
            pad_scale_k = padded_scale_k - scale_k
            scales = torch.nn.functional.pad(scales.view(torch.uint8), (0, pad_scale_k, 0, 0))
            pad_weight_k = pad_scale_k * 8
            weight = torch.nn.functional.pad(weight, (0, pad_weight_k, 0, 0))
            weights_padding_cols = pad_weight_k
        epilogue_tile_m = 128
        shuffled_scale_shape = scales.shape
        weight = flashinfer.shuffle_matrix_a(weight.view(torch.uint8), epilogue_tile_m)
        scales = (
            flashinfer.shuffle_matrix_sf_a(scales.view(torch.uint8), epilogue_tile_m)
            .reshape(shuffled_scale_shape)
            .view(torch.float8_e4m3fn)
        )
        return weight, scales, weights_padding_cols
    weight, weights_padding_cols = pad_nvfp4_weight(weight)
    scales = scales.unsqueeze(0)
    batch, rows, columns = scales.shape
    rows_padded = round_up(rows, 128)
    columns_padded = round_up(columns, 4)
    padded_scales = torch.zeros((batch, rows_padded, columns_padded), dtype=scales.dtype)
    padded_scales[:batch, :rows, :columns] = scales
    padded_scales = padded_scales.reshape(batch, rows_padded // 128, 4, 32, columns_padded // 4, 4)
    padded_scales = padded_scales.permute(0, 1, 4, 3, 2, 5)
    padded_scales = padded_scales.contiguous()
    return weight, padded_scales.reshape(rows_padded, columns_padded), weights_padding_cols
