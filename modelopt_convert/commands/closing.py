"""The closing step of builds and rewrites: what was written is checked before anyone can see it.

A wrong checkpoint is thrown away. A GPU that is busy or broken, or a kernel that is wrong, says nothing about the
checkpoint: it is published, and the report says that GPU parity was not shown.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from modelopt_convert.checkpoint.calibration import Calibrated
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.commands.command import Warned
from modelopt_convert.plan.plan import ShardPlan, Step
from modelopt_convert.report.report import ProofReport
from modelopt_convert.report.verify import VerifyReport
from modelopt_convert.run.boundary import storage_error
from modelopt_convert.run.errors import CheckFailedError, InputError, first_line
from modelopt_convert.run.progress import Progress
from modelopt_convert.verification.options import VerifyOptions

_HINT = "this is a bug in mopt, or the disk or the memory of this machine is broken; nothing was published"


@dataclass(frozen=True, slots=True)
class Closed:
    """What a check of the closing step found.

    Attributes:
        check: Its entry in the report.
        failure: What is wrong, in one line, or None.
        warned: What the user should know.
        verify: By the levels of verify, where they ran.
    """

    check: dict[str, Any]
    failure: str | None
    warned: list[Warned] = field(default_factory=list)
    verify: VerifyReport | None = None


@contextmanager
def opened_stage(folder: Path, *, need_config: bool = True) -> Iterator[CheckpointReader]:
    """What was written, opened as any reader would.

    Args:
        folder: Of one transformer in the stage.
        need_config: Whether a config.json was written.

    Raises:
        StorageError: The disk does not give it back; no input is to blame.
        CheckFailedError: ``check.structure``: no reader would take it.
    """
    try:
        reader = CheckpointReader(folder, need_config=need_config)
    except InputError as error:
        if isinstance(error.__cause__, OSError):
            raise storage_error(error.__cause__, folder) from error
        raise CheckFailedError(error.message, code="check.structure", hint=_HINT) from error
    with reader:
        yield reader


def written_faults(reader: CheckpointReader, steps: Mapping[str, Step], shards: Iterable[ShardPlan]) -> list[str]:
    """Where the headers of what was written depart from the plan, in words."""
    planned = {name: (step.output.dtype, step.output.shape) for name, step in steps.items()}
    written = {name: (info.dtype, info.shape) for name, info in reader.tensors.items()}
    faults = [
        f"tensor {name!r}: planned {planned.get(name)}, written {written.get(name)}"
        for name in sorted(planned.keys() | written.keys())
        if planned.get(name) != written.get(name)
    ]
    metadata = {shard.file: dict(shard.metadata) for shard in shards}
    return faults + [
        f"{file}: header metadata {found}" for file, found in reader.metadata.items() if found != metadata.get(file)
    ]


def structure_checked(faults: list[str]) -> Closed:
    """The check of headers, index and config against the plan and each other."""
    check = {"name": "structure", "status": "fail" if faults else "pass", "failures": faults[:10]}
    failure = f"the finished checkpoint is not the planned one: {faults[0]} ({len(faults)} faults)" if faults else None
    return Closed(check, failure)


def refuse_failed(closed: Closed) -> None:
    """Refuse to publish what failed a check.

    Raises:
        CheckFailedError: ``check.structure``, ``check.proof`` or ``check.verify``.
    """
    if closed.failure is not None:
        raise CheckFailedError(
            closed.failure,
            code=f"check.{closed.check['name']}",
            hint=_HINT,
        )


def verify_stage(
    stage: Path,
    parts: Mapping[str, tuple[CheckpointReader | None, ProofReport]],
    options: VerifyOptions,
    output: str,
    progress: Progress,
    calibrated: Mapping[str, Calibrated],
) -> Closed:
    """Verify every transformer of a finished stage.

    Args:
        stage: The stage.
        parts: The opened base of each, or None, and its proof, by the folder in the stage.
        options: What to run.
        output: Where the checkpoint will stand.
        progress: Told what is read.
        calibrated: The calibration of each that was built with one, by the folder in the stage.
    """
    import torch

    from modelopt_convert.verification.subject import device_of
    from modelopt_convert.verification.transformer import verify_opened
    from modelopt_convert.verification.verdict import combine

    device = device_of(options.device)
    found: dict[str, VerifyReport] = {}
    warned: list[Warned] = []
    for prefix, (base, proof) in parts.items():
        asked = replace(options, calibrated=calibrated.get(prefix))

        def verified(
            reader: CheckpointReader,
            device: torch.device,
            base: CheckpointReader | None = base,
            words: str = proof.words,
            asked: VerifyOptions = asked,
        ) -> VerifyReport:
            return verify_opened(reader, base, asked, device, progress, with_record=False, proof=words)

        with opened_stage(stage / prefix) as reader, torch.inference_mode():
            try:
                found[prefix] = verified(reader, device)
            except RuntimeError as error:  # CUDA's
                if device.type != "cuda":
                    raise
                warned.append(("verify.gpu_parity", f"gpu_parity: not run: {first_line(error)}"))
                device = torch.device("cpu")
                found[prefix] = verified(reader, device)
    verify = combine(found, output).model_copy(update={"checkpoint": output})
    skipped = [level.reason for level in verify.levels if level.level == "L3" and level.status == "skipped"]
    if skipped and device.type == "cuda":
        warned.append(("verify.gpu_parity", f"gpu_parity: not run: {skipped[0]}"))
    is_broken, has_failed = verify.verdict.startswith("backend"), verify.verdict == "fail"
    if is_broken:
        warned.append(("verify.gpu_parity", f"gpu_parity: not run: {verify.verdict}: {verify.statement}"))
    check = {
        "name": "verify",
        "status": "fail" if has_failed else "pass",
        "gpu_parity": "not run" if skipped or is_broken else "pass",
        "failures": [words for level in verify.levels for words in level.failures][:10] if has_failed else [],
    }
    failure = f"the finished checkpoint is not right: {verify.statement}" if has_failed else None
    return Closed(check, failure, warned, verify)
