"""Small quantized weights as ModelOpt itself writes them: tests/formats/goldens, for tests that need no ModelOpt.

    python scripts/make/make_goldens.py

writes nvfp4.json and fp8.json: per case the weight, and the bytes that ModelOpt's own quantizer made of it, in hex,
with the versions that did. A case is a few rows; the weights hold zeros, ties, outliers and values beyond the range.
"""

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent.parent.parent / "tests" / "formats" / "goldens"
VERSIONS = {name: version(name) for name in ("nvidia-modelopt", "torch")}
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SHAPE = (3, 48)


def main() -> None:
    """Write both files."""
    FOLDER.mkdir(exist_ok=True)
    for name, cases in (("nvfp4", nvfp4()), ("fp8", fp8())):
        text = json.dumps({"versions": VERSIONS, "shape": SHAPE, "cases": list(cases)}, indent=1)
        (FOLDER / f"{name}.json").write_text(text + "\n")


def nvfp4() -> Iterator[dict[str, str]]:
    """Packed codes, block scales and global scale."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    for name, dtype, weight in weights():
        packed, scale, global_scale = NVFP4QTensor.quantize(weight.clone(), 16)
        made = {"packed": packed._quantized_data, "scale": scale, "global_scale": global_scale.float()}
        yield {"name": name, "dtype": dtype, "weight": to_hex(weight)} | {key: to_hex(one) for key, one in made.items()}


def fp8() -> Iterator[dict[str, str]]:
    """Codes under the scale of the weight's amax."""
    from modelopt.torch.export.quant_utils import QUANTIZATION_FP8, to_quantized_weight

    for name, dtype, weight in weights():
        scale = weight.abs().amax().float() / 448
        codes = to_quantized_weight(weight.clone(), scale, QUANTIZATION_FP8)
        yield {
            "name": name,
            "dtype": dtype,
            "weight": to_hex(weight),
            "scale": to_hex(scale),
            "codes": to_hex(codes),
        }


def weights() -> Iterator[tuple[str, str, Tensor]]:
    """Cases by name and dtype."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(SHAPE, generator=generator) * 0.02
    outliers = plain.clone()
    outliers[0, 5], outliers[2, 40] = 11.0, -7.5
    blocks = plain.clone()
    blocks[1, 16:32] = 0.0
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(*SHAPE[:1], SHAPE[1] // 8)
    ties[:, 1::2] *= -1
    for dtype, torch_dtype in DTYPES.items():
        for name, weight in (("plain", plain), ("outliers", outliers), ("zero block", blocks), ("ties", ties)):
            yield name, dtype, weight.to(torch_dtype)


def to_hex(tensor: Tensor) -> str:
    """The bytes of a tensor."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().hex()


if __name__ == "__main__":
    main()
