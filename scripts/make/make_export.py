"""Make small diffusers transformers and real ModelOpt exports of them, on the CPU.

The weights are seeded, with outlier channels as trained models have them. ModelOpt's own quantizer and exporter do the
rest, so that what is tested is what users have. Needs the ``modelopt`` extra. The families are in tiny_models.py.

    python scripts/make/make_export.py OUT [--family FAMILY] [VARIANT ...]

writes OUT/base (in shards) and OUT/<variant>; without variants, nvfp4 alone; "all" is every one. Without a family,
flux1; the family "all" makes every family in one process, as OUT/<family>/base and OUT/<family>/<variant>. FP8 variants
come with the checkpoint that ModelOpt's example saves before it exports, OUT/<variant>/ckpt/transformer.pt.
"""

import argparse
import contextlib
import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tiny_models import FAMILIES, Draw, Family


@dataclass(frozen=True)
class Variant:
    """How an export is made."""

    config: str  # name of the config in modelopt.torch.quantization whose weight and input quantizers are taken
    dtype: str = "bfloat16"
    max_shard_size: str = "10GB"
    calibrate: bool = True
    compress: bool = False
    checkpoint: bool = False  # whether ModelOpt's own checkpoint is saved too, before the export changes the model
    transforms: bool = (
        False  # AWQ or SVDQuant: the config's own algorithm is run, and what ModelOpt multiplies by saved
    )
    noise: float = 0.0  # the weights are multiplied by 1 + noise * N(0, 1) first, as further training would change them


VARIANTS = {
    "nvfp4": Variant("NVFP4_DEFAULT_CFG"),
    "nvfp4_sharded": Variant("NVFP4_DEFAULT_CFG", max_shard_size="700KB"),
    "nvfp4_fp16": Variant("NVFP4_DEFAULT_CFG", dtype="float16"),
    "nvfp4_uncalibrated": Variant("NVFP4_DEFAULT_CFG", calibrate=False),
    "nvfp4_compressed": Variant("NVFP4_DEFAULT_CFG", compress=True),
    "nvfp4_trained": Variant("NVFP4_DEFAULT_CFG", noise=0.02),
    "fp8": Variant("FP8_DEFAULT_CFG", checkpoint=True),
    "fp8_sharded": Variant("FP8_DEFAULT_CFG", max_shard_size="900KB"),
    "fp8_fp16": Variant("FP8_DEFAULT_CFG", dtype="float16", checkpoint=True),
    "fp8_uncalibrated": Variant("FP8_DEFAULT_CFG", calibrate=False, checkpoint=True),
    "fp8_compressed": Variant("FP8_DEFAULT_CFG", compress=True),
    "fp8_trained": Variant("FP8_DEFAULT_CFG", noise=0.02, checkpoint=True),
}
TRANSFORMED = {
    "nvfp4_awq": Variant("NVFP4_AWQ_LITE_CFG", transforms=True),
    "nvfp4_svd": Variant("NVFP4_SVDQUANT_DEFAULT_CFG", transforms=True),
}
_LOW_RANK = 8


_HELP = f"all of {', '.join(VARIANTS)}; or some of them and {', '.join(TRANSFORMED)}"


def main() -> None:
    """Make what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "variants", nargs="*", choices=[[], "all", *VARIANTS, *TRANSFORMED], metavar="variant", help=_HELP
    )
    parser.add_argument("--family", choices=[*FAMILIES, "all"], default="flux1")
    arguments = parser.parse_intermixed_args()
    variants = VARIANTS if "all" in arguments.variants else arguments.variants or ["nvfp4"]
    if arguments.family == "all":
        make_all(arguments.out, FAMILIES, variants)
    else:
        make_family(FAMILIES[arguments.family], variants, arguments.out)


def make_all(out: Path, families: Iterable[str], variants: Iterable[str]) -> None:
    """Make several families, each in a folder of its name; importing ModelOpt once is most of what that saves."""
    variants = list(variants)
    for name in families:
        make_family(FAMILIES[name], variants, out / name)


def make_family(family: Family, variants: Iterable[str], path: Path) -> None:
    """Make ``path/base`` and ``path/<variant>``."""
    make_base(family, path / "base")
    for name in variants:
        make_export(family, path / "base", (VARIANTS | TRANSFORMED)[name], path / name)


def make_base(family: Family, path: Path) -> None:
    """Save a seeded transformer in shards, as a pipeline folder with transformer/."""
    import diffusers
    import torch
    from diffusers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(20)
    model = getattr(diffusers, family.class_name)(**family.config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            columns = torch.rand(parameter.shape[1]).pow(4) * 8 + 0.5  # a few channels far above the rest
            parameter.data = torch.randn_like(parameter) * columns / parameter.shape[1] ** 0.5 * family.gain
        else:
            parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    in_f32 = set(model._keep_in_fp32_modules or ())  # whatever the rest is in
    kept = {name: one.data.clone() for name, one in model.named_parameters() if in_f32 & set(name.split("."))}
    model.to(getattr(torch, family.base_dtype))
    for name, data in kept.items():
        model.get_parameter(name).data = data
    model.save_pretrained(path / "transformer", max_shard_size="2400KB")


def make_export(family: Family, base: Path, variant: Variant, path: Path) -> None:
    """Quantize the base with ModelOpt, calibrated on random inputs, and export it to ``path/transformer``."""
    import diffusers
    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq
    import torch
    from diffusers.utils import logging
    from modelopt.torch.export import export_hf_checkpoint

    logging.disable_progress_bar()
    dtype = getattr(torch, variant.dtype)
    model = getattr(diffusers, family.class_name).from_pretrained(base / "transformer", torch_dtype=dtype)
    run = _calibration(family, dtype) if variant.calibrate else None
    torch.manual_seed(21)
    for name, parameter in model.named_parameters():
        is_linear = parameter.ndim == 2 and name.endswith(".weight")
        if variant.noise and is_linear and not family.leaves_alone(name):
            parameter.data = parameter.data * (1 + variant.noise * torch.randn_like(parameter))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _convolutions_on_cpu():
        warnings.simplefilter("ignore")
        with _fake_quantization_on_cpu() if variant.transforms else contextlib.nullcontext():
            mtq.quantize(model, _quant_config(getattr(mtq, variant.config), family.attention, variant.transforms), run)
            mtq.disable_quantizer(model, family.leaves_alone)
            if variant.transforms:
                _save_multiplied(model, path)
        if variant.compress:
            mtq.compress(model)
        if variant.checkpoint:
            (path / "ckpt").mkdir(parents=True)
            mto.save(model, path / "ckpt" / "transformer.pt")
        export_hf_checkpoint(model, export_dir=path / "transformer", max_shard_size=variant.max_shard_size)


def _convolutions_on_cpu() -> contextlib.AbstractContextManager[Any]:
    """Keep ModelOpt from running 3-D convolutions in a CUDA kernel even when their quantizers are disabled.

    Without it the forward pass in which the export looks for q, k and v of one attention fails for Wan, ModelOpt only
    prints a warning, and their scales stay apart.
    """
    from modelopt.torch.quantization.nn.modules.quant_conv import _QuantConv3d

    return mock.patch.object(_QuantConv3d, "_should_use_implicit_gemm", return_value=False, create=True)


def _fake_quantization_on_cpu() -> contextlib.AbstractContextManager[Any]:
    """What AWQ and SVDQuant try factors with: ModelOpt's quantizer, and its decoder, for its CUDA kernel of both."""
    from modelopt.torch.quantization import tensor_quant
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    def both(inputs: Any, block_size: int, amax: Any, *_: Any) -> Any:
        largest = amax.float() / (6 * 448) if amax is not None else None
        packed, scales, scale = NVFP4QTensor.quantize(inputs, block_size, None, largest)
        return packed.dequantize(dtype=inputs.dtype, scale=scales, double_scale=scale, block_sizes={-1: block_size})

    return mock.patch.object(tensor_quant, "dynamic_block_quantize_op", both)


def _save_multiplied(model: Any, path: Path) -> None:
    """Save what each Linear multiplies its inputs by, by ModelOpt's own forward pass with inputs left unquantized."""
    import torch
    from modelopt.torch.quantization.nn import TensorQuantizer
    from safetensors.torch import save_file

    found = {}
    for name, module in model.named_modules():
        quantizer = getattr(module, "input_quantizer", None)
        if isinstance(quantizer, TensorQuantizer) and isinstance(module, torch.nn.Linear):
            was = quantizer._if_quant
            quantizer.disable_quant()
            one = torch.eye(module.weight.shape[1], dtype=module.weight.dtype)
            with torch.no_grad():
                bias = module.bias if module.bias is not None else 0
                found[f"{name}.weight"] = (module(one) - bias).T.contiguous()
            if was:
                quantizer.enable_quant()
    path.mkdir(parents=True)
    save_file(found, path / "multiplied.safetensors")


def _quant_config(library: dict[str, Any], with_attention: bool, transforms: bool) -> dict[str, Any]:
    """As ModelOpt's diffusers example has it: all Linears, and for some FP8 attention that is switched off later.

    A quantizer that was calibrated and then disabled leaves its amax in the export.
    """
    linear = [
        entry for entry in library["quant_cfg"] if entry["quantizer_name"] in ("*weight_quantizer", "*input_quantizer")
    ]
    attention = [
        {"quantizer_name": name, "cfg": {"num_bits": (4, 3)}}
        for name in ("*[qkv]_bmm_quantizer", "*bmm2_output_quantizer")
        if with_attention
    ]
    algorithm: Any = library["algorithm"] if transforms else "max"
    if algorithm == "awq_lite":
        algorithm = {"method": algorithm, "alpha_step": 0.5}  # three exponents are tried, not eleven
    elif transforms:
        algorithm = {**algorithm, "lowrank": _LOW_RANK}
    return {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *linear, *attention], "algorithm": algorithm}


def _calibration(family: Family, dtype: Any) -> Callable[[Any], None]:
    def run(model: Any) -> None:
        draw = Draw(dtype)
        for _ in range(2):
            model(**family.inputs(model.config, draw))

    return run


if __name__ == "__main__":
    main()
