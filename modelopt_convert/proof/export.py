"""Prove an export against its base, module by module; the only reader of scale values.

Cheapest cause first: scales that no kernel could use, unquantized tensors that are not the base's, a few rows of the
packed weights, and then all of them. Without a base only the first is possible.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Event
from typing import Literal

import torch

from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.calibration import Calibration
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.format import Algorithm
from modelopt_convert.formats.layout import Layout
from modelopt_convert.formats.rows import SAMPLED_ROWS, sample_rows
from modelopt_convert.plan.from_export import needs_base
from modelopt_convert.plan.keeps import with_keep
from modelopt_convert.plan.plan import BuildPlan
from modelopt_convert.plan.prediction import num_bytes, row_readings, scale_readings
from modelopt_convert.proof.due import Due
from modelopt_convert.proof.input_scales import odd_input_scales
from modelopt_convert.proof.judgement import FormatProof, Judgement, format_proof, with_shared_scales
from modelopt_convert.proof.tensors import casts_of, common_dtype, load
from modelopt_convert.proof.unquantized import first_difference, is_near_base, rounded_side
from modelopt_convert.report.words import REFUTED
from modelopt_convert.run.errors import Faults, InputError
from modelopt_convert.run.text import few
from modelopt_convert.run.workers import all_in_order, in_order, small_calls


@dataclass(slots=True)
class Proof:
    """What is known of an export against its base.

    Attributes:
        algorithm: The format.
        method: In words; empty without a base.
        is_rebased: Whether a runtime brings the tensor scales of a fused group to one.
        modules: The judgement on every packed module, by name.
        due: Modules of which all bytes are still to be compared, while they are written.
        unproven: Modules about to be replaced whose scales are unusable, with the reason.
        odd_inputs: What is odd about input scales, in words.
        fused_differ: Fused groups whose global scales differ, with the largest ratio; runtimes rebase them.
        biases_differ: Packed modules whose bias is not the base's.
        unquantized_differ: Unquantized tensors that are not the base's by more than a cast.
        coarser: Tensors that are written as the base has them, which are casts of the export's.
    """

    algorithm: Algorithm
    method: str = ""
    is_rebased: bool = True
    modules: dict[str, Judgement] = field(default_factory=dict)
    due: dict[str, Due] = field(default_factory=dict)
    unproven: dict[str, str] = field(default_factory=dict)
    odd_inputs: list[str] = field(default_factory=list)
    fused_differ: dict[str, float] = field(default_factory=dict)
    biases_differ: list[str] = field(default_factory=list)
    unquantized_differ: list[str] = field(default_factory=list)
    coarser: list[str] = field(default_factory=list)

    def layouts(self) -> dict[str, Layout]:
        """How each module lies, of those that are known to lie somehow."""
        return {name: one.reading for name, one in self.modules.items() if one.reading is not None}


def prove(
    export: CheckpointReader,
    base: CheckpointReader | None,
    plan: BuildPlan,
    calibration: Calibration,
    faults: Faults,
    *,
    max_error: float,
    accept_near: bool,
    is_whole: bool,
    workers: int,
    advance: Callable[[int], None],
) -> Proof:
    """Run the passes, up to the comparison of all bytes: that is done while they are written (``concluded``).

    A fault ends the look at its module alone. Only another base ends all: each module would say the same.

    Args:
        export: The opened export.
        base: The opened base, or None.
        plan: What will be built from them.
        calibration: Amax values to compare scales with; FP8 only.
        faults: Gets causes that can be named: unusable scales, another base, another layout.
        max_error: Limit of the relative error where codes are not reproduced.
        accept_near: Whether unquantized tensors may differ from the base's, and biases be near them.
        is_whole: Whether all bytes of what is written will be compared, or these rows are all.
        workers: Modules judged at a time.
        advance: Called with the number of bytes just read.

    Returns:
        The proof; a module may have failed for a reason that cannot be named.
    """
    rules = format_proof(plan.format.algorithm)
    proof = Proof(plan.format.algorithm, is_rebased=rules.is_rebased)
    with torch.inference_mode():
        scales = _check_scales(export, base, plan, calibration, proof, workers, advance, faults)
        broken = _check_biases(export, plan, faults)
        if base is not None:
            proof.method = rules.method
            _check_unquantized(export, base, plan, proof, workers, advance)
            with faults.taken():
                _refuse_other_values(export, base, proof, max_error if accept_near else None, broken)
        _note_fused(plan, scales, proof)
        proof.odd_inputs = list(odd_input_scales(_inputs(export, plan, scales), scales, plan.fused))
        if base is None:
            return proof
    common = common_dtype(export)
    due = {
        name: Due(plan.format.algorithm, one, casts_of(common, base, one), scales[name], max_error)
        for name, one in plan.modules.items()
        if name in scales
    }

    def looked(one: Due, _stopped: Event) -> Judgement:
        with small_calls(), torch.inference_mode():  # of each thread
            found = rules.look(export, base, one)
        advance(sum(num_bytes(row_readings(one.module, side.tensors)) for side in (export, base)))
        return found

    looks = _judged(due, looked, workers, faults)
    if _is_other_base(export, looks, faults):
        return proof
    with faults.taken():
        rules.name_cause(export, looks)
    proof.modules, told = looks, faults.names
    due = {name: _informed(due[name], one) for name, one in looks.items() if name not in told}
    # What a few rows refute is refuted as a whole, or not at all, before anything is written. So is what they find near
    # the base in a module that the base replaces: all of it is never compared while it is written, and a few rows do
    # not tell damage to a few codes from another way to round.
    now = {
        name: one
        for name, one in due.items()
        if looks[name].verdict in REFUTED or not is_whole or (name in plan.replaced and looks[name].verdict == "near")
    }
    rows = None if is_whole else SAMPLED_ROWS
    proof = concluded(proof, compared(export, base, now, workers, faults, rows), export, faults)
    if is_whole:
        proof.due = {name: due[name] for name in plan.packed if name in due and name not in now}
    return proof


def compared(
    export: CheckpointReader,
    base: CheckpointReader,
    due: Mapping[str, Due],
    workers: int,
    faults: Faults,
    count: int | None = None,
) -> dict[str, Judgement]:
    """The judgement on each module, by all of its bytes.

    Args:
        export: The opened export.
        base: The opened base.
        due: What is compared.
        workers: Modules compared at a time.
        faults: Gets modules that cannot be judged.
        count: How many rows of each module are compared; None for all.
    """

    def one_compared(one: Due, stopped: Event) -> Judgement:
        rows = None if count is None else sample_rows(one.module.rows, count)
        with torch.inference_mode():  # of each thread
            return _compared(format_proof(one.algorithm), export, base, one, stopped, rows)

    return _judged(due, one_compared, workers, faults)


def _judged(
    due: Mapping[str, Due], judge: Callable[[Due, Event], Judgement], workers: int, faults: Faults
) -> dict[str, Judgement]:
    """The judgement on each module; those where export or base cannot be judged are added to the faults."""
    found = dict[str, Judgement]()
    for name, one in zip(due, all_in_order(list(due.values()), judge, workers), strict=True):
        if isinstance(one, InputError):
            faults.add(name, one)
        else:
            found[name] = one
    return found


def concluded(proof: Proof, found: Mapping[str, Judgement], export: CheckpointReader, faults: Faults) -> Proof:
    """The proof once the modules that were due are compared.

    Args:
        proof: By ``prove``.
        found: The judgement on each module that was due.
        export: For messages.
        faults: Gets causes that can be named.
    """
    rules, modules = format_proof(proof.algorithm), dict(proof.modules)
    for name, one in with_shared_scales(rules, found).items():
        modules[name] = replace(one, closeness=one.closeness or modules[name].closeness)
    if not _is_other_base(export, modules, faults):
        with faults.taken():
            rules.name_cause(export, modules)
    return replace(proof, modules=modules, due={})


def judge_module(
    export: CheckpointReader,
    base: CheckpointReader,
    due: Due,
    stopped: Event,
    rows: Sequence[int] | None = None,
) -> Judgement:
    """Look at a module, then compare it; whether its scale is the base's is open still.

    Args:
        export: The opened export.
        base: The opened base.
        due: What is compared.
        stopped: Ends the comparison.
        rows: The rows to be compared; None for all. What they refute is compared whole.

    Raises:
        InputError: Export or base cannot be judged.
        Stopped: The event was set meanwhile.
    """
    rules = format_proof(due.algorithm)
    with torch.inference_mode():  # of each thread
        with small_calls():
            look = rules.look(export, base, due)
        found = _compared(rules, export, base, _informed(due, look), stopped, rows)
    return replace(found, closeness=found.closeness or look.closeness)


def _compared(
    rules: FormatProof,
    export: CheckpointReader,
    base: CheckpointReader,
    due: Due,
    stopped: Event,
    rows: Sequence[int] | None,
) -> Judgement:
    """Compare all rows, or those given. A few refute nothing: of a column they say less than all of it."""
    found = rules.compare(export, base, due, stopped, rows)
    return found if rows is None or found.verdict not in REFUTED else rules.compare(export, base, due, stopped, None)


def _informed(due: Due, look: Judgement) -> Due:
    """With what a few rows say that is to be tried first, unless that is known."""
    return replace(due, reading=due.reading or look.reading, rule=look.rule)


def _is_other_base(export: CheckpointReader, modules: Mapping[str, Judgement], faults: Faults) -> bool:
    """Whether most modules have nothing to do with the base; that is added to the faults."""
    unrelated = [name for name, one in modules.items() if one.verdict == "unrelated"]
    if 2 * len(unrelated) <= len(modules):
        return False
    fault = InputError(
        f"{export.path}: {len(unrelated)} of {len(modules)} packed weights have nothing in common with the base",
        code="export.other_base",
        path=str(export.path),
        hint="give the base that the export was made from",
    )
    faults.add("", fault.at(unrelated))
    return True


def _check_scales(
    export: CheckpointReader,
    base: CheckpointReader | None,
    plan: BuildPlan,
    calibration: Calibration,
    proof: Proof,
    workers: int,
    advance: Callable[[int], None],
    faults: Faults,
) -> dict[str, float]:
    """Scales by module, after all were looked at; modules to be replaced by the base are excused."""
    rules = format_proof(plan.format.algorithm)

    def checked(module: PackedModule, _stopped: Event) -> float:
        try:
            if module.fault is not None:
                raise module.fault
            with torch.inference_mode():  # of each thread
                return rules.scale(export, base, module, calibration)
        finally:
            advance(num_bytes(scale_readings(module)))

    found: dict[str, float] = {}
    modules = list(plan.modules.values())
    for module, scale in zip(modules, all_in_order(modules, checked, workers), strict=True):
        if not isinstance(scale, InputError):
            found[module.name] = scale
        elif module.name not in plan.replaced or any(one.code in rules.never_excused for one in scale.each()):
            faults.add(module.name, with_keep(scale, module.name, plan.fused))
        elif module.name in plan.dequantized:
            faults.add(module.name, needs_base(scale))
        else:
            proof.unproven[module.name] = scale.message
    return found


def _inputs(export: CheckpointReader, plan: BuildPlan, scales: Collection[str]) -> dict[str, float]:
    """The input scales of modules that stay packed, as they will be written; of those with usable ``scales``."""
    found: dict[str, float] = {}
    for module in (plan.modules[name] for name in plan.packed if name in scales):
        if (info := module.scales.get("input_scale")) is not None:
            found[module.name] = float(load(export, info.name))
        elif "input_scale" in module.calibrated:
            found[module.name] = module.calibrated["input_scale"]
    return found


def _note_fused(plan: BuildPlan, scales: dict[str, float], proof: Proof) -> None:
    for group in plan.fused:
        values = [scales[name] for name in group if name in scales]
        if len(set(values)) > 1:
            proof.fused_differ[", ".join(group)] = max(values) / min(values)


def _check_biases(export: CheckpointReader, plan: BuildPlan, faults: Faults) -> set[str]:
    """Add the biases of packed modules that no base makes right, ``export.not_finite``; their names."""
    broken = set()
    for info in (plan.modules[name].bias for name in plan.packed):
        if info is not None and not bool(load(export, info.name).isfinite().all()):
            fault = InputError(
                f"{export.folder / info.file}: tensor {info.name!r}: expected finite values, found NaN or infinity",
                code="export.not_finite",
                path=str(export.folder / info.file),
                hint="the export is damaged; export again",
            )
            faults.add(info.name, fault)
            broken.add(info.name)
    return broken


def _check_unquantized(
    export: CheckpointReader,
    base: CheckpointReader,
    plan: BuildPlan,
    proof: Proof,
    workers: int,
    advance: Callable[[int], None],
) -> None:
    def rounded(name: str, stopped: Event) -> Literal["export", "base"] | None:
        with torch.inference_mode():  # of each thread
            found = rounded_side(export, base, name, stopped)
        advance(sum(one.tensors[name].num_bytes for one in (export, base)))
        return found

    sides = dict(zip(plan.must_equal, in_order(plan.must_equal, rounded, workers), strict=True))
    proof.unquantized_differ = [name for name, side in sides.items() if side is None]
    proof.coarser = [name for name, side in sides.items() if side == "base" and plan.steps[name].origin == "base"]
    biases = zip(plan.may_differ, in_order(plan.may_differ, rounded, workers), strict=True)
    proof.biases_differ = [module_of(name) for name, side in biases if side is None]


def _refuse_other_values(
    export: CheckpointReader, base: CheckpointReader, proof: Proof, near: float | None, broken: Collection[str]
) -> None:
    """Refuse unquantized tensors that differ; or, up to a limit, biases alone, since these are written as they are.

    Of the biases that are ``broken`` nothing more is said.

    Raises:
        InputError: ``export.other_base``.
    """
    biases = [f"{name}.bias" for name in proof.biases_differ if f"{name}.bias" not in broken]
    if near is None:
        names, how = [*proof.unquantized_differ, *biases], "differ from the base by more than a dtype cast"
        more = ", or --accept-near to build what is not proven"
    else:
        names = [name for name in biases if not is_near_base(export, base, name, near)]
        how, more = "are not near the base's", ""
    if names:
        where = str(export.folder / export.tensors[names[0]].file)
        with torch.inference_mode():
            first = f"{names[0]} {first_difference(export, base, names[0])}"
        listed = f": {few(names)}" if len(names) > 1 else ""
        fault = InputError(
            f"{where}: {len(names)} unquantized tensors {how}{listed} ({first}; base: {base.path})",
            code="export.other_base",
            path=where,
            hint="the export was made from another base (a merged LoRA, further training, another revision) or changed "
            f"by AWQ or SVDQuant; give that base, or export again{more}",
        )
        raise fault.at(names)
