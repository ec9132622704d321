"""The layout of a packed module by its base, for ``mopt inspect --base``: what needs torch."""

import torch

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.formats.rows import SAMPLED_ROWS, sample_rows
from modelopt_convert.formats.tensor_bytes import from_bytes
from modelopt_convert.inspection.module_bytes import ModuleBytes
from modelopt_convert.proof.detector import Detection, detect_with_base, telling_rows


@torch.inference_mode()
def detect(
    looks: ModuleBytes, base: CheckpointReader, info: TensorInfo, global_scale: float, max_error: float
) -> Detection | None:
    """The layout, by sampled rows of the weight ``info`` in the base; None if the shapes allow no reading."""
    packed = looks.packed
    readings = {
        order: torch.tensor(one).view(torch.float8_e4m3fn)  # a copy: torch takes no memory that may not be written to
        for order, one in looks.readings.items()
    }
    if not readings:
        return None
    rows = sorted({*sample_rows(packed.rows, SAMPLED_ROWS), *telling_rows(readings, 4)})
    half, row_bytes = packed.columns // 2, info.num_bytes // packed.rows
    codes = looks.reader.read_rows(packed.weight.name, rows, packed.weight.shape[1], half)
    base_bytes = base.read_rows(info.name, rows, row_bytes)
    base_rows = from_bytes(base_bytes, info.dtype, (len(rows), packed.columns))
    dtypes = (torch.bfloat16, torch.float16, base_rows.dtype)
    return detect_with_base(
        [base_rows, *(base_rows.to(dtype) for dtype in dict.fromkeys(dtypes) if dtype != base_rows.dtype)],
        from_bytes(codes, "U8", (len(rows), half)),
        readings,
        rows,
        torch.tensor(global_scale, dtype=torch.float32),
        max_error=max_error,
    )
