"""FP8 made here from a base. Pure, no torch."""

from collections.abc import Iterator, Mapping
from typing import Any

from modelopt_convert.checkpoint.header import TensorInfo, TensorSpec
from modelopt_convert.dialects.packed import PackedModule, module_format
from modelopt_convert.formats.dtypes import E4M3_MAX
from modelopt_convert.formats.fp8.format import FORMAT
from modelopt_convert.plan.from_base import BaseFormat
from modelopt_convert.plan.plan import Source, Step
from modelopt_convert.run.errors import InputError

# ModelOpt 0.47 divides in the dtype of a model's first parameter (``infer_dtype_from_model`` in diffusers_utils.py). Of
# these classes diffusers keeps that parameter in F32 (``_keep_in_fp32_modules``).
_DIVIDED_IN_F32 = frozenset(
    {
        "AnyFlowFARTransformer3DModel",
        "AnyFlowTransformer3DModel",
        "ChronoEditTransformer3DModel",
        "Kandinsky5Transformer3DModel",
        "Kandinsky6SRTransformer3DModel",
        "MiniMaxH3Transformer3DModel",
        "SkyReelsV2Transformer3DModel",
        "WanAnimateTransformer3DModel",
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
    }
)


class _Fp8OfBase:
    inputs: Mapping[str, Any] = {"num_bits": 8, "type": "float"}
    largest_input = E4M3_MAX
    shares = False  # ``_fuse_shared_input_modules`` in unified_export_hf.py leaves FP8 out
    by_layers = True

    def steps(self, module: PackedModule, class_name: object, *, is_merged: bool) -> Iterator[Step]:
        codes, scale = (
            TensorSpec(f"{module.name}.{role}", dtype, module_format(FORMAT).shape(module, role, is_merged=is_merged))
            for role, dtype in (("weight", FORMAT.packed_dtype), (FORMAT.tensor_scale, "F32"))
        )
        yield Step(codes, "base", "quantize_fp8", quotient="F32" if class_name in _DIVIDED_IN_F32 else "BF16")
        yield Step(scale, "base", "write_scale")

    def fault(self, base: Source, info: TensorInfo) -> InputError | None:
        """Any weight has FP8 codes."""
        return None


ENTRY: BaseFormat = _Fp8OfBase()
