"""L0 and L1: what the container holds, and whether the layout found is the one declared."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.modelopt.export import check_quant_config
from modelopt_convert.dialects.packed import SCALE_ROLES, PackedModule
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.formats.finite import FiniteWatch, not_finite_words
from modelopt_convert.formats.format import Algorithm, entry
from modelopt_convert.formats.layout import ScaleOrder
from modelopt_convert.inspection.component import inspect_component
from modelopt_convert.plan.inputs import differing_keys, one_sided_words
from modelopt_convert.report.inspect import ComponentReport, LintReport
from modelopt_convert.report.verify import LevelReport, LevelStatus
from modelopt_convert.run.errors import InputError
from modelopt_convert.run.workers import in_order
from modelopt_convert.verification.levels.record import Scanned
from modelopt_convert.verification.subject import Subject

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SCALE_FAULTS = frozenset(
    {
        "scale.missing",
        "scale.nan",
        "scale.unusable",
        "global_scale.missing",
        "input_scale.missing",
        "input_scale.mixed",
        "weight_scale.missing",
    }
)
"""Of what `inspect` shows, these say that no kernel can use a scale."""

# These make a checkpoint wrong for any runtime; the rest is for its user to know.
_FATAL = SCALE_FAULTS | {"module.split", "ignore.lists_packed", "engine.misread"}


class StoredFormat(Protocol):
    """What L0 and L1 ask of modules of one format: the entry of a format in this folder.

    Attributes:
        fatal: Codes of faults that make such a checkpoint wrong, beside those that make any wrong.
        one_layout: Why the layout need not be asked for; empty where there are several.
    """

    fatal: frozenset[str]
    one_layout: str

    def stored_faults(self, subject: Subject, module: PackedModule) -> list[str]:
        """What is wrong with the stored bytes of a module, in words."""

    def decoded(self, subject: Subject, module: PackedModule, rows: Sequence[int]) -> "NDArray[np.float32]":
        """Some rows of codes times block scales, without the scale of the tensor: float32 [R, K], exact.

        Raises:
            InputError: A scale that cannot be used.
            ValueError: The stored shape does not allow the declared reading.
        """

    def hint(self, subject: Subject, module: PackedModule) -> ScaleOrder:
        """The order of a module's scales, by what one tile of rows says."""

    def fused_losses(self, reader: CheckpointReader, group: Sequence[str]) -> Mapping[str, float]:
        """By engine, what it loses of a fused weight whose parts have tensor scales of their own; nothing if unknown.

        Args:
            reader: The checkpoint, in the canonical layout.
            group: The parts, by module name.
        """


def stored_format(algorithm: Algorithm) -> StoredFormat:
    """What a format asks for."""
    found: StoredFormat = entry("modelopt_convert.verification.levels", algorithm)
    return found


def look(subject: Subject) -> ComponentReport:
    """Inspect with every scale. What engines make of a file is not said of one that is presented as another."""
    found = inspect_component(subject.reader, None, every_scale=True, max_error=1.0)
    if not subject.reader.is_presented:
        return found
    return found.model_copy(update={"lint": [one for one in found.lint if not one.code.startswith("engine.")]})


def container_level(
    subject: Subject,
    seen: ComponentReport,
    scanned: Scanned,
    workers: int,
    base: CheckpointReader | None,
    decoded: LevelReport,
) -> LevelReport:
    """L0: dtypes, shapes, finite scales, padding, ``ignore`` against tensors, the config against the base's.

    Args:
        subject: The checkpoint.
        seen: By ``look``.
        scanned: By one pass over its bytes.
        workers: Modules looked at at a time.
        base: Its base, or None.
        decoded: L2, which tells what is not the base's.
    """
    rules = stored_format(subject.format.algorithm)
    unlike = {words.partition(": ")[0] for words in decoded.failures}
    fatal = _FATAL | rules.fatal
    said = {(fault.module, role) for fault in seen.lint if fault.code in fatal for role in _scales_of(fault)}
    failures = [_words(fault) for fault in seen.lint if fault.code in fatal and fault.module not in subject.refused]
    odd = {name for name, module in subject.modules.items() if not module.has_weight}  # no padding explains its shape
    warnings = [
        _words(fault)
        for fault in seen.lint
        if fault.code not in {*fatal, "scale.zero"} and not (fault.code == "shape.padded" and fault.module in odd)
    ]
    failures += _declaration_faults(subject) + _bias_faults(subject)
    if base is not None and base.config:
        failures += _config_faults(subject.reader, base)
        if subject.reader.config:
            warnings += one_sided_words(subject.reader.config, base.config, "the checkpoint")
    failures += [
        f"{module.name}: {fault.message}"
        for module in subject.modules.values()
        if module.fault is not None
        for fault in module.fault.each()
        if not any((module.name, role) in said for role in _roles(fault.message))
    ]
    failures += [f"{name}: {why}" for name, why in scanned.broken.items()]
    # Of scales and biases of quantized modules, and of what is not the base's, it is a failure already.
    coded = {info.name for one in subject.modules.values() for info in (*one.scales.values(), one.bias) if info}
    if found := {name: one for name, one in scanned.not_finite.items() if name not in coded | unlike}:
        warnings.append(not_finite_words(found))
    due = [module for module in subject.modules.values() if module.has_weight]
    for faults in in_order(due, lambda module, _stopped: rules.stored_faults(subject, module), workers):
        failures += faults
    failures = list(dict.fromkeys(failures))
    return LevelReport(
        level="L0", title="container", status=level_status(failures, warnings), failures=failures, warnings=warnings
    )


def level_status(failures: list[str], warnings: list[str]) -> LevelStatus:
    """``fail``, ``warn`` or ``pass``."""
    return "fail" if failures else "warn" if warnings else "pass"


def unreadable(subject: Subject, seen: ComponentReport, scanned: Scanned) -> frozenset[str]:
    """Modules that cannot be right for what L0 says of their codes or scales: no other level says it again."""
    of_scales = {
        str(one.module)
        for one in seen.lint
        if one.code in SCALE_FAULTS and any(role != "input_scale" for role in _scales_of(one) or [""])
    }
    return frozenset(of_scales | {module_of(name) for name in scanned.broken}) & subject.modules.keys()


def _scales_of(fault: LintReport) -> list[str]:
    """The scales that a fault is of, as far as it names them."""
    return ["weight_scale"] if fault.code == "scale.missing" else _roles(fault.message)


def _roles(message: str) -> list[str]:
    """The scales that a message names."""
    return [role for role in SCALE_ROLES if re.search(rf"\b{role}\b", message)]


def _words(fault: LintReport) -> str:
    return f"{fault.module}: {fault.message}" if fault.module else fault.message


def _declaration_faults(subject: Subject) -> list[str]:
    """Engines load by config.json: what it says must be what the tensors are."""
    try:
        path = subject.reader.config_place
        check_quant_config(subject.reader.config, subject.format, path=path)
    except InputError as error:
        return [error.message]
    return []


def _config_faults(reader: CheckpointReader, base: CheckpointReader) -> list[str]:
    return [
        f"config.json: {key}: expected {theirs!r} as in the base, found {mine!r}"
        for key, mine, theirs in differing_keys(reader.config, base.config)
    ]


def _bias_faults(subject: Subject) -> list[str]:
    faults = []
    for name, module in subject.modules.items():
        bias = module.bias
        if bias is None:
            continue
        if bias.shape != (module.rows,) or bias.dtype not in HALF_AND_FLOAT:
            faults.append(f"{name}: bias is {bias.dtype} {list(bias.shape)}, expected [{module.rows}]")
        else:
            watch = FiniteWatch(bias.dtype, bias.shape)
            watch.add(subject.reader.read(bias.name))
            if watch.found() is not None:
                faults.append(f"{name}: bias holds NaN or infinity")
    return faults
