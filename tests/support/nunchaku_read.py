"""Modules of nunchaku as they are read: a few of FLUX.1's, each of another kind."""

from collections.abc import Mapping

import torch
from described import Files
from nunchaku_files import halves, w4a4
from support import Tensors

from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.dialects.form import Canonical
from modelopt_convert.dialects.nunchaku_form import FORM

# A module that takes what comes, one whose inputs are shifted, and modulations of six vectors and of three.
PLAIN, SHIFTED = "single_transformer_blocks.0.mlp_fc1", "transformer_blocks.0.mlp_fc2"
SIX, THREE = "transformer_blocks.0.norm1.linear", "single_transformer_blocks.0.norm.linear"
DIFFUSERS = {
    PLAIN: "single_transformer_blocks.0.proj_mlp",
    SHIFTED: "transformer_blocks.0.ff.net.2",
    SIX: SIX,
    THREE: THREE,
}
FIRST = w4a4(torch.ones(128, 128), torch.ones(128), "int4", torch.ones(128).bfloat16()).tensors


def described(modules: Mapping[str, Tensors], files: Files | None = None) -> tuple[Canonical, Files]:
    """A description of modules of FLUX.1; the one that tells the model is there in any case."""
    files = files or Files()
    # All of a file have low-rank parts, or none has.
    lacks = any("smooth" in roles and "lora_down" not in roles for roles in modules.values())
    first = {role: one for role, one in FIRST.items() if not (lacks and role.startswith("lora"))}
    tensors = {PLAIN: first, **modules}
    infos = [files.put(f"{name}.{role}", one) for name, roles in tensors.items() for role, one in roles.items()]
    return FORM.read(Headers({info.name: info for info in infos}, {}, {}, ()), files.read, {}, "IN"), files


def values(module: str, roles: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias that a module is read as."""
    found, files = described({module: roles})
    name = DIFFUSERS[module]
    return tuple(files.tensor(found.tensors[f"{name}.{role}"]) for role in ("weight", "bias"))  # type: ignore[return-value]


def nvfp4() -> Tensors:
    made = w4a4(halves((128, 128), 1, -1, 1), halves((128,), 2, -1, 1), "nvfp4", halves((128,), 3, 0.5, 2))
    return dict(made.tensors)
