"""Faults to plant in checkpoints, and how a refusal is asserted. The formats are spelled out anew here, on purpose."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support import Outcome, Tensors, build, packed_in

SHARD = "diffusion_pytorch_model.safetensors"
# A packed module that stays packed under the preset, and one that the preset puts back to BF16; in no fused group.
PACKED = "single_transformer_blocks.0.proj_out"
REPLACED = "single_transformer_blocks.0.proj_mlp"

# Algorithms that ModelOpt exports diffusion transformers with and mopt does not take, and a word of why.
OTHER_ALGORITHMS = {
    "NVFP4_AWQ": "AWQ",
    "W4A16_AWQ": "AWQ",
    "W4A8_AWQ": "AWQ",
    "NVFP4_SVD": "SVDQuant",
    "W4A8_NVFP4_FP8": "32 wide",
    "W4A16_NVFP4": "input_scale",
    "MXFP8": "E8M0",
    "W8A8_SQ_PER_CHANNEL": "INT8",
    "FP8_PER_CHANNEL_PER_TOKEN": "per row",
    "MIXED_PRECISION": "differ in algorithm",
}

QUANTIZATION_CONFIG: dict[str, Any] = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "producer": {"name": "modelopt", "version": "0.47.0"},
}


def entries(folder: Path) -> dict[str, str]:
    """Everything below a folder: files with their digest, links with their target, folders too; hidden ones as well."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            what = f"link to {path.readlink()}"
        elif path.is_dir():
            what = "folder"
        else:
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        found[path.relative_to(folder).as_posix()] = what
    return found


def refused(
    export: Path,
    base: Path | None,
    room: Path,
    *more: str | Path,
    code: str,
    names: tuple[str, ...] = (),
    hint: str = "",
    exit_code: int = 3,
    preset: str | None = "flux1-dev",
    command: Callable[..., Outcome] = build,
) -> Outcome:
    """Build to ``room/out`` and require a refusal that changes nothing at all below ``room``."""

    def run() -> Outcome:
        return command(export, base, room / "out", *more, preset=preset)

    return refusal(run, room, code=code, names=names, hint=hint, exit_code=exit_code)


def told(error: dict[str, Any]) -> list[str]:
    """What the terminal says of a refusal as a report has it: of several kinds of fault, each."""
    several = error["faults"] if len(error["faults"]) > 1 else [error]
    lines = [(f"error: {one['message']} [{one['code']}]", f"hint: {one['hint']}") for one in several]
    return [line for pair in lines for line in pair]


def refusal(
    run: Callable[[], Outcome],
    room: Path,
    *,
    code: str,
    names: tuple[str, ...] = (),
    hint: str = "",
    exit_code: int = 3,
) -> Outcome:
    """Require that a run is refused and changes nothing at all below ``room``.

    ``names`` must all be in the message: files and tensors. ``hint`` must be in the hint, which may not be empty.
    """
    before = entries(room)
    outcome = run()
    assert (outcome.exit_code, outcome.error_code) == (exit_code, code), outcome.stderr
    assert outcome.report is not None
    error = outcome.report["error"]
    assert [name for name in names if name not in error["message"]] == [], error["message"]
    assert error["hint"] and hint in error["hint"]
    assert "\n" not in error["message"] + error["hint"]
    assert "tensor '" not in error["message"] or any(one["names"] for one in error["faults"]), error
    assert "\n".join(told(error)) in outcome.stderr
    assert outcome.report["exit_code"] == exit_code and outcome.report["output"]["published"] is False
    assert entries(room) == before
    return outcome


def write_transformer(folder: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    """A transformer folder of one file."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / SHARD, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def quantize(module: str, weight: torch.Tensor, global_scale: torch.Tensor | None = None) -> Tensors:
    """A packed module as ModelOpt's own quantizer makes it, with an input scale."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    packed, scale, scale_2 = NVFP4QTensor.quantize(weight.clone(), 16, None, global_scale)
    return {
        f"{module}.weight": packed._quantized_data,
        f"{module}.weight_scale": scale,
        f"{module}.weight_scale_2": scale_2,
        f"{module}.input_scale": torch.tensor(0.01),
    }


def seeded_weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    """A BF16 weight whose columns differ in size, as those of trained models do."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(columns, generator=generator) * 3 + 0.2
    return (torch.randn(rows, columns, generator=generator) * sizes).to(torch.bfloat16)


def small_pair(
    room: Path, shapes: dict[str, tuple[int, int]], global_scale: torch.Tensor | None = None
) -> tuple[Path, Path]:
    """An export and its base of no known class, with modules of any shapes and one unquantized norm."""
    weights = {name: seeded_weight(*shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    plain = {"norm.weight": torch.ones(8, dtype=torch.bfloat16)}
    packed: Tensors = {}
    for name, weight in weights.items():
        packed |= quantize(name, weight, None if global_scale is None else global_scale.clone())
    base = {f"{name}.weight": weight for name, weight in weights.items()}
    config = {"_class_name": "SmallTransformer"}
    return (
        write_transformer(room / "export", packed | plain, config | {"quantization_config": QUANTIZATION_CONFIG}),
        write_transformer(room / "base", base | plain, config),
    )


def swizzle(scale: torch.Tensor) -> torch.Tensor:
    """Scales in the 128x4 order, padded with zeros, by cuBLAS's formula for where each one lies."""
    rows, columns = scale.shape
    wide = -(-columns // 4)
    tall = -(-rows // 128)
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    tile = (row // 128) * wide + column // 4
    offset = tile * 512 + (row % 32) * 16 + ((row % 128) // 32) * 4 + column % 4
    flat = torch.zeros(tall * wide * 512, dtype=torch.uint8)
    flat[offset.flatten()] = scale.contiguous().view(torch.uint8).flatten()
    return flat.view(tall * 128, wide * 4).view(scale.dtype)


def swap(packed: torch.Tensor) -> torch.Tensor:
    """The two codes of every byte exchanged."""
    return (packed % 16) * 16 + packed // 16


def swapped(tensors: Tensors, modules: Iterable[str] | None = None) -> None:
    """Exchange the two codes of every byte of some packed modules, or of all."""
    for module in packed_in(tensors) if modules is None else modules:
        tensors[f"{module}.weight"] = swap(tensors[f"{module}.weight"])


def reciprocal(tensors: Tensors, modules: Iterable[str] | None = None) -> None:
    """Turn the global scales of some packed modules, or of all, upside down."""
    for module in packed_in(tensors) if modules is None else modules:
        tensors[f"{module}.weight_scale_2"] = 1.0 / tensors[f"{module}.weight_scale_2"]


def postprocess(tensors: Tensors, modules: Iterable[str] | None = None, *, padding: str | None = None) -> None:
    """ModelOpt's own padding and swizzling of some packed modules, or of all, in the order in which it does them."""
    from modelopt.torch.export.diffusers_utils import pad_nvfp4_weights, swizzle_nvfp4_scales

    chosen = set(packed_in(tensors) if modules is None else modules)
    part = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] in chosen}
    if padding:
        part = pad_nvfp4_weights(part, padding)
    tensors.update(swizzle_nvfp4_scales(part))


def quantization(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the config's quantization_config."""
    return lambda config: config["quantization_config"].update(changes)


def poke(tensor: torch.Tensor, row: int, column: int, byte: int) -> torch.Tensor:
    """An E4M3 tensor with one byte replaced."""
    raw = tensor.clone().view(torch.uint8)
    raw[row, column] = byte
    return raw.view(tensor.dtype)
