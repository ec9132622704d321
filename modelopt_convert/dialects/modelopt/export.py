"""ModelOpt's diffusers exports: what their modules have in common, and which exports are not for us. Pure, no torch.

What an NVFP4 and an FP8 module consist of is in nvfp4.py and fp8.py beside this file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.run.errors import InputError

SCALE_ROLES = ("weight_scale", "weight_scale_2", "input_scale")
SCALE_SHAPES: tuple[tuple[int, ...], ...] = ((), (1,))  # of a scale per tensor: ModelOpt's, and that of some loaders

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
    "FP8": "it is an FP8 export, not NVFP4: mopt convert-fp8",
    "NVFP4": "it is an NVFP4 export, not FP8: mopt build-nvfp4",
}
_EXPORT_FLAGS = {"NVFP4": "--format fp4 --quant-algo max", "FP8": "--format fp8 --quant-algo max"}
_GROUP_SIZE = 16  # of NVFP4

# Tensors that AWQ and SVDQuant leave beside a packed weight: without them the weight means something else.
_TRANSFORM_ROLES: Mapping[str, str] = {
    "pre_quant_scale": "AWQ or SVDQuant",
    "_pre_quant_scale": "AWQ or SVDQuant",
    "svdquant_lora_a": "SVDQuant",
    "svdquant_lora_b": "SVDQuant",
}


@dataclass(frozen=True, slots=True)
class PackedModule:
    """One quantized module of an export.

    Attributes:
        name: Full module name.
        rows: N, the number of output features, without padding.
        columns: K, the number of input features, without padding.
        weight: NVFP4: U8 [N, K/2], or padded as ModelOpt's post-processing does. FP8: F8_E4M3 [N, K], or still BF16.
            Without an export: the base's [N, K].
        scales: ``weight_scale``, ``weight_scale_2`` (NVFP4) and ``input_scale`` as far as they are there.
        bias: The bias, if the module has one.
        fault: Why the scales cannot be used, or None; only a module about to be replaced may have one.
        calibrated: Scales by role that come from a ``--checkpoint``, for those that the export lacks.
    """

    name: str
    rows: int
    columns: int
    weight: TensorInfo
    scales: Mapping[str, TensorInfo]
    bias: TensorInfo | None
    fault: InputError | None
    calibrated: Mapping[str, float] = field(default_factory=dict)

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


def check_quant_config(config: Mapping[str, Any], algorithm: str, *, path: str) -> Mapping[str, Any]:
    """The ``quantization_config`` of an export.

    Args:
        config: config.json.
        algorithm: The ``quant_algo`` it must have, to the letter: engines that look for a part of it load others wrong.
        path: Of config.json, for messages.

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
    declared = found.get("quant_algo")
    if declared != algorithm:
        why = UNSUPPORTED_ALGORITHMS.get(declared, "unknown") if isinstance(declared, str) else "unknown"
        raise InputError(
            f"{path}: quant_algo: expected {algorithm!r}, found {declared!r} ({why})",
            code="export.quant_algo",
            path=path,
            hint=f"export again with ModelOpt's {_EXPORT_FLAGS[algorithm]}",
        )
    for size in _group_sizes(found.get("config_groups")) if algorithm == "NVFP4" else []:
        if size != _GROUP_SIZE:
            raise InputError(
                f"{path}: group_size: expected {_GROUP_SIZE}, found {size!r}",
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


def group_modules(tensors: Mapping[str, TensorInfo], *, path: str) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of every module by role; calibration state and markers left out.

    Raises:
        InputError: ``export.transformed`` (AWQ, SVDQuant): no module that is kept can excuse it.
    """
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        role = name.rpartition(".")[2]
        if role in _TRANSFORM_ROLES:
            raise InputError(
                f"{path}/{info.file}: tensor {name!r}: expected a plain export, found {_TRANSFORM_ROLES[role]}",
                code="export.transformed",
                path=f"{path}/{info.file}",
                hint="export again with ModelOpt's --quant-algo max; the other weights of this export are changed too",
            )
        if not is_quantizer_state(name) and not is_layout_marker(name):
            modules.setdefault(module_of(name), {})[role] = info
    return modules


def missing_scale(module: str, role: str, expected: str, where: str) -> InputError:
    """The fault of a quantized module that lacks a scale."""
    return InputError(
        f"{where}: tensor {module + '.' + role!r}: expected {expected}, found no such tensor",
        code=f"export.missing_{role}",
        path=where,
        hint=(
            "calibration never reached this module; calibrate with real prompts and export again"
            if role == "input_scale"
            else "the export is incomplete; export again"
        )
        + f", or --keep-bf16 '{module}'",
    )
