"""``mopt inspect``: every transformer of a source, each looked at on its own."""

from contextlib import ExitStack

from modelopt_convert.checkpoint.components import transformers_of
from modelopt_convert.checkpoint.location import Location
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.inspection.component import inspect_component
from modelopt_convert.report.inspect import InspectReport


def inspect(
    source: Location, base: Location | None, report: InspectReport, *, every_scale: bool, max_error: float
) -> None:
    """Fill ``report`` with what ``source`` is.

    Args:
        source: A transformer folder, a pipeline folder, or one .safetensors file.
        base: The unquantized base, or None.
        report: Filled component by component.
        every_scale: Look at every scale of every module, not at a sample of modules.
        max_error: Largest relative error of a reading that is accepted without reproducing the codes.

    Raises:
        InputError: Something cannot be read at all.
    """
    for name, path, base_path in transformers_of(source, base):
        with ExitStack() as stack:
            reader = stack.enter_context(CheckpointReader(path, need_config=False))
            against = stack.enter_context(CheckpointReader(base_path)) if base_path else None
            component = inspect_component(reader, against, every_scale=every_scale, max_error=max_error)
        report.components[name] = component
    first = next(iter(report.components.values()))
    report.dialect, report.layout, report.modules = first.dialect, first.layout, first.modules
    report.lint, report.totals, report.engine = first.lint, first.totals, first.engine
