"""A checkpoint's transformer as diffusers' own class, with its weights from our reader."""

import inspect
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.packed import PackedModule, is_layout_marker, is_quantizer_state
from modelopt_convert.proof.tensors import load_weight
from modelopt_convert.run.errors import InputError


def require_diffusers() -> None:
    """Require the extra.

    Raises:
        InputError: ``fidelity.not_installed``.
    """
    try:
        import accelerate  # noqa: F401
        import diffusers  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"pictures need diffusers and accelerate: {error}",
            code="fidelity.not_installed",
            hint="pip install 'modelopt-convert[fidelity]'",
        ) from None


def load_transformer(
    reader: CheckpointReader,
    *,
    dtype: torch.dtype = torch.bfloat16,
    packed: Mapping[str, PackedModule] = MappingProxyType({}),
) -> nn.Module:
    """A transformer with the unquantized tensors of a checkpoint, in eval mode, on the CPU.

    Args:
        reader: The opened base or checkpoint, with diffusers' names.
        dtype: Of floating tensors, but for those that the class keeps in float32.
        packed: Quantized modules by name. Their layers stay empty, on the meta device, for the caller to replace.

    Raises:
        InputError: ``fidelity.class`` or ``fidelity.tensors``.
    """
    import diffusers
    from accelerate import init_empty_weights

    name = reader.config.get("_class_name")
    kind: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (inspect.isclass(kind) and issubclass(kind, nn.Module) and hasattr(kind, "from_config")):
        raise InputError(
            f"{reader.path}: diffusers {diffusers.__version__} has no transformer class {name!r}",
            code="fidelity.class",
            path=str(reader.path),
            hint="give the base's config.json by --config, or install a diffusers that has the class",
        )
    with init_empty_weights(include_buffers=False):  # buffers that no checkpoint holds are computed by the class
        model: nn.Module = kind.from_config(_of_model(reader.config))
    theirs = {info.name for one in packed.values() for info in (*one.tensors, *([one.bias] if one.bias else []))}
    extra = {one for one in reader.tensors if packed and (is_quantizer_state(one) or is_layout_marker(one))}
    replaced = {f"{name}.{role}" for name in packed for role in ("weight", "bias")}
    stored, expected = reader.tensors.keys() - theirs - extra, model.state_dict().keys() - replaced
    if stored != expected:
        other = min(stored ^ expected)
        raise InputError(
            f"{reader.path}: tensor {other!r} is {'not in' if other in stored else 'expected by'} diffusers' {name}; "
            f"{len(stored ^ expected)} such tensors",
            code="fidelity.tensors",
            path=str(reader.path),
            hint="give a base with diffusers' config and all of its tensors",
        )
    fp32 = tuple(getattr(kind, "_keep_in_fp32_modules", None) or ())
    values = {}
    for one in stored:
        value = load_weight(reader, one)
        if value.is_floating_point():
            value = value.to(torch.float32 if _is_kept(one, fp32) else dtype)
        values[one] = value
    shapes = {one: tensor.shape for one, tensor in model.state_dict().items()}
    wrong = next((one for one in values if values[one].shape != shapes[one]), None)
    if wrong is not None:
        raise InputError(
            f"{reader.path}: tensor {wrong!r}: expected {list(shapes[wrong])} as in diffusers' {name}, "
            f"found {list(values[wrong].shape)}",
            code="fidelity.tensors",
            path=str(reader.path),
            hint="give the base with its own config.json",
        )
    model.load_state_dict(values, assign=True, strict=not packed)
    return model.eval().requires_grad_(False)


def _of_model(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}


def _is_kept(tensor: str, modules: tuple[str, ...]) -> bool:
    """As diffusers finds them: a part of the name between dots."""
    return any(re.search(rf"(^|\.){re.escape(module)}(\.|$)", tensor) for module in modules)
