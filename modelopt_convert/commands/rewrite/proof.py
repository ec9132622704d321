"""The proof of a rewritten checkpoint against its base: all bytes, by what ``verify`` finds of them.

torch is imported on the way.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.checkpoint.record import other_base, read_record
from modelopt_convert.commands.build.proof import module_report, verdict_counts
from modelopt_convert.commands.command import Warned, not_compared
from modelopt_convert.commands.requests import ConvertRequest, RewriteRequest
from modelopt_convert.commands.rewrite.plan import first_layout, has_input_scales
from modelopt_convert.formats.layout import Layout
from modelopt_convert.formats.nvfp4.format import FORMAT
from modelopt_convert.plan.inputs import check_same_config, one_sided_words
from modelopt_convert.report.report import ModuleReport, ProofReport
from modelopt_convert.report.words import MISMATCH_WORDS, NEAR_WORDS, PROVEN_WORDS, REFUTED
from modelopt_convert.run.errors import CheckFailedError, Faults, InputError, joint
from modelopt_convert.verification.options import VerifyOptions

_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Rewritten:
    """What the proof found.

    Attributes:
        report: Verdicts and their counts.
        wrong: What is not the base's, in words.
        near: What is near the base, and not made of it as it is, in words.
        misdeclared: What lies otherwise than the checkpoint declares, in words.
        odd: What is odd about input scales, which no base proves, in words.
        scales: What is to be known of tensor scales that are not max calibration's, in words.
    """

    report: ProofReport
    wrong: list[str]
    near: list[str]
    misdeclared: list[str]
    odd: list[str]
    scales: list[str]

    def but_for(self, told: Collection[str]) -> "Rewritten":
        """What is said of other modules and tensors than these."""

        def rest(found: list[str]) -> list[str]:
            return [one for one in found if {at := one.partition(": ")[0], module_of(at)}.isdisjoint(told)]

        return replace(self, wrong=rest(self.wrong), near=rest(self.near), misdeclared=rest(self.misdeclared))


def proven_layouts(
    source: CheckpointReader, base: CheckpointReader, request: RewriteRequest, faults: Faults
) -> dict[str, Layout]:
    """How packed modules lie, by all bytes; only those that are the base's under some layout.

    Args:
        source: The checkpoint to be rewritten.
        base: Its base.
        request: What is asked for.
        faults: Gets modules that are none of NVFP4.
    """
    import torch

    from modelopt_convert.verification.levels.decode import judge_modules
    from modelopt_convert.verification.subject import find_subject

    subject = find_subject(source, base, faults)
    subject = replace(subject, layout=first_layout(request.kind))
    with torch.inference_mode():
        found, _ = judge_modules(
            subject, base, VerifyOptions(workers=request.worker_count), request.max_error, lambda _: None
        )
    return {name: one.reading for name, one in found.items() if one.passed and one.reading is not None}


def compare_configs(source: CheckpointReader, base: CheckpointReader) -> list[Warned]:
    """Compare config.json with that of the base, where both have one: keys that only one has are told.

    Raises:
        InputError: ``base.config``.
    """
    if lacking := not_compared(source, base):
        return lacking
    check_same_config(source, base, "source")
    return [("config.one_sided", words) for words in one_sided_words(source.config, base.config, "the source")]


def compare_bases(source: CheckpointReader, base: CheckpointReader) -> list[Warned]:
    """Tell that the base is another than the source's record names, or that the record cannot be read.

    Args:
        source: The checkpoint that was rewritten.
        base: Its base, all of which was read.
    """
    try:
        record = read_record(source.folder)
    except InputError as error:
        return [(error.code, error.message)]
    return [("base.not_recorded", words) for words in other_base(record, base.identity())]


def prove_rewritten(
    written: CheckpointReader,
    base: CheckpointReader,
    request: RewriteRequest | ConvertRequest,
    faults: Faults | None = None,
) -> Rewritten:
    """Prove every byte of every packed module, and every other tensor; see that all scales can be used.

    Args:
        written: The checkpoint.
        base: Its base.
        request: What is asked for.
        faults: Gets modules that are none of the format; without it they are refused.
    """
    import torch

    from modelopt_convert.proof.judgement import format_proof, scale_words
    from modelopt_convert.verification.levels.container import SCALE_FAULTS, look
    from modelopt_convert.verification.levels.decode import judge_modules, unlike_base
    from modelopt_convert.verification.levels.layout import misdeclared
    from modelopt_convert.verification.subject import find_subject

    has_inputs, limit = has_input_scales(written), request.max_error
    subject = find_subject(written, base, faults)
    options = VerifyOptions(workers=request.worker_count)
    with torch.inference_mode():
        found, unreadable = judge_modules(subject, base, options, limit, lambda _: None)
        lint = look(subject).lint
    unlike, like = unlike_base(subject, base, limit, options.workers, lambda _: None)
    modules = {name: module_report(one) for name, one in found.items()}
    modules |= {name: ModuleReport(verdict="mismatch", reason=why) for name, why in unreadable.items()}
    wrong = [f"{name}: {one.verdict}{_place(one)}" for name, one in modules.items() if one.verdict in REFUTED]
    near = [f"{name}: near{_place(one)}" for name, one in modules.items() if one.verdict == "near"]
    report = rewritten_report(modules, limit, format_proof(FORMAT.algorithm).method, unlike=unlike, like=like)
    due = SCALE_FAULTS if has_inputs else SCALE_FAULTS - {"input_scale.missing"}
    unusable = [f"{one.module}: {one.message}" for one in lint if one.code in due]
    odd = [one.message for one in lint if one.code == "input_scale.odd"]
    odd += ["no module has an input_scale, nor had one in the source"] * any(
        one.code == "input_scale.missing" for one in lint if not has_inputs
    )
    # A fault that lint does not know keeps a module from being compared, too.
    told = modules.keys() | {one.module for one in lint if one.code in due}
    unread = [f"{name}: {one.fault}" for name, one in subject.modules.items() if name not in told]
    readings = {name: one.reading for name, one in found.items() if one.reading is not None}
    scales = scale_words(found, ())
    bad, close = [*wrong, *unusable, *unread, *unlike], [*near, *like]
    return Rewritten(report, bad, close, misdeclared(subject.layout, readings), odd, scales)


def rewritten_report(
    modules: Mapping[str, ModuleReport],
    max_error: float,
    method: str,
    *,
    unlike: Sequence[str] = (),
    like: Sequence[str] = (),
) -> ProofReport:
    """The proof as it is reported.

    Args:
        modules: By name.
        max_error: The limit that was used.
        method: In words.
        unlike: Other tensors that are not the base's, in words.
        like: Other tensors that are near the base's, in words.
    """
    is_wrong = bool(unlike) or any(one.verdict in REFUTED for one in modules.values())
    is_near = bool(like) or any(one.verdict == "near" for one in modules.values())
    return ProofReport(
        method=method,
        status="fail" if is_wrong else "not proven" if is_near else "pass",
        words=MISMATCH_WORDS if is_wrong else NEAR_WORDS if is_near else PROVEN_WORDS,
        max_error=max_error,
        counts=verdict_counts(modules),
        fused_scales_differ={},
        biases_differ=[],
        unquantized_differ=[*unlike, *like],
        modules=dict(sorted(modules.items())),
    )


@dataclass(frozen=True, slots=True)
class Refusal:
    """What is said where a proof does not pass, and differs by command.

    Attributes:
        misdeclared: What is wrong with a layout that is not the declared one.
        remedy: What to do about that.
        without: What happens without ``--base``.
    """

    misdeclared: str
    remedy: str
    without: str


REWRITE = Refusal(
    "would be in a layout that config.json cannot declare",
    "rewrite the other order first, without --base, and then this one with it",
    "it is rewritten as told, unproven",
)


def refuse_unproven(found: Rewritten, source: str, words: Refusal, *, accept_near: bool) -> None:
    """Refuse what ``verify`` would not pass.

    Args:
        found: By ``prove_rewritten``.
        source: The checkpoint, for the message.
        words: Of the command.
        accept_near: Whether what is near the base may be written.

    Raises:
        CheckFailedError: ``check.proof``.
    """
    wrong = f"it is damaged, or of another base; give that base. Without --base {words.without}"
    near = "give the base that was quantized, or --accept-near to write what is not proven"
    kinds = (
        (found.wrong, "are not the base's", wrong),
        (found.misdeclared, words.misdeclared, words.remedy),
        ([] if accept_near else found.near, "are near the base, and not what quantizing it gives", near),
    )
    failures = []
    for told, what, hint in kinds:
        message = f"{source}: {len(told)} modules and tensors {what}: {'; '.join(told[:_SHOWN])}"
        failure = CheckFailedError(message, code="check.proof", path=source, hint=f"{hint}. Nothing was published")
        failures += [(one.partition(": ")[0], failure) for one in told]
    if failures:
        raise joint(failures)


def _place(one: ModuleReport) -> str:
    return f" ({one.first or one.reason})" if one.first or one.reason else ""
