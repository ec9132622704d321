"""Which dialect a checkpoint is written in, by names, dtypes, shapes and markers. Pure, no torch."""

from modelopt_convert.dialects.black_forest_labs import BFL, BFL_PACKAGE
from modelopt_convert.dialects.comfyui import (
    COMFYUI,
    COMFYUI_FP8,
    COMFYUI_FP8_LEGACY,
    COMFYUI_HEADER,
    COMFYUI_INT8,
    COMFYUI_MXFP8,
)
from modelopt_convert.dialects.dialect import Dialect, Headers
from modelopt_convert.dialects.modelopt.dialect import (
    MODELOPT,
    MODELOPT_FP8,
    MODELOPT_LLM,
    MODELOPT_OTHER,
    MODELOPT_POSTPROCESSED,
)
from modelopt_convert.dialects.others import (
    COMPRESSED_TENSORS,
    DEEPSEEK_FP8,
    FP8_UNLABELLED,
    LIGHTX2V,
    MXFP4,
    NUNCHAKU,
    NVFP4_UNLABELLED,
    TORCHAO,
    TORCHAO_FP8,
    UNKNOWN,
    UNQUANTIZED,
)

# In the order in which evidence is conclusive.
DIALECTS: tuple[Dialect, ...] = (
    COMPRESSED_TENSORS,
    MXFP4,
    NUNCHAKU,
    TORCHAO,
    TORCHAO_FP8,
    LIGHTX2V,
    BFL,
    COMFYUI,
    COMFYUI_HEADER,
    COMFYUI_MXFP8,
    COMFYUI_FP8,
    COMFYUI_INT8,
    COMFYUI_FP8_LEGACY,
    BFL_PACKAGE,
    MODELOPT_LLM,
    MODELOPT_POSTPROCESSED,
    MODELOPT,
    MODELOPT_FP8,
    MODELOPT_OTHER,
    DEEPSEEK_FP8,
    NVFP4_UNLABELLED,
    FP8_UNLABELLED,
    UNQUANTIZED,
)


def detect_dialect(headers: Headers) -> tuple[Dialect, list[str]]:
    """The dialect, with the evidence for it; ``unknown`` if there are quantized dtypes and nothing to tell."""
    found = ((one, evidence) for one in DIALECTS if (evidence := one.recognise(headers)))
    return next(found, (UNKNOWN, UNKNOWN.recognise(headers)))
