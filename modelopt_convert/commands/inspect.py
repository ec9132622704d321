"""``mopt inspect``: every transformer of a source, each looked at on its own."""

from contextlib import ExitStack

from modelopt_convert.checkpoint.config import read_config
from modelopt_convert.checkpoint.pipeline import transformers_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.commands.beside import present_transformer
from modelopt_convert.commands.command import Warned, ending, left_aside_words, warnings_of, without_quantization
from modelopt_convert.commands.requests import InspectRequest
from modelopt_convert.dialects.presented import present_under_names_of
from modelopt_convert.report.inspect import ComponentReport, InspectReport
from modelopt_convert.run.progress import Progress


class InspectCommand:
    """Say what a checkpoint is."""

    def __init__(self, request: InspectRequest) -> None:
        """Do nothing yet."""
        self._request = request
        self._components: dict[str, ComponentReport] = {}
        self._warned: list[Warned] = []

    def run(self, progress: Progress) -> None:
        """Look at every transformer.

        Raises:
            InputError: Something cannot be read at all.
        """
        from modelopt_convert.inspection.component import inspect_component

        request, source = self._request, self._request.locate("source")
        assert source is not None  # the request requires it
        place = request.locate("config")
        config = read_config(place) if place is not None else None
        of_base = without_quantization(config) if config is not None else None
        for name, path, base_path in transformers_of(source, request.locate("base")):
            with ExitStack() as stack:
                of_source = request.variant if base_path is None else None
                reader = stack.enter_context(
                    CheckpointReader(path, need_config=False, variant=of_source, config=config)
                )
                self._warned += present_transformer(reader)[1]
                against = None
                if base_path is not None:
                    against = stack.enter_context(
                        CheckpointReader(base_path, need_config=False, variant=request.variant, config=of_base)
                    )
                    present_under_names_of(against, reader)
                for one in (reader, against):
                    if one is not None and one.left_aside:
                        self._warned.append(("input.left_aside", left_aside_words(str(one.path), one.left_aside)))
                component = inspect_component(
                    reader, against, every_scale=request.all_scales, max_error=request.max_error
                )
                if request.engines:
                    from modelopt_convert.inspection.every_engine import engine_verdicts

                    found = engine_verdicts(reader, component.modules)
                    component = component.model_copy(update={"verdicts": found})
            self._components[name] = component.model_copy(update={"config_from": reader.config_from})

    def report(self, error: BaseException | None = None) -> InspectReport:
        """What was found; the fields at the top are the first transformer's."""
        first = next(iter(self._components.values()), None) if error is None else None
        names = (
            ("dialect", "layout", "modules", "lint", "totals", "engine", "engines", "verdicts")
            if first is not None
            else ()
        )
        of_first = {name: getattr(first, name) for name in names}
        return InspectReport(
            components=self._components, warnings=warnings_of(self._warned), **of_first, **ending(error)
        )
