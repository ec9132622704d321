"""The dialects that are converted from and to, by the names of ``--from`` and ``--to``. Pure, no torch."""

from collections.abc import Callable, Mapping

from modelopt_convert.dialects.bf16_form import FORM as BF16
from modelopt_convert.dialects.bfl_form import FORM as BFL_DIFFUSERS
from modelopt_convert.dialects.bfl_form import check_calibrated
from modelopt_convert.dialects.comfyui_form import FORM as COMFYUI
from modelopt_convert.dialects.compressed_tensors_form import FORM as COMPRESSED_TENSORS
from modelopt_convert.dialects.dialect import Dialect
from modelopt_convert.dialects.form import Canonical, Form
from modelopt_convert.dialects.modelopt.form import FORM as MODELOPT
from modelopt_convert.dialects.nunchaku_form import FORM as NUNCHAKU
from modelopt_convert.dialects.torchao_form import FORM as TORCHAO

_ALL: tuple[Form, ...] = (MODELOPT, COMFYUI, BFL_DIFFUSERS, COMPRESSED_TENSORS, TORCHAO, BF16)
FORMS: Mapping[str, Form] = {one.name: one for one in _ALL}
# What a target refuses by the names of tensors alone, so that a build is refused before it begins.
CHECKS: Mapping[str, Callable[[Canonical], None]] = {BFL_DIFFUSERS.name: check_calibrated}
# A dialect as it is recognised. Of FP8 that nothing labels there is one reading: codes, by a scale where there is one.
_OF: Mapping[str, Form] = {
    "modelopt": MODELOPT,
    "modelopt-llm": MODELOPT,
    "modelopt-postprocessed": MODELOPT,
    "modelopt-fp8": MODELOPT,
    "modelopt-other": MODELOPT,
    "comfyui": COMFYUI,
    "comfyui-header": COMFYUI,
    "comfyui-mxfp8": COMFYUI,
    "comfyui-fp8": COMFYUI,
    "comfyui-fp8-legacy": COMFYUI,
    "fp8-unlabelled": COMFYUI,
    "bfl": COMFYUI,
    "compressed-tensors": COMPRESSED_TENSORS,
    "torchao": TORCHAO,
    "torchao-fp8": TORCHAO,
    "unquantized": BF16,
    "nunchaku": NUNCHAKU,
}


def form_of(dialect: Dialect) -> Form | None:
    """How a dialect is read; None for one that mopt only recognises."""
    return _OF.get(dialect.name)
