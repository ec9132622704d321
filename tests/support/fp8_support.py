"""FP8 exports that today's ModelOpt does not write, running convert-fp8, and the arithmetic its output is held against.

The arithmetic is plain torch or ModelOpt's own, and the formats are spelled out anew here, on purpose.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from faults import refused, seeded_weight, write_transformer
from safetensors.torch import save_file
from support import Outcome, Tensors, config_of, load, run_mopt

E4M3 = torch.float8_e4m3fn
# A module that the preset leaves packed, one that it keeps in BF16 though the export packed it, and one never packed.
PACKED = "single_transformer_blocks.0.proj_out"
REPLACED = "single_transformer_blocks.0.proj_mlp"
UNPACKED = "time_text_embed.text_embedder.linear_1"
ROLES = ("weight_scale", "input_scale")

QUANTIZATION_CONFIG: dict[str, Any] = {
    "quant_method": "modelopt",
    "quant_algo": "FP8",
    "ignore": [],
    "producer": {"name": "modelopt", "version": "0.47.0"},
}


def convert(
    export: Path, base: Path | None, output: Path, *more: str | Path, preset: str | None = "flux1-dev"
) -> Outcome:
    """Run ``mopt convert-fp8``."""
    chosen = [] if preset is None else ["--preset", preset]
    beside = [] if base is None else ["--base", base]
    return run_mopt("convert-fp8", *chosen, "--export", export, *beside, "--output", output, *more)


fp8_refused = partial(refused, command=convert)


def warnings_of(outcome: Outcome) -> dict[str, str]:
    """The warnings of a run by code; of several with one code, the last."""
    assert outcome.report is not None
    return {one["code"]: one["message"] for one in outcome.report["warnings"]}


def packed_modules(tensors: Tensors) -> set[str]:
    """Names of the modules whose weight is E4M3."""
    return {name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.dtype == E4M3}


def modelopt_cast(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A weight in E4M3 as ModelOpt's exporter casts it, in the dtype that the weight has."""
    from modelopt.torch.export.quant_utils import QUANTIZATION_FP8, to_quantized_weight

    return to_quantized_weight(weight, scale, QUANTIZATION_FP8)


def quotient(weight: torch.Tensor, scale: torch.Tensor, rule: str) -> torch.Tensor:
    """The codes of a weight under a rule of the report, by torch alone; its cast to E4M3 saturates."""
    dtype, _, rounded = rule.removeprefix("quotient in ").partition(", scale rounded to ")
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    # ModelOpt loads the model in BF16 or F16 before it divides: F32 weights are rounded first.
    narrow = weight if weight.dtype != torch.float32 else weight.to(torch.bfloat16)
    return (narrow.to(dtypes[dtype]) / (scale.to(dtypes[rounded]) if rounded else scale)).to(E4M3)


def dequantized(tensors: Tensors, module: str) -> torch.Tensor:
    """Code times scale in F32."""
    return tensors[f"{module}.weight"].float() * tensors[f"{module}.weight_scale"]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the Frobenius norms."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def state_dict(checkpoint: Path) -> Tensors:
    """``model_state_dict`` of a checkpoint that ModelOpt saved."""
    return torch.load(checkpoint, weights_only=True, map_location="cpu")["model_state_dict"]


def checkpoint_of(export: Path) -> Path:
    """The checkpoint that make_export.py saved beside an export."""
    return export / "ckpt" / "transformer.pt"


def old_export(export: Path, target: Path) -> Path:
    """What ModelOpt wrote before it packed FP8 weights: those of its checkpoint, no scales, the same config."""
    tensors, weights = load(export / "transformer"), state_dict(checkpoint_of(export))
    for module in packed_modules(tensors):
        tensors[f"{module}.weight"] = weights[f"{module}.weight"].clone()
        for role in ROLES:
            tensors.pop(f"{module}.{role}", None)
    plain = {name: tensor for name, tensor in tensors.items() if "_quantizer." not in name}
    return write_transformer(target, plain, config_of(export / "transformer"))


def save_checkpoint(path: Path, tensors: Tensors, **more: object) -> Path:
    """A checkpoint as ModelOpt's ``mto.save`` lays it out."""
    torch.save({"modelopt_state": {}, "model_state_dict": tensors} | more, path)
    return path


def edited_checkpoint(checkpoint: Path, target: Path, changes: Tensors, *, without: tuple[str, ...] = ()) -> Path:
    """A copy with some tensors of its ``model_state_dict`` replaced or left out."""
    tensors = state_dict(checkpoint) | changes
    return save_checkpoint(target, {name: tensor for name, tensor in tensors.items() if name not in without})


def small_fp8_pair(room: Path, weights: dict[str, torch.Tensor], scales: dict[str, float]) -> tuple[Path, Path]:
    """An export and its base of no known class, cast by ModelOpt under any scale, with one unquantized norm."""
    plain: Tensors = {"norm.weight": torch.ones(8, dtype=torch.bfloat16)}
    packed: Tensors = {}
    for name, weight in weights.items():
        scale = torch.tensor(scales[name]) if name in scales else weight.abs().max().float() / 448
        packed[f"{name}.weight"] = modelopt_cast(weight, scale)
        packed[f"{name}.weight_scale"] = scale
        packed[f"{name}.input_scale"] = torch.tensor(0.01)
    base = {f"{name}.weight": weight for name, weight in weights.items()}
    config = {"_class_name": "SmallTransformer"}
    return (
        write_transformer(room / "export", packed | plain, config | {"quantization_config": QUANTIZATION_CONFIG}),
        write_transformer(room / "base", base | plain, config),
    )


def small_old_pair(room: Path, weights: dict[str, torch.Tensor], amax: dict[str, torch.Tensor]) -> tuple[Path, Path]:
    """An old export of no known class, which is its own base too, and a checkpoint with any amax."""
    plain = {f"{name}.weight": weight for name, weight in weights.items()}
    plain["norm.weight"] = torch.ones(8, dtype=torch.bfloat16)
    config = {"_class_name": "SmallTransformer", "quantization_config": QUANTIZATION_CONFIG}
    state = dict(plain)
    for name in weights:
        state[f"{name}.weight_quantizer._amax"] = amax[name]
        state[f"{name}.input_quantizer._amax"] = torch.tensor(4.0, dtype=amax[name].dtype)
    return write_transformer(room / "export", plain, config), save_checkpoint(room / "transformer.pt", state)


def two_weights() -> dict[str, torch.Tensor]:
    """Weights of the two modules ``lin`` and ``other``."""
    return {"lin": seeded_weight(64, 96, 1), "other": seeded_weight(32, 64, 2)}


# LTX's own names of what diffusers calls otherwise (Lightricks/LTX-2, ltx_core/model/transformer): the reverse of what
# diffusers' loader does with them, which the tests hold this against.
_LTX_PREFIXES = {
    "proj_in.": "patchify_proj.",
    "audio_proj_in.": "audio_patchify_proj.",
    "time_embed.": "adaln_single.",
    "audio_time_embed.": "audio_adaln_single.",
    "av_cross_attn_video_scale_shift.": "av_ca_video_scale_shift_adaln_single.",
    "av_cross_attn_video_a2v_gate.": "av_ca_a2v_gate_adaln_single.",
    "av_cross_attn_audio_scale_shift.": "av_ca_audio_scale_shift_adaln_single.",
    "av_cross_attn_audio_v2a_gate.": "av_ca_v2a_gate_adaln_single.",
}
_LTX_PARTS = {
    "norm_q": "q_norm",
    "norm_k": "k_norm",
    "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
    "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
}


def ltx_name(name: str) -> str:
    """LTX's own name of a tensor in diffusers' naming."""
    for mine, theirs in _LTX_PREFIXES.items():
        if name.startswith(mine):
            return theirs + name.removeprefix(mine)
    return ".".join(_LTX_PARTS.get(part, part) for part in name.split("."))


def connectors(prefix: str) -> Tensors:
    """Tensors of the text connectors: LTX keeps them beside the transformer, diffusers in a component of its own."""
    block = "transformer_1d_blocks.0.attn1.to_q"
    return {
        f"{prefix}{kind}_embeddings_connector.{leaf}": torch.ones(16, 16, dtype=torch.bfloat16)
        for kind in ("video", "audio")
        for leaf in ("learnable_registers", f"{block}.weight")
    }


def x0_export(export: Path, target: Path, *, merged: bool = False) -> Path:
    """A diffusers export of LTX-2 as ModelOpt writes one of LTX's own pipeline.

    Args:
        export: The export in diffusers' naming.
        target: The folder to make.
        merged: Whether ModelOpt's merged_base_safetensor_path put it into a whole single-file checkpoint of LTX.
    """
    prefix = "model.diffusion_model." if merged else "velocity_model."
    config = config_of(export / "transformer")["quantization_config"]
    tensors = {prefix + ltx_name(name): tensor for name, tensor in load(export / "transformer").items()}
    tensors |= connectors(prefix)
    metadata = {"_class_name": "X0Model", "_export_format": "safetensors_state_dict"}
    if merged:
        metadata |= {"config": json.dumps({"transformer": {"num_layers": 6}}), "model_version": "2.0.0"}
        for stranger in ("vae.encoder.conv_in.conv.weight", "vocoder.conv_pre.weight", "audio_vae.decoder.x.weight"):
            tensors[stranger] = torch.ones(4, 4, dtype=torch.bfloat16)
        tensors["text_embedding_projection.aggregate_embed.weight"] = torch.ones(8, 8, dtype=torch.bfloat16)
    ignore = [prefix + ltx_name(entry.removesuffix("*") + ".").removesuffix(".") + "*" for entry in config["ignore"]]
    target.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors", metadata)
    (target / "config.json").write_text(
        json.dumps(
            {
                "_export_format": "safetensors_state_dict",
                "_class_name": "X0Model",
                "quantization_config": config | {"ignore": ignore},
            }
        )
    )
    return target
