"""What is no checkpoint of nunchaku: one line each, with a code, and what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from described import Files
from nunchaku_files import halves, w4a4, w4a16
from nunchaku_read import FIRST, PLAIN, SHIFTED, SIX, described, nvfp4
from support import Tensors

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.dialects.nunchaku_form import FORM
from modelopt_convert.run.errors import InputError

Change = Callable[[Tensors], Any]


def _pop(role: str) -> Change:
    return lambda roles: roles.pop(role)


def _put(role: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda roles: roles.update({role: make(roles[role])})


def _new(role: str, tensor: torch.Tensor) -> Change:
    return lambda roles: roles.update({role: tensor})


HALF = torch.zeros(128).bfloat16()
W4A4_FAULTS: dict[str, tuple[Change, str]] = {
    "no wscales": (_pop("wscales"), "dialect.role"),
    "no smooth": (_pop("smooth"), "dialect.role"),
    "no bias": (_pop("bias"), "dialect.role"),
    "no qweight": (_pop("qweight"), "dialect.role"),
    "one low-rank part": (_pop("lora_up"), "dialect.role"),
    "wzeros beside": (_new("wzeros", HALF), "dialect.role"),
    "a strange tensor beside": (_new("strange", HALF), "dialect.role"),
    "a role in both spellings": (_new("smooth_factor", HALF), "dialect.role"),
    "wcscales of INT4": (_new("wcscales", HALF), "dialect.role"),
    "wtscale of INT4": (_new("wtscale", torch.ones(1)), "dialect.role"),
    "qweight of U8": (_put("qweight", lambda one: one.view(torch.uint8)), "dialect.shape"),
    "qweight of one dimension": (_put("qweight", lambda one: one.reshape(-1)), "dialect.shape"),
    "rows that fill no tile": (_put("qweight", lambda one: one[:-8]), "dialect.shape"),
    "columns that fill no tile": (_put("qweight", lambda one: one[:, :32].contiguous()), "dialect.shape"),
    "wscales cut": (_put("wscales", lambda one: one[:1]), "dialect.shape"),
    "wscales in F32": (_put("wscales", lambda one: one.float()), "dialect.shape"),
    "wscales turned": (_put("wscales", lambda one: one.T.contiguous()), "dialect.shape"),
    "E4M3 scales of 64 columns": (_put("wscales", lambda one: one.to(torch.float8_e4m3fn)), "dialect.shape"),
    "smooth cut": (_put("smooth", lambda one: one[:-2]), "dialect.shape"),
    "smooth_orig cut": (_put("smooth_orig", lambda one: one[:-2]), "dialect.shape"),
    "bias in F32": (_put("bias", lambda one: one.float()), "dialect.shape"),
    "a rank of 8": (
        lambda roles: roles.update({role: roles[role][:, :8].contiguous() for role in ("lora_down", "lora_up")}),
        "dialect.shape",
    ),
    "a rank of 0 beside one of 16": (
        _put("lora_up", lambda one: one[:, :0].contiguous()),
        "dialect.shape",
    ),
    "ranks that differ": (_put("lora_up", lambda one: one.repeat(1, 2)), "dialect.shape"),
    "a low-rank part in F32": (_put("lora_down", lambda one: one.float()), "dialect.shape"),
}
W4A16_FAULTS: dict[str, tuple[Change, str]] = {
    "no wzeros": (_pop("wzeros"), "dialect.role"),
    "no bias": (_pop("bias"), "dialect.role"),
    "smooth beside": (_new("smooth", HALF), "dialect.role"),
    "qweight of I8": (_put("qweight", lambda one: one.view(torch.int8)), "dialect.shape"),
    "rows that are no six": (_put("qweight", lambda one: one[:-1]), "dialect.shape"),
    "columns that are no 64": (_put("qweight", lambda one: one[:, :48].contiguous()), "dialect.shape"),
    "wzeros cut": (_put("wzeros", lambda one: one[:1]), "dialect.shape"),
    "wscales of padding": (_put("wscales", lambda one: torch.cat((one, one))), "dialect.shape"),
    "bias cut": (_put("bias", lambda one: one[:-1]), "dialect.shape"),
}
FAULTS = [
    *((SHIFTED, kind, *W4A4_FAULTS[kind]) for kind in W4A4_FAULTS),
    *((SIX, kind, *W4A16_FAULTS[kind]) for kind in W4A16_FAULTS),
]


@pytest.mark.parametrize(("module", "kind", "change", "code"), FAULTS, ids=lambda one: one if " " in str(one) else "")
def test_what_the_engine_would_not_load_is_one_line(module: str, kind: str, change: Change, code: str) -> None:
    made = (
        w4a16(halves((96, 128), 1, -1, 1), halves((96,), 2, -1, 1), 6)
        if module == SIX
        else w4a4(halves((128, 128), 1, -1, 1), halves((128,), 2, -1, 1), "int4", halves((128,), 3, 0.5, 2))
    )
    roles = dict(made.tensors)
    described({module: roles})
    change(roles)
    with pytest.raises(InputError) as caught:
        described({module: roles})
    assert caught.value.code == code and module in caught.value.message and caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("factor", [torch.ones(2), torch.ones(1).double(), torch.ones(1, 1)])
def test_a_scale_of_nvfp4_that_is_no_one_number(factor: torch.Tensor) -> None:
    files = Files()
    infos: dict[str, TensorInfo] = {}
    for name, roles in {PLAIN: FIRST, SHIFTED: nvfp4()}.items():
        for role, one in roles.items():
            if role != "wtscale":
                infos[f"{name}.{role}"] = files.put(f"{name}.{role}", one)
    dtype = {torch.float32: "F32", torch.float64: "F64"}[factor.dtype]
    name = f"{SHIFTED}.wtscale"
    infos[name] = files.add(name, dtype, tuple(factor.shape), factor.numpy().tobytes())
    with pytest.raises(InputError) as caught:
        FORM.read(Headers(infos, {}, {}, ()), files.read, {}, "IN")
    assert caught.value.code == "dialect.shape" and "wtscale" in caught.value.message


@pytest.mark.parametrize(
    ("name", "tensor", "code"),
    [
        ("transformer_blocks.0.strange.weight", HALF, "naming.unknown"),
        ("transformer_blocks.0.mlp_fc3.qweight", HALF, "naming.unknown"),
        ("lora_unet.lora_A.weight", HALF, "naming.unknown"),
        ("strange", HALF, "naming.unknown"),
        ("transformer_blocks.00.norm_q.weight", HALF, "naming.unknown"),
        ("transformer_blocks.{}.mlp_fc1.qweight", HALF, "naming.unknown"),
        ("single_transformer_blocks.0.proj_mlp.weight", HALF, "naming.twice"),
    ],
)
def test_a_tensor_that_the_model_does_not_have(name: str, tensor: torch.Tensor, code: str) -> None:
    files = Files()
    module, _, role = name.rpartition(".")
    with pytest.raises(InputError) as caught:
        described({module: {role: tensor}} if module else {}, files) if module else _bare(name, tensor)
    assert caught.value.code == code and "\n" not in caught.value.message
    assert name in caught.value.message or code == "naming.twice"


def _bare(name: str, tensor: torch.Tensor) -> None:
    files = Files()
    infos = [files.put(f"{PLAIN}.{role}", one) for role, one in FIRST.items()] + [files.put(name, tensor)]
    FORM.read(Headers({info.name: info for info in infos}, {}, {}, ()), files.read, {}, "IN")


def test_other_models_of_nunchaku_are_refused_by_name() -> None:
    files = Files()
    infos = [files.put(f"down_blocks.0.attn.to_q.{role}", one) for role, one in FIRST.items()]
    with pytest.raises(InputError) as caught:
        FORM.read(Headers({info.name: info for info in infos}, {}, {}, ()), files.read, {}, "IN")
    assert caught.value.code == "naming.unknown_model"
    assert all(one in caught.value.message for one in ("FLUX.1", "Qwen-Image", "Z-Image", "down_blocks"))
