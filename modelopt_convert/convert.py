"""The straight line: refuse, open, plan, prove, stage, stream, check, publish. Here alone a plan meets the disk.

torch is imported inside the functions that touch tensor values, so that refusals and dry runs stay fast.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from modelopt_convert import __version__
from modelopt_convert.card import model_card
from modelopt_convert.check import check_structure, refuse_misread
from modelopt_convert.checkpoint import CheckpointReader
from modelopt_convert.components import resolve_component
from modelopt_convert.errors import CheckFailedError, InputError
from modelopt_convert.output_rules import canonical_output, check_output_allowed
from modelopt_convert.plan import INDEX_NAME, BuildPlan, Keeps
from modelopt_convert.plan_nvfp4 import plan_nvfp4
from modelopt_convert.preset import LoadedPreset, choose_preset, load_preset
from modelopt_convert.report import InputReport, ModuleReport, ProofReport, Report, RuleReport
from modelopt_convert.staging import Published, StagingDir
from modelopt_convert.stream import Layouts, Progress, stream

if TYPE_CHECKING:
    from modelopt_convert.proof import Judgement
    from modelopt_convert.prove import Proof

SMALL_FILES_BYTES = 1 << 20  # room for config, card, index and mopt.json, beside the tensors


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """What the user asked of ``build-nvfp4``.

    Attributes:
        export: The ModelOpt export: transformer folder or pipeline folder.
        base: The unquantized base, likewise.
        output: Where the new checkpoint shall stand; None for ``./<preset>-nvfp4``.
        preset: Name or path; ``none``; or None to choose by config.json.
        keep_bf16: The user's own patterns.
        max_shard_size: Largest output file, in bytes of tensors.
        max_error: Limit of the relative error where codes are not reproduced.
        overwrite: Consent to replace an existing checkpoint.
        dry_run: Plan only.
    """

    export: Path
    base: Path
    output: Path | None
    preset: str | None
    keep_bf16: tuple[str, ...]
    max_shard_size: int
    max_error: float
    overwrite: bool
    dry_run: bool


def build_nvfp4(request: BuildRequest, report: Report, progress: Progress) -> None:
    """Build a mixed BF16+NVFP4 transformer repo; what happened is in ``report``, also when this raises.

    Raises:
        MoptError: One of its kinds; nothing was published unless a StorageError says so.
    """
    named = load_preset(request.preset) if request.preset not in (None, "none") else None
    if named is not None:
        _note_preset(report, named)
    export_path = resolve_component(request.export, what="export")
    base_path = resolve_component(request.base, what="base")
    inputs = (request.export, export_path, request.base, base_path)
    if request.output is not None or named is not None:
        output = _output_path(request, named)
        report.output.path = str(output)
        check_output_allowed(output, inputs, overwrite=request.overwrite)
    with _opened(report, export_path) as export, _opened(report, base_path) as base:
        note_input(report, "export", export)
        note_input(report, "base", base)
        loaded = named
        if request.preset is None:
            loaded = _choose(export, report)
            output = _output_path(request, loaded)
            report.output.path = str(output)
            check_output_allowed(output, inputs, overwrite=request.overwrite)
        preset = loaded.preset if loaded else None
        keeps = Keeps(preset, preset.rules("nvfp4") if preset else None, request.keep_bf16)
        with timed(report, "plan"):
            plan = plan_nvfp4(export, base, keeps, max_shard_size=request.max_shard_size)
        _note_plan(report, plan, output)
        refuse_misread(plan, str(export.path))
        if request.dry_run:
            report.status = "planned"
            return
        proof = _prove(export, base, plan, request.max_error, report, progress)
        layouts = Layouts(frozenset(proof.swapped()), frozenset(proof.swizzled()))
        plan = plan.with_layouts(layouts.swapped, layouts.swizzled)
        _note_fates(report, plan)
        _note_layouts(report, plan, layouts)
        need = plan.total_bytes + SMALL_FILES_BYTES
        with StagingDir(output, inputs, overwrite=request.overwrite, need_bytes=need) as stage:
            with timed(report, "stream"):
                digests = stream(stage, plan, {"export": export, "base": base}, layouts, progress)
            for reader in (export, base):
                reader.check_unchanged()
            for name, data in _small_files(plan, loaded, report, proof, digests).items():
                stage.write_file(name, data)
            with timed(report, "check"):
                _check(stage, plan, report)
            with timed(report, "publish"):
                publish(stage, report)
    report.peak_rss_bytes = peak_rss_bytes()


def _output_path(request: BuildRequest, loaded: LoadedPreset | None) -> Path:
    if request.output is not None:
        return canonical_output(request.output)
    if loaded is None:
        raise InputError("there is no preset to name the output after", code="output.unnamed", hint="give --output")
    return canonical_output(Path(f"{loaded.preset.name}-nvfp4"))


def _choose(export: CheckpointReader, report: Report) -> LoadedPreset:
    loaded, others = choose_preset(export.config, "nvfp4")
    _note_preset(report, loaded)
    also = f"; {', '.join(others)} would give the same" if others else ""
    report.warn("preset.chosen", f"preset {loaded.preset.name} was chosen by config.json{also}")
    return loaded


def _prove(
    export: CheckpointReader,
    base: CheckpointReader,
    plan: BuildPlan,
    max_error: float,
    report: Report,
    progress: Progress,
) -> "Proof":
    from modelopt_convert.prove import METHOD, proof_bytes, prove

    progress.begin("prove", proof_bytes(plan))
    with timed(report, "prove"):
        proof = prove(export, base, plan, max_error=max_error, advance=progress.advance)
    modules = {name: _module_report(one) for name, one in proof.modules.items()}
    modules |= {name: ModuleReport(verdict="not proven: replaced", reason=why) for name, why in proof.unproven.items()}
    counts = Counter(one.verdict for one in modules.values())
    report.proof = ProofReport(
        method=METHOD,
        status="pass" if proof.passed else "fail",
        max_error=max_error,
        counts=dict(sorted(counts.items())),
        fused_scales_differ=proof.fused_differ,
        biases_differ=proof.biases_differ,
        modules=dict(sorted(modules.items())),
    )
    for group, ratio in proof.fused_differ.items():
        report.warn(
            "export.fused_scales", f"{group}: global scales differ {ratio:.3f}x; SGLang rebases them on loading"
        )
    if proof.biases_differ:
        report.warn(
            "export.biases_differ",
            f"{len(proof.biases_differ)} packed modules keep a bias unlike the base's ({proof.biases_differ[0]} first)",
        )
    if counts["within limits"]:
        report.warn(
            "proof.not_reproduced",
            f"{counts['within limits']} modules are near the base but not quantized from it as it is (QAT, --compress, "
            "a small LoRA); those kept in BF16 get the base's weights",
        )
    if not proof.passed:
        failing = proof.failing()
        first = modules[failing[0]]
        raise CheckFailedError(
            f"{export.path}: {len(failing)} of {len(modules)} packed modules are not the base's: "
            f"{', '.join(failing[:10])} (relative error {first.relative_error:.3f}, gain {first.gain:.3f}, "
            f"worst row {first.worst_row:.3f}, worst column {first.worst_column:.3f})",
            code="check.proof",
            path=str(export.path),
            hint="the export is damaged, was changed after quantization, or was made with --compress (which rounds "
            "scales twice); export again. Nothing was written",
        )
    return proof


def _module_report(one: "Judgement") -> ModuleReport:
    near = one.closeness
    return ModuleReport(
        verdict=one.verdict,
        codes=one.codes,
        codes_equal=one.codes_equal,
        relative_error=near.relative_error,
        gain=near.gain,
        worst_row=near.worst_row,
        worst_column=near.worst_column,
        reading=one.reading.in_words() or None,
    )


def _small_files(
    plan: BuildPlan, loaded: LoadedPreset | None, report: Report, proof: "Proof", digests: Mapping[str, str]
) -> dict[str, bytes]:
    """Config, card, manifest and index, in the order in which they are written: the index, if any, last."""
    producer = plan.config["quantization_config"].get("producer")
    maker = f"{producer.get('name')} {producer.get('version')}" if isinstance(producer, dict) else "ModelOpt"
    verdicts = report.proof.counts if report.proof else {}
    files = {
        "README.md": model_card(plan, loaded.preset if loaded else None, verdicts, maker).encode(),
        "config.json": json_bytes(plan.config),
    }
    index = plan.index()
    if index is not None:
        files[INDEX_NAME] = json_bytes(index)
    manifest = {
        "schema": "mopt.manifest/1",
        "tool": {"name": "mopt", "version": __version__},
        "command": report.command,
        "sources": {name: source.identity for name, source in report.inputs.items()},
        "preset": loaded and {"name": loaded.preset.name, "sha256": loaded.sha256},
        "base_repo": loaded and loaded.preset.base_repo,
        "rules": [rule.model_dump() for rule in report.rules],
        "counts": report.counts,
        "proof": {
            "method": report.proof.method if report.proof else None,
            "counts": verdicts,
            "fused_scales_differ": sorted(proof.fused_differ),
            "modules": {name: _stable(one) for name, one in report.proof.modules.items()} if report.proof else {},
        },
        "digests": {
            "algorithm": "xxh3-128",
            "tensors": dict(sorted(digests.items())),
            "files": {name: xxhash.xxh3_128_hexdigest(data) for name, data in sorted(files.items())},
        },
    }
    last = files.pop(INDEX_NAME, None)
    files["mopt.json"] = json_bytes(manifest)
    return files | ({INDEX_NAME: last} if last is not None else {})


def _stable(module: ModuleReport) -> dict[str, Any]:
    """A verdict without what could vary by machine: sums of floats depend on the order in which they are added."""
    kept: dict[str, Any] = {"verdict": module.verdict, "codes": module.codes, "codes_equal": module.codes_equal}
    if module.relative_error is not None:
        kept["relative_error"] = round(module.relative_error, 4)
    return kept


def peak_rss_bytes() -> int | None:
    """The process's own peak; ``ru_maxrss`` would begin with that of whoever started it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def json_bytes(value: Any) -> bytes:
    """JSON as it is written to disk: sorted, ASCII, the same on every machine."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=True) + "\n").encode()


def _check(stage: StagingDir, plan: BuildPlan, report: Report) -> None:
    faults = check_structure(stage.path, plan)
    report.checks.append({"name": "structure", "status": "fail" if faults else "pass", "failures": faults[:10]})
    if faults:
        raise CheckFailedError(
            f"the finished checkpoint is not the planned one: {faults[0]} ({len(faults)} faults)",
            code="check.structure",
            hint="this is a bug in mopt or a disk that lies; nothing was published",
        )


def note_input(report: Report, name: str, reader: CheckpointReader) -> None:
    """Put an opened input into the report."""
    report.inputs[name] = InputReport(
        path=str(reader.path),
        identity=reader.identity(),
        tensors=len(reader.tensors),
        bytes=reader.num_bytes,
        files=list(reader.files),
        skipped_files=list(reader.skipped),
    )


def publish(stage: StagingDir, report: Report) -> None:
    """Publish, and put into the report how; also when a signal that was held acts right after the swap."""
    try:
        stage.publish()
    finally:
        if stage.published is not None:
            _note_published(report, stage.published)


def _note_published(report: Report, published: Published) -> None:
    report.output.published = True
    report.output.method = published.method
    report.output.durable = published.durable
    for text in published.warnings:
        report.warn("output.old_not_removed", text)


def _note_preset(report: Report, loaded: LoadedPreset) -> None:
    rules = loaded.preset.nvfp4
    report.preset = {
        "name": loaded.preset.name,
        "path": loaded.path,
        "sha256": loaded.sha256,
        "status": rules.status if rules else None,
        "known_limits": rules.known_limits if rules else [],
    }


def _note_plan(report: Report, plan: BuildPlan, output: Path) -> None:
    report.rules = [
        RuleReport(
            kind=rule.kind, pattern=rule.pattern, matched=rule.matched, replaced=rule.replaced, bytes=rule.num_bytes
        )
        for rule in plan.rules
    ]
    _note_fates(report, plan)
    report.output.tensors = len(plan.steps)
    report.output.bytes = plan.total_bytes
    report.output.shards = [
        {"file": shard.file, "bytes": sum(spec.num_bytes for spec in shard.tensors)} for shard in plan.shards
    ]
    report.peak_working_bytes = plan.peak_bytes()
    report.free_bytes = shutil.disk_usage(output.parent).free
    for code, message in plan.warnings:
        report.warn(code, message)


def _opened(report: Report, path: Path) -> CheckpointReader:
    with timed(report, "open"):
        return CheckpointReader(path)


def _note_fates(report: Report, plan: BuildPlan) -> None:
    report.ledger = {name: dict(fates) for name, fates in plan.ledger.items()}
    report.counts = {name: dict(sorted(Counter(fates.values()).items())) for name, fates in plan.ledger.items()}


def _note_layouts(report: Report, plan: BuildPlan, layouts: Layouts) -> None:
    """Say what was found otherwise than ModelOpt writes it, and is put in order."""
    total = len(plan.modules)
    for found, words in (
        (layouts.swapped, "the even column in the high nibble"),
        (layouts.swizzled, "the scales in the 128x4 order"),
    ):
        if found:
            report.warn(
                "export.layout", f"{len(found)} of {total} modules have {words}; written in the canonical layout"
            )


@contextmanager
def timed(report: Report, what: str) -> Iterator[None]:
    """Add the time that a phase takes to the report."""
    begin = time.monotonic()
    try:
        yield
    finally:
        report.timings_s[what] = round(report.timings_s.get(what, 0.0) + time.monotonic() - begin, 3)
