"""The kernels of NVFP4 layers without a GPU: run by Triton's interpreter, and compiled for GPUs down to their code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from root import ROOT

# The interpreter cuts float32 to BF16 where a GPU rounds; so what is rounded last is looked at in float32.
RUN = """
import json, torch
from modelopt_convert.fidelity import triton_kernels as kernels
from modelopt_convert.fidelity.activations import quantizer_of
from modelopt_convert.verification.gemm.nvfp4 import Nvfp4Weight, decode_nvfp4

static, found = quantizer_of("nvfp4").static, {}
every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
every = every[every.isfinite()].view(-1, 480)
for dtype in (torch.bfloat16, torch.float32, torch.float16):
    values = torch.randn(37, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    values[3], values[4, :16], values[5], values[6] = 0.0, 0.0, values[5] * 1e-4, values[6] * 1e4
    for scale in (1e-7, 4e-4, 0.01, 3.0, 1e4):
        for kind, rows in (("random", values), ("every", every)):
            scales = torch.tensor(scale)
            got, wanted = kernels.quantize(rows, scales), static(rows, scales).operand
            found[f"{kind} {dtype} {scale}"] = int((got != wanted).sum())
values[8, 40] = float("nan")
got, wanted = kernels.quantize(values, scales), static(values, scales).operand
found["NaN"] = int((got.isnan() != wanted.isnan()).sum()) + abs(int(wanted.isnan().sum()) - 16)
packed = torch.randint(0, 256, (48, 32), dtype=torch.uint8)
codes = torch.randint(0, 255, (48, 4), dtype=torch.uint8)
codes[codes == 127] = 0
block = codes.view(torch.float8_e4m3fn)
found["decode"] = int((kernels.decode(Nvfp4Weight(packed, block, 1.0)) != decode_nvfp4(packed, block)).sum())
product, scale, bias = torch.randn(37, 48), torch.tensor(0.0137), torch.randn(48)
got = kernels.finish(product, scale, None, torch.float32)
found["finish"] = int((got != product * scale).sum())
got = kernels.finish(product, scale, bias, torch.float32)
found["finish with bias"] = int((got != product * scale + bias).sum())
print(json.dumps(found))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def test_the_interpreter_gives_the_bits_of_plain_torch() -> None:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found) == 34 and not any(found.values()), found


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_roundings_stay_as_they_are_written(capability: int) -> None:
    """Reciprocals are rounded, and no product is contracted with the sum after it, which would round once."""
    from modelopt_convert.fidelity.triton_kernels import compile_ahead

    code = compile_ahead(capability)
    assert "div.rn.f32" in code["quantize"] and "div.full" not in code["quantize"]
    assert "fma.rn.f32" not in code["finish"]
