"""Load checkpoints with vLLM-omni's own transformer classes and ModelOpt adapter, on a CPU, and compare what they hold.

    python load_vllm_omni.py CHECKPOINT ...

Its code runs unmodified but for a gloo process group of one, the choice of GEMM kernels, which needs a GPU, and the
name of one kernel, which Z-Image's activation looks up when it is made.
Parameters are NaN, or a code, before loading, so that what is never set is seen.
"""

import importlib
import inspect
import json
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import comparison
import torch
from comparison import Tensors, by_rows, decode_nvfp4, decoded, stored

MODULES = {
    "FluxTransformer2DModel": "flux.flux_transformer",
    "Flux2Transformer2DModel": "flux2.flux2_transformer",
    "WanTransformer3DModel": "wan2_2.wan2_2_transformer",
    "QwenImageTransformer2DModel": "qwen_image.qwen_image_transformer",
    "LTX2VideoTransformer3DModel": "ltx2.ltx2_transformer",
    "HunyuanVideo15Transformer3DModel": "hunyuan_video.hunyuan_video_15_transformer",
    "SD3Transformer2DModel": "sd3.sd3_transformer",
    "ZImageTransformer2DModel": "z_image.z_image_transformer",
    "Krea2Transformer2DModel": "krea2.krea2_transformer",
}
_KEPT: list[Any] = []  # contexts that stay open


def start() -> None:
    """Make the process group, and stand in for what needs a GPU."""
    comparison.let_torchvision_import()
    comparison.alone()
    import vllm.platforms
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()
    context = set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu")))
    context.__enter__()
    _KEPT.append(context)
    from vllm_omni.diffusion.distributed import parallel_state

    platform = type(parallel_state.current_omni_platform)
    attention = "vllm_omni.diffusion.attention.backends.sdpa.SDPABackend"
    platform.get_device_count = classmethod(lambda _cls: 1)
    platform.get_diffusion_attn_backend_cls = classmethod(lambda _cls, *_arguments, **_more: attention)
    platform.set_device = classmethod(lambda _cls, _device: None)
    parallel_state.init_distributed_environment(world_size=1, rank=0, local_rank=0, backend="gloo")
    parallel_state.initialize_model_parallel(backend="gloo")
    kernels = torch.library.Library("_C", "FRAGMENT")
    kernels.define("silu_and_mul(Tensor! result, Tensor input) -> ()")
    _KEPT.append(kernels)
    importlib.import_module("vllm.model_executor.layers.quantization.modelopt")
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.model_executor.layers.quantization") and module is not None:
            for chooser in ("init_fp8_linear_kernel", "init_nvfp4_linear_kernel", "init_mxfp8_linear_kernel"):
                if hasattr(module, chooser):
                    setattr(module, chooser, lambda *_arguments, **_more: _NoKernel())


class _NoKernel:
    def __getattr__(self, _name: str) -> Any:
        return lambda *_arguments, **_more: None


def load(checkpoint: Path) -> tuple[Tensors, Tensors]:
    """What vLLM-omni holds, decoded, and what it should hold, by its names."""
    from vllm_omni.quantization import build_quant_config

    config = json.loads((checkpoint / "config.json").read_text())
    plain = _loaded(checkpoint, config, None, decoded(checkpoint).items(), torch.float32).state_dict()
    lies = {name: tensor.dtype for name, tensor in decoded(checkpoint).items()}
    model = _loaded(checkpoint, config, build_quant_config(config["quantization_config"]), stored(checkpoint))
    held = dict(model.state_dict())
    # The plain model is float32 throughout; what comes from the file in 16 bits is to be held as it lies.
    wide = _loaded(checkpoint, config, None, _marked(lies, decoded(checkpoint)), torch.float32).state_dict()
    wanted = {name: value if wide[name].any() else value.to(torch.bfloat16) for name, value in plain.items()}
    return {name: _value(model, held, name) for name in wanted if name in held}, wanted


def _marked(lies: dict[str, torch.dtype], tensors: Tensors) -> Iterable[tuple[str, torch.Tensor]]:
    """Each tensor as ones where it lies in 32 bits or is packed, as zeros where it lies in 16."""
    for name, tensor in tensors.items():
        yield name, torch.full(tensor.shape, float(lies[name] == torch.float32))


def _loaded(
    checkpoint: Path,
    config: dict[str, Any],
    quantization: Any,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype = torch.bfloat16,
) -> Any:
    """The model, loaded as vLLM-omni's loader does."""
    from vllm_omni.diffusion.model_loader.checkpoint_adapters import get_checkpoint_adapter

    model = _built(checkpoint, config, quantization, dtype)
    source = types.SimpleNamespace(subfolder="transformer", prefix="", model_or_path=str(checkpoint))
    adapter = get_checkpoint_adapter(model, source, quantization, True)
    model.load_weights(adapter.adapt(iter(tensors)) if adapter else iter(tensors))
    return model


def _built(checkpoint: Path, config: dict[str, Any], quantization: Any, dtype: torch.dtype) -> Any:
    from vllm_omni.diffusion.data import OmniDiffusionConfig, TransformerConfig

    name = config["_class_name"]
    if name not in MODULES:
        raise LookupError(f"vLLM-omni has no class {name}")
    cls = getattr(importlib.import_module(f"vllm_omni.diffusion.models.{MODULES[name]}"), name)
    whole = OmniDiffusionConfig(model=str(checkpoint))
    whole.tf_model_config = TransformerConfig.from_dict(
        {key: value for key, value in config.items() if key != "quantization_config"}
    )
    whole.quantization_config = quantization
    known = inspect.signature(cls.__init__).parameters
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    arguments = {key: value for key, value in values.items() if key in known and value is not None}
    arguments |= {key: value for key, value in (("quant_config", quantization), ("od_config", whole)) if key in known}
    if quantization is not None:
        quantization.packed_modules_mapping.update(getattr(cls, "packed_modules_mapping", None) or {})
    torch.set_default_dtype(dtype)
    try:
        model = cls(**arguments)
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        if parameter.dtype == torch.float8_e4m3fn:
            parameter.data = torch.full(parameter.shape, 127, dtype=torch.uint8).view(parameter.dtype)  # NaN
        elif parameter.dtype.is_floating_point:
            parameter.data = torch.full_like(parameter.data, float("nan"))
        else:
            parameter.data = torch.full_like(parameter.data, 0xAB)
    return model


def _value(model: Any, held: Tensors, name: str) -> torch.Tensor:
    """The weights that a parameter means to vLLM: of a fused one the largest global scale counts, for all parts."""
    value, module = held[name], name.rpartition(".")[0]
    if value.dtype == torch.uint8:
        return decode_nvfp4(value, held[f"{module}.weight_scale"], held[f"{module}.weight_scale_2"].max())
    if value.dtype == torch.float8_e4m3fn:
        return value.float() * by_rows(held[f"{module}.weight_scale"], model.get_submodule(module).logical_widths)
    return value


if __name__ == "__main__":
    comparison.main(start, load)
