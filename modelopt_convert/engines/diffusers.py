"""diffusers' view of a file: what its config.json makes of it, and what BFLQuantizationConfig does. Pure, no torch.

Run at 0.42.1:

- ``quantizers/auto.py``, ``DiffusersAutoQuantizer.from_dict``: by ``quant_method`` alone;
- ``quantizers/bfl/``: ``from_single_file`` with ``BFLQuantizationConfig()``, which the caller passes, since no file
  says it. ``maybe_update_state_dict`` in ``bfl_quantizer.py`` asks for scales, ``utils.py`` decodes: the low nibble
  first, block scales row by row, an FP8 scale for each row;
- ``models/model_loading_utils.py``: without a quantizer, tensors are cast as they lie, and shapes are compared.
"""

from collections.abc import Mapping
from typing import Any

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.engines.outcome import FP8_DTYPES, HALVED, UNSCALED, Outcome, Reading, coded, counted, quant_keys
from modelopt_convert.formats.layout import CANONICAL

VERSION = "diffusers@0.42.1"
_AUTO, _BFL, _LOADING = "quantizers/auto.py", "quantizers/bfl/bfl_quantizer.py", "models/model_loading_utils.py"
_GROUP = 16
# ``AUTO_QUANTIZER_MAPPING``: those of which nothing more was looked at.
_OTHERS = frozenset({"bitsandbytes", "gguf", "quanto", "auto-round", "nunchaku_lite", "sdnq"})
PASSED = "only if the caller passes BFLQuantizationConfig() to from_single_file, and if it knows the names"


def read(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    *,
    is_file: bool,
    beside: Mapping[str, TensorInfo] | None = None,
) -> Reading:
    """What diffusers makes of a folder by ``from_pretrained``, or of one file by ``from_single_file``.

    Args:
        tensors: The transformer's.
        config: config.json, empty for one file.
        is_file: Whether it is one file.
        beside: What else the file holds, at which ``BFLQuantizationConfig`` looks, too.
    """
    keys = quant_keys(config)
    if keys is not None:
        return _declared(tensors, keys)
    # Of a folder without a config.json ``from_pretrained`` makes nothing; its file is for ``from_single_file``.
    if (is_file or not config) and any(one.dtype in ("U8", *FP8_DTYPES) for one in coded(tensors).values()):
        return _single(tensors, beside or {})
    return _plain(tensors)


def _declared(tensors: Mapping[str, TensorInfo], keys: Mapping[str, Any]) -> Reading:
    method = keys.get("quant_method")
    weights = [name for name in tensors if name.endswith("_weight_qdata")]
    if method == "torchao" and "quant_type" in keys and weights:
        how = f"makes {len(weights)} tensors of torchao of it, as the header says"
        source = "quantizers/torchao/torchao_quantizer.py"
        return Reading(engine=VERSION, outcome="reads", how=how, source=source, shown="run")
    if method == "torchao" and "quant_type" in keys:
        how = "quantizes by torchao on loading; what becomes of codes of another form was not looked at"
        return Reading(engine=VERSION, outcome="unknown", how=how, source=_AUTO, shown="read")
    if keys.get("load_in_4bit") or keys.get("load_in_8bit") or (isinstance(method, str) and method in _OTHERS):
        how = "has a reader of its own for it, which was not looked at"
        return Reading(engine=VERSION, outcome="unknown", how=how, source=_AUTO, shown="read")
    raised = {
        "modelopt": "TypeError for the quantization_config of ModelOpt's exports",
        "torchao": "KeyError: 'quant_type'",
        "bfl": "TypeError for a quantization_config that says bfl: that one is passed, not read",
        None: "ValueError: the quantization_config has no quant_method",
    }
    known = method is None or method in raised
    words = raised[method] if known else f"ValueError: Unknown quantization type, got {method}"
    return Reading(engine=VERSION, outcome="refuses", how=f"raises {words}", source=_AUTO, shown="run")


def _plain(tensors: Mapping[str, TensorInfo]) -> Reading:
    """Without a quantizer."""
    packed = {what: tuple(sorted(names)) for what, names in _unlike(tensors).items() if names}
    if packed:
        how = "; ".join(f"{what}: {counted(names)}" for what, names in packed.items())
        fails = HALVED in packed
        how = f"raises ValueError, {how}" if fails else how
        outcome: Outcome = "refuses" if fails else "misreads"
        return Reading(engine=VERSION, outcome=outcome, how=how, source=_LOADING, shown="run", modules=packed)
    how = "finds no declaration; what becomes of codes in other dtypes or under other names was not run"
    return Reading(engine=VERSION, outcome="unknown", how=how, source=_LOADING, shown="read")


def _unlike(tensors: Mapping[str, TensorInfo]) -> dict[str, list[str]]:
    weights = coded(tensors)
    return {
        HALVED: [module for module, one in weights.items() if one.dtype == "U8"],
        UNSCALED: [module for module, one in weights.items() if one.dtype in FP8_DTYPES],
    }


def _single(tensors: Mapping[str, TensorInfo], beside: Mapping[str, TensorInfo]) -> Reading:
    """With ``BFLQuantizationConfig()``."""
    faults: dict[str, list[str]] = {}
    for module, weight in coded(beside).items():
        if (fault := _raised(beside, module, weight)) is not None:
            faults.setdefault(f"{fault}, in what lies beside the transformer", []).append(module)
    plain: list[str] = []
    has_nvfp4 = False
    for module, weight in coded(tensors).items():
        scale = tensors.get(f"{module}.weight_scale")
        if scale is None:
            plain.append(module)
        elif f"{module}.weight_scale_2" in tensors:
            has_nvfp4 = True
            fault = _raised(tensors, module, weight)
            if fault is None and scale.shape != (weight.shape[0], weight.shape[1] * 2 // _GROUP):
                fault = "fails when it decodes: block scales are not stored as [N, K/16]"
            if fault is not None:
                faults.setdefault(fault, []).append(module)
        elif (fault := _raised(tensors, module, weight)) is not None:
            faults.setdefault(fault, []).append(module)
        elif scale.shape not in (weight.shape[:1], (1,)):
            faults.setdefault("fails when it decodes: fp8r has one scale for each row", []).append(module)
    if len(plain) == len(coded(tensors)) and not any(name.endswith(".weight_scale") for name in beside):
        faults = {"raises ValueError: no weight_scale tensors": plain}
    modules = {what: tuple(sorted(names)) for what, names in faults.items()}
    if plain and not modules:
        modules = {UNSCALED: tuple(sorted(plain))}
    if modules:
        how = "; ".join(f"{what}: {counted(names)}" for what, names in modules.items())
    else:
        how = f"takes {len(coded(tensors))} modules for {'nvfp4' if has_nvfp4 else 'fp8r'}"
    return Reading(
        engine=VERSION,
        outcome="refuses" if faults else "misreads" if plain else "reads",
        how=how,
        source=_BFL,
        shown="run",
        layout=CANONICAL if has_nvfp4 else None,
        modules=modules,
        depends=PASSED,
    )


def _raised(tensors: Mapping[str, TensorInfo], module: str, weight: TensorInfo) -> str | None:
    """What ``maybe_update_state_dict`` raises for a module that has scales; it looks at the whole file."""
    if f"{module}.weight_scale" not in tensors:
        return None
    if f"{module}.weight_scale_2" not in tensors:
        return f"raises ValueError, for {weight.dtype} is not fp8r" if weight.dtype != "F8_E4M3" else None
    if weight.dtype != "U8":
        return f"raises ValueError, for {weight.dtype} is not nvfp4"
    return "raises ValueError: no input_scale" if f"{module}.input_scale" not in tensors else None
