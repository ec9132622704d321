"""One small checkpoint per dialect, made by the format's rules and not with the package's own code.

Two modules are quantized. The scales of ODD need padding in the 128x4 order, so that their shape tells the order; those
of EVEN fill whole tiles, so that it does not. The contents are random, which is enough: nothing here is dequantized.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from faults import swizzle
from safetensors.torch import save_file
from support import Tensors
from torch import Tensor

ODD, EVEN = "blocks.0.attn.to_q", "blocks.0.attn.to_out"
SHAPES = {ODD: (160, 96), EVEN: (256, 128)}
PLAIN = "proj_out"
CLASS = {"_class_name": "AnyTransformer2DModel"}
WEIGHTS = "diffusion_pytorch_model.safetensors"
MODELOPT: dict[str, Any] = {
    "config_groups": {
        "group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}
    },
    "ignore": [PLAIN],
    "quant_algo": "NVFP4",
    "producer": {"name": "modelopt", "version": "0.47.0"},
    "quant_method": "modelopt",
}


def _bytes(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Random bytes; as FP8 all are positive, finite and not zero."""
    values = torch.randint(1, 0x7E, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(shape)))
    return values.view(dtype)


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _marker(name: str) -> Tensor:
    """ComfyUI's marker of one layer: JSON as a tensor of bytes."""
    return torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)


def _layers(name: str, *modules: str) -> str:
    return json.dumps({"format_version": "1.0", "layers": {module: {"format": name} for module in modules}})


def _plain() -> Tensors:
    """What is quantized in no dialect."""
    return {
        f"{PLAIN}.weight": torch.ones(64, 96, dtype=torch.bfloat16),
        "norm.weight": torch.ones(96, dtype=torch.bfloat16),
    }


def nvfp4(module: str, rows: int, columns: int) -> Tensors:
    """A module as ModelOpt writes it; the order of nibbles and scales shows in no name, dtype or shape."""
    return {
        f"{module}.weight": _bytes(rows, columns // 2),
        f"{module}.weight_scale": _bytes(rows, columns // 16, dtype=torch.float8_e4m3fn),
        f"{module}.weight_scale_2": _scalar(0.001),
        f"{module}.input_scale": _scalar(0.01),
    }


def _nvfp4_modules(shapes: Mapping[str, tuple[int, int]] = SHAPES, *, swizzled: bool = False) -> Tensors:
    tensors: Tensors = {}
    for module, shape in shapes.items():
        tensors |= nvfp4(module, *shape)
    if swizzled:
        tensors |= {name: swizzle(scale) for name, scale in tensors.items() if name.endswith(".weight_scale")}
    return tensors


def _fp8_modules(*, scale: str = "weight_scale", scale_shape: tuple[int, ...] = ()) -> Tensors:
    tensors: Tensors = {}
    for module, shape in SHAPES.items():
        tensors[f"{module}.weight"] = _bytes(*shape, dtype=torch.float8_e4m3fn)
        tensors[f"{module}.{scale}"] = torch.full(scale_shape, 0.02, dtype=torch.float32)
    return tensors


def write_folder(
    path: Path, tensors: Tensors, config: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> Path:
    """A transformer folder: config.json and one file, with what is never quantized added."""
    path.mkdir(parents=True)
    save_file({**_plain(), **tensors}, path / WEIGHTS, {"format": "pt", **(metadata or {})})
    (path / "config.json").write_text(json.dumps({**CLASS, **config}))
    return path


def write_file(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    """A single file, as ComfyUI's users pass around."""
    path.mkdir(parents=True)
    save_file({**_plain(), **tensors}, path / "model.safetensors", dict(metadata) if metadata else None)
    return path / "model.safetensors"


def modelopt(path: Path) -> Path:
    return write_folder(path, _nvfp4_modules(), {"quantization_config": MODELOPT})


def sglang_override(path: Path) -> Path:
    """ModelOpt's, with the flat config that SGLang's builder writes into the header under both keys."""
    config = {**MODELOPT, "quant_type": "NVFP4", "group_size": 16, "swap_weight_nibbles": False}
    header = {"_quantization_metadata": json.dumps(config), "quantization_config": json.dumps(config)}
    return write_folder(path, _nvfp4_modules(), {"quantization_config": config}, header)


def modelopt_padded(path: Path) -> Path:
    """Post-processed: the scales swizzled, which only their shape tells."""
    return write_folder(path, _nvfp4_modules(swizzled=True), {"quantization_config": MODELOPT})


def modelopt_postprocessed(path: Path) -> Path:
    """Post-processed with enable_layerwise_quant_metadata."""
    header = {"quantization_config": json.dumps(MODELOPT), "_quantization_metadata": _layers("nvfp4", *SHAPES)}
    return write_folder(path, _nvfp4_modules(swizzled=True), {"quantization_config": MODELOPT}, header)


def modelopt_header(path: Path) -> Path:
    """Post-processed without it; nothing is padded, so that the header alone tells."""
    header = {"quantization_config": json.dumps(MODELOPT)}
    return write_folder(path, _nvfp4_modules({EVEN: SHAPES[EVEN]}), {"quantization_config": MODELOPT}, header)


def modelopt_fp8(path: Path) -> Path:
    scales = {f"{module}.input_scale": _scalar(0.1) for module in SHAPES}
    return write_folder(path, _fp8_modules() | scales, {"quantization_config": {**MODELOPT, "quant_algo": "FP8"}})


def modelopt_svd(path: Path) -> Path:
    tensors = _nvfp4_modules()
    for module, (rows, columns) in SHAPES.items():
        tensors[f"{module}.pre_quant_scale"] = torch.ones(columns, dtype=torch.bfloat16)
        tensors[f"{module}.svdquant_lora_a"] = torch.ones(8, columns, dtype=torch.bfloat16)
        tensors[f"{module}.svdquant_lora_b"] = torch.ones(rows, 8, dtype=torch.bfloat16)
    return write_folder(path, tensors, {"quantization_config": {**MODELOPT, "quant_algo": "NVFP4_SVD"}})


def modelopt_llm(path: Path) -> Path:
    """Transformers' path: hf_quant_config.json beside config.json, which says the same."""
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": [PLAIN], "kv_cache_quant_algo": "FP8"}
    scales = {"layers.0.self_attn.k_proj.k_scale": _scalar(1.0), "layers.0.self_attn.v_proj.v_scale": _scalar(1.0)}
    folder = write_folder(path, _nvfp4_modules() | scales, {"quantization_config": MODELOPT})
    described = {"producer": MODELOPT["producer"], "quantization": quantization}
    (folder / "hf_quant_config.json").write_text(json.dumps(described))
    return folder


def bfl_package(path: Path) -> Path:
    """FLUX.3 klein: a manifest that states the conventions in words."""
    folder = modelopt_llm(path)
    (folder / "manifest.json").write_text(json.dumps({"scale_convention": {"weight_scale_2": "amax / (448 * 6)"}}))
    return folder


def bfl(path: Path) -> Path:
    """FLUX.1/FLUX.2 NVFP4: names of the original code, swizzled and swapped; all sizes of these models fill tiles."""
    shapes = {"double_blocks.0.img_attn.qkv": (384, 128), "single_blocks.0.linear1": (896, 128)}
    header = {"_quantization_metadata": _layers("nvfp4", *shapes)}
    return write_file(path, _nvfp4_modules(shapes, swizzled=True), header)


def comfyui(path: Path) -> Path:
    markers = {f"{module}.comfy_quant": _marker("nvfp4") for module in SHAPES}
    return write_file(path, _nvfp4_modules(swizzled=True) | markers)


def comfyui_both(path: Path) -> Path:
    """Marker tensors, and the header says it too."""
    markers = {f"{module}.comfy_quant": _marker("nvfp4") for module in SHAPES}
    header = {"_quantization_metadata": _layers("nvfp4", *SHAPES)}
    return write_file(path, _nvfp4_modules(swizzled=True) | markers, header)


def comfyui_header(path: Path) -> Path:
    return write_file(path, _nvfp4_modules(swizzled=True), {"_quantization_metadata": _layers("nvfp4", *SHAPES)})


def comfyui_fp8(path: Path) -> Path:
    markers = {f"{module}.comfy_quant": _marker("float8_e4m3fn") for module in SHAPES}
    return write_file(path, _fp8_modules() | markers)


def comfyui_fp8_header(path: Path) -> Path:
    return write_file(path, _fp8_modules(), {"_quantization_metadata": _layers("float8_e4m3fn", *SHAPES)})


def comfyui_fp8_legacy(path: Path) -> Path:
    tensors = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)} | _fp8_modules(scale="scale_weight")
    return write_file(path, tensors | {f"{module}.scale_input": _scalar(1.0) for module in SHAPES})


def comfyui_int8(path: Path) -> Path:
    tensors = {f"{module}.weight": torch.ones(shape, dtype=torch.int8) for module, shape in SHAPES.items()}
    tensors |= {f"{module}.weight_scale": _scalar(1.0) for module in SHAPES}
    return write_file(path, tensors | {f"{module}.comfy_quant": _marker("int8_tensorwise") for module in SHAPES})


def comfyui_mxfp8(path: Path) -> Path:
    tensors: Tensors = {}
    for module, (rows, columns) in SHAPES.items():
        tensors[f"{module}.weight"] = _bytes(rows, columns, dtype=torch.float8_e4m3fn)
        tensors[f"{module}.weight_scale"] = swizzle(_bytes(rows, columns // 32))
        tensors[f"{module}.comfy_quant"] = _marker("mxfp8")
    return write_file(path, tensors)


def compressed_tensors(path: Path) -> Path:
    tensors: Tensors = {}
    for module, (rows, columns) in SHAPES.items():
        tensors[f"{module}.weight_packed"] = _bytes(rows, columns // 2)
        tensors[f"{module}.weight_scale"] = _bytes(rows, columns // 16, dtype=torch.float8_e4m3fn)
        tensors[f"{module}.weight_global_scale"] = torch.tensor([1000.0])  # its reciprocal multiplies
        tensors[f"{module}.input_global_scale"] = torch.tensor([100.0])
    config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": [PLAIN]}
    return write_folder(path, tensors, {"quantization_config": config})


def lightx2v(path: Path) -> Path:
    tensors: Tensors = {}
    for module, (rows, columns) in SHAPES.items():
        tensors[f"{module}.weight"] = _bytes(rows, columns // 2)
        tensors[f"{module}.weight_scale"] = swizzle(_bytes(rows, columns // 16, dtype=torch.float8_e4m3fn))
        tensors[f"{module}.weight_global_scale"] = _scalar(1000.0)
        tensors[f"{module}.input_global_scale"] = _scalar(100.0)
        tensors[f"{module}.alpha"] = _scalar(1e-5)
    return write_file(path, tensors)


def torchao(path: Path) -> Path:
    tensors: Tensors = {}
    for module, (rows, columns) in SHAPES.items():
        tensors[f"{module}._weight_qdata"] = _bytes(rows, columns // 2)
        tensors[f"{module}._weight_scale_e4m3"] = _bytes(rows, columns // 16, dtype=torch.float8_e4m3fn)
        tensors[f"{module}._weight_per_tensor_scale"] = _scalar(0.001)
        tensors[f"{module}._weight_act_per_tensor_scale"] = _scalar(0.01)
    return write_folder(path, tensors, {"quantization_config": {"quant_method": "torchao"}})


def torchao_fp8(path: Path) -> Path:
    tensors: Tensors = {}
    for module, (rows, columns) in SHAPES.items():
        tensors[f"{module}._weight_qdata"] = _bytes(rows, columns, dtype=torch.float8_e4m3fn)
        tensors[f"{module}._weight_scale"] = torch.full((rows, 1), 0.02)
    return write_folder(path, tensors, {"quantization_config": {"quant_method": "torchao"}})


def mxfp4(path: Path) -> Path:
    """gpt-oss: all experts of a layer in one tensor."""
    experts = "model.layers.0.mlp.experts"
    tensors = {
        f"{experts}.gate_up_proj_blocks": _bytes(4, 128, 3, 16),
        f"{experts}.gate_up_proj_scales": _bytes(4, 128, 3),
        f"{experts}.down_proj_blocks": _bytes(4, 96, 2, 16),
        f"{experts}.down_proj_scales": _bytes(4, 96, 2),
    }
    return write_folder(path, tensors, {"quantization_config": {"quant_method": "mxfp4"}})


def nunchaku(path: Path) -> Path:
    tensors: Tensors = {}
    for module, (rows, columns) in SHAPES.items():
        tensors[f"{module}.qweight"] = _bytes(rows, columns // 2, dtype=torch.int8)
        tensors[f"{module}.wscales"] = _bytes(columns // 16, rows, dtype=torch.float8_e4m3fn)
        tensors[f"{module}.wtscale"] = _scalar(0.001)
        tensors[f"{module}.smooth_factor"] = torch.ones(columns, dtype=torch.bfloat16)
        tensors[f"{module}.proj_down"] = torch.ones(columns, 32, dtype=torch.bfloat16)
        tensors[f"{module}.proj_up"] = torch.ones(rows, 32, dtype=torch.bfloat16)
    header = {"quantization_config": json.dumps({"method": "svdquant", "rank": 32}), "config": json.dumps(CLASS)}
    return write_file(path, tensors, header)


def deepseek_fp8(path: Path) -> Path:
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    tensors = _fp8_modules(scale="weight_scale_inv", scale_shape=(2, 1))
    return write_folder(path, tensors, {"quantization_config": config})


def unlabelled_nvfp4(path: Path) -> Path:
    return write_file(path, _nvfp4_modules())


def unlabelled_fp8(path: Path) -> Path:
    return write_file(path, _fp8_modules())


def unquantized(path: Path) -> Path:
    weights = {f"{module}.weight": torch.ones(*shape, dtype=torch.bfloat16) for module, shape in SHAPES.items()}
    return write_folder(path, weights, {})


# By dialect; several files where it occurs in several forms.
FILES: dict[str, tuple[Callable[[Path], Path], ...]] = {
    "modelopt": (modelopt, sglang_override),
    "modelopt-postprocessed": (modelopt_postprocessed, modelopt_padded, modelopt_header),
    "modelopt-fp8": (modelopt_fp8,),
    "modelopt-other": (modelopt_svd,),
    "modelopt-llm": (modelopt_llm,),
    "bfl-package": (bfl_package,),
    "bfl": (bfl,),
    "comfyui": (comfyui, comfyui_both),
    "comfyui-header": (comfyui_header,),
    "comfyui-fp8": (comfyui_fp8, comfyui_fp8_header),
    "comfyui-int8": (comfyui_int8,),
    "comfyui-fp8-legacy": (comfyui_fp8_legacy,),
    "comfyui-mxfp8": (comfyui_mxfp8,),
    "compressed-tensors": (compressed_tensors,),
    "lightx2v": (lightx2v,),
    "torchao": (torchao,),
    "torchao-fp8": (torchao_fp8,),
    "mxfp4": (mxfp4,),
    "nunchaku": (nunchaku,),
    "deepseek-fp8": (deepseek_fp8,),
    "nvfp4-unlabelled": (unlabelled_nvfp4,),
    "fp8-unlabelled": (unlabelled_fp8,),
    "unquantized": (unquantized,),
}
MAKERS = [(dialect, maker) for dialect, makers in FILES.items() for maker in makers]
