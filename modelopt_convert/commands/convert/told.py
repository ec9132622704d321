"""The report of a conversion, put together from what its steps returned."""

from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.commands.build.proof import verdict_counts
from modelopt_convert.commands.convert.nunchaku import is_nunchaku
from modelopt_convert.commands.convert.output import ConvertPlan
from modelopt_convert.commands.convert.proof import Compared, no_proof
from modelopt_convert.commands.convert.restore import Restored
from modelopt_convert.commands.convert.way_back import Kept
from modelopt_convert.dialects.source import Source
from modelopt_convert.report.convert import ChangedTensor, Comparison, ConvertedModules, ConvertReport, LossyModule
from modelopt_convert.report.report import ModuleReport, ProofReport
from modelopt_convert.report.words import PROVEN, PROVEN_WORDS


def convert_report(
    source: Source, to: str, plan: ConvertPlan, kept: Kept, compared: Compared | None, words: str
) -> ConvertReport:
    """What a conversion did, or would do.

    Args:
        source: What was converted.
        to: The target.
        plan: What was written.
        kept: What the record keeps of the source.
        compared: What the comparison found; None where nothing was written.
        words: What is known of the source against a base.
    """
    lossy = _lossy(plan)
    by_how = [*lossy.values()]
    restored = plan.restored if isinstance(plan.restored, Restored) else None
    rest = _unequal(plan)
    rounded = _rounded(plan)
    done = compared or Compared()
    is_equal = compared is not None and not compared.failures
    dropped = [ChangedTensor(tensor=name, why=why) for name, (why, is_out) in sorted(rest.items()) if is_out]
    changed = [ChangedTensor(tensor=name, why=why) for name, why in sorted(plan.told.items())]
    changed += [ChangedTensor(tensor=name, why=why) for name, (why, is_out) in sorted(rest.items()) if not is_out]
    return ConvertReport.model_validate(
        {
            "from": source.dialect,
            "to": to,
            "family": source.found.family.name,
            "naming": source.dialect if is_nunchaku(source) else source.found.spelling,
            "prefix": source.found.prefix,
            "evidence": list(source.evidence),
            "modules": ConvertedModules(
                exact=len(source.described.modules) - len(lossy) - len(rounded),
                rounded_global=len(rounded),
                bf16=by_how.count("bf16"),
                rebased=by_how.count("rebased"),
                requantized=by_how.count("requantized"),
            ),
            "lossy": [
                LossyModule(
                    module=one.module,
                    members=list(one.members),
                    how=one.how,
                    why=one.why,
                    rel_error=one.rel_error,
                    at_most=one.is_bound,
                )
                for one in plan.lossy
            ],
            "dropped": dropped,
            "changed": changed,
            "proof": Comparison(compared=done.tensors, equal=done.equal, bytes=done.num_bytes),
            "restored": list(restored.used) if restored is not None else [],
            "restorable": not kept.lost,
            "not_restorable": list(kept.lost),
            "proven": words == PROVEN_WORDS and is_equal,
            "verifiable": no_proof(plan.settled) is None,
            "words": words,
        }
    )


def written_proof(proof: ProofReport, plan: ConvertPlan) -> ProofReport:
    """The proof of SOURCE as it holds of what is written, where that has other scales or codes.

    Args:
        proof: Of SOURCE against the base.
        plan: What is written.
    """
    lossy, rounded = _lossy(plan), _rounded(plan)
    modules = dict(proof.modules)
    for name, one in proof.modules.items():
        if name in lossy:
            modules[name] = ModuleReport(verdict=f"not proven: {lossy[name]}", reason="it was changed in writing")
        elif name in rounded and one.verdict in PROVEN:  # its tensor scale is no longer that of max calibration
            modules[name] = one.model_copy(update={"verdict": "nearest", "reason": "its weight_scale_2 was rounded"})
    told = {"modules": modules, "counts": verdict_counts(modules)}
    if any(name in modules for name in lossy):
        told |= {"status": "not proven", "words": f"not proven: {len(lossy)} modules are not written as they are"}
    return proof.model_copy(update=told)


def _lossy(plan: ConvertPlan) -> dict[str, str]:
    """What became of modules that the target cannot hold, by module."""
    return {name: one.how for one in plan.lossy for name in one.members}


def _unequal(plan: ConvertPlan) -> dict[str, tuple[str, bool]]:
    """Tensors of other modules that are not written as they are: why, and whether they are left out."""
    lossy = _lossy(plan)
    given_back = plan.restored.found.keys() if isinstance(plan.restored, Restored) else set()
    return {
        name: one for name, one in plan.announced.items() if module_of(name) not in lossy and name not in given_back
    }


def _rounded(plan: ConvertPlan) -> set[str]:
    """Modules of which a scale was rounded."""
    return {
        module_of(name)
        for name, (_, is_out) in _unequal(plan).items()
        if not is_out and not name.endswith("input_scale")
    }
