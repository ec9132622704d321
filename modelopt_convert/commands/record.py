"""The small files of an output: config, card, manifest and index. Pure: the same bytes for the same input."""

from collections.abc import Mapping
from typing import Any

import xxhash

from modelopt_convert import __version__
from modelopt_convert.checkpoint.digests import headers_digest
from modelopt_convert.checkpoint.strict_json import json_bytes
from modelopt_convert.commands.build.card import model_card, pipeline_card
from modelopt_convert.commands.build.inputs import Opened
from modelopt_convert.dialects.modelopt.dialect import INDEX_NAME
from modelopt_convert.plan.plan import BuildPlan
from modelopt_convert.preset.preset import ChosenPreset
from modelopt_convert.report.report import ModuleReport, ProofReport, Report

_SCHEMA = "mopt.manifest/1"


def small_files(
    opened: Opened,
    plan: BuildPlan,
    chosen: ChosenPreset | None,
    report: Report,
    proof: ProofReport,
    digests: Mapping[str, str],
) -> dict[str, bytes]:
    """Config, card, manifest and index, in the order in which they are written: the index, if any, last."""
    producer = plan.config["quantization_config"].get("producer")
    maker = f"{producer.get('name')} {producer.get('version')}" if isinstance(producer, dict) else "ModelOpt"
    card = model_card(plan, chosen, proof, maker, report.command)
    files = {"README.md": card.encode(), "config.json": json_bytes(plan.config)}
    index = plan.index()
    if index is not None:
        files[INDEX_NAME] = json_bytes(index)
    prefix = opened.prefix
    manifest = _head(report, chosen) | {
        "sources": {role: report.inputs[f"{prefix}{role}"].identity for role in opened.readers},
        "rules": [
            rule.model_dump(exclude={"component"}) for rule in report.rules if rule.component == (prefix or None)
        ],
        "counts": {name: report.counts[f"{prefix}{name}"] for name in (*plan.ledger, *_checkpoint(opened))},
        "proof": {
            "method": proof.method,
            "status": proof.status,
            "counts": proof.counts,
            "fused_scales_differ": sorted(proof.fused_scales_differ),
            "modules": {name: _stable(one) for name, one in proof.modules.items()},
        },
        "dequantized": list(plan.dequantized),
        **({"calibration": report.calibration} if report.calibration is not None else {}),
        "digests": {
            "algorithm": "xxh3-128",
            "tensors": dict(sorted(digests.items())),
            "files": _digests(files),
            "headers": headers_digest(
                (step.output for step in plan.steps.values()), (shard.metadata for shard in plan.shards)
            ),
        },
    }
    last = files.pop(INDEX_NAME, None)
    files["mopt.json"] = json_bytes(manifest)
    return files | ({INDEX_NAME: last} if last is not None else {})


def pipeline_files(parts: Mapping[str, bytes], chosen: ChosenPreset | None, report: Report) -> dict[str, bytes]:
    """Card and manifest above several transformers, each of which has its own.

    Args:
        parts: The manifest of each, by its folder.
        chosen: The preset they were built with, if any.
        report: Of the run.
    """
    components = list(parts)
    files = {"README.md": pipeline_card(components, chosen, report.command, report.calibration).encode()}
    manifest = _head(report, chosen) | {
        "components": components,
        "parts": {name: xxhash.xxh3_128_hexdigest(data) for name, data in parts.items()},
        "digests": {"algorithm": "xxh3-128", "tensors": {}, "files": _digests(files)},
    }
    return files | {"mopt.json": json_bytes(manifest)}


def _head(report: Report, chosen: ChosenPreset | None) -> dict[str, Any]:
    return {
        "schema": _SCHEMA,
        "tool": {"name": "mopt", "version": __version__},
        "command": report.command,
        "preset": chosen and {"name": chosen.loaded.preset.name, "sha256": chosen.loaded.sha256},
        "base_repo": chosen and chosen.base_repo,
    }


def _checkpoint(opened: Opened) -> list[str]:
    return ["checkpoint"] if opened.amax_names else []


def _digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: xxhash.xxh3_128_hexdigest(data) for name, data in sorted(files.items())}


def _stable(module: ModuleReport) -> dict[str, Any]:
    """A verdict without what could vary by machine: sums of floats depend on the order in which they are added."""
    kept: dict[str, Any] = {"verdict": module.verdict, "codes": module.codes, "codes_equal": module.codes_equal}
    if module.relative_error is not None:
        kept["relative_error"] = round(module.relative_error, 4)
    return kept | ({"rule": module.rule} if module.rule else {})
