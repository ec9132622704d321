"""NVFP4 made here from a base, without calibration. Pure, no torch."""

from collections.abc import Iterator, Mapping
from typing import Any

from modelopt_convert import __version__
from modelopt_convert.checkpoint.header import TensorInfo, TensorSpec
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.dialects.packed import PackedModule, module_format
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE, FORMAT
from modelopt_convert.plan.from_base import BaseFormat
from modelopt_convert.plan.plan import Op, Source, Step
from modelopt_convert.run.errors import InputError

# As ModelOpt 0.47's convert_hf_config.py has them, but for the inputs: these are scaled by the engine.
_DECLARED: Mapping[str, Any] = {
    "quant_algo": FORMAT.quant_algo,
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": True, "num_bits": 4, "type": "float", "group_size": BLOCK_SIZE},
            "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK_SIZE},
            "targets": ["Linear"],
        }
    },
    "producer": {"name": "mopt", "version": __version__},
    **FORMAT.dynamic,
}
_STEPS: Mapping[str, tuple[str, Op]] = {
    "weight": (FORMAT.packed_dtype, "quantize_nvfp4"),
    "weight_scale": ("F8_E4M3", "block_scales"),
    "weight_scale_2": ("F32", "write_scale"),
}


class _Nvfp4OfBase:
    declared = _DECLARED
    shares = True
    by_layers = False

    def steps(self, module: PackedModule, class_name: object, *, is_merged: bool) -> Iterator[Step]:
        for role, (dtype, op) in _STEPS.items():
            shape = module_format(FORMAT).shape(module, role, is_merged=is_merged)
            yield Step(TensorSpec(f"{module.name}.{role}", dtype, shape), "base", op)

    def fault(self, base: Source, info: TensorInfo) -> InputError | None:
        """ModelOpt's exporter asserts the same (``NVFP4QTensor.get_weights_scaling_factor``)."""
        if info.shape[1] % BLOCK_SIZE == 0:
            return None
        where = f"{base.folder}/{info.file}"
        return InputError(
            f"{where}: tensor {info.name!r}: expected K divisible by {BLOCK_SIZE}, found K = {info.shape[1]}",
            code="base.block_size",
            path=where,
            hint=f"NVFP4 scales blocks of {BLOCK_SIZE} columns: build with --keep-bf16 '{module_of(info.name)}'",
        )


ENTRY: BaseFormat = _Nvfp4OfBase()
