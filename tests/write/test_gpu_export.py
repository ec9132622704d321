"""build-nvfp4 --export --device cuda: the CPU's verdicts, counts, messages and bytes, whatever the export is.

The device is the CPU, or a GPU where there is one; its work is done at once, or only when it is waited for.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import QUANTIZATION_CONFIG, postprocess, swapped, write_transformer
from gpu_slots import Late
from producers import Packed, larger_global_scale, max_calibration, ten_scales, ties_away
from support import Tensors, load, tree
from torch import Tensor

import modelopt_convert
from modelopt_convert import MoptError
from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.formats.nvfp4.codes import quantize_nvfp4
from modelopt_convert.formats.rows import SAMPLED_ROWS, sample_rows
from modelopt_convert.formats.tensor_bytes import TORCH_DTYPES
from modelopt_convert.write import gpu as gpu_module
from modelopt_convert.write.gpu import Gpu

# Rows of 256 and 640 bytes in BF16; their number is no multiple of what fits into a chunk.
SHAPES = {"transformer_blocks.0.ff.net.0.proj": (250, 128), "transformer_blocks.0.ff.net.2": (70, 320)}
DAMAGED = "transformer_blocks.0.ff.net.2"
CHUNKS = (100, 3000, 16 << 20)  # shorter than a row, a few rows, all of them
Change = Callable[[Tensors], object]


def one_bit(tensors: Tensors) -> None:
    tensors[f"{DAMAGED}.weight"][-1, -1] ^= 1


def one_scale(tensors: Tensors) -> None:
    tensors[f"{DAMAGED}.weight_scale"].view(torch.uint8)[-1, -1] ^= 4


def row_swapped(tensors: Tensors) -> None:
    packed = tensors[f"{DAMAGED}.weight"]
    row = packed[next(row for row in range(len(packed)) if row not in sample_rows(len(packed), SAMPLED_ROWS))]
    row.copy_((row << 4) | (row >> 4))


# Who made the export, what was done to it then, and the verdict; None where it is refused.
EXPORTS: dict[str, tuple[Callable[[Tensor], Packed], Change, str | None]] = {
    "reproduced": (max_calibration, lambda _: None, "reproduced"),
    "tied": (ties_away, lambda _: None, "reproduced but for ties"),
    "nearest": (larger_global_scale, lambda _: None, "nearest"),
    "swept": (ten_scales, lambda _: None, "nearest"),
    "swapped": (max_calibration, swapped, "reproduced"),
    "swizzled": (max_calibration, postprocess, "reproduced"),
    "one bit": (max_calibration, one_bit, None),
    "one scale": (max_calibration, one_scale, None),
    "a row swapped": (max_calibration, row_swapped, None),
}


@pytest.fixture(params=["at once", "late", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ``--device cuda`` means; the casts that were asked of it."""
    asked: list[str] = []
    working = Gpu.again

    def noted(self: Gpu, base: CheckpointReader, info: TensorInfo, cast: str, scale: float, height: int) -> Any:
        asked.append(cast)
        return working(self, base, info, cast, scale, height)

    monkeypatch.setattr(Gpu, "again", noted)
    # A real GPU is not checked first: its check needs a chunk of the full size.
    found = torch.device("cuda" if request.param == "cuda" else "cpu")
    monkeypatch.setattr(gpu_module, "open_gpu", lambda: Gpu(found))
    if request.param == "late":
        monkeypatch.setattr(Late, "log", [], raising=False)
        monkeypatch.setattr(gpu_module, "Slot", Late)
    return asked


def with_ties(rows: int, columns: int, seed: int) -> Tensor:
    """A weight with values at midpoints: multiples of a sixteenth, with 6 in every block."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(-90, 91, (rows, columns), generator=generator) / 16
    found[:, ::16] = 6.0
    return found * 2.0**-8


def pair(folder: Path, made: Callable[[Tensor], Packed], change: Change, stored: str, cast: str) -> tuple[Path, Path]:
    """An export, and its base in one dtype, of which it was made in another."""
    base: Tensors = {"norm.weight": torch.ones(8, dtype=TORCH_DTYPES[cast])}
    export = dict(base)
    for seed, (module, shape) in enumerate(SHAPES.items()):
        one = (with_ties(*shape, seed) * 1.001 if stored == "F32" else with_ties(*shape, seed)).to(TORCH_DTYPES[stored])
        base[f"{module}.weight"] = one
        parts = made(one.to(TORCH_DTYPES[cast]))
        roles = ("weight", "weight_scale", "weight_scale_2")
        export |= {f"{module}.{role}": tensor for role, tensor in zip(roles, parts, strict=True)}
        export[f"{module}.input_scale"] = torch.tensor(0.01 * (1 + seed))
    change(export)
    config = {"_class_name": "SmallTransformer"}
    write_transformer(folder / "base", base, config)
    write_transformer(folder / "export", export, config | {"quantization_config": QUANTIZATION_CONFIG})
    return folder / "export", folder / "base"


def outcome(export: Path, base: Path, output: Path, device: str) -> tuple[Any, str, Any]:
    """The proof, what is said of a refusal, and the files."""
    options: Any = {"preset": "none", "device": device, "workers": 2}
    try:
        report = modelopt_convert.build_nvfp4(export=export, base=base, output=output, **options)
    except MoptError as error:
        assert error.report is not None and error.report.proof is not None
        return error.report.proof, error.message, None
    return report.proof, "", tree(output)


@pytest.mark.parametrize("name", EXPORTS)
def test_the_outcome_is_the_cpus(name: str, tmp_path: Path, device: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made, change, verdict = EXPORTS[name]
    export, base = pair(tmp_path, made, change, "BF16", "BF16")
    here = outcome(export, base, tmp_path / "cpu", "cpu")
    assert not device
    found = here[0].modules[DAMAGED].verdict
    assert found == verdict if verdict is not None else found not in ("reproduced", "nearest")
    for chunk_bytes in CHUNKS:
        device.clear()
        monkeypatch.setattr(gpu_module, "CHUNK_BYTES", chunk_bytes)
        assert outcome(export, base, tmp_path / str(chunk_bytes), "cuda") == here
        assert bool(device) == (chunk_bytes > min(CHUNKS))


@pytest.mark.parametrize(("stored", "cast"), [("F32", "BF16"), ("F32", "F16"), ("F32", "F32"), ("F16", "F16")])
def test_the_base_is_cast_as_the_exporter_did(stored: str, cast: str, tmp_path: Path, device: list[str]) -> None:
    export, base = pair(tmp_path, max_calibration, lambda _: None, stored, cast)
    here = outcome(export, base, tmp_path / "cpu", "cpu")
    assert here[0].modules[DAMAGED].verdict == "reproduced" and here[0].modules[DAMAGED].cast == cast
    assert outcome(export, base, tmp_path / "cuda", "cuda") == here
    assert cast in device


def test_a_base_that_is_not_finite_is_refused_alike(tmp_path: Path, device: list[str]) -> None:
    export, base = pair(tmp_path, max_calibration, lambda _: None, "BF16", "BF16")
    tensors = load(base)
    tensors[f"{DAMAGED}.weight"][37, 5] = float("nan")
    base = write_transformer(tmp_path / "damaged", tensors, {"_class_name": "SmallTransformer"})
    messages = []
    for where in ("cpu", "cuda"):
        with pytest.raises(MoptError) as caught:
            modelopt_convert.build_nvfp4(
                export=export,
                base=base,
                output=tmp_path / where,
                preset="none",
                device=where,  # type: ignore[arg-type]
            )
        assert caught.value.code == "base.not_finite"
        messages.append(caught.value.message)
    assert messages[0] == messages[1] and DAMAGED in messages[0] and device


def test_rows_are_those_of_the_cpu(tmp_path: Path, device: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the base's values and the largest magnitude, each good until the next."""
    _, base = pair(tmp_path, max_calibration, lambda _: None, "F32", "F16")
    monkeypatch.setattr(gpu_module, "CHUNK_BYTES", 3000)
    one = gpu_module.open_gpu()
    with CheckpointReader(base) as reader:
        info = reader.tensors[f"{DAMAGED}.weight"]
        height, top = one.height(1280), 0
        values = load(base)[info.name].to(torch.float16)
        for again in one.again(reader, info, "F16", 3e-5, height):
            rows = values[top : top + height]
            packed, scale = quantize_nvfp4(rows, torch.tensor(3e-5))
            assert torch.equal(again.base, rows) and torch.equal(again.packed, packed)
            assert torch.equal(again.scale, scale.view(torch.uint8)) and again.amax == float(rows.abs().amax())
            top += len(rows)
    assert height == 2 and top == len(values) and device == ["F16"]
