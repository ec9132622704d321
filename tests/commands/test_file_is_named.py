"""Every command on one FILE with every kind of fault: what is said names that FILE, and no folder that nobody gave."""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import PACKED, reciprocal, swapped
from root import LONG
from safetensors.torch import save_file
from support import Outcome, Tensors, config_of, load, run_mopt

NAME = "that-one.safetensors"
LAIR = "lair"  # the folder of the file, which is never given
COMMANDS = {
    "build": "build-nvfp4 --preset flux1-dev --export {file} --base {base} --output {out}",
    "build one": "build-nvfp4 --preset flux1-dev --base {file} --output {out}",
    "build on": "build-nvfp4 --preset flux1-dev --export {nvfp4} --base {file} --output {out}",
    "build to": "build-nvfp4 --preset flux1-dev --export {file} --base {base} --output {out} --to comfyui",
    "build --config": "build-nvfp4 --export {file} --base {base} --config {config} --output {out} --dry-run",
    "fp8": "convert-fp8 --preset flux1-dev --export {file} --base {base} --output {out}",
    "fp8 one": "convert-fp8 --preset flux1-dev --base {file} --output {out}",
    "comfyui": "convert {file} {out} --to comfyui",
    "modelopt": "convert {file} {out} --to modelopt --base {base}",
    "bf16": "convert {file} {out} --to bf16 --base {base}",
    "base of": "convert {nvfp4} {out} --to bf16 --base {file}",
    "inspect": "inspect {file} --engines",
    "inspect base": "inspect {file} --base {base}",
    "verify": "verify {file} --device cpu",
    "verify base": "verify {file} --base {base} --device cpu",
    "verify on": "verify {nvfp4} --base {file} --device cpu",
    "swap": "swap-nibbles {file} {out}",
    "swap base": "swap-nibbles {file} {out} --base {base}",
    "swizzle": "unswizzle-scales {file} {out} --reverse",
    "new": "presets new {file}",
    "push": "push {file} alice/it --dry-run",
}

Change = Callable[[Tensors, dict[str, Any]], object]
NORM = "norm_out.linear.bias"


def _raw(content: bytes) -> Callable[[bytes], bytes]:
    return lambda _: content


def _put(name: str, tensor: torch.Tensor) -> Change:
    return lambda tensors, _: tensors.__setitem__(name, tensor)


def _changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors, _: tensors.__setitem__(name, change(tensors[name]))


def _said(**keys: Any) -> Change:
    return lambda _, config: config.update(keys)


def _filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.full_like(tensor.float(), value).to(tensor.dtype)


def _noise(tensor: torch.Tensor) -> torch.Tensor:
    noise = torch.randint(0, 120, tensor.shape, generator=torch.Generator().manual_seed(1))
    return noise.to(torch.uint8).view(tensor.dtype) if tensor.element_size() == 1 else noise.to(tensor.dtype)


def _all_noise(tensors: Tensors, _: object) -> None:
    weights = [name for name, one in tensors.items() if one.element_size() == 1 and name.endswith(".weight")]
    tensors |= {name: _noise(tensors[name]) for name in weights}


def _only(name: str, tensor: torch.Tensor) -> Change:
    return lambda tensors, _: (tensors.clear(), tensors.update({name: tensor}))


def _renamed(name: Callable[[str], str]) -> Change:
    return lambda tensors, _: [tensors.__setitem__(name(one), tensors.pop(one)) for one in list(tensors)]


def _without(start: str) -> Change:
    return lambda tensors, _: [tensors.pop(one) for one in list(tensors) if one.startswith(start)]


def _marker(text: bytes) -> Change:
    return _put(f"{PACKED}.comfy_quant", torch.tensor(list(text), dtype=torch.uint8))


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": _raw(b""),
    "git-lfs": _raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n"),
    "GGUF": _raw(b"GGUF\x03\0\0\0" + bytes(100)),
    "cut short": lambda raw: raw[:-1000],
    "no header": lambda raw: raw[:100],
    "longer": lambda raw: raw + bytes(8),
}
CHANGES: dict[str, Change] = {
    "as it is": lambda *_: None,
    "no config": lambda _, config: config.clear(),
    "other class": _said(_class_name="WanTransformer3DModel"),
    "unknown class": _said(_class_name="Mine"),
    "other values": _said(num_attention_heads=3, num_layers=7),
    "quantized otherwise": _said(quantization_config={"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}),
    "no dictionary": _said(quantization_config=[1]),
    "an odd list": _said(
        quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["proj_out*", 3]}
    ),
    "a LoRA": _only("a.lora_A.weight", torch.ones(4, 4)),
    "a LoRA within": _put("transformer_blocks.0.attn.to_q.lora_A.weight", torch.ones(4, 4)),
    "other names": _only("a.weight", torch.ones(32, 32)),
    "quantizer state": _put("proj_out.weight_quantizer._amax", torch.ones(())),
    "one more": _put("proj_extra.weight", torch.ones(16, 16, dtype=torch.bfloat16)),
    "one less": lambda tensors, _: tensors.pop(NORM),
    "no weight": lambda tensors, _: tensors.pop(f"{PACKED}.weight"),
    "no block scales": lambda tensors, _: tensors.pop(f"{PACKED}.weight_scale", None),
    "other shape": _changed(NORM, lambda one: one[:-1].clone()),
    "other weight": _changed(f"{PACKED}.weight", lambda one: one[:-16].clone()),
    "integers": _changed(NORM, lambda one: one.to(torch.int32)),
    "F64": _changed(NORM, torch.Tensor.double),
    "NaN": _changed(NORM, _filled(float("nan"))),
    "infinity": _changed("proj_out.weight", _filled(float("inf"))),
    "zeros": _changed(f"{PACKED}.weight", torch.zeros_like),
    "noise": _changed(f"{PACKED}.weight", _noise),
    "all noise": _all_noise,
    "negative scale": _put(f"{PACKED}.weight_scale_2", torch.tensor(-1.0)),
    "zero scale": _put(f"{PACKED}.weight_scale", torch.tensor(0.0)),
    "two scales": _put(f"{PACKED}.weight_scale_2", torch.ones(2)),
    "F16 scale": _put(f"{PACKED}.weight_scale_2", torch.ones((), dtype=torch.float16)),
    "NaN input scale": _put(f"{PACKED}.input_scale", torch.tensor(float("nan"))),
    "smoothed": _put(f"{PACKED}.pre_quant_scale", torch.full((256,), 0.5, dtype=torch.bfloat16)),
    "marker of another": _marker(b'{"format": "float8_e4m3fn"}'),
    "broken marker": _marker(b"{"),
    "swapped": lambda tensors, _: swapped(tensors),
    "reciprocal": lambda tensors, _: reciprocal(tensors),
    "a text encoder beside": _put("text_encoders.t5.weight", torch.ones(8, 8)),
    "prefixed": _renamed(lambda name: f"model.diffusion_model.{name}"),
    "mixed names": _renamed(lambda name: name.replace("transformer_blocks.0.attn.to_out.0", "double_blocks.0.proj")),
    "one block less": _without("single_transformer_blocks.0."),
}  # fmt: skip
STARTS = ("nvfp4", "fp8", "base")
FAULTS = [(start, fault) for start in STARTS for fault in (*CHANGES, *BYTES)]
# Of every fault one command, another for each start. All pairs, three thousand, with MOPT_TEST_LONG.
SHARE = len(COMMANDS) if LONG else 1
# A folder that nobody gave. An OUT beside the file may be proposed, and a config.json that lies beside it is named.
STRAY = re.compile(rf"/{LAIR}(?!/{NAME}(?!/)|/that-one-right )\b\S*")


def write(folder: Path, start: Path, fault: str) -> Path:
    tensors, config = load(start / "transformer"), config_of(start / "transformer")
    CHANGES.get(fault, CHANGES["as it is"])(tensors, config)
    folder.mkdir(parents=True)
    header = {"config": json.dumps(config)} if config else {}
    file = folder / NAME
    save_file({name: one.contiguous() for name, one in tensors.items()}, file, {"format": "pt", **header})
    if fault in BYTES:
        file.write_bytes(BYTES[fault](file.read_bytes()))
    return file


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from texts(one)
    elif isinstance(value, str):
        yield value


def told_wrong(outcome: Outcome) -> list[str]:
    """What names a folder that nobody gave, or the refusal that does not name the file."""
    found = [*texts(outcome.report or {}), outcome.stderr, *([] if outcome.report else [outcome.stdout])]
    stray = [text for text in found if STRAY.search(text)]
    if outcome.exit_code not in (0, 1, 6):
        message = outcome.report["error"]["message"] if outcome.report else outcome.stderr
        stray += [message] * (f"/{NAME}" not in message)
    return stray


@pytest.mark.parametrize(("start", "fault"), FAULTS)
def test_the_file_is_named_and_no_folder(start: str, fault: str, exports: Path, tmp_path: Path) -> None:
    file = write(tmp_path / LAIR, exports / start, fault)
    config = exports / "nvfp4" / "transformer" / "config.json"
    places = {"file": file, "base": exports / "base", "nvfp4": exports / "nvfp4", "config": config}
    for number, command in enumerate(random.Random(f"{start} {fault}").sample(sorted(COMMANDS), SHARE)):
        words = [word.format(**places, out=tmp_path / f"out{number}") for word in COMMANDS[command].split()]
        outcome = run_mopt(*words)
        assert outcome.exit_code != 70 and told_wrong(outcome) == [], (command, outcome.stderr)
