"""The dialects that are converted from and to, by the names of ``--from`` and ``--to``. Pure, no torch."""

from collections.abc import Mapping

from modelopt_convert.dialects.comfyui_form import FORM as COMFYUI
from modelopt_convert.dialects.dialect import Dialect
from modelopt_convert.dialects.form import Form
from modelopt_convert.dialects.modelopt.form import FORM as MODELOPT

FORMS: Mapping[str, Form] = {one.name: one for one in (MODELOPT, COMFYUI)}
# A dialect as it is recognised, by the first part of its name.
_OF: Mapping[str, Form] = {"modelopt": MODELOPT, "comfyui": COMFYUI, "bfl": COMFYUI}


def form_of(dialect: Dialect) -> Form | None:
    """How a dialect is read; None for one that mopt only recognises."""
    return next((form for name, form in _OF.items() if dialect.name.partition("-")[0] == name), None)
