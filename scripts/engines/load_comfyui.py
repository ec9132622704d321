"""Load checkpoints with ComfyUI's ``load_diffusion_model``, on a CPU, as one file, and compare what it holds.

    MOPT_COMFYUI=CHECKOUT python load_comfyui.py CHECKPOINT ...

ComfyUI runs unmodified but for the sizes of small models, where it takes those of the published ones for granted, and
for torchaudio, which it imports for VAEs. What it should hold is what it makes of the decoded weights, loaded first: an
error there is of the names, whatever the format. Weights that it holds quantized decode themselves.
"""

import contextlib
import json
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import comparison
import torch
import transformers  # noqa: F401  before torchaudio's stand-in, for which it would look
from comparison import Tensors, decoded, stored
from safetensors.torch import save_file

_TIME_WIDTH = 1024  # of Z-Image's time embedder, but for models that are narrower
_FILE = "model.safetensors"  # by a relative path, since ComfyUI's errors have it


def start() -> None:
    """Import ComfyUI from its checkout."""
    comparison.let_torchvision_import()
    for name in ("torchaudio", "torchaudio.functional", "torchaudio.transforms"):
        sys.modules[name] = types.ModuleType(name)
    sys.path.insert(0, os.environ["MOPT_COMFYUI"])
    from comfy.cli_args import args

    args.cpu = True
    torch.use_deterministic_algorithms(True, warn_only=True)  # what is never set is NaN, and not what the memory held


def load(checkpoint: Path) -> tuple[Tensors, Tensors]:
    """What ComfyUI holds and what it should hold, by its names."""
    config = json.loads((checkpoint / "config.json").read_text())
    plain = decoded(checkpoint)
    lies = {name: tensor.dtype for name, tensor in plain.items()}
    wanted = _loaded(plain, config, torch.float32)
    held = _loaded(dict(stored(checkpoint)), config, None)
    marks = {name: torch.full(one.shape, float(lies[name] == torch.float32)) for name, one in plain.items()}
    wide = _loaded(marks, config, torch.float32)
    return held, {name: one if wide[name].any() else one.to(torch.bfloat16) for name, one in wanted.items()}


def _loaded(tensors: Tensors, config: dict[str, Any], dtype: torch.dtype | None) -> Tensors:
    """The parameters of the model that ComfyUI makes of tensors."""
    options = {} if dtype is None else {"dtype": dtype}
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / _FILE, metadata={"format": "pt"})
        return {name: one.clone() for name, one in held(_FILE, Path(folder), config, options).items()}


def held(file: str, folder: Path, config: dict[str, Any], options: dict[str, Any]) -> Tensors:
    """The parameters of the model that ComfyUI makes of one file, by its names."""
    import comfy.ldm.lumina.model
    import comfy.ldm.wan.model
    import comfy.model_detection
    import comfy.sd

    image, time = comfy.ldm.wan.model.MLPProj, comfy.ldm.lumina.model.TimestepEmbedder
    comfy.ldm.wan.model.MLPProj = lambda _, *rest, **more: image(config["image_dim"], *rest, **more)
    comfy.ldm.lumina.model.TimestepEmbedder = lambda _, **more: time(_TIME_WIDTH, **more)
    detect = comfy.model_detection.detect_unet_config

    def detect_small(*arguments: Any, **more: Any) -> dict[str, Any] | None:
        found = detect(*arguments, **more)
        return found and found | _sizes(config, found)

    comfy.model_detection.detect_unet_config = detect_small
    try:
        with contextlib.chdir(folder):
            model = comfy.sd.load_diffusion_model(file, model_options=options)
            return {name: one.detach() for name, one in model.model.diffusion_model.named_parameters()}
    finally:
        comfy.model_detection.detect_unet_config = detect
        comfy.ldm.wan.model.MLPProj, comfy.ldm.lumina.model.TimestepEmbedder = image, time


def _sizes(config: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What ComfyUI does not find out from the tensors, by its names."""
    model, heads = found.get("image_model"), config.get("num_attention_heads")
    if model == "qwen_image":
        keys = ("attention_head_dim", "num_attention_heads", "joint_attention_dim", "axes_dims_rope")
        return {key: config[key] for key in keys}
    if model in ("flux", "flux2"):
        axes, channels = config["axes_dims_rope"], config["in_channels"]
        return {"axes_dim": axes, "num_heads": heads, "out_channels": channels // found["patch_size"] ** 2}
    if model == "hunyuan_video":
        return {"num_heads": heads, "axes_dim": config["rope_axes_dim"], "vec_in_dim": config["pooled_projection_dim"]}
    if model == "wan2.1":
        return {"num_heads": heads, "freq_dim": config["freq_dim"], "text_dim": config["text_dim"]}
    if model == "ltxav":
        return {key: value for key, value in config.items() if key.endswith(("_dim", "_heads", "_channels"))}
    if model == "lumina2":
        keys = ("n_heads", "n_kv_heads", "n_refiner_layers", "axes_dims")
        sizes = {"z_image_modulation": True, "pad_tokens_multiple": 32, "ffn_dim_multiplier": 8.0 / 3.0}
        return sizes | {key: config[key] for key in keys}
    return {}


if __name__ == "__main__":
    comparison.main(start, load)
