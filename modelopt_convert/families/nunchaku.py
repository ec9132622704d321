"""How nunchaku's engine names the modules of a model, and what it joins. Pure, no torch.

Sources, at nunchaku 3a3cc3d0 (2025-12-30): ``src/FluxModel.cpp``, and in ``nunchaku/models/transformers`` the modules
``transformer_flux_v2.py`` (``convert_flux_state_dict``), ``transformer_qwenimage.py`` and ``transformer_zimage.py``.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from modelopt_convert.families.family import Family
from modelopt_convert.families.flux1 import FLUX1
from modelopt_convert.families.qwen_image import QWEN_IMAGE
from modelopt_convert.families.z_image import Z_IMAGE

_NUMBER = re.compile(r"(?<=\.)(0|[1-9][0-9]{0,8})(?=\.)")


class Linear(NamedTuple):
    """A quantized module of the engine.

    Attributes:
        members: diffusers' modules, whose rows it holds in equal parts, one below the other.
        columns: Which stretch of the columns of its one member it holds.
        stretches: How many modules hold the columns of that member, each a stretch.
        parts: Of an AWQ W4A16 module the number of vectors that it makes, whose rows take turns, so that row
            ``r * parts + s`` is row r of vector s; the bias of the second and the last but one has 1 added. 0: W4A4.
        shifted: Whether the engine adds to its inputs if it is INT4, so that none is negative: they come from GELU.
        plain: Whether the engine also has it unquantized, joined all the same.
    """

    members: tuple[str, ...]
    columns: int = 0
    stretches: int = 1
    parts: int = 0
    shifted: bool = False
    plain: bool = False


class Nunchaku(NamedTuple):
    """The names of one model.

    ``{}`` stands for the number of a block.

    Attributes:
        family: diffusers' names.
        class_names: The engine's classes, which a config may name.
        linears: By the engine's names.
        renamed: Modules that are not quantized, by the engine's names, where diffusers has another name.
        smoothed: By diffusers' names: whose rows may be divided by the smoothing factors of another's columns.
        biased: Whether quantized modules have a bias: all, or none.
        mark: A module by the engine's name that no other model has.
    """

    family: Family
    class_names: tuple[str, ...]
    linears: Mapping[str, Linear]
    renamed: Mapping[str, str]
    smoothed: Mapping[str, str]
    biased: bool
    mark: str

    def linear(self, module: str) -> Linear | None:
        """A quantized module by its full name; None if the engine has none of this name."""
        pattern, number = _pattern(module)
        found = self.linears.get(pattern)
        return found and found._replace(members=tuple(one.replace("{}", number) for one in found.members))

    def plain(self, module: str) -> str:
        """The name in diffusers of a module that is not quantized."""
        pattern, number = _pattern(module)
        return self.renamed.get(pattern, pattern).replace("{}", number)

    def smoothed_by(self, module: str) -> str | None:
        """By diffusers' names, the module whose smoothing the rows of this one may have."""
        pattern, number = _pattern(module)
        found = self.smoothed.get(pattern)
        return found and found.replace("{}", number)


def nunchaku_of(modules: Iterable[str]) -> Nunchaku | None:
    """The model that a checkpoint of nunchaku is of, by the names of its modules; None if mopt knows none."""
    names = set(modules)
    return next((one for one in MODELS if one.mark in names), None)


def _pattern(module: str) -> tuple[str, str]:
    """A name with the number of its block left open, and that number; of a name that no model has, nothing."""
    if "{" in module:
        return "", ""
    found = _NUMBER.search(module)
    return (module, "") if found is None else (f"{module[: found.start()]}{{}}{module[found.end() :]}", found[0])


def _within(block: str, linears: Mapping[str, Linear]) -> dict[str, Linear]:
    return {
        f"{block}.{name}": one._replace(members=tuple(f"{block}.{member}" for member in one.members))
        for name, one in linears.items()
    }


def _all_within(block: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{block}.{one}": f"{block}.{other}" for one, other in names.items()}


_DOUBLE, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
_QKV = Linear(("attn.to_q", "attn.to_k", "attn.to_v"))
_ADDED = Linear(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"))
_OUT, _ADDED_OUT = Linear(("attn.to_out.0",)), Linear(("attn.to_add_out",))
_NORMS = {"norm_q": "attn.norm_q", "norm_k": "attn.norm_k"}
_ADDED_NORMS = {"norm_added_q": "attn.norm_added_q", "norm_added_k": "attn.norm_added_k"}
_VALUES = {"attn.to_v": "attn.to_out.0", "attn.add_v_proj": "attn.to_add_out"}

_FLUX1 = Nunchaku(
    FLUX1,
    ("NunchakuFluxTransformer2dModel", "NunchakuFluxTransformer2DModelV2"),
    _within(
        _DOUBLE,
        {
            "norm1.linear": Linear(("norm1.linear",), parts=6),
            "norm1_context.linear": Linear(("norm1_context.linear",), parts=6),
            "qkv_proj": _QKV,
            "qkv_proj_context": _ADDED,
            "out_proj": _OUT,
            "out_proj_context": _ADDED_OUT,
            "mlp_fc1": Linear(("ff.net.0.proj",)),
            "mlp_fc2": Linear(("ff.net.2",), shifted=True),
            "mlp_context_fc1": Linear(("ff_context.net.0.proj",)),
            "mlp_context_fc2": Linear(("ff_context.net.2",), shifted=True),
        },
    )
    | _within(
        _SINGLE,
        {
            "norm.linear": Linear(("norm.linear",), parts=3),
            "qkv_proj": _QKV,
            "mlp_fc1": Linear(("proj_mlp",)),
            "out_proj": Linear(("proj_out",), columns=0, stretches=2),
            "mlp_fc2": Linear(("proj_out",), columns=1, stretches=2, shifted=True),
        },
    ),
    _all_within(_DOUBLE, _NORMS | _ADDED_NORMS) | _all_within(_SINGLE, _NORMS),
    _all_within(_DOUBLE, _VALUES) | _all_within(_SINGLE, {"attn.to_v": "proj_out"}),
    biased=True,
    mark="single_transformer_blocks.0.mlp_fc1",
)

_QWEN_IMAGE = Nunchaku(
    QWEN_IMAGE,
    ("NunchakuQwenImageTransformer2DModel",),
    _within(
        _DOUBLE,
        {
            "img_mod.1": Linear(("img_mod.1",), parts=6),
            "txt_mod.1": Linear(("txt_mod.1",), parts=6),
            "attn.to_qkv": _QKV,
            "attn.add_qkv_proj": _ADDED,
            "attn.to_out.0": _OUT,
            "attn.to_add_out": _ADDED_OUT,
            "img_mlp.net.0.proj": Linear(("img_mlp.net.0.proj",)),
            "img_mlp.net.2": Linear(("img_mlp.net.2",), shifted=True),
            "txt_mlp.net.0.proj": Linear(("txt_mlp.net.0.proj",)),
            "txt_mlp.net.2": Linear(("txt_mlp.net.2",), shifted=True),
        },
    ),
    {},
    _all_within(_DOUBLE, _VALUES),
    biased=True,
    mark="transformer_blocks.0.attn.add_qkv_proj",
)

# diffusers' SwiGLU multiplies the upper half of the rows by the gate, which is the lower; w1 is the gate of Z-Image.
_Z_BLOCK = {
    "attention.to_qkv": Linear(("attention.to_q", "attention.to_k", "attention.to_v")),
    "attention.to_out.0": Linear(("attention.to_out.0",)),
    "feed_forward.net.0.proj": Linear(("feed_forward.w3", "feed_forward.w1")),
    "feed_forward.net.2": Linear(("feed_forward.w2",)),
}
_Z_REFINER = {name: one._replace(plain=name != "attention.to_qkv") for name, one in _Z_BLOCK.items()}
_Z_VALUES = {"attention.to_v": "attention.to_out.0", "feed_forward.w3": "feed_forward.w2"}
_REFINERS = ("noise_refiner.{}", "context_refiner.{}")

_Z_IMAGE = Nunchaku(
    Z_IMAGE,
    ("NunchakuZImageTransformer2DModel",),
    {
        **_within("layers.{}", _Z_BLOCK),
        **{name: one for stack in _REFINERS for name, one in _within(stack, _Z_REFINER).items()},
    },
    {},
    {name: one for stack in ("layers.{}", *_REFINERS) for name, one in _all_within(stack, _Z_VALUES).items()},
    biased=False,
    mark="layers.0.feed_forward.net.0.proj",
)

MODELS = (_FLUX1, _QWEN_IMAGE, _Z_IMAGE)
