"""A whole pipeline around a transformer, for tests of what is copied."""

import json
from pathlib import Path

import torch
from safetensors.torch import save
from support import copy

INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.40.0",
    "boundary_ratio": 0.9,
    "flags": [True, None, 1],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "text_encoder_2": [None, None],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
FILES = {
    "scheduler/scheduler_config.json": b'{"_class_name": "FlowMatchEulerDiscreteScheduler"}',
    "text_encoder/config.json": b'{"architectures": ["T5EncoderModel"]}',
    "text_encoder/model.safetensors.index.json": b'{"metadata": {}, "weight_map": {"a": "model.safetensors"}}',
    "text_encoder/model.safetensors": save({"a": torch.arange(4000.0)}),
    "tokenizer/vocab.json": b'{"/home/me</w>": 1}',
    "tokenizer/nested/deeper/merges.txt": b"a b\n",
    "vae/config.json": b'{"_class_name": "AutoencoderKL"}',
    "vae/diffusion_pytorch_model.safetensors": save({"a": torch.arange(1000.0)}),
    "LICENSE.md": b"as the base\n",
    "README.md": b"the base's own card\n",
}


def make_pipeline(transformer: Path, folder: Path, *also: Path) -> Path:
    """What a download of FLUX.1 looks like.

    Args:
        transformer: Copied as ``transformer``.
        folder: Where to put the pipeline.
        also: Copied as ``transformer_2``.
    """
    copy(transformer, folder / "transformer")
    for second in also:
        copy(second, folder / "transformer_2")
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    index = INDEX | ({"transformer_2": INDEX["transformer"]} if also else {})
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
