"""The ``quantization_config`` of ModelOpt's diffusers exports, and which exports are not for us. Pure, no torch."""

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from modelopt_convert.formats.format import Format
from modelopt_convert.formats.table import FORMATS, is_modelopts
from modelopt_convert.run.errors import InputError

_AWQ = "AWQ changes the weights of modules that claim to be BF16 and moves a factor into pre_quant_scale"
_SVD = "SVDQuant splits each weight into a low-rank part and a scaled rest"
TRANSFORMED = ("NVFP4_AWQ", "NVFP4_SVD")
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
}


def check_exported(config: Mapping[str, Any], names: Iterable[str], *, path: str) -> None:
    """Refuse a quantized model that was saved and not exported: its state is there, and no packed weight.

    Args:
        config: config.json.
        names: Of the tensors.
        path: Of config.json, for messages.

    Raises:
        InputError: ``export.saved``.
    """
    found = config.get("quantization_config")
    if isinstance(found, dict):
        # diffusers' own config of a model that it quantized with ModelOpt.
        saved = found.get("quant_method") == "modelopt" and "quant_algo" not in found and "quant_type" in found
        state = "quant_type without quant_algo" if saved else None
    else:
        # An export that failed before its end has packed weights with scales, and can have such state beside them.
        listed = list(names)
        packed = any(name.endswith(".weight_scale") for name in listed)
        state = None if packed else next((name for name in listed if "_quantizer." in name), None)
    if state is not None:
        raise InputError(
            f"{path}: expected what export_hf_checkpoint writes, found what save_pretrained writes ({state}): saved, "
            "not exported",
            code="export.saved",
            path=path,
            hint="call modelopt.torch.export.export_hf_checkpoint(pipe, export_dir=FOLDER) on the quantized pipeline",
        )


def check_quant_config(
    config: Mapping[str, Any],
    target: Format,
    *,
    path: str,
    export: str = "EXPORT",
    base: str = "BASE",
    output: str | None = None,
) -> Mapping[str, Any]:
    """The ``quantization_config`` of an export.

    Args:
        config: config.json.
        target: Whose ``quant_algo`` it must have, to the letter: engines that look for a part of it load others wrong.
        path: Of config.json, for messages.
        export: The export as the command line has it, for messages.
        base: The base as the command line has it, for messages.
        output: Likewise, if it is given.

    Raises:
        InputError: ``export.not_quantized``, ``export.quant_method``, ``export.quant_algo`` or ``export.group_size``.
    """
    found = config.get("quantization_config")
    if not isinstance(found, dict):
        raise InputError(
            f"{path}: expected a quantization_config, found none",
            code="export.not_quantized",
            path=path,
            hint="this is not a ModelOpt export, or one that failed before its end; export again",
        )
    if not is_modelopts(found):
        raise InputError(
            f"{path}: quant_method: expected 'modelopt', found {found.get('quant_method')!r}",
            code="export.quant_method",
            path=path,
            hint="give the folder that ModelOpt's export_hf_checkpoint wrote",
        )
    declared = found.get("quant_algo")
    if declared != target.quant_algo:
        other = next((one for one in FORMATS.values() if one.quant_algo == declared), None)
        why = UNSUPPORTED_ALGORITHMS.get(declared, "unknown") if isinstance(declared, str) else "unknown"
        hint = f"export again with ModelOpt's {target.export_flags}"
        if declared in TRANSFORMED:
            hint = f"`mopt convert` undoes that with --to bf16; or {hint}"
        if other is not None:
            why = f"it is an {declared} export, not {target.quant_algo}"
            words = [
                other.command,
                "--export",
                export or path.removesuffix("/config.json"),
                "--base",
                base,
                *(["--output", output] if output else []),
            ]
            hint = f"run `mopt {shlex.join(words)}`, or {hint}"
        raise InputError(
            f"{path}: quant_algo: expected {target.quant_algo!r}, found {declared!r} ({why})",
            code="export.quant_algo",
            path=path,
            hint=hint,
        )
    sizes = [found[key] for key in found if key == "group_size"] + _group_sizes(found.get("config_groups"))
    for size in sizes if target.block_size is not None else []:
        if size != target.block_size:
            raise InputError(
                f"{path}: group_size: expected {target.block_size}, found {size!r}",
                code="export.group_size",
                path=path,
                hint=f"export again without --block-size; {target.quant_algo} kernels read blocks of "
                f"{target.block_size}",
            )
    return found


def _group_sizes(groups: Any) -> list[Any]:
    if not isinstance(groups, dict):
        return []
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    return [part["group_size"] for part in weights if isinstance(part, dict) and "group_size" in part]
