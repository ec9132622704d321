"""Make a small diffusers transformer and real ModelOpt exports of it, on the CPU.

The weights are seeded, with outlier channels as trained models have them. ModelOpt's own quantizer and exporter do the
rest, so that what is tested is what users have. Needs the ``modelopt`` extra.

    python scripts/make_export.py OUT [VARIANT ...]

writes OUT/base (BF16, three shards) and OUT/<variant>; without variants, nvfp4 alone.
"""

import argparse
import contextlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLUX1_CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 5,
    "joint_attention_dim": 96,
    "pooled_projection_dim": 48,
    "guidance_embeds": True,
    "axes_dims_rope": (8, 12, 12),
}


@dataclass(frozen=True)
class Variant:
    """How an export is made."""

    config: str  # name of the config in modelopt.torch.quantization whose weight and input quantizers are taken
    dtype: str = "bfloat16"
    max_shard_size: str = "10GB"
    calibrate: bool = True
    compress: bool = False
    noise: float = 0.0  # the weights are multiplied by 1 + noise * N(0, 1) first, as further training would change them


VARIANTS = {
    "nvfp4": Variant("NVFP4_DEFAULT_CFG"),
    "nvfp4_sharded": Variant("NVFP4_DEFAULT_CFG", max_shard_size="700KB"),
    "nvfp4_fp16": Variant("NVFP4_DEFAULT_CFG", dtype="float16"),
    "nvfp4_uncalibrated": Variant("NVFP4_DEFAULT_CFG", calibrate=False),
    "nvfp4_compressed": Variant("NVFP4_DEFAULT_CFG", compress=True),
    "nvfp4_trained": Variant("NVFP4_DEFAULT_CFG", noise=0.02),
    "fp8": Variant("FP8_DEFAULT_CFG"),
}

# What the diffusers example of ModelOpt leaves alone in FLUX.1: its filter, as wildcards.
_LEFT_ALONE = ("time_text_embed", "context_embedder", "x_embedder", "norm_out")


def main() -> None:
    """Make what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("variants", nargs="*", choices=[[], *VARIANTS], default=["nvfp4"])
    arguments = parser.parse_args()
    make_base(arguments.out / "base")
    for name in arguments.variants:
        make_export(arguments.out / "base", VARIANTS[name], arguments.out / name)


def make_base(path: Path) -> None:
    """Save a seeded BF16 FLUX.1 transformer in three shards, as a pipeline folder with transformer/."""
    import torch
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(20)
    model = FluxTransformer2DModel(**FLUX1_CONFIG)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            columns = torch.rand(parameter.shape[1]).pow(4) * 8 + 0.5  # a few channels far above the rest
            parameter.data = torch.randn_like(parameter) * columns / parameter.shape[1] ** 0.5
        else:
            parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(path / "transformer", max_shard_size="2400KB")


def make_export(base: Path, variant: Variant, path: Path) -> None:
    """Quantize the base with ModelOpt, calibrated on random inputs, and export it to ``path/transformer``."""
    import modelopt.torch.quantization as mtq
    import torch
    from diffusers import FluxTransformer2DModel
    from diffusers.utils import logging
    from modelopt.torch.export import export_hf_checkpoint

    logging.disable_progress_bar()
    dtype = getattr(torch, variant.dtype)
    model = FluxTransformer2DModel.from_pretrained(base / "transformer", torch_dtype=dtype)
    run = _calibration(dtype) if variant.calibrate else None
    torch.manual_seed(21)
    for name, parameter in model.named_parameters():
        if variant.noise and parameter.ndim == 2 and not _is_left_alone(name):
            parameter.data = parameter.data * (1 + variant.noise * torch.randn_like(parameter))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        mtq.quantize(model, _quant_config(getattr(mtq, variant.config)), run)
        mtq.disable_quantizer(model, _is_left_alone)
        if variant.compress:
            mtq.compress(model)
        export_hf_checkpoint(model, export_dir=path / "transformer", max_shard_size=variant.max_shard_size)


def _quant_config(library: dict[str, Any]) -> dict[str, Any]:
    """As ModelOpt's diffusers example has it: all Linears, and FP8 attention that is switched off later.

    A quantizer that was calibrated and then disabled leaves its amax in the export.
    """
    linear = [
        entry for entry in library["quant_cfg"] if entry["quantizer_name"] in ("*weight_quantizer", "*input_quantizer")
    ]
    attention = [
        {"quantizer_name": name, "cfg": {"num_bits": (4, 3)}}
        for name in ("*[qkv]_bmm_quantizer", "*bmm2_output_quantizer")
    ]
    return {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *linear, *attention], "algorithm": "max"}


def _is_left_alone(name: str) -> bool:
    return name.startswith("proj_out") or "bmm" in name or any(part in name for part in _LEFT_ALONE)


def _calibration(dtype: Any) -> Callable[[Any], None]:
    import torch

    def run(model: Any) -> None:
        generator = torch.Generator().manual_seed(7)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        for _ in range(2):
            model(
                hidden_states=random(1, 16, FLUX1_CONFIG["in_channels"]),
                encoder_hidden_states=random(1, 8, FLUX1_CONFIG["joint_attention_dim"]),
                pooled_projections=random(1, FLUX1_CONFIG["pooled_projection_dim"]),
                timestep=torch.tensor([0.5], dtype=dtype),
                img_ids=torch.zeros(16, 3, dtype=dtype),
                txt_ids=torch.zeros(8, 3, dtype=dtype),
                guidance=torch.tensor([3.5], dtype=dtype),
            )

    return run


if __name__ == "__main__":
    main()
