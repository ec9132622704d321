"""Full-size FLUX.1-dev checkpoints made of sparse files: real names, shapes and sizes, no bytes on the disk.

    python scripts/make/sparse_flux1.py OUT

writes OUT/base (BF16, 24 GB by its headers) and OUT/export (NVFP4). Needs diffusers for the names and shapes.
"""

import json
import os
import sys
from pathlib import Path

from modelopt_convert.checkpoint.header import TensorSpec, build_header
from modelopt_convert.dialects.modelopt.dialect import INDEX_NAME
from modelopt_convert.plan.plan import split_into_shards

SHARD_BYTES = 10_000_000_000
_LEFT_ALONE = ("time_text_embed.", "context_embedder.", "x_embedder.", "norm_out.", "proj_out.")
_QUANTIZATION = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 16}, "targets": ["Linear"]}},
    "producer": {"name": "modelopt", "version": "0.47.0"},
    "ignore": [f"{name}*" for name in _LEFT_ALONE],
}


def make(folder: Path) -> None:
    """Write both checkpoints."""
    import torch
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    config = {"_class_name": "FluxTransformer2DModel", **{key: model.config[key] for key in sorted(model.config)}}
    config = {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
    write_sparse(folder / "base", [TensorSpec(name, "BF16", shape) for name, shape in shapes.items()], config)
    write_sparse(folder / "export", list(_packed(shapes)), config | {"quantization_config": _QUANTIZATION})


def _packed(shapes: dict[str, tuple[int, ...]]) -> list[TensorSpec]:
    specs: list[TensorSpec] = []
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) != 2 or name.startswith(_LEFT_ALONE):
            specs.append(TensorSpec(name, "BF16", shape))
            continue
        rows, columns = shape
        specs += [
            TensorSpec(name, "U8", (rows, columns // 2)),
            TensorSpec(f"{module}.weight_scale", "F8_E4M3", (rows, columns // 16)),
            TensorSpec(f"{module}.weight_scale_2", "F32", ()),
            TensorSpec(f"{module}.input_scale", "F32", ()),
        ]
    return specs


def write_sparse(folder: Path, specs: list[TensorSpec], config: dict[str, object]) -> None:
    """Write a checkpoint of any names and shapes, in shards as ModelOpt cuts them; its bytes are holes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    shards = split_into_shards(specs, SHARD_BYTES)
    for shard in shards:
        head, _, num_bytes = build_header(shard.tensors, {"format": "pt"})
        path = folder / shard.file
        path.write_bytes(head)
        os.truncate(path, num_bytes)
        weight_map |= {spec.name: shard.file for spec in shard.tensors}
    if len(shards) > 1:
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
