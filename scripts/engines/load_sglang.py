"""Load checkpoints with SGLang Diffusion's own TransformerLoader, on a CPU, and compare what it holds.

    python load_sglang.py CHECKPOINT ...

SGLang runs unmodified but for: a gloo process group of one; ``tensor.cuda()`` as the identity, which the
post-processing of FP4 calls; the lookup of a GEMM backend, which needs flashinfer on a GPU; one FP8 kernel, in torch;
and the sizes of two models, which SGLang takes from no config.json.
"""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import comparison
import torch
from comparison import Tensors, by_rows, decode_nvfp4, decoded

CONFIGS = {
    "FluxTransformer2DModel": ("flux", "FluxPipelineConfig"),
    "Flux2Transformer2DModel": ("flux", "Flux2PipelineConfig"),
    "WanTransformer3DModel": ("wan", "WanT2V480PConfig"),
    "QwenImageTransformer2DModel": ("qwen_image", "QwenImagePipelineConfig"),
    "HunyuanVideoTransformer3DModel": ("hunyuan", "HunyuanConfig"),
    "LTX2VideoTransformer3DModel": ("ltx_2", "LTX2PipelineConfig"),
    "SD3Transformer2DModel": ("stablediffusion3", "StableDiffusion3PipelineConfig"),
    "ZImageTransformer2DModel": ("zimage", "ZImagePipelineConfig"),
    "Krea2Transformer2DModel": ("krea2", "Krea2PipelineConfig"),
}
# SGLang's names of sizes, and those of config.json: it knows the published models' by heart.
SIZES = {
    "ZImageTransformer2DModel": {"num_attention_heads": "n_heads", "num_layers": "n_layers"},
    "Krea2Transformer2DModel": {
        "heads": "num_attention_heads",
        "kvheads": "num_key_value_heads",
        "layers": "num_layers",
        "tdim": "timestep_embed_dim",
        "txtdim": "text_hidden_dim",
        "txtlayers": "num_text_layers",
        "txtheads": "text_num_attention_heads",
        "txtkvheads": "text_num_key_value_heads",
        "axes_dims": "axes_dims_rope",
    },
}
_ONE = (
    "tp_size", "sp_degree", "hsdp_replicate_dim", "hsdp_shard_dim", "kv_gather_degree", "ulysses_degree", "ring_degree",
    "num_gpus", "dp_size",
)  # fmt: skip
_OFF = ("dit_cpu_offload", "text_encoder_cpu_offload", "dit_layerwise_offload")


def start() -> None:
    """Make the process group, and stand in for what needs a GPU."""
    comparison.let_torchvision_import()
    comparison.alone()
    from sglang.kernels.ops.quantization import fp8_kernel
    from sglang.multimodal_gen.runtime.distributed.parallel_state import (
        maybe_init_distributed_environment_and_model_parallel,
    )
    from sglang.multimodal_gen.runtime.layers.quantization import modelopt_quant

    maybe_init_distributed_environment_and_model_parallel(1, 1)
    torch.Tensor.cuda = lambda self, *_arguments, **_more: self
    modelopt_quant._get_fp4_gemm_op = lambda: (None, "cutlass")

    def quantize(values: torch.Tensor, out: torch.Tensor, scale: torch.Tensor, is_static: bool) -> None:
        if not is_static:
            scale.copy_(values.abs().max().float() / 448)
        out.copy_((values.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn))

    fp8_kernel.sgl_per_tensor_quant_fp8 = quantize


def load(checkpoint: Path) -> tuple[Tensors, Tensors]:
    """What SGLang holds, decoded, and what it should hold, by its names."""
    from sglang.multimodal_gen.runtime.loader import fsdp_load
    from sglang.multimodal_gen.runtime.loader.component_loaders.transformer_loader import TransformerLoader
    from sglang.multimodal_gen.runtime.loader.utils import get_param_names_mapping, hf_to_custom_state_dict

    loader, arguments = TransformerLoader(), _arguments(checkpoint)
    loader.component_type = "transformer"
    before: Tensors = {}
    real = fsdp_load.process_model_weights_after_loading

    def note(model: Any, *positional: Any, **named: Any) -> Any:
        before.update({name: value.detach().clone() for name, value in model.state_dict().items()})
        return real(model, *positional, **named)

    fsdp_load.process_model_weights_after_loading = note
    try:
        model = loader.load_customized(str(checkpoint), arguments, "transformer")
    finally:
        fsdp_load.process_model_weights_after_loading = real
    names = set(before)
    mapping = get_param_names_mapping(model.param_names_mapping, valid_target_names=names)
    wanted, _ = hf_to_custom_state_dict(iter(decoded(checkpoint).items()), mapping, valid_target_names=names)
    held = {name: _value(model, before, name) for name in wanted if name in before}
    after = model.state_dict()
    for name, value in held.items():
        # After loading, packed weights lie as the kernels want them. All others are read again.
        if before[name].dtype in (torch.bfloat16, torch.float32) and after[name].shape == value.shape:
            held[name] = after[name]
    return held, wanted


def _arguments(checkpoint: Path) -> Any:
    """ServerArgs with the defaults of its fields, for one process and the pipeline of the checkpoint's class."""
    from sglang.multimodal_gen.runtime.server_args import ServerArgs, set_global_server_args

    config = json.loads((checkpoint / "config.json").read_text())
    if config["_class_name"] not in CONFIGS:
        raise LookupError(f"SGLang has no pipeline for {config['_class_name']}")
    module, name = CONFIGS[config["_class_name"]]
    pipeline = getattr(importlib.import_module(f"sglang.multimodal_gen.configs.pipeline_configs.{module}"), name)()
    sizes = {ours: config[theirs] for ours, theirs in SIZES.get(config["_class_name"], {}).items()}
    if "heads" in sizes:  # of patches of 2 by 2
        sizes |= {"features": sizes["heads"] * config["attention_head_dim"], "channels": config["in_channels"] // 4}
    vars(pipeline.dit_config.arch_config).update(sizes)
    arguments = object.__new__(ServerArgs)
    for field in dataclasses.fields(ServerArgs):
        default = None if field.default is dataclasses.MISSING else field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        object.__setattr__(arguments, field.name, default)
    chosen = {"model_path": str(checkpoint), "pipeline_config": pipeline, "model_paths": {}, "nunchaku_config": None}
    for key, value in (chosen | dict.fromkeys(_ONE, 1) | dict.fromkeys(_OFF, False)).items():
        setattr(arguments, key, value)
    set_global_server_args(arguments)
    return arguments


def _value(model: Any, held: Tensors, name: str) -> torch.Tensor:
    """The weights that a parameter means to SGLang, with the global scales that its kernels get."""
    from sglang.multimodal_gen.runtime.layers.quantization.modelopt_quant import _rebase_partition_weight_scales

    value, module = held[name], name.rpartition(".")[0]
    if value.dtype == torch.uint8:
        layer = model.get_submodule(module)
        scale, scale_2 = held[f"{module}.weight_scale"], held[f"{module}.weight_scale_2"]
        if scale_2.numel() > 1:
            scale = _rebase_partition_weight_scales(scale, layer.logical_widths, scale_2, scale_2.max())
        if layer.quant_method.quant_config.swap_weight_nibbles:
            value = (value << 4) | (value >> 4)
        return decode_nvfp4(value, scale, scale_2.max())
    if value.dtype == torch.float8_e4m3fn:
        factors = held[f"{module}.weight_scale"].flatten()
        return value.float() * by_rows(factors[factors > -1e30], model.get_submodule(module).logical_widths)
    return value


if __name__ == "__main__":
    comparison.main(start, load)
