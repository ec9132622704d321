"""L1: whether the layout found is the one declared."""

from collections.abc import Collection, Mapping
from threading import Event

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.layout import Layout, ScaleOrder
from modelopt_convert.report.inspect import ComponentReport
from modelopt_convert.report.verify import LevelReport
from modelopt_convert.run.workers import in_order, small_calls
from modelopt_convert.verification.levels.container import level_status, stored_format
from modelopt_convert.verification.subject import Subject


def layout_level(
    subject: Subject,
    seen: ComponentReport,
    base: CheckpointReader | None,
    readings: Mapping[str, Layout],
    workers: int,
    told: Collection[str],
) -> LevelReport:
    """L1: the layout found against the one declared; by the base where there is one, else by what tells.

    Args:
        subject: The checkpoint.
        seen: By ``look``.
        base: Its base, or None.
        readings: Under which L2 found each module to fit the base.
        workers: Modules that are looked at at a time.
        told: Modules whose scales L0 says to be unusable.
    """

    def hinted(module: PackedModule, _stopped: Event) -> ScaleOrder:
        with small_calls():
            return rules.hint(subject, module)

    level = LevelReport(level="L1", title="layout", status="pass")
    rules = stored_format(subject.format.algorithm)
    if rules.one_layout:
        level.status, level.reason = "skipped", rules.one_layout
        return level
    scales = subject.layout.scales
    for name, one in seen.modules.items():
        if name not in readings and one.scale_basis == "shape" and one.scale_layout not in (scales, "equivalent"):
            level.failures.append(f"{name}: the scales are {one.scale_layout}, declared {scales}")
        if one.global_scale == "divide" and name not in readings and name not in told:
            level.warnings.append(f"{name}: weight_scale_2 is so large that it may be a reciprocal")
    level.failures += misdeclared(subject.layout, readings)
    if base is None:
        level.reason = "without a base the nibble order is only declared; the order of the scales is a hint"
        due = [module for module in subject.modules.values() if module.has_weight]
        for module, hint in zip(due, in_order(due, hinted, workers), strict=True):
            if hint in ("linear", "128x4") and hint != scales:
                level.failures.append(f"{module.name}: scales and codes fit the {hint} order, declared {scales}")
    level.failures += [
        f"{name}: weight_scale_2 is a reciprocal" for name, one in readings.items() if one.global_scale == "divide"
    ]
    level.status = level_status(level.failures, level.warnings)
    return level


def misdeclared(declared: Layout, readings: Mapping[str, Layout]) -> list[str]:
    """Modules that fit the base under another layout than the declared one, in words.

    The declared layout is tried first, on the whole tensor: where another one fits, the declared one does not.

    Args:
        declared: How packed modules are said to lie.
        readings: Under which each module was found to fit the base.
    """
    found = []
    for name, one in readings.items():
        if one.nibbles != declared.nibbles:
            found.append(f"{name}: the even column is in the {one.nibbles} nibble, declared {declared.nibbles}")
        if one.scales != declared.scales:
            found.append(f"{name}: the scales are {one.scales}, declared {declared.scales}")
    return found
