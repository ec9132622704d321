"""Verify one opened transformer: all levels, one verdict; or the backends alone.

torch is imported where there is a base, or a device: what a record says is verified without.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.checkpoint.record import (
    calibration_of,
    claim,
    other_base,
    read_record,
    recorded_preset,
    recorded_verdicts,
)
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.proof.limits import COLUMN_LIMIT, GAIN_LIMIT, ROW_LIMIT
from modelopt_convert.report.verify import BackendReport, DeviceReport, LevelReport, ModuleVerify, Verdict, VerifyReport
from modelopt_convert.report.words import (
    MISMATCH_WORDS,
    NEAR_WORDS,
    NO_BASE_WORDS,
    PROVEN_WORDS,
    UNCALIBRATED_WORDS,
    UNCHANGED_WORDS,
    UNCOMPARED_WORDS,
)
from modelopt_convert.run.errors import Faults, first_line
from modelopt_convert.run.progress import Progress
from modelopt_convert.run.text import by_kind
from modelopt_convert.run.workers import torch_on_one_thread
from modelopt_convert.verification.gemm import limits
from modelopt_convert.verification.levels.container import container_level, look, unreadable
from modelopt_convert.verification.levels.layout import layout_level
from modelopt_convert.verification.levels.record import Scanned, scan
from modelopt_convert.verification.levels.row_digests import Decoded, decode_alone
from modelopt_convert.verification.options import VerifyOptions
from modelopt_convert.verification.subject import Subject, find_subject
from modelopt_convert.verification.verdict import is_uncalibrated

if TYPE_CHECKING:
    import torch

    from modelopt_convert.verification.levels.kernels import Kernels

_ALL_BYTES = "every byte is as mopt.json says"


def prewarm_kernels(
    reader: CheckpointReader,
    base: CheckpointReader | None,
    options: VerifyOptions,
    device: "torch.device",
    progress: Progress,
) -> VerifyReport:
    """Build the kernels for one transformer's shapes, and judge nothing."""
    from modelopt_convert.verification.levels.kernels import choose, prewarm

    subject = find_subject(reader, base)
    backends, reports = choose(options.backends, options.preferred, subject.format.algorithm, device)
    progress.begin("prewarm", _weight_bytes(subject))
    prewarm(subject, backends, device, progress.advance)
    names = ", ".join(backend.name for backend in backends) or "none that runs here"
    found = VerifyReport(
        algorithm=subject.format.algorithm,
        verdict="prewarmed",
        statement=f"kernels built for {names}; nothing was verified",
        device=describe(device),
        backends=reports,
    )
    return found if backends else _or_broken(found)


def _or_broken(found: VerifyReport) -> VerifyReport:
    """The report, with the verdict on a broken backend if there is one."""
    broken = next((one for one in found.backends if one.status == "broken"), None)
    if broken is None:
        return found
    return found.model_copy(update={"verdict": "backend broken", "statement": f"{broken.name}: {broken.reason}"})


def _weight_bytes(subject: Subject) -> int:
    return sum(sum(info.num_bytes for info in one.tensors) for one in subject.modules.values())


def verify_backends(options: VerifyOptions, device: "torch.device", progress: Progress) -> VerifyReport:
    """Self-test the backends without a checkpoint, which also builds their kernels.

    The reference is what they are compared with: its own word, alone, says nothing of any backend.
    """
    from modelopt_convert.verification.levels.kernels import choose

    backends: list[BackendReport] = []
    alone = []
    for algorithm in FORMATS:
        progress.begin(f"self-test {algorithm}", 0)
        _, reports = choose(options.backends, options.preferred, algorithm, device)
        for one in reports:
            reason = f"{algorithm}: {one.reason}" if one.reason else algorithm
            backends.append(one.model_copy(update={"reason": reason}))
        if not any(one.status == "pass" and one.kind != "reference" for one in reports):
            alone.append(algorithm.upper())
    passed = sum(one.status == "pass" and one.kind != "reference" for one in backends)
    statement = f"{passed} backends pass their self-test"
    if alone:
        statement += f"; {' and '.join(alone)}: none but the reference ran, so nothing was compared"
    verdict: Verdict = "prewarmed" if options.prewarm else "pass" if passed else "inconclusive"
    return _or_broken(VerifyReport(verdict=verdict, statement=statement, device=describe(device), backends=backends))


def verify_opened(
    reader: CheckpointReader,
    base: CheckpointReader | None,
    options: VerifyOptions,
    device: "torch.device | None",
    progress: Progress,
    *,
    with_record: bool,
    proof: str | None = None,
    faults: Faults | None = None,
) -> VerifyReport:
    """All levels of one transformer.

    Args:
        reader: The opened checkpoint.
        base: Its opened base, or None.
        options: What to run.
        device: Where; None for the CPU where no kernel is asked for, which does without torch unless there is a base.
        progress: Told what is read.
        with_record: Whether mopt.json is asked, and all bytes are read for it.
        proof: How the proof of a build ended, in words; None where the bytes and the record say it.
        faults: Gets modules that are none of the format, as ``find_subject`` adds them.
    """
    subject = find_subject(reader, base, faults)
    # A record is about all that a folder holds; one file is looked at alone.
    record = read_record(reader.folder) if with_record and not reader.is_alone else None
    if options.calibrated is not None and base is not None:
        if (recorded := calibration_of(record)) is not None:
            options.calibrated.refuse_other(recorded, str(reader.path))
        else:
            options.calibrated.refuse_other_base(base.identity(), str(base.path))
    max_error = subject.format.max_error if options.max_error is None else options.max_error
    scanned = Scanned()
    with nullcontext() if device is None and base is None else torch_on_one_thread():
        if with_record:
            progress.begin("read", reader.num_bytes)
            scanned = scan(reader.as_stored(), record, options.workers, progress.advance, is_compared=base is not None)
        seen = look(subject)
        told_of = unreadable(subject, seen, scanned)
        decoded = _decoded(subject, base, options, max_error, recorded_verdicts(record), told_of, progress)
        if base is not None:  # all of it was read by now, or nothing is said
            scanned.warnings += other_base(record, base.identity())
            if with_record and record is None:
                decoded.level.reason = decoded.level.reason or _not_compared(subject)
        levels = [
            _record_level(record, scanned),
            container_level(subject, seen, scanned, options.workers, base, decoded.level),
            layout_level(subject, seen, base, decoded.readings, options.workers, told_of),
            decoded.level,
        ]
    kernels = run_kernels(subject, decoded.modules, options, device, progress) if device is not None else None
    unchanged = UNCHANGED_WORDS if record is not None and levels[0].status != "fail" else NO_BASE_WORDS
    found = VerifyReport(
        checkpoint=str(reader.path),
        algorithm=subject.format.algorithm,
        preset=recorded_preset(record),
        proof=proof or decoded.proof or unchanged,
        device=describe(device),
        levels=[*levels, kernels.level if kernels is not None else not_multiplied()],
        backends=list(kernels.backends) if kernels is not None else [],
        modules=dict(kernels.modules) if kernels is not None else decoded.modules,
        agreement=list(kernels.agreement) if kernels is not None else [],
        native_executed=f"{kernels.native if kernels is not None else 0} of {len(decoded.modules)}",
        peak_gpu_bytes=kernels.peak_gpu_bytes if kernels is not None else None,
        thresholds={
            "relative_error": max_error,
            "gain": GAIN_LIMIT,
            "worst_row": ROW_LIMIT,
            "worst_column": COLUMN_LIMIT,
            "kernel_calc_diff": limits.CALC_DIFF_LIMIT,
            "kernel_gain": limits.GAIN_LIMIT,
            "kernel_worst_row": limits.ROW_LIMIT,
            "kernel_worst_column": limits.COLUMN_LIMIT,
        },
    )
    verdict, statement = _verdict(found, record, scanned.edited)
    # What is near fails L2 alone. Where another level fails too, no consent to what is near would make it pass.
    is_near = found.proof == NEAR_WORDS and all(one.status != "fail" for one in found.levels if one.level != "L2")
    is_refuted = verdict == "fail" and not is_near
    proven = {"proof": _refuted(found)} if is_refuted and found.proof != UNCOMPARED_WORDS else {}
    return found.model_copy(update={"verdict": verdict, "statement": statement, **proven})


def _decoded(
    subject: Subject,
    base: CheckpointReader | None,
    options: VerifyOptions,
    max_error: float,
    recorded: Mapping[str, tuple[str, str | None]],
    told_of: Collection[str],
    progress: Progress,
) -> Decoded:
    if base is None:
        return decode_alone(subject, options, told_of)
    from modelopt_convert.verification.levels.decode import decode_level, decode_size

    progress.begin("decode", decode_size(subject, base))
    return decode_level(
        subject,
        base,
        options,
        max_error=max_error,
        recorded=recorded,
        told_of=told_of,
        advance=progress.advance,
    )


def not_multiplied() -> LevelReport:
    """L3 where nothing asks for it."""
    reason = "no GPU: kernel parity needs one, or a --backend that runs on the CPU"
    return LevelReport(level="L3", title="kernel parity", status="skipped", reason=reason)


def _refuted(found: VerifyReport) -> str:
    """The words of what failed: they are about the weights, which are compared without input scales."""
    if not is_uncalibrated(found.levels):
        return MISMATCH_WORDS
    return UNCALIBRATED_WORDS if found.proof == PROVEN_WORDS else found.proof


def _not_compared(subject: Subject) -> str:
    """That no base has input scales, and no record says what they were."""
    count = sum("input_scale" in one.scales for one in subject.modules.values())
    return f"not compared: input scales of {count} modules, which no base has and no mopt.json tells" if count else ""


def _record_level(record: dict[str, Any] | None, scanned: Scanned) -> LevelReport:
    level = LevelReport(level="record", title="digests of mopt.json", status="pass")
    if record is None:
        level.status, level.reason = "skipped", "no mopt.json to compare with"
    level.failures, level.warnings = scanned.failures, scanned.warnings
    if record is not None or level.failures:
        level.status = "fail" if level.failures else "warn" if level.warnings else "pass"
    return level


def run_kernels(
    subject: Subject,
    decoded: Mapping[str, ModuleVerify],
    options: VerifyOptions,
    device: "torch.device",
    progress: Progress,
) -> "Kernels":
    """L3, where there is something to run it on; a GPU that fails is no fault of the checkpoint.

    Args:
        subject: The checkpoint.
        decoded: What is known of each module; it is left as it is.
        options: What to run.
        device: Where.
        progress: Told what is read.
    """
    import torch

    from modelopt_convert.verification.levels.kernels import Kernels, agreement, choose, prewarm

    found = Kernels(not_multiplied(), {name: one.model_copy(deep=True) for name, one in decoded.items()})
    if device.type == "cpu" and not options.names_backends:
        return found
    found.level.reason = ""
    try:
        backends, found.backends = choose(options.backends, options.preferred, subject.format.algorithm, device)
        if not backends:
            found.level.reason = "; ".join(f"{one.name}: {one.reason}" for one in found.backends)
            return found
        progress.begin("prewarm", _weight_bytes(subject))
        prewarm(subject, backends, device, progress.advance)
        progress.begin("multiply", _weight_bytes(subject))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        found.multiply(subject, backends, device, progress.advance)
        found.agreement = agreement(found.modules, found.backends)
        if device.type == "cuda":
            found.peak_gpu_bytes = torch.cuda.max_memory_allocated(device)
            found.native = max((one.modules for one in found.backends if one.kind == "native"), default=0)
    except RuntimeError as error:  # CUDA's, memory among them: of the GPU, and not of the checkpoint
        if device.type != "cuda":
            raise
        found.level.status = "fail" if found.level.failures else "skipped"
        found.level.reason = f"the GPU failed: {first_line(error)}"
    return found


def _verdict(found: VerifyReport, record: dict[str, Any] | None, edited: Sequence[str]) -> tuple[Verdict, str]:
    failed = [level for level in found.levels if level.status == "fail"]
    if any(level.level != "L3" for level in failed):
        return "fail", by_kind(failed[0].failures)[0]
    if found.backends:
        from modelopt_convert.verification.levels.kernels import disagree

        if (words := disagree(found.modules)) is not None:
            return "backends disagree", words
    if failed:
        return "fail", failed[0].failures[0]
    healthy = [one for one in found.backends if one.status in ("pass", "warn") and one.kind != "reference"]
    if not healthy and any(one.status == "broken" for one in found.backends):
        broken = next(one for one in found.backends if one.status == "broken")
        return "backend broken", f"{broken.name} {broken.reason}"
    where = "cpu only" if found.device is None or found.device.capability is None else f"on {found.device.name}"
    if found.proof == UNCHANGED_WORDS and record is not None:
        what = f"every weight is as mopt.json says, {' and '.join(edited)} is not" if edited else _ALL_BYTES
        return "pass", f"{what}, {where}; {claim(record)}"
    if found.proof == NO_BASE_WORDS:
        return "inconclusive", "there is neither a base nor a record to prove it by"
    return "pass", f"{found.proof}, {where}"


def describe(device: "torch.device | None") -> DeviceReport:
    """The device and torch's build."""
    if device is None:
        return DeviceReport(name="cpu", capability=None, torch=version("torch"), cuda=None)
    import torch

    if device.type != "cuda":
        return DeviceReport(name="cpu", capability=None, torch=torch.__version__, cuda=None)
    major, minor = torch.cuda.get_device_capability(device)
    return DeviceReport(
        name=torch.cuda.get_device_name(device),
        capability=f"{major}.{minor}",
        torch=torch.__version__,
        cuda=torch.version.cuda,
    )
