"""Prove an export against its base, module by module; the only reader of scale values.

Three passes, cheapest cause first: scales that no kernel could use, unquantized tensors that are not the base's, and
then the packed weights themselves. Without a base only the first is possible.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Event

import torch

from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.calibration import Calibration
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.layout import Layout
from modelopt_convert.formats.tensor_bytes import from_bytes
from modelopt_convert.plan.from_export import needs_base
from modelopt_convert.plan.plan import BuildPlan
from modelopt_convert.plan.prediction import num_bytes, row_readings, scale_readings
from modelopt_convert.proof.judgement import FormatProof, Judgement, format_proof
from modelopt_convert.proof.tensors import common_dtype
from modelopt_convert.proof.unquantized import same_up_to_cast
from modelopt_convert.run.errors import InputError
from modelopt_convert.run.workers import in_order

_SHOWN = 10


@dataclass(slots=True)
class Proof:
    """What was proven of an export against its base.

    Attributes:
        method: In words; empty without a base.
        is_rebased: Whether a runtime brings the tensor scales of a fused group to one.
        modules: The judgement on every packed module, by name.
        unproven: Modules about to be replaced whose scales are unusable, with the reason.
        fused_differ: Fused groups whose global scales differ, with the largest ratio; runtimes rebase them.
        biases_differ: Packed modules whose bias is not the base's.
    """

    method: str = ""
    is_rebased: bool = True
    modules: dict[str, Judgement] = field(default_factory=dict)
    unproven: dict[str, str] = field(default_factory=dict)
    fused_differ: dict[str, float] = field(default_factory=dict)
    biases_differ: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every module that could be judged is what the base says it should be."""
        return not self.failing()

    def failing(self) -> list[str]:
        """Modules that are not."""
        return [name for name, one in self.modules.items() if not one.passed]

    def layouts(self) -> dict[str, Layout]:
        """How each module lies, of those that are known to lie somehow."""
        return {name: one.reading for name, one in self.modules.items() if one.reading is not None}


def prove(
    export: CheckpointReader,
    base: CheckpointReader | None,
    plan: BuildPlan,
    calibration: Calibration,
    *,
    max_error: float,
    workers: int,
    advance: Callable[[int], None],
) -> Proof:
    """Run the passes.

    Args:
        export: The opened export.
        base: The opened base, or None.
        plan: What will be built from them.
        calibration: Amax values to compare scales with; FP8 only.
        max_error: Limit of the relative error where codes are not reproduced.
        workers: Modules judged at a time.
        advance: Called with the number of bytes just read.

    Returns:
        The proof; it may have failed for a reason that cannot be named (``Proof.passed``).

    Raises:
        InputError: A cause that can be named: unusable scales, another base, another layout.
    """
    rules = format_proof(plan.format.algorithm)
    proof = Proof(is_rebased=rules.is_rebased)
    with torch.inference_mode():
        scales = _check_scales(export, base, plan, calibration, proof, workers, advance)
        _note_fused(plan, scales, proof)
        if base is None:
            return proof
        proof.method = rules.method
        _check_unquantized(export, base, plan, proof, workers, advance)
        due = {module: plan.modules[module] for module in plan.modules if module not in proof.unproven}
        proof.modules = judge_modules(export, base, due, scales, rules, max_error, workers, advance)
    rules.name_cause(export, proof.modules)
    _name_another_base(export, proof)
    return proof


def judge_modules(
    export: CheckpointReader,
    base: CheckpointReader,
    modules: Mapping[str, PackedModule],
    scales: Mapping[str, float],
    rules: FormatProof,
    max_error: float,
    workers: int,
    advance: Callable[[int], None],
) -> dict[str, Judgement]:
    """Judge modules by sampled rows; arguments as those of ``prove``, ``scales`` by module."""
    common = common_dtype(export)

    def judged(module: PackedModule, _stopped: Event) -> Judgement:
        with torch.inference_mode():  # of each thread
            found = rules.judge(export, base, module, common, scales[module.name], max_error)
        advance(sum(num_bytes(row_readings(module, one.tensors)) for one in (export, base)))
        return found

    return dict(zip(modules, in_order(list(modules.values()), judged, workers), strict=True))


def _check_scales(
    export: CheckpointReader,
    base: CheckpointReader | None,
    plan: BuildPlan,
    calibration: Calibration,
    proof: Proof,
    workers: int,
    advance: Callable[[int], None],
) -> dict[str, float]:
    """Scales by module, after all were looked at; modules to be replaced by the base are excused."""
    rules = format_proof(plan.format.algorithm)

    def checked(module: PackedModule, _stopped: Event) -> float | InputError:
        try:
            if module.fault is not None:
                raise module.fault
            with torch.inference_mode():  # of each thread
                return rules.scale(export, base, module, calibration)
        except InputError as error:
            if module.name not in plan.replaced or error.code in rules.never_excused:
                raise
            if module.name in plan.dequantized:
                raise needs_base(error) from error
            return error
        finally:
            advance(num_bytes(scale_readings(module)))

    found: dict[str, float] = {}
    modules = list(plan.modules.values())
    for module, scale in zip(modules, in_order(modules, checked, workers), strict=True):
        if isinstance(scale, InputError):
            proof.unproven[module.name] = scale.message
        else:
            found[module.name] = scale
    return found


def _note_fused(plan: BuildPlan, scales: dict[str, float], proof: Proof) -> None:
    for group in plan.fused:
        values = [scales[name] for name in group if name in scales]
        if len(set(values)) > 1:
            proof.fused_differ[", ".join(group)] = max(values) / min(values)


def _check_unquantized(
    export: CheckpointReader,
    base: CheckpointReader,
    plan: BuildPlan,
    proof: Proof,
    workers: int,
    advance: Callable[[int], None],
) -> None:
    def same(name: str, stopped: Event) -> bool:
        with torch.inference_mode():  # of each thread
            found = same_up_to_cast(export, base, name, stopped)
        advance(sum(one.tensors[name].num_bytes for one in (export, base)))
        return found

    equal = in_order(plan.must_equal, same, workers)
    differing = [name for name, one in zip(plan.must_equal, equal, strict=True) if not one]
    equal = in_order(plan.may_differ, same, workers)
    for name, one in zip(plan.may_differ, equal, strict=True):
        if not one:
            proof.biases_differ.append(module_of(name))
            info = export.tensors[name]
            if not bool(from_bytes(export.read(name), info.dtype, (-1,)).isfinite().all()):
                raise InputError(
                    f"{export.path / info.file}: tensor {name!r}: expected finite values, found NaN or infinity",
                    code="export.not_finite",
                    path=str(export.path / info.file),
                    hint="the export is damaged; export again",
                )
    if differing:
        names = ", ".join(differing[:_SHOWN])
        where = str(export.path / export.tensors[differing[0]].file)
        raise InputError(
            f"{where}: {len(differing)} unquantized tensors differ from the base by more than a dtype cast: {names}",
            code="export.other_base",
            path=where,
            hint="the export was made from another base (a merged LoRA, further training, another revision) or changed "
            "by AWQ or SVDQuant; give that base, or export again",
        )


def _name_another_base(export: CheckpointReader, proof: Proof) -> None:
    unrelated = [name for name, one in proof.modules.items() if one.verdict == "unrelated"]
    if 2 * len(unrelated) > len(proof.modules):
        raise InputError(
            f"{export.path}: {len(unrelated)} of {len(proof.modules)} packed weights have nothing in common with the "
            f"base ({unrelated[0]} first)",
            code="export.other_base",
            path=str(export.path),
            hint="give the base that the export was made from",
        )
