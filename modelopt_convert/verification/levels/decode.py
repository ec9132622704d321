"""L2: every code and scale against the base."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from threading import Event

import torch

from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.packed import PackedModule, is_layout_marker, is_quantizer_state
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.formats.rows import sample_rows
from modelopt_convert.preset.patterns import siblings
from modelopt_convert.preset.preset import preset_of_class
from modelopt_convert.proof.due import Due
from modelopt_convert.proof.export import judge_module
from modelopt_convert.proof.judgement import SWEPT, Judgement, format_proof, scale_words, with_shared_scales
from modelopt_convert.proof.scale_values import tensor_scale
from modelopt_convert.proof.tensors import casts_of, common_dtype
from modelopt_convert.proof.unquantized import first_difference, is_near_base, rounded_side
from modelopt_convert.report.verify import LevelReport, ModuleVerify
from modelopt_convert.report.words import (
    MISMATCH_WORDS,
    NEAR_WORDS,
    PROVEN,
    PROVEN_WORDS,
    SAMPLED_WORDS,
    UNCOMPARED_WORDS,
)
from modelopt_convert.run.errors import InputError
from modelopt_convert.run.workers import in_order
from modelopt_convert.verification.levels.row_digests import Decoded, digest_modules
from modelopt_convert.verification.options import VerifyOptions
from modelopt_convert.verification.subject import Subject


def decode_level(
    subject: Subject,
    base: CheckpointReader,
    options: VerifyOptions,
    *,
    max_error: float,
    recorded: Mapping[str, tuple[str, str | None]],
    told_of: Collection[str],
    advance: Callable[[int], None],
) -> Decoded:
    """Judge every module that can be read.

    Args:
        subject: The checkpoint.
        base: Its base.
        options: How many rows are compared, on how many threads, and whether what is near passes.
        max_error: Limit of the relative error where codes are not reproduced.
        recorded: Verdicts and rules that a record claims, by module. A claim better than the bytes is a failure.
        told_of: Modules of which L0 says why they cannot be right: the level fails, and does not say it again.
        advance: Called with the number of bytes just read.
    """
    modules = {name: ModuleVerify(shape=[one.rows, one.columns]) for name, one in subject.modules.items()}
    failures = digest_modules(subject, modules, options)
    judgements, unreadable = judge_modules(subject, base, options, max_error, advance)
    for name, words in unreadable.items():
        modules[name].worsen("fail")
        failures.setdefault(name, words)
    silent = [name for name in told_of if failures.pop(name, None) is not None]
    near: list[str] = []
    for name, one in judgements.items():
        _fill(modules[name], one, accept_near=options.accept_near)
        if one.passed:
            continue
        words = f"{name}: {one.verdict}{_figures(modules[name])}"
        if name in told_of:
            silent.append(name)
        elif one.verdict == "near":
            near.append(words)
        else:
            failures.setdefault(name, words)
    told = list(failures.values())
    told += _weaker_than_recorded(modules, recorded)
    unlike, like = unlike_base(subject, base, max_error, options.workers, advance)
    told, near = told + unlike, near + like
    is_empty = not judgements and not told and not near and not silent
    if is_empty:
        told = ["no module was compared"]
    preset = preset_of_class(subject.reader.config)
    odd = scale_words(judgements, siblings(preset.fused if preset else [], judgements))
    status = "warn" if near or odd else "pass"
    level = LevelReport(level="L2", title="decode", status=status, failures=told, warnings=[*near, *odd])
    if near and not options.accept_near:
        level.failures, level.warnings = [*told, *near], odd
    if level.failures or silent:
        level.status = "fail"
    if silent:
        level.reason = f"L0 says what is wrong with {len(silent)} modules"
    refuted = MISMATCH_WORDS if told or silent else NEAR_WORDS if near else SAMPLED_WORDS
    proof = UNCOMPARED_WORDS if is_empty else refuted
    if proof == SAMPLED_WORDS and all(one.is_whole for one in judgements.values()):
        proof = PROVEN_WORDS
    readings = {name: one.reading for name, one in judgements.items() if one.reading is not None}
    return Decoded(level, modules, readings, proof)


def _figures(one: ModuleVerify) -> str:
    """What is wrong with a module, in numbers."""
    found = [one.first] if one.first is not None else []
    found.append(f"{one.codes_equal} of {one.codes} codes equal")
    if one.relative_error is not None:
        found.append(
            f"relative error {one.relative_error:.3f}, gain {one.gain:.3f}, worst row {one.worst_row:.3f}, "
            f"worst column {one.worst_column:.3f}"
        )
    return f" ({'; '.join(found)})"


def judge_modules(
    subject: Subject,
    base: CheckpointReader,
    options: VerifyOptions,
    max_error: float,
    advance: Callable[[int], None],
) -> tuple[dict[str, Judgement], dict[str, str]]:
    """Judge every packed module that can be read.

    Args:
        subject: The checkpoint.
        base: Its base.
        options: How many rows are compared, and on how many threads.
        max_error: Limit of the relative error where codes are not reproduced.
        advance: Called with the number of values just compared.

    Returns:
        Judgements by module, and what is wrong with modules that cannot be judged.
    """
    common = common_dtype(subject.reader)

    def judged(module: PackedModule, stopped: Event) -> str | Judgement:
        try:
            found = _judge(subject, base, module, common, options, max_error, stopped)
        except (InputError, ValueError) as error:
            if isinstance(error, InputError) and error.code.startswith("calibration."):
                raise  # of CALIB, and not of this module
            return str(error) if module.name in str(error) else f"{module.name}: {error}"
        advance(module.rows * module.columns)
        return found

    due = [module for module in subject.modules.values() if module.has_weight]
    answers = dict(zip((one.name for one in due), in_order(due, judged, options.workers), strict=True))
    found = {name: one for name, one in answers.items() if isinstance(one, Judgement)}
    unreadable = {name: one for name, one in answers.items() if isinstance(one, str)}
    return with_shared_scales(format_proof(subject.format.algorithm), found), unreadable


def _weaker_than_recorded(
    modules: Mapping[str, ModuleVerify], recorded: Mapping[str, tuple[str, str | None]]
) -> list[str]:
    """Modules that a record calls better than they are.

    Another search is nearest too. So where mopt's own sweep made all bytes, it still has to.
    """
    failures = []
    for name, one in modules.items():
        claimed, rule = recorded.get(name, ("", None))
        if claimed not in PROVEN or one.verdict not in PROVEN:
            continue
        is_swept = rule == SWEPT and PROVEN.index(one.verdict) == PROVEN.index(claimed)
        if PROVEN.index(one.verdict) > PROVEN.index(claimed) or (is_swept and one.rule != SWEPT):
            one.worsen("fail")
            words = f"{claimed} ({rule})" if is_swept else claimed
            failures.append(f"{name}: {one.verdict}, recorded as {words}{_at(one)}")
    return failures


def _at(one: ModuleVerify) -> str:
    return f" ({one.first})" if one.first is not None else ""


def decode_size(subject: Subject, base: CheckpointReader) -> int:
    """What ``decode_level`` counts in all: values of modules, and bytes of what is compared beside them."""
    values = sum(one.rows * one.columns for one in subject.modules.values())
    return values + sum(subject.reader.tensors[name].num_bytes for name in _unpacked(subject, base))


def _beside_scales(subject: Subject) -> set[str]:
    """Tensors that a base may have, too."""
    scales = {info.name for module in subject.modules.values() for info in module.scales.values()}
    known = {name for name in subject.reader.tensors if not is_quantizer_state(name) and not is_layout_marker(name)}
    return {name for name in known - scales if module_of(name) not in subject.refused}


def _unpacked(subject: Subject, base: CheckpointReader) -> list[str]:
    """Tensors that both have, and that hold no codes."""
    coded = {module.weight.name for module in subject.modules.values()}
    return sorted((_beside_scales(subject) & base.tensors.keys()) - coded)


def unlike_base(
    subject: Subject, base: CheckpointReader, max_error: float, workers: int, advance: Callable[[int], None]
) -> tuple[list[str], list[str]]:
    """Tensors beside codes and scales that are not those of the base, or that only one of both has, in words.

    Args:
        subject: The checkpoint.
        base: Its base.
        max_error: Limit of the relative error of a tensor that is near.
        workers: Tensors compared at a time.
        advance: Called with the number of bytes just read.

    Returns:
        Those that are other tensors, and those that are near the base's.
    """
    mine = _beside_scales(subject)
    lost = (name for name in base.tensors if name not in mine and module_of(name) not in subject.refused)
    failures = [f"{name}: the base has it, the checkpoint has not" for name in sorted(lost)]
    failures += [f"{name}: the checkpoint has it, the base has not" for name in sorted(mine - base.tensors.keys())]

    def compared(name: str, stopped: Event) -> tuple[bool, str] | None:
        """What is wrong with a tensor, and whether it is near."""
        info = subject.reader.tensors[name]
        if info.shape != base.tensors[name].shape:
            return False, f"{name}: {list(info.shape)}, the base's is {list(base.tensors[name].shape)}"
        with torch.inference_mode():  # of each thread
            side = rounded_side(subject.reader, base, name, stopped)
            advance(info.num_bytes)
            if side is not None:
                return None
            is_near = is_near_base(subject.reader, base, name, max_error)
            place = first_difference(subject.reader, base, name)
        return is_near, f"{name}: {'near' if is_near else 'not'} the base's ({place or 'other bytes'})"

    answers = in_order(_unpacked(subject, base), compared, workers)
    wrong = [answer for answer in answers if answer is not None]
    return [*failures, *(words for near, words in wrong if not near)], [words for near, words in wrong if near]


def _judge(
    subject: Subject,
    base: CheckpointReader,
    module: PackedModule,
    common: str,
    options: VerifyOptions,
    max_error: float,
    stopped: Event,
) -> Judgement:
    info = base.tensors.get(module.weight.name)
    shape = (module.rows, module.columns)
    if info is None or info.shape != shape or info.dtype not in HALF_AND_FLOAT:
        what = "none" if info is None else f"{info.dtype} {list(info.shape)}"
        raise ValueError(f"{module.weight.name}: expected {list(shape)} in the base, found {what}")
    target = subject.format
    scale = tensor_scale(subject.reader, module, target.tensor_scale)
    due = Due(target.algorithm, module, casts_of(common, base, module), scale, max_error, reading=subject.layout)
    if options.calibrated is not None:
        due = replace(due, **options.calibrated.known(module.name, module.columns))
    rows = None if options.sample is None else sample_rows(module.rows, options.sample)
    return judge_module(subject.reader, base, due, stopped, rows)


def _fill(found: ModuleVerify, one: Judgement, *, accept_near: bool) -> None:
    """Take a judgement over into the report."""
    found.verdict, found.rule, found.first = one.verdict, one.rule, one.first
    found.compared = "all" if one.is_whole else "sampled rows"
    found.codes, found.codes_equal = one.counts.codes, one.counts.codes_equal
    found.scales, found.scales_equal = one.counts.scales, one.counts.scales_equal
    if (near := one.closeness) is not None:
        found.relative_error, found.gain = near.relative_error, near.gain
        found.worst_row, found.worst_column = near.worst_row, near.worst_column
        if near.relative_error > 0:
            found.sqnr_db = round(-20 * math.log10(near.relative_error), 2)
    is_accepted = accept_near and one.verdict == "near"
    found.worsen("pass" if one.passed else "warn" if is_accepted else "fail")
