"""build-nvfp4 --device cuda: the CPU's bytes, whenever the device does its work; and what is said where it cannot.

The pipeline runs on the CPU too, where a launch works at once or, as a GPU may, only when it is waited for. Where
there is a GPU the same tests run on it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import entries, refusal
from gpu_slots import Late
from support import build, edit, run_mopt, tree
from torch import Tensor

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.formats.format import WEIGHTS_WORDS, Weights
from modelopt_convert.formats.nvfp4.codes import quantize_nvfp4
from modelopt_convert.formats.nvfp4.sweep import quantize
from modelopt_convert.formats.tensor_bytes import TORCH_DTYPES, quantize_nvfp4_rows, to_bytes
from modelopt_convert.run.errors import BackendError
from modelopt_convert.write import gpu as gpu_module
from modelopt_convert.write.gpu import Gpu, Slot

PACKED = "single_transformer_blocks.0.proj_out"
SMALL = 30 * 64  # bytes of a chunk: whole blocks of every dtype, and no divisor of the weights


KINDS = ["at once", "late", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=KINDS)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What ``--device cuda`` means."""
    # A real GPU is not checked first: its check needs a chunk of the full size.
    found = torch.device("cuda" if request.param == "cuda" else "cpu")
    monkeypatch.setattr(gpu_module, "open_gpu", lambda: Gpu(found))
    if request.param == "late":
        monkeypatch.setattr(Late, "log", [], raising=False)
        monkeypatch.setattr(gpu_module, "Slot", Late)
    return str(request.param)


def widened(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = (tensor.float() * 1.003).to(dtype)

    return change


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_file_is_the_cpus(
    exports: Path, tmp_path: Path, gpu: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """With a last chunk that is not whole, slots used for one weight after another, and by one and several workers."""
    base = edit(exports / "base", tmp_path / "base", widened(dtype))
    assert build(None, base, tmp_path / "cpu").exit_code == 0
    for chunk_bytes, workers in ((SMALL, 1), (SMALL, 3), (gpu_module.CHUNK_BYTES, 2)):
        monkeypatch.setattr(gpu_module, "CHUNK_BYTES", chunk_bytes)
        out = tmp_path / f"{chunk_bytes}-{workers}"
        outcome = build(None, base, out, "--device", "cuda", "--workers", str(workers))
        assert outcome.exit_code == 0 and outcome.report is not None
        assert tree(out) == tree(tmp_path / "cpu")
        assert outcome.report["device"] == (torch.cuda.get_device_name() if gpu == "cuda" else "cpu")
        assert (outcome.report["peak_gpu_bytes"] > 0) == (gpu == "cuda")


@pytest.mark.parametrize("weights", ["max", "sweep"])
def test_the_next_chunk_is_under_way_before_one_is_waited_for(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Weights
) -> None:
    monkeypatch.setattr(Late, "log", [], raising=False)
    monkeypatch.setattr(gpu_module, "Slot", Late)
    monkeypatch.setattr(gpu_module, "CHUNK_BYTES", SMALL)
    reading = CheckpointReader.read_into

    def noted(self: CheckpointReader, name: str, begin: int, target: memoryview) -> None:
        Late.log.append(("read", begin))
        reading(self, name, begin, target)

    monkeypatch.setattr(CheckpointReader, "read_into", noted)
    device = Gpu(torch.device("cpu"))
    with CheckpointReader(exports / "base/transformer") as reader:
        info = reader.tensors[f"{PACKED}.weight"]
        pieces = [(bytes(codes), bytes(scales)) for codes, scales in device.quantized(reader, info, 3e-5, weights)]
        expected = quantize_nvfp4_rows(reader.read(info.name), info.dtype, info.shape[1], 3e-5, weights)
    assert len(pieces) > 4 and len({len(codes) for codes, _ in pieces}) == 2
    assert b"".join(codes for codes, _ in pieces) == bytes(expected[0])
    assert b"".join(scales for _, scales in pieces) == bytes(expected[1])
    first, second = dict.fromkeys(slot for what, slot in Late.log if what == "launch")
    assert Late.log[:8] == [
        ("read", 0), ("launch", first), ("read", SMALL), ("launch", second), ("wait", first),
        ("read", 2 * SMALL), ("launch", first), ("wait", second),
    ]  # fmt: skip


def test_a_chunk_of_a_weighted_sweep_begins_with_the_first_column(
    exports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_module, "CHUNK_BYTES", SMALL)
    device, name = Gpu(torch.device("cpu")), f"{PACKED}.weight"
    with CheckpointReader(exports / "base/transformer") as reader:
        info = reader.tensors[name]
        importance = bytes(to_bytes(torch.logspace(-3, 3, info.shape[1])))
        assert SMALL % (info.num_bytes // info.shape[0])  # else chunks are whole rows by chance
        how = (3e-5, "sweep-weighted", importance)
        pieces = [(bytes(codes), bytes(scales)) for codes, scales in device.quantized(reader, info, *how)]  # type: ignore[arg-type]
        expected = quantize_nvfp4_rows(reader.read(name), info.dtype, info.shape[1], *how)  # type: ignore[arg-type]
    assert len(pieces) > 4
    assert b"".join(codes for codes, _ in pieces) == bytes(expected[0])
    assert b"".join(scales for _, scales in pieces) == bytes(expected[1])


def test_the_error_is_the_cpus(exports: Path, room: Path, gpu: str) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{PACKED}.weight"].view(-1)[-1] = float("nan")

    base = edit(exports / "base", room / "base", damage)
    here = build(None, base, room / "out")
    there = refusal(
        lambda: build(None, base, room / "out", "--device", "cuda"), room, code="base.not_finite", names=(PACKED,)
    )
    assert here.message == there.message


@pytest.mark.parametrize("launches", [0, 1, 40])
def test_a_gpu_that_fails_leaves_out_as_it_was(
    exports: Path, room: Path, monkeypatch: pytest.MonkeyPatch, launches: int
) -> None:
    """Once while the base is measured, and once while a shard is half written."""
    monkeypatch.setattr(gpu_module, "open_gpu", lambda: Gpu(torch.device("cpu")))
    assert build(None, exports / "base", room / "out").exit_code == 0
    working, left = Slot.launch, launches

    def failing(self: Slot, work: Callable[[Tensor, Slot], None], num_bytes: int) -> None:
        def full(given: Tensor, slot: Slot) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.00 MiB.\nSee documentation")
            work(given, slot)

        working(self, full, num_bytes)

    monkeypatch.setattr(Slot, "launch", failing)
    outcome = refusal(
        lambda: build(None, exports / "base", room / "out", "--device", "cuda", "--overwrite"),
        room,
        code="device.failed",
        names=("CUDA out of memory. Tried to allocate 32.00 MiB.",),
        hint="--workers",
        exit_code=7,
    )
    assert "See documentation" not in outcome.message


def test_without_a_gpu_nothing_is_read(exports: Path, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("read_into", "buffered", "read_range"):
        monkeypatch.setattr(CheckpointReader, name, None)
    arguments = (exports / "base", room / "out", "--device", "cuda")
    refusal(lambda: build(None, *arguments), room, code="device.none", names=("GPU",), hint="--device", exit_code=6)
    assert build(None, *arguments, "--dry-run").exit_code == 0  # the plan is the same on any machine
    assert entries(room) == {}


def test_people_are_told(exports: Path, tmp_path: Path, gpu: str) -> None:
    arguments = ("--preset", "flux1-dev", "--base", exports / "base", "--output", tmp_path / "out", "--device", "cuda")
    outcome = run_mopt("build-nvfp4", *arguments, json_report=False)
    name = torch.cuda.get_device_name() if gpu == "cuda" else "cpu"
    assert outcome.exit_code == 0 and f"quantized on {name}, with " in outcome.stdout


def test_people_are_told_what_is_compared(exports: Path, tmp_path: Path, gpu: str) -> None:
    arguments = ("--export", exports / "nvfp4", "--base", exports / "base", "--output", tmp_path / "out")
    outcome = run_mopt("build-nvfp4", "--preset", "flux1-dev", *arguments, "--device", "cuda", json_report=False)
    name = torch.cuda.get_device_name() if gpu == "cuda" else "cpu"
    assert outcome.exit_code == 0 and f"compared on {name}, with " in outcome.stdout


RULES = [weights for weights in WEIGHTS_WORDS if weights != "gptq"]


@pytest.mark.parametrize("fault", ["reciprocal", *(f"one code by {weights}" for weights in RULES)])
def test_a_device_that_rounds_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    device = Gpu(torch.device("cpu"))
    device.check()

    def damaged(
        dtype: str, cast: str, scale: float, weights: Weights, importance: Tensor | None
    ) -> Callable[[Tensor, Slot], None]:
        assert dtype == cast

        def work(given: Tensor, slot: Slot) -> None:
            blocks = given.view(TORCH_DTYPES[dtype]).view(-1, 16)
            if fault == "reciprocal":  # what torch does on a GPU with a divisor that lies on the CPU
                blocks = blocks.float()
                divisor = torch.tensor(6.0, dtype=torch.float32) * torch.tensor(scale)
                amax = blocks.abs().amax(-1, keepdim=True) * divisor.reciprocal()
                scales = amax.masked_fill(amax == 0, 1.0).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn)
                packed, _ = quantize_nvfp4(blocks, torch.tensor(scale))
            else:
                packed, scales = quantize(weights, blocks, torch.tensor(scale), importance)
                packed[-1, -1] ^= fault == f"one code by {weights}"
            slot.codes[: packed.numel()] = packed.reshape(-1)
            slot.scales[: scales.numel()] = scales.view(torch.uint8).reshape(-1)

        return work

    monkeypatch.setattr(gpu_module, "_quantizing", damaged)
    with pytest.raises(BackendError, match="rounds otherwise") as caught:
        device.check()
    assert caught.value.code == "device.differs"


def test_a_device_whose_sums_are_not_exact_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As products of float64 by way of narrower numbers would be."""
    seen = list[str]()

    def damaged(weights: Weights, *given: Any) -> tuple[Tensor, Tensor]:
        packed, scale = quantize(weights, *given)
        seen.append(weights)
        if seen.count("gptq") == 2:  # the device's turn
            packed[-1, -1] ^= 1
        return packed, scale

    monkeypatch.setattr(gpu_module, "quantize", damaged)
    with pytest.raises(BackendError, match="rounds otherwise") as caught:
        Gpu(torch.device("cpu")).check()
    assert caught.value.code == "device.differs" and seen.count("gptq") == 2
