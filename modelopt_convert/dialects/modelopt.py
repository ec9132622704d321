"""ModelOpt's diffusers exports: what a quantized module consists of, and which exports are not for us. Pure, no torch.

NVFP4, per Linear of shape [N, K] (modelopt/torch/export/quant_utils.py, NVFP4QTensor):

=================  ========  ===========  =====================================================
tensor             dtype     shape        meaning
=================  ========  ===========  =====================================================
``weight``         U8        [N, K/2]     two E2M1 codes a byte, the even column in the low nibble
``weight_scale``   F8_E4M3   [N, K/16]    one scale per block of 16 columns, row-major
``weight_scale_2`` F32       []           amax / (6 * 448)
``input_scale``    F32       []           activation amax / (6 * 448)
=================  ========  ===========  =====================================================
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelopt_convert.errors import InputError
from modelopt_convert.header import TensorInfo
from modelopt_convert.patterns import module_of
from modelopt_convert.scale_shapes import packed_shapes, scale_shapes

BLOCK_SIZE = 16
SCALE_ROLES = ("weight_scale", "weight_scale_2", "input_scale")

_AWQ = "AWQ changes the weights of modules that claim to be BF16 and moves a factor into pre_quant_scale"
_SVD = "SVDQuant splits each weight into a low-rank part and a scaled rest"
UNSUPPORTED_ALGORITHMS: Mapping[str, str] = {
    "NVFP4_AWQ": _AWQ,
    "W4A16_AWQ": _AWQ,
    "W4A8_AWQ": _AWQ,
    "NVFP4_SVD": _SVD,
    "W4A8_NVFP4_FP8": "its blocks are 32 wide and its activations FP8",
    "W4A16_NVFP4": "it has no input_scale",
    "MXFP8": "its scales are E8M0 per 32 values",
    "W8A8_SQ_PER_CHANNEL": "it is INT8 with SmoothQuant",
    "FP8_PER_CHANNEL_PER_TOKEN": "its scales are per row",
    "MIXED_PRECISION": "its modules differ in algorithm",
    "FP8": "it is an FP8 export, not NVFP4",
}

_PACKED_DTYPES = frozenset({"U8", "F8_E4M3", "F8_E5M2"})

# Tensors that AWQ and SVDQuant leave beside a packed weight: without them the weight means something else.
_TRANSFORM_ROLES: Mapping[str, str] = {
    "pre_quant_scale": "AWQ or SVDQuant",
    "_pre_quant_scale": "AWQ or SVDQuant",
    "svdquant_lora_a": "SVDQuant",
    "svdquant_lora_b": "SVDQuant",
}


@dataclass(frozen=True, slots=True)
class Nvfp4Module:
    """One packed module of an export.

    Attributes:
        name: Full module name.
        rows: N, the number of output features, without padding.
        columns: K, the number of input features, without padding.
        weight: U8 [N, K/2], or padded as ModelOpt's post-processing does.
        scales: ``weight_scale``, ``weight_scale_2`` and ``input_scale`` as far as they are there.
        bias: The bias, if the module has one.
        fault: Why the scales cannot be used, or None; only a module about to be replaced may have one.
    """

    name: str
    rows: int
    columns: int
    weight: TensorInfo
    scales: Mapping[str, TensorInfo]
    bias: TensorInfo | None
    fault: InputError | None

    @property
    def tensors(self) -> list[TensorInfo]:
        """Everything but the bias."""
        return [self.weight, *self.scales.values()]


def is_layout_marker(name: str) -> bool:
    """Whether a tensor is ComfyUI's per-module marker, by which loaders guess the layout."""
    return name.endswith(".comfy_quant")


def is_quantizer_state(name: str) -> bool:
    """Whether a tensor is calibration state that ModelOpt leaks into exports (``q_bmm_quantizer._amax``)."""
    return "_quantizer." in name


def check_nvfp4_config(config: Mapping[str, Any], *, path: str) -> Mapping[str, Any]:
    """The ``quantization_config`` of an NVFP4 export.

    Raises:
        InputError: ``export.not_quantized``, ``export.quant_method``, ``export.quant_algo`` or ``export.group_size``.
    """
    found = config.get("quantization_config")
    if not isinstance(found, dict):
        raise InputError(
            f"{path}: expected a quantization_config, found none",
            code="export.not_quantized",
            path=path,
            hint="this is not a ModelOpt export, or one that failed half-way; export again",
        )
    if found.get("quant_method") != "modelopt":
        raise InputError(
            f"{path}: quant_method: expected 'modelopt', found {found.get('quant_method')!r}",
            code="export.quant_method",
            path=path,
            hint="give the folder that ModelOpt's export_hf_checkpoint wrote",
        )
    algorithm = found.get("quant_algo")
    if algorithm != "NVFP4":
        why = UNSUPPORTED_ALGORITHMS.get(algorithm, "unknown") if isinstance(algorithm, str) else "unknown"
        raise InputError(
            f"{path}: quant_algo: expected 'NVFP4', found {algorithm!r} ({why})",
            code="export.quant_algo",
            path=path,
            hint="export again with ModelOpt's --format fp4 --quant-algo max",
        )
    for size in _group_sizes(found.get("config_groups")):
        if size != BLOCK_SIZE:
            raise InputError(
                f"{path}: group_size: expected {BLOCK_SIZE}, found {size!r}",
                code="export.group_size",
                path=path,
                hint="export again without --block-size; NVFP4 kernels read blocks of 16",
            )
    return found


def _group_sizes(groups: Any) -> list[Any]:
    if not isinstance(groups, dict):
        return []
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    return [part["group_size"] for part in weights if isinstance(part, dict) and "group_size" in part]


def find_nvfp4_modules(
    tensors: Mapping[str, TensorInfo], true_shapes: Mapping[str, tuple[int, ...]], *, path: str
) -> dict[str, Nvfp4Module]:
    """Group an export's tensors into packed modules, judged by dtype and shape and not by ``ignore``.

    Args:
        tensors: All of the export.
        true_shapes: Shapes [N, K] of weights by tensor name, as far as a base tells them: what lies beyond is padding.
        path: The export's folder, for messages.

    Returns:
        Packed modules by name. Unquantized tensors are in none of them.

    Raises:
        InputError: ``export.transformed`` (AWQ, SVDQuant) or ``export.mixed`` (an FP8 weight among them): no module
            that is kept can excuse these.
    """
    by_module: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        role = name.rpartition(".")[2]
        if role in _TRANSFORM_ROLES:
            raise InputError(
                f"{path}/{info.file}: tensor {name!r}: expected plain NVFP4, found {_TRANSFORM_ROLES[role]}",
                code="export.transformed",
                path=f"{path}/{info.file}",
                hint="export again with ModelOpt's --quant-algo max; the other weights of this export are changed too",
            )
        if not is_quantizer_state(name) and not is_layout_marker(name):
            by_module.setdefault(module_of(name), {})[role] = info
    return {
        module: _nvfp4_module(module, roles, true_shapes.get(f"{module}.weight"), path)
        for module, roles in by_module.items()
        if any(role in roles for role in SCALE_ROLES) or ("weight" in roles and roles["weight"].dtype in _PACKED_DTYPES)
    }


def _nvfp4_module(
    module: str, roles: Mapping[str, TensorInfo], true_shape: tuple[int, ...] | None, path: str
) -> Nvfp4Module:
    anything = next(iter(roles.values()))
    weight = roles.get("weight")
    where = f"{path}/{(weight or anything).file}"
    if weight is None or weight.dtype != "U8" or len(weight.shape) != 2 or 0 in weight.shape:
        found = f"{weight.dtype} {list(weight.shape)}" if weight else "no weight"
        fp8 = weight is not None and weight.dtype.startswith("F8_")
        raise InputError(
            f"{where}: tensor {module + '.weight'!r}: expected U8 [N, K/2] beside its scales, found {found}",
            code="export.mixed" if fp8 else "export.weight",
            path=where,
            hint="this module is not NVFP4; export again with one algorithm for all modules",
        )
    rows, columns = weight.shape[0], weight.shape[1] * 2
    if true_shape is not None and len(true_shape) == 2 and weight.shape in packed_shapes(*true_shape):
        rows, columns = true_shape
    scales = {role: roles[role] for role in SCALE_ROLES if role in roles}
    return Nvfp4Module(
        module, rows, columns, weight, scales, roles.get("bias"), _scale_fault(module, rows, columns, scales, where)
    )


def _scale_fault(
    module: str, rows: int, columns: int, scales: Mapping[str, TensorInfo], where: str
) -> InputError | None:
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight_scale": ("F8_E4M3", (rows, columns // BLOCK_SIZE)),
        "weight_scale_2": ("F32", ()),
        "input_scale": ("F32", ()),
    }
    if columns % BLOCK_SIZE:
        return InputError(
            f"{where}: tensor {module + '.weight'!r}: expected K divisible by {BLOCK_SIZE}, found K = {columns}",
            code="export.shape",
            path=where,
            hint="the weight is cut or padded; export again",
        )
    for role, (dtype, shape) in expected.items():
        name = f"{module}.{role}"
        if role not in scales:
            return InputError(
                f"{where}: tensor {name!r}: expected {dtype} {list(shape)}, found no such tensor",
                code=f"export.missing_{role}",
                path=where,
                hint=(
                    "calibration never reached this module; calibrate with real prompts and export again"
                    if role == "input_scale"
                    else "the export is incomplete; export again"
                )
                + f", or --keep-bf16 '{module}'",
            )
        info = scales[role]
        known = {shape}
        if role == "weight_scale":
            known |= {one.stored for one in scale_shapes(rows, columns // BLOCK_SIZE)}
        if info.dtype != dtype or info.shape not in known:
            return InputError(
                f"{where}: tensor {name!r}: expected {dtype} {list(shape)}, found {info.dtype} {list(info.shape)}"
                + (" (blocks of 32)" if info.shape == (rows, columns // 32) else ""),
                code="export.shape",
                path=where,
                hint="the export is cut or mixed up; export again",
            )
    return None
