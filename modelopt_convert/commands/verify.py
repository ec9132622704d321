"""Open what ``mopt verify`` looks at, before torch is imported, which takes seconds: refusals are fast."""

from contextlib import ExitStack

from modelopt_convert.checkpoint.components import transformers_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.commands.accounting import note_input, timed, traffic_noted
from modelopt_convert.report.report import Report
from modelopt_convert.run.progress import Progress
from modelopt_convert.verification.request import OpenedTransformer, VerifyRequest


def verify(request: VerifyRequest, report: Report, progress: Progress) -> None:
    """Open every transformer of a checkpoint, then verify them.

    Raises:
        InputError: One cannot be opened.
        MoptError: What ``verify_all`` raises.
    """
    transformers = transformers_of(request.checkpoint, request.base)
    with ExitStack() as stack:
        opened: list[OpenedTransformer] = []
        for name, path, base_path in transformers:
            prefix = f"{name}/" if len(transformers) > 1 else ""
            with timed(report, "open"):
                reader = stack.enter_context(CheckpointReader(path))
                base = stack.enter_context(CheckpointReader(base_path)) if base_path is not None else None
            for role, one in (("checkpoint", reader), ("base", base)):
                if one is not None:
                    note_input(report, f"{prefix}{role}", one)
                    stack.enter_context(traffic_noted(report, f"{prefix}{role}", one))
            opened.append(OpenedTransformer(prefix, reader, base))
        from modelopt_convert.verification.transformer import verify_all

        verify_all(request, opened, report, progress)
