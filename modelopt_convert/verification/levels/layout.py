"""L1: whether the layout found is the one declared."""

from collections.abc import Mapping

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.formats.layout import Layout
from modelopt_convert.inspection.component import inspect_component
from modelopt_convert.report.inspect import ComponentReport
from modelopt_convert.report.verify import LevelReport
from modelopt_convert.verification.levels.container import level_status, stored_format
from modelopt_convert.verification.subject import Subject


def layout_level(
    subject: Subject,
    seen: ComponentReport,
    base: CheckpointReader | None,
    readings: Mapping[str, Layout],
    max_error: float,
) -> LevelReport:
    """L1: the layout found against the one declared; by the base where there is one, else by what tells.

    Args:
        subject: The checkpoint.
        seen: By ``look``.
        base: Its base, or None.
        readings: Under which L2 found each module to fit the base.
        max_error: As for L2.
    """
    level = LevelReport(level="L1", title="layout", status="pass")
    rules = stored_format(subject)
    if rules.one_layout:
        level.status, level.reason = "skipped", rules.one_layout
        return level
    nibbles, scales = subject.layout.nibbles, subject.layout.scales
    if base is not None and any(reading != subject.layout for reading in readings.values()):
        # Several readings may mean the same: only the detector can tell, and it is asked only now, since it takes long.
        seen = inspect_component(subject.reader, base, every_scale=False, max_error=max_error)
    for name, one in seen.modules.items():
        if one.nibble_basis == "proven" and one.nibble_order not in (nibbles, "equivalent"):
            level.failures.append(f"{name}: the even column is in the {one.nibble_order} nibble, declared {nibbles}")
        if one.scale_basis in ("proven", "shape") and one.scale_layout not in (scales, "equivalent"):
            level.failures.append(f"{name}: the scales are {one.scale_layout}, declared {scales}")
        if one.global_scale == "divide" and name not in readings:
            level.warnings.append(f"{name}: weight_scale_2 is so large that it may be a reciprocal")
    if base is None:
        level.reason = "without a base the nibble order is only declared; the order of the scales is a hint"
        for name, module in subject.modules.items():
            hint = rules.hint(subject, module) if module.fault is None else "undetermined"
            if hint in ("linear", "128x4") and hint != scales:
                level.failures.append(f"{name}: scales and codes fit the {hint} order, declared {scales}")
    level.failures += [
        f"{name}: weight_scale_2 is a reciprocal" for name, one in readings.items() if one.global_scale == "divide"
    ]
    level.status = level_status(level.failures, level.warnings)
    return level
