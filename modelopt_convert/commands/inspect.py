"""``mopt inspect``: every transformer of a source, each looked at on its own."""

from contextlib import ExitStack

from modelopt_convert.checkpoint.pipeline import transformers_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.commands.command import ending
from modelopt_convert.commands.requests import InspectRequest
from modelopt_convert.report.inspect import ComponentReport, InspectReport
from modelopt_convert.run.progress import Progress


class InspectCommand:
    """Say what a checkpoint is."""

    def __init__(self, request: InspectRequest) -> None:
        """Do nothing yet."""
        self._request = request
        self._components: dict[str, ComponentReport] = {}

    def run(self, progress: Progress) -> None:
        """Look at every transformer.

        Raises:
            InputError: Something cannot be read at all.
        """
        from modelopt_convert.inspection.component import inspect_component

        request, source = self._request, self._request.locate("source")
        assert source is not None  # the request requires it
        for name, path, base_path in transformers_of(source, request.locate("base")):
            with ExitStack() as stack:
                reader = stack.enter_context(CheckpointReader(path, need_config=False))
                against = stack.enter_context(CheckpointReader(base_path)) if base_path else None
                component = inspect_component(
                    reader, against, every_scale=request.all_scales, max_error=request.max_error
                )
                if request.engines:
                    from modelopt_convert.inspection.every_engine import engine_verdicts

                    found = engine_verdicts(reader, component.modules, is_file=path.is_file())
                    component = component.model_copy(update={"verdicts": found})
            self._components[name] = component

    def report(self, error: BaseException | None = None) -> InspectReport:
        """What was found; the fields at the top are the first transformer's."""
        first = next(iter(self._components.values()), None) if error is None else None
        names = (
            ("dialect", "layout", "modules", "lint", "totals", "engine", "engines", "verdicts")
            if first is not None
            else ()
        )
        of_first = {name: getattr(first, name) for name in names}
        return InspectReport(components=self._components, **of_first, **ending(error))
