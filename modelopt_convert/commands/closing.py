"""The closing step of a build: what was written is verified before anyone can see it.

A wrong checkpoint is thrown away. A GPU that is busy or broken, or a kernel that is wrong, says nothing about the
checkpoint: it is published, and the report says that GPU parity was not shown.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.commands.accounting import timed
from modelopt_convert.report.report import Report
from modelopt_convert.report.verify import VerifyReport
from modelopt_convert.run.errors import CheckFailedError, first_line
from modelopt_convert.run.progress import Progress
from modelopt_convert.verification.request import DEFAULT_SAMPLE, VerifyRequest
from modelopt_convert.verification.subject import device_of
from modelopt_convert.verification.transformer import verify_opened
from modelopt_convert.verification.verdict import combine


def verify_stage(
    stage: Path,
    parts: Mapping[str, CheckpointReader | None],
    how: str,
    max_error: float,
    workers: int,
    report: Report,
    progress: Progress,
) -> None:
    """Verify every transformer of a finished stage.

    Args:
        stage: The stage.
        parts: The opened base of each, or None, by the folder in the stage.
        how: ``auto`` or ``cpu``.
        max_error: Limit of the relative error where codes are not reproduced.
        workers: Modules that are decoded at a time.
        report: Gets ``verify`` and an entry under ``checks``.
        progress: Told what is read.

    Raises:
        CheckFailedError: ``check.verify``.
    """
    device = device_of("cpu" if how == "cpu" else None)
    found: dict[str, VerifyReport] = {}
    for prefix, base in parts.items():
        request = VerifyRequest(stage / prefix, None, ("best",), None, DEFAULT_SAMPLE, None, max_error, workers=workers)
        proof = report.proof.modules if report.proof is not None else {}
        proven = {name.removeprefix(prefix): one.verdict for name, one in proof.items() if name.startswith(prefix)}
        with CheckpointReader(stage / prefix) as reader, timed(report, "verify"), torch.inference_mode():
            try:
                found[prefix] = _verify(reader, base, request, device, progress, proven)
            except RuntimeError as error:  # CUDA's
                if device.type != "cuda":
                    raise
                report.warn("verify.gpu_parity", f"gpu_parity: not run: {first_line(error)}")
                device = torch.device("cpu")
                found[prefix] = _verify(reader, base, request, device, progress, proven)
    report.verify = combine(found, report.output.path)
    report.verify.checkpoint = report.output.path
    verdict = report.verify.verdict
    kernels = [level for level in report.verify.levels if level.level == "L3"]
    skipped = [level.reason for level in kernels if level.status == "skipped"]
    if skipped and device.type == "cuda":
        report.warn("verify.gpu_parity", f"gpu_parity: not run: {skipped[0]}")
    parity = "not run" if skipped or verdict.startswith("backend") else "pass"
    report.checks.append(
        {"name": "verify", "status": "fail" if verdict == "fail" else "pass", "gpu_parity": parity, "failures": []}
    )
    if verdict.startswith("backend"):
        report.warn("verify.gpu_parity", f"gpu_parity: not run: {verdict}: {report.verify.statement}")
    if verdict == "fail":
        failures = [words for level in report.verify.levels for words in level.failures]
        report.checks[-1]["failures"] = failures[:10]
        raise CheckFailedError(
            f"the finished checkpoint is not right: {report.verify.statement}",
            code="check.verify",
            hint="this is a bug in mopt, a disk that lies or memory that fails; nothing was published",
        )


def _verify(
    reader: CheckpointReader,
    base: CheckpointReader | None,
    request: VerifyRequest,
    device: torch.device,
    progress: Progress,
    proven: Mapping[str, str],
) -> VerifyReport:
    return verify_opened(reader, base, request, device, progress, with_record=False, expected=proven)
