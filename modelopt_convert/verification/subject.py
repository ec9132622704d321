"""A checkpoint's quantized modules, and their operands as the checkpoint declares them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.modelopt.export import PackedModule
from modelopt_convert.dialects.modelopt.fp8 import find_fp8_modules
from modelopt_convert.dialects.modelopt.nvfp4 import BLOCK_SIZE, declares_dynamic_inputs, find_nvfp4_modules
from modelopt_convert.formats.nvfp4.codes import swap_nibbles
from modelopt_convert.formats.nvfp4.scales import scale_readings
from modelopt_convert.formats.table import Algorithm
from modelopt_convert.formats.tensor_bytes import from_bytes
from modelopt_convert.proof.tensors import load, load_rows, load_weight, tensor_scale
from modelopt_convert.run.errors import InconclusiveError, InputError
from modelopt_convert.verification.gemm.operands import Fp8Weight, Nvfp4Weight, Weight


@dataclass(frozen=True, slots=True)
class Subject:
    """What is verified.

    Attributes:
        reader: The opened checkpoint.
        algorithm: Of its modules.
        modules: By name.
        high_first: Whether the high nibble is declared to hold the even column.
        swizzled: Whether the scales are declared to lie in the 128x4 order.
    """

    reader: CheckpointReader
    algorithm: Algorithm
    modules: Mapping[str, PackedModule]
    high_first: bool
    swizzled: bool

    def operands(self, module: PackedModule, rows: Sequence[int] | None = None) -> Weight:
        """One module's weight in the canonical layout, read as declared.

        Args:
            module: Which.
            rows: Of these rows only, and without its bias; None for all.

        Raises:
            InputError: A scale that cannot be used.
            ValueError: The stored shape does not allow the declared reading.
        """
        bias = load(self.reader, module.bias.name) if module.bias is not None and rows is None else None
        name, columns = module.weight.name, module.columns
        if self.algorithm == "fp8":
            scale = tensor_scale(self.reader, module, "weight_scale")
            codes = load_weight(self.reader, name) if rows is None else load_rows(self.reader, name, rows)
            return Fp8Weight(codes, scale, bias)
        stored = load(self.reader, module.scales["weight_scale"].name)
        readings = scale_readings(stored, module.rows, columns // BLOCK_SIZE)
        order = "128x4" if self.swizzled else "linear"
        if order not in readings:
            raise ValueError(f"scales {list(module.scales['weight_scale'].shape)} cannot be read as {order}")
        scales = readings[order]
        if rows is None:
            packed = load_weight(self.reader, name)[: module.rows, : columns // 2].contiguous()
        else:
            raw = self.reader.read_rows(name, rows, module.weight.shape[1], columns // 2)
            packed = from_bytes(raw, "U8", (len(rows), columns // 2))
            scales = scales.view(torch.uint8)[list(rows)].view(torch.float8_e4m3fn)
        return Nvfp4Weight(
            swap_nibbles(packed) if self.high_first else packed,
            scales,
            tensor_scale(self.reader, module, "weight_scale_2"),
            bias,
        )


def find_subject(reader: CheckpointReader, base: CheckpointReader | None) -> Subject:
    """Make out what is quantized in a checkpoint, by dtype and shape.

    Raises:
        InputError: ``verify.nothing_quantized``, or what ``find_nvfp4_modules`` and ``find_fp8_modules`` raise.
    """
    path = str(reader.path)
    packed = any(info.dtype == "U8" and name.endswith(".weight") for name, info in reader.tensors.items())
    true_shapes = {name: info.shape for name, info in base.tensors.items()} if base is not None else {}
    modules = (
        find_nvfp4_modules(
            reader.tensors, true_shapes, path=path, dynamic_inputs=declares_dynamic_inputs(reader.config)
        )
        if packed
        else find_fp8_modules(reader.tensors, {}, (), path=path)
    )
    if not modules:
        raise InputError(
            f"{path}: expected NVFP4 or FP8 modules, found none",
            code="verify.nothing_quantized",
            path=path,
            hint="verify looks at what build-nvfp4 and convert-fp8 write, and at ModelOpt's exports",
        )
    found = reader.config.get("quantization_config")
    keys = found if isinstance(found, dict) else {}
    return Subject(
        reader,
        "nvfp4" if packed else "fp8",
        modules,
        high_first=keys.get("swap_weight_nibbles") is True,
        swizzled=keys.get("checkpoint_weight_scale_layout") == "swizzled",
    )


def device_of(wanted: str | None) -> torch.device:
    """The device asked for, or the GPU if there is one.

    Raises:
        InconclusiveError: ``verify.no_gpu``.
    """
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise InconclusiveError(
            "--device cuda: torch sees no GPU",
            code="verify.no_gpu",
            hint="install the CUDA build of torch on a machine with a GPU, or leave --device out",
        )
    return torch.device(wanted or ("cuda" if has_gpu else "cpu"))
