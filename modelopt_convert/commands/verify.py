"""``mopt verify``: open, run every level, write the page, conclude.

torch is imported once refusals are past, and only for a base or a kernel.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modelopt_convert.checkpoint.calibration import read_calibration
from modelopt_convert.checkpoint.location import Location
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.pipeline import transformers_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.checkpoint.record import copied_files, part_digest, parts_of, read_pipeline
from modelopt_convert.commands.called import command_line
from modelopt_convert.commands.command import (
    Clock,
    Inputs,
    Warned,
    ending,
    not_compared,
    peak_rss_bytes,
    versions,
    warnings_of,
)
from modelopt_convert.commands.requests import VerifyRequest
from modelopt_convert.plan.inputs import check_roles
from modelopt_convert.report.report import OutputReport, Report, VerifiedReport
from modelopt_convert.report.verify import VerifyReport
from modelopt_convert.report.words import MISMATCH_WORDS
from modelopt_convert.run.errors import CheckFailedError, Faults, InconclusiveError, MoptError
from modelopt_convert.run.progress import Progress
from modelopt_convert.stage.written_file import check_file_place, check_file_writable, write_report
from modelopt_convert.verification.options import VerifyOptions


class VerifyCommand:
    """Verify a checkpoint, or the backends alone."""

    def __init__(self, request: VerifyRequest) -> None:
        """Do nothing yet."""
        self._request = request
        self._options = VerifyOptions(
            backends=request.backends,
            device=request.device,
            sample=request.rows,
            accept_near=request.accept_near,
            require=request.require,
            max_error=request.max_error,
            prewarm=request.prewarm,
            preferred=request.preferred,
            workers=request.worker_count,
        )
        self._clock = Clock()
        self._inputs = Inputs(request.locate("config"), request.variant, variant_of_base=request.base is not None)
        self._warned: list[Warned] = []
        self._found: VerifyReport | None = None
        self._peak: int | None = None

    def run(self, progress: Progress) -> None:
        """Verify.

        Raises:
            CheckFailedError: ``check.verify``: a level failed.
            InconclusiveError: ``verify.inconclusive`` or ``verify.required``.
            BackendError: ``verify.backend``.
            MoptError: Something cannot be opened, or the page not be written.
        """
        if self._request.report is not None:
            check_file_place(Path(self._request.report), self._request.on_disk())
            check_file_writable(Path(self._request.report))
        try:
            checkpoint = self._request.locate("checkpoint")
            if checkpoint is None:
                self._verify_backends(progress)
            else:
                self._verify(checkpoint, self._request.locate("base"), progress)
        except MoptError as error:  # what was found goes onto the page; that it cannot be written hides no verdict
            try:
                self._write_page(error)
            except MoptError as unwritten:
                self._warned.append((unwritten.code, f"the page could not be written: {unwritten.message}"))
            raise
        self._write_page(None)

    def report(self, error: BaseException | None = None) -> Report:
        """What was found, also after a failure."""
        kind = Report if self._found is None else VerifiedReport
        return kind(
            command=self._request.command,
            output=OutputReport(path=""),
            inputs=self._inputs.reports(),
            network=self._inputs.network(),
            verify=self._found,
            peak_rss_bytes=self._peak,
            timings_s=self._clock.seconds,
            warnings=warnings_of([*self._inputs.left_aside(), *self._warned]),
            versions=versions(),
            **ending(error),
        )

    def _verify_backends(self, progress: Progress) -> None:
        import torch

        from modelopt_convert.verification.subject import device_of
        from modelopt_convert.verification.transformer import verify_backends
        from modelopt_convert.verification.verdict import conclude_backends

        device = device_of(self._options.device)
        with self._clock.timed("self_test"), torch.inference_mode():
            self._found = verify_backends(self._options, device, progress)
        conclude_backends(self._found, self._options)

    def _verify(self, checkpoint: Location, base: Location | None, progress: Progress) -> None:
        asked = self._request.calibration
        calibration = read_calibration(Path(asked)) if asked is not None else None
        record = read_pipeline(checkpoint)
        copied = copied_files(record)
        transformers = [one for one in transformers_of(checkpoint, base) if f"{one[0]}/config.json" not in copied]
        if not transformers:
            raise _incomplete(checkpoint, f"{' and '.join(parts_of(record))} was built and is gone")
        with self._inputs as inputs:
            opened: dict[str, tuple[CheckpointReader, CheckpointReader | None]] = {}
            names = dict[str, tuple[str, ...]]()
            for name, path, base_path in transformers:
                prefix = f"{name}/" if len(transformers) > 1 else ""
                with self._clock.timed("open"):
                    reader = inputs.open(f"{prefix}checkpoint", path)
                    against = None
                    if base_path is not None:
                        against = inputs.open(f"{prefix}base", base_path, is_base=True)
                check_roles(reader, against)
                with self._clock.timed("open"):
                    if against is not None:
                        self._warned += inputs.present(f"{prefix}base")
                    known = against.tensors if against is not None else {}
                    self._warned += inputs.present(f"{prefix}checkpoint", known)
                    self._warned += not_compared(reader, against) if against is not None else []
                    inputs.lend_config(f"{prefix}checkpoint", against)
                folders = (path.name,) if base_path is None else (base_path.name, path.name)
                opened[prefix], names[prefix] = (reader, against), folders if name == "." else (name,)
            from modelopt_convert.verification.levels.record import beside_faults
            from modelopt_convert.verification.subject import device_of
            from modelopt_convert.verification.transformer import prewarm_kernels, verify_opened
            from modelopt_convert.verification.verdict import (
                SEVERITY,
                combine,
                conclude,
                conclude_backends,
                failures_of,
            )

            options = self._options
            device = device_of(options.device) if self._needs_device() else None
            found: dict[str, VerifyReport] = {}
            faults = Faults()
            with _inference(device is not None or base is not None):
                for prefix, (reader, against) in opened.items():
                    if device is not None and options.prewarm:
                        found[prefix] = prewarm_kernels(reader, against, options, device, progress)
                        continue
                    calibrated = calibration.of(*names[prefix]) if calibration is not None else None
                    mine = replace(options, calibrated=calibrated)
                    with self._clock.timed("verify"):
                        found[prefix] = verify_opened(
                            reader, against, mine, device, progress, with_record=True, faults=faults.under(prefix)
                        )
            for prefix, (name, _, _) in zip(opened, transformers, strict=True):
                if name in parts_of(record) and part_digest(checkpoint / name) != parts_of(record)[name]:
                    words = f"{name} is not the one that was built with the others"
                    found[prefix] = found[prefix].model_copy(update=_refuted(words))
            gone = _gone(checkpoint, record)
            if gone is None and record and not options.prewarm:
                with self._clock.timed("copied"):
                    wrong = beside_faults(checkpoint, record, options.workers, progress)
                if wrong:
                    more = f" ({len(wrong)} such faults)" if len(wrong) > 1 else ""
                    gone = _incomplete(checkpoint, f"{wrong[0]}{more}")
            self._found = whole = combine(found, str(checkpoint))
            self._peak = peak_rss_bytes()
            failures = list(failures_of(found, {prefix: _places(*both) for prefix, both in opened.items()}))
            if faults:  # of what is none of the format; the others were looked at all the same
                words = f"{len(faults.names)} modules are none of {whole.algorithm.upper()}"
                self._found = whole.model_copy(update=_refuted(words))
                for name, failure in failures:
                    faults.add(name, failure)
                faults.refuse()
            if gone is not None:
                self._found = whole.model_copy(update=_refuted(gone.message))
                raise gone.about(failures)
            try:
                for prefix in sorted(found, key=lambda one: SEVERITY.index(found[one].verdict), reverse=True):
                    against = opened[prefix][1]
                    if options.prewarm:
                        conclude_backends(found[prefix], options)
                    else:
                        conclude(found[prefix], options, str(against.path) if against is not None else None)
            except CheckFailedError as error:
                error.about(failures)
                raise
            except InconclusiveError as error:
                # What was required did not run; the proof's words are about the weights, and stand.
                self._found = whole.model_copy(update={"verdict": "inconclusive", "statement": error.message})
                raise

    def _needs_device(self) -> bool:
        """Whether a kernel may run; else torch is not asked which devices there are: to import it takes seconds."""
        from modelopt_convert.verification.subject import may_have_gpu

        options = self._options
        is_for_gpu = options.device == "cuda" or (options.device is None and may_have_gpu())
        return is_for_gpu or options.names_backends or options.prewarm

    def _write_page(self, error: MoptError | None) -> None:
        if self._request.report is None or self._found is None:
            return
        from modelopt_convert.verification.page.document import render

        date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        found = self.report(error).model_dump()
        write_report(Path(self._request.report), render(found, command=command_line(self._request), date=date))


@contextmanager
def _inference(with_torch: bool) -> Iterator[None]:
    """Without gradients, where torch is needed at all."""
    if not with_torch:
        yield
        return
    import torch

    with torch.inference_mode():
        yield


def _places(reader: CheckpointReader, base: CheckpointReader | None) -> set[str]:
    """The tensors and modules of both."""
    tensors = reader.tensors.keys() | (base.tensors.keys() if base is not None else ())
    return tensors | {module_of(name) for name in tensors}


def _refuted(statement: str) -> dict[str, str]:
    """The fields of a report that say so."""
    return {"verdict": "fail", "proof": MISMATCH_WORDS, "statement": statement}


def _gone(checkpoint: Location, record: Mapping[str, Any]) -> CheckFailedError | None:
    """A build of several transformers says which they are: none may be gone."""
    gone = (name for name in parts_of(record) if not (checkpoint / name / "config.json").is_file())
    return next((_incomplete(checkpoint, f"{name} was built and is gone") for name in gone), None)


def _incomplete(checkpoint: Location, what: str) -> CheckFailedError:
    return CheckFailedError(
        f"{checkpoint}: {what}",
        code="check.verify",
        path=str(checkpoint),
        hint="the download is incomplete, or something was changed since; get it again",
    )
