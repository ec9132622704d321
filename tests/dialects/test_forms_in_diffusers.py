"""diffusers loads what is written, and its forward pass is that of the values that mopt decodes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from support import run_mopt
from torch import Tensor

from modelopt_convert.dialects.targets import FORMS


@pytest.fixture(scope="module")
def outputs(families: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """FLUX.2 in NVFP4 as each target has it."""
    root = tmp_path_factory.mktemp("targets")
    export = families / "flux2" / "nvfp4"
    for target in ("bf16", "torchao", "bfl-diffusers"):
        outcome = run_mopt("convert", export, root / target, "--to", target)
        assert outcome.exit_code == 0, outcome.message
    return {target: root / target for target in FORMS if (root / target).is_dir()}


def run(model: Any) -> Tensor:
    """A forward pass of a small FLUX.2."""
    config, generator = model.config, torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    axes = len(config.axes_dims_rope)
    with torch.inference_mode():
        return model(
            hidden_states=random(1, 6, config.in_channels),
            encoder_hidden_states=random(1, 4, config.joint_attention_dim),
            timestep=torch.tensor([0.5]).bfloat16(),
            img_ids=torch.zeros(1, 6, axes),
            txt_ids=torch.zeros(1, 4, axes),
            guidance=torch.tensor([1.0]).bfloat16(),
            return_dict=False,
        )[0]


@pytest.fixture(scope="module")
def decoded(outputs: Mapping[str, Path]) -> Any:
    return diffusers.Flux2Transformer2DModel.from_pretrained(outputs["bf16"], torch_dtype=torch.bfloat16)


def test_bf16(decoded: Any, families: Path) -> None:
    base = diffusers.Flux2Transformer2DModel.from_pretrained(
        families / "flux2" / "base/transformer", torch_dtype=torch.bfloat16
    )
    weights, originals = decoded.state_dict(), base.state_dict()
    assert weights.keys() == originals.keys()
    differing = [name for name, one in weights.items() if not torch.equal(one, originals[name])]
    assert differing and max(_error(weights[name], originals[name]) for name in differing) < 0.13
    assert _error(run(decoded), run(base)) < 0.3


def test_torchao(outputs: Mapping[str, Path], decoded: Any) -> None:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    model = diffusers.Flux2Transformer2DModel.from_pretrained(outputs["torchao"], torch_dtype=torch.bfloat16)
    wanted, packed = decoded.state_dict(), 0
    for name, parameter in model.named_parameters():
        if isinstance(parameter.data, NVFP4Tensor):
            packed += 1
            assert parameter.data.act_quant_kwargs is not None and parameter.data.act_per_tensor_scale is not None
            assert torch.equal(parameter.data.dequantize(), wanted[name]), name
            parameter.act_quant_kwargs = None  # no CPU has the kernel for packed inputs
        else:
            assert torch.equal(parameter, wanted[name]), name
    assert packed == 28
    assert torch.equal(run(model), run(decoded))


@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
def test_torchao_in_several_files(kind: str, families: Path, decoded: Any, tmp_path: Path) -> None:
    """diffusers takes the names of tensors from the last file's header, and reads parts of weights from several."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    from torchao.quantization import Float8Tensor

    export = families / "flux2" / kind
    for target, more in (("torchao", ("--max-shard-size", "300KB")), ("bf16", ())):
        outcome = run_mopt("convert", export, tmp_path / target, "--to", target, *more)
        assert outcome.exit_code == 0, outcome.message
    assert len(list((tmp_path / "torchao").glob("*.safetensors"))) > 3
    model = diffusers.Flux2Transformer2DModel.from_pretrained(tmp_path / "torchao", torch_dtype=torch.bfloat16)
    plain = diffusers.Flux2Transformer2DModel.from_pretrained(tmp_path / "bf16", torch_dtype=torch.bfloat16)
    wanted, packed = plain.state_dict(), 0
    for name, parameter in model.named_parameters():
        if isinstance(parameter.data, NVFP4Tensor | Float8Tensor):
            packed += 1
            assert torch.equal(parameter.data.dequantize(), wanted[name]), name
            parameter.act_quant_kwargs = None
        else:
            assert torch.equal(parameter, wanted[name]), name
    assert packed == 28
    assert torch.equal(run(model), run(plain))


def test_black_forest_labs_for_diffusers(outputs: Mapping[str, Path], decoded: Any) -> None:
    (file,) = outputs["bfl-diffusers"].glob("*.safetensors")
    model = diffusers.Flux2Transformer2DModel.from_single_file(
        str(file),
        config=str(outputs["bf16"]),
        quantization_config=diffusers.BFLQuantizationConfig(),
        torch_dtype=torch.bfloat16,
    )
    wanted, packed = decoded.state_dict(), 0
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale_2"):
            from diffusers.quantizers.bfl.utils import dequantize_nvfp4

            packed += 1
            values = dequantize_nvfp4(module.weight, module.weight_scale, module.weight_scale_2)
            assert torch.equal(values.bfloat16(), wanted[f"{name}.weight"]), name
    assert packed == 28
    assert torch.equal(run(model), run(decoded))


def _error(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())
