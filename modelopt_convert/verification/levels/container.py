"""L0 and L1: what the container holds, and whether the layout found is the one declared."""

from collections.abc import Mapping

import torch

from modelopt_convert.dialects.modelopt.export import PackedModule, check_quant_config
from modelopt_convert.dialects.modelopt.nvfp4 import BLOCK_SIZE
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.formats.nvfp4.codes import unpack_e2m1
from modelopt_convert.formats.nvfp4.scales import all_positive, scale_readings
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.formats.tensor_bytes import from_bytes
from modelopt_convert.inspection.component import inspect_component
from modelopt_convert.proof.tensors import load, load_weight
from modelopt_convert.report.inspect import ComponentReport, LintReport
from modelopt_convert.report.verify import LevelReport, LevelStatus
from modelopt_convert.run.errors import InputError
from modelopt_convert.run.workers import in_order
from modelopt_convert.verification.levels.record import Scanned
from modelopt_convert.verification.subject import Subject

# Of what `inspect` shows, these make a checkpoint wrong for any runtime; the rest is for its user to know.
_FATAL = frozenset(
    {
        "scale.missing",
        "scale.nan",
        "scale.unusable",
        "global_scale.missing",
        "input_scale.missing",
        "input_scale.mixed",
        "weight_scale.missing",
        "module.split",
        "ignore.lists_packed",
        "engine.misread",
    }
)
# FP8 configs are believed; NVFP4 is recognised by its tensors.
_FATAL_FP8 = _FATAL | {"ignore.misses_unpacked"}


def look(subject: Subject) -> ComponentReport:
    """Inspect with every scale."""
    return inspect_component(subject.reader, None, every_scale=True, max_error=1.0)


def container_level(subject: Subject, seen: ComponentReport, scanned: Scanned, workers: int) -> LevelReport:
    """L0: dtypes, shapes, finite scales, padding, ``ignore`` against tensors."""
    fatal = _FATAL_FP8 if subject.algorithm == "fp8" else _FATAL
    failures = [_words(fault) for fault in seen.lint if fault.code in fatal]
    warnings = [_words(fault) for fault in seen.lint if fault.code not in fatal and fault.code != "scale.zero"]
    failures += _declaration_faults(subject) + _bias_faults(subject)
    failures += [module.fault.message for module in subject.modules.values() if module.fault is not None]
    failures += [f"{name}: {why}" for name, why in scanned.broken.items()]
    if subject.algorithm == "nvfp4":
        due = [module for module in subject.modules.values() if module.fault is None]
        for found in in_order(due, lambda module, _stopped: _stored_faults(subject, module), workers):
            failures += found
    failures = list(dict.fromkeys(failures))
    return LevelReport(
        level="L0", title="container", status=_status(failures, warnings), failures=failures, warnings=warnings
    )


def _status(failures: list[str], warnings: list[str]) -> LevelStatus:
    return "fail" if failures else "warn" if warnings else "pass"


def _words(fault: LintReport) -> str:
    return f"{fault.module}: {fault.message}" if fault.module else fault.message


def _readings(subject: Subject, module: PackedModule) -> dict[str, torch.Tensor]:
    stored = load(subject.reader, module.scales["weight_scale"].name)
    return scale_readings(stored, module.rows, module.columns // BLOCK_SIZE)


def _codes(subject: Subject, module: PackedModule, rows: list[int]) -> torch.Tensor:
    """Packed codes of some rows, without padding."""
    stored, half = module.weight.shape[1], module.columns // 2
    raw = subject.reader.read_rows(module.weight.name, rows, stored, half)
    return from_bytes(raw, "U8", (len(rows), half))


def _declaration_faults(subject: Subject) -> list[str]:
    """Engines load by config.json: what it says must be what the tensors are."""
    try:
        path = str(subject.reader.path / "config.json")
        check_quant_config(subject.reader.config, FORMATS[subject.algorithm].quant_algo, path=path)
    except InputError as error:
        return [error.message]
    return []


def _bias_faults(subject: Subject) -> list[str]:
    faults = []
    for name, module in subject.modules.items():
        bias = module.bias
        if bias is None:
            continue
        if bias.shape != (module.rows,) or bias.dtype not in HALF_AND_FLOAT:
            faults.append(f"{name}: bias is {bias.dtype} {list(bias.shape)}, expected [{module.rows}]")
        elif not bool(load(subject.reader, bias.name).isfinite().all()):
            faults.append(f"{name}: bias holds NaN or infinity")
    return faults


def _stored_faults(subject: Subject, module: PackedModule) -> list[str]:
    with torch.inference_mode():  # of each thread
        stored = load(subject.reader, module.scales["weight_scale"].name)
        if stored.shape == (module.rows, module.columns // BLOCK_SIZE) and all_positive(stored):
            return _padding_of_weight(subject, module)
        readings = scale_readings(stored, module.rows, module.columns // BLOCK_SIZE)
        padding = [] if readings else [f"{module.name}: the padding of weight_scale is not zero"]
        return padding + _padding_of_weight(subject, module) + _zero_faults(subject, module, readings)


def _padding_of_weight(subject: Subject, module: PackedModule) -> list[str]:
    if module.weight.shape == (module.rows, module.columns // 2):
        return []
    stored = load_weight(subject.reader, module.weight.name)
    if bool(stored[module.rows :].any()) or bool(stored[:, module.columns // 2 :].any()):
        return [f"{module.name}: the padding of weight is not zero"]
    return []


def _zero_faults(subject: Subject, module: PackedModule, readings: Mapping[str, torch.Tensor]) -> list[str]:
    """Zero scales over codes that are neither zero nor saturated: no quantizer makes these.

    ModelOpt up to 0.44 let scales underflow to zero; all codes of such a block are saturated.
    """
    reading = readings.get("128x4" if subject.swizzled else "linear")
    if reading is None:
        return []
    zero = (reading.view(torch.uint8) & 0x7F) == 0
    count = 0
    for row in zero.any(dim=1).nonzero().flatten().tolist():
        codes = unpack_e2m1(_codes(subject, module, [row]))[0].view(-1, BLOCK_SIZE) & 0x07
        meant = (codes == 0).all(dim=1) | (codes == 7).all(dim=1)
        count += int((zero[row] & ~meant).sum())
    return [f"{module.name}: {count} block scales are zero over codes that are not"] if count else []
