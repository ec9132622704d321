"""The small files of a build: config, card, record and index. Pure: the same bytes for the same input."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from modelopt_convert.checkpoint.companions import MODEL_INDEX, Companions
from modelopt_convert.checkpoint.record import RECORD, digest_of, write_record
from modelopt_convert.checkpoint.strict_json import json_bytes
from modelopt_convert.commands.build.card import Made, model_card, pipeline_card
from modelopt_convert.commands.build.inputs import Opened
from modelopt_convert.dialects.modelopt.dialect import INDEX_NAME
from modelopt_convert.plan.plan import BuildPlan
from modelopt_convert.report.report import ModuleReport, ProofReport, RuleReport


def small_files(
    opened: Opened, plan: BuildPlan, made: Made, proof: ProofReport, digests: Mapping[str, str]
) -> dict[str, bytes]:
    """Config, card, record and index, in the order in which they are written: the index, if any, last."""
    producer = plan.config["quantization_config"].get("producer")
    maker = f"{producer.get('name')} {producer.get('version')}" if isinstance(producer, dict) else "ModelOpt"
    card = model_card(plan, made, proof, maker)
    files = {"README.md": card.encode(), "config.json": json_bytes(plan.config)}
    index = plan.index()
    last = {INDEX_NAME: json_bytes(index)} if index is not None else {}
    more = _head(made) | {
        "sources": {role: reader.identity() for role, reader in opened.readers.items()},
        "rules": [rule.model_dump(exclude={"component"}) for rule in rules_of(opened, plan)],
        "counts": {role: counted(fates) for role, fates in fates_of(opened, plan).items()},
        "proof": proof_record(proof),
        "dequantized": list(plan.dequantized),
        **({"calibration": made.calibration, "weights": plan.weights} if made.calibration is not None else {}),
    }
    headers = ([step.output for step in plan.steps.values()], {shard.file: shard.metadata for shard in plan.shards})
    record = write_record(made.command, more, tensors=digests, files=files | last, headers=headers)
    return files | {RECORD: record} | last


def pipeline_files(
    parts: Mapping[str, bytes],
    plans: Mapping[str, BuildPlan],
    made: Made,
    companions: Companions | None,
    copied: Mapping[str, str],
) -> dict[str, bytes]:
    """Card and record above several transformers, each of which has its own, or of a whole pipeline.

    Args:
        parts: The record of each, by its folder.
        plans: What was built, by its folder.
        made: How they were asked for.
        companions: What stands beside them, of a whole pipeline.
        copied: The digest of each file that was copied, by its path.
    """
    components = list(parts)
    files = {"README.md": pipeline_card(plans, made).encode()}
    files |= {MODEL_INDEX: companions.index} if companions is not None else {}
    digests = {name: digest_of(data) for name, data in parts.items()}
    more = _head(made) | {"components": components, "parts": digests}
    more |= {"copied": dict(sorted(copied.items()))} if companions is not None else {}
    return files | {RECORD: write_record(made.command, more, tensors={}, files=files, headers=None)}


def proof_record(proof: ProofReport) -> dict[str, Any]:
    """What a record says of the proof."""
    return {
        "method": proof.method,
        "status": proof.status,
        "words": proof.words,
        "max_error": proof.max_error,
        "counts": proof.counts,
        "fused_scales_differ": sorted(proof.fused_scales_differ),
        "unlike_base": sorted([*(f"{name}.bias" for name in proof.biases_differ), *proof.unquantized_differ]),
        "modules": {name: _stable(one) for name, one in proof.modules.items()},
    }


def rules_of(opened: Opened, plan: BuildPlan) -> list[RuleReport]:
    """What each pattern did."""
    return [
        RuleReport(
            component=opened.prefix or None,
            kind=rule.kind,
            pattern=rule.pattern,
            matched=rule.matched,
            replaced=rule.replaced,
            bytes=rule.num_bytes,
        )
        for rule in plan.rules
    ]


def fates_of(opened: Opened, plan: BuildPlan) -> dict[str, dict[str, str]]:
    """The fate of every tensor of every input, under its own name."""
    ledger = {role: dict(fates) for role, fates in plan.ledger.items()}
    for role, presented in opened.presented.items():
        if role in ledger:
            ledger[role] = presented.own_fates(ledger[role])
    if opened.amax_names:
        ledger["checkpoint"] = {key: _amax_fate(scale, plan) for key, scale in opened.amax_names.items()}
    return ledger


def counted(fates: Mapping[str, str]) -> dict[str, int]:
    """How many tensors met each fate."""
    return dict(sorted(Counter(fates.values()).items()))


def _amax_fate(scale: str, plan: BuildPlan) -> str:
    module, _, role = scale.rpartition(".")
    if module not in plan.modules:
        return "unused: of a module that is not quantized"
    return "compared with the export's scale" if role in plan.modules[module].scales else "used"


def _head(made: Made) -> dict[str, Any]:
    chosen = made.chosen
    return {
        "preset": chosen
        and {
            "name": chosen.loaded.preset.name,
            "sha256": chosen.loaded.sha256,
            **({} if chosen.is_named else {"chosen_by": "config.json"}),
        },
        "base_repo": made.base_repo,
        **({"base_claimed": made.base_claimed} if made.base_claimed is not None else {}),
    }


def _stable(module: ModuleReport) -> dict[str, Any]:
    """A verdict without what could vary by machine: sums of floats depend on the order in which they are added."""
    kept: dict[str, Any] = {"verdict": module.verdict, "codes": module.codes, "codes_equal": module.codes_equal}
    if module.compared is not None:
        kept["compared"] = module.compared
    counts = ("codes_tied", "zero_signs", "scales", "scales_equal", "scales_tied", "scales_idle", "blocks_above")
    kept |= {name: count for name in counts if (count := getattr(module, name))}
    if module.relative_error is not None:
        kept["relative_error"] = round(module.relative_error, 4)
    return kept | ({"rule": module.rule} if module.rule else {})
