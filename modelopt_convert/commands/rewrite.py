"""``mopt swap-nibbles`` and ``mopt unswizzle-scales``: rewrite the layout of a checkpoint's packed modules.

Everything else streams through. The config keys are set to what is true then, and markers by which a loader would guess
otherwise are stripped. With a base only modules that need it are rewritten, and the result is proven.
"""

import contextlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from modelopt_convert import __version__
from modelopt_convert.checkpoint.components import resolve_component
from modelopt_convert.checkpoint.header import TensorSpec
from modelopt_convert.checkpoint.location import Location, local_path
from modelopt_convert.checkpoint.names import natural_key
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.checkpoint.strict_json import json_bytes
from modelopt_convert.commands.accounting import note_cost, note_input, publish, timed, traffic_noted
from modelopt_convert.dialects.modelopt.dialect import INDEX_NAME
from modelopt_convert.dialects.packed import is_layout_marker
from modelopt_convert.engines.sglang import FLAT_METADATA_KEYS, PACKED_QKV
from modelopt_convert.formats.layout import Layout
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.formats.nvfp4.shapes import padded_shape
from modelopt_convert.plan.plan import ShardPlan, Step
from modelopt_convert.report.inspect import InspectReport, ModuleLayout
from modelopt_convert.report.report import Report
from modelopt_convert.run.errors import CheckFailedError, InputError
from modelopt_convert.run.progress import Progress
from modelopt_convert.run.workers import torch_on_one_thread
from modelopt_convert.stage.directory import StagingDir
from modelopt_convert.stage.output_rules import canonical_output, check_output_allowed
from modelopt_convert.stage.space import DIGEST, disk_bytes, shard_sizes
from modelopt_convert.write.executors import ExecutorName, open_executor, refuse_far
from modelopt_convert.write.stream import stream

Kind = Literal["swap", "unswizzle", "swizzle"]
_FIELD: Mapping[Kind, Literal["nibble_order", "scale_layout"]] = {
    "swap": "nibble_order",
    "unswizzle": "scale_layout",
    "swizzle": "scale_layout",
}
# What SGLang's loader needs besides the layout keys.
_KEYS = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": BLOCK_SIZE, "ignore": []}
_WANTED: Mapping[Kind, str] = {"swap": "low", "unswizzle": "linear", "swizzle": "128x4"}


@dataclass(frozen=True, slots=True)
class RewriteRequest:
    """What the user asked for.

    Attributes:
        source: A transformer folder, or one .safetensors file.
        output: The folder to be written.
        base: The unquantized base, or None to do as told without proof.
        kind: Which rewrite.
        force_names: Rewrite although a loader guesses the old layout from the names.
        max_error: Largest relative error of a reading that is accepted without reproducing the codes.
        overwrite: Consent to replace an existing checkpoint.
        dry_run: Plan only.
        workers: Tensors that are worked on at a time.
        executor: Where shards are written.
    """

    source: Location
    output: Path
    base: Location | None
    kind: Kind
    force_names: bool
    max_error: float
    overwrite: bool
    dry_run: bool
    workers: int
    executor: ExecutorName


@dataclass(frozen=True, slots=True)
class RewritePlan:
    """What the rewrite will do; the parts that streaming needs."""

    steps: Mapping[str, Step]
    shards: tuple[ShardPlan, ...]
    fates: Mapping[str, str]

    @property
    def total_bytes(self) -> int:
        """Tensor bytes of the output."""
        return sum(step.output.num_bytes for step in self.steps.values())


def rewrite(request: RewriteRequest, report: Report, progress: Progress) -> None:
    """Rewrite the layout; what happened is in ``report``, also when this raises.

    Raises:
        MoptError: One of its kinds; nothing was published unless a StorageError says so.
    """
    refuse_far(request.executor, request.source)
    source_path = request.source if request.source.is_file() else resolve_component(request.source, what="source")
    base_path = resolve_component(request.base, what="base") if request.base else None
    output = canonical_output(request.output)
    report.output.path = str(output)
    folder = source_path.parent if source_path.is_file() else source_path
    named = (request.source if request.source.is_dir() else folder, folder, request.base, base_path)
    inputs = [path for path in map(local_path, named) if path is not None]
    check_output_allowed(output, inputs, overwrite=request.overwrite)
    with contextlib.ExitStack() as stack:
        executor = stack.enter_context(open_executor(request.executor))
        with timed(report, "open"):
            reader = stack.enter_context(CheckpointReader(source_path))
        note_input(report, "source", reader)
        stack.enter_context(traffic_noted(report, "source", reader))
        _refuse_names(reader, request)
        stage: StagingDir | None = None
        if not request.dry_run:
            # Before tensors are read: if another run holds OUT, that is said first. What fits is known after that.
            stage = stack.enter_context(StagingDir(output, inputs, overwrite=request.overwrite, need_bytes=0))
        with timed(report, "inspect"):
            modules = _look(source_path, base_path, request.max_error)
        chosen = _choose(modules, request, reader)
        plan = _plan(reader, modules, chosen, request.kind)
        _note(report, plan, chosen, proven=base_path is not None)
        if stage is None:
            report.status = "planned"
            return
        stage.check_space(_disk_bytes(reader, plan, request.kind, report, proven=base_path is not None))
        with timed(report, "stream"), torch_on_one_thread():
            digests = stream(
                stage,
                plan,
                {"export": reader},
                progress,
                workers=request.workers,
                executor=executor,
            ).digests
        reader.check_unchanged()
        files = _small_files(reader, plan, request.kind, report, digests, proven=base_path is not None)
        for name, data in files.items():
            stage.write_file(name, data)
        with timed(report, "check"):
            _check(stage.path, plan, base_path, request, report)
        with timed(report, "publish"):
            publish(stage, report)
    note_cost(report)


def _look(source: Location, base: Location | None, max_error: float) -> dict[str, ModuleLayout]:
    from modelopt_convert.commands.inspect import inspect

    found = InspectReport()
    inspect(source, base, found, every_scale=False, max_error=max_error)
    return {name: one for name, one in found.modules.items() if one.algorithm == "NVFP4"}


def _refuse_names(reader: CheckpointReader, request: RewriteRequest) -> None:
    named = next((name for name in reader.tensors if PACKED_QKV.match(name)), None)
    if named is None or request.force_names or request.kind == "swizzle":
        return
    raise InputError(
        f"{reader.path}: SGLang already reads this file right; rewritten under these names ({named!r}) it would not",
        code="layout.names_decide",
        path=str(reader.path),
        hint="serve it as it is; --force-names rewrites it all the same, for a loader that does not guess from names",
    )


def _choose(modules: Mapping[str, ModuleLayout], request: RewriteRequest, reader: CheckpointReader) -> frozenset[str]:
    """The modules that need the rewrite."""
    where, field, wanted = str(reader.path), _FIELD[request.kind], _WANTED[request.kind]
    if not modules:
        raise InputError(
            f"{where}: expected NVFP4 modules (U8 weights with E4M3 scales), found none",
            code="layout.nothing_packed",
            path=where,
            hint="`mopt inspect` says what this is",
        )
    answers = {name: getattr(one, field) for name, one in modules.items()}
    if request.base is not None:
        unclear = [name for name, answer in answers.items() if answer == "undetermined"]
        if unclear:
            raise InputError(
                f"{where}: the base does not tell the layout of {len(unclear)} of {len(modules)} modules "
                f"({unclear[0]} first)",
                code="layout.undetermined",
                path=where,
                hint="give the base that the checkpoint was made from; without --base it is done as told, unproven",
            )
        chosen = {name for name, answer in answers.items() if answer not in (wanted, "equivalent")}
    else:
        # The shape of the scales is evidence too; a guess is not.
        known = {name for name, one in modules.items() if one.scale_basis == "shape" and request.kind != "swap"}
        chosen = {name for name in modules if name not in known or answers[name] != wanted}
    if request.kind != "swap":
        chosen = {name for name in chosen if _can(reader, modules[name], name, request.kind)}
    if not chosen:
        raise CheckFailedError(
            f"{where}: already in order: all {len(modules)} packed modules are {wanted}",
            code="check.already_in_order",
            path=where,
            hint="use it as it is. Nothing was written",
        )
    return frozenset(chosen)


def _can(reader: CheckpointReader, module: ModuleLayout, name: str, kind: Kind) -> bool:
    """Whether the shape of the stored scales allows the rewrite at all.

    Raises:
        InputError: The shape is none that the order to be undone has.
    """
    rows, columns = module.shape[0], module.shape[1] // BLOCK_SIZE
    info = reader.tensors[f"{name}.weight_scale"]
    linear = info.shape == (rows, columns)
    size = padded_shape(rows, columns)
    if kind == "swizzle":
        return linear
    if not linear or size == (rows, columns):
        return True
    raise InputError(
        f"{reader.path / info.file}: tensor {info.name!r}: expected {list(size)} as 128x4 scales have, "
        f"found {list(info.shape)}",
        code="layout.shape",
        path=str(reader.path / info.file),
        hint="scales of this shape are row-major; `mopt inspect --base` proves it",
    )


def _plan(
    reader: CheckpointReader, modules: Mapping[str, ModuleLayout], chosen: frozenset[str], kind: Kind
) -> RewritePlan:
    steps: dict[str, Step] = {}
    fates: dict[str, str] = {}
    for name, info in reader.tensors.items():
        if is_layout_marker(name):
            fates[name] = "dropped: layout marker that would be wrong"
            continue
        module = name.rpartition(".")[0]
        shape: tuple[int, ...] = info.shape
        step = Step(TensorSpec(name, info.dtype, shape), "export", "copy")
        fates[name] = "kept"
        if module in chosen:
            rows, columns = modules[module].shape
            if name.endswith(".weight"):
                cut = kind == "unswizzle" and shape != (rows, columns // 2)
                if kind == "swap":
                    step, fates[name] = (
                        Step(TensorSpec(name, "U8", shape), "export", "repack", layout=Layout(nibbles="high")),
                        "rewritten: nibbles swapped",
                    )
                elif cut:
                    spec = TensorSpec(name, "U8", (rows, columns // 2))
                    step, fates[name] = Step(spec, "export", "repack"), "rewritten: padding cut"
            elif name.endswith(".weight_scale") and kind == "unswizzle":
                spec = TensorSpec(name, info.dtype, (rows, columns // BLOCK_SIZE))
                step, fates[name] = (
                    Step(spec, "export", "reorder_scales", layout=Layout(scales="128x4")),
                    "rewritten: 128x4 to row-major",
                )
            elif name.endswith(".weight_scale") and kind == "swizzle":
                spec = TensorSpec(name, info.dtype, padded_shape(rows, columns // BLOCK_SIZE))
                step, fates[name] = Step(spec, "export", "swizzle_scales"), "rewritten: row-major to 128x4"
        steps[name] = step
    shards = tuple(
        ShardPlan(
            file,
            tuple(step.output for name, step in steps.items() if reader.tensors[name].file == file),
            {
                key: value
                for key, value in sorted(({"format": "pt"} | reader.metadata[file]).items())
                if key not in FLAT_METADATA_KEYS
            },
        )
        for file in reader.files
    )
    return RewritePlan(dict(sorted(steps.items(), key=lambda item: natural_key(item[0]))), shards, fates)


def _output_config(config: Mapping[str, Any], kind: Kind, *, proven: bool) -> dict[str, Any] | None:
    """config.json with the keys set to what is true now; None if the source had none."""
    if not config:
        return None
    found = config.get("quantization_config")
    keys = dict(found) if isinstance(found, dict) else dict(_KEYS)
    if kind == "swap":
        # Proven, the low nibble is first now. Else a declared order is turned round, and where nothing was declared
        # the user has said that the order was the other one.
        keys["swap_weight_nibbles"] = not proven and keys.get("swap_weight_nibbles") is False
    else:
        keys["checkpoint_weight_scale_layout"] = "linear" if kind == "unswizzle" else "swizzled"
    return {**config, "quantization_config": keys}


def _small_files(
    reader: CheckpointReader, plan: RewritePlan, kind: Kind, report: Report, digests: Mapping[str, str], *, proven: bool
) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    config = _output_config(reader.config, kind, proven=proven)
    if config is not None:
        files["config.json"] = json_bytes(config)
    index: bytes | None = None
    if len(plan.shards) > 1:
        weight_map = {spec.name: shard.file for shard in plan.shards for spec in shard.tensors}
        total = {"total_size": plan.total_bytes}
        index = json_bytes({"metadata": total, "weight_map": dict(sorted(weight_map.items()))})
    named = files | ({INDEX_NAME: index} if index is not None else {})
    manifest = {
        "schema": "mopt.manifest/1",
        "tool": {"name": "mopt", "version": __version__},
        "command": report.command,
        "sources": {name: source.identity for name, source in report.inputs.items()},
        "counts": report.counts,
        "digests": {
            "algorithm": "xxh3-128",
            "tensors": dict(sorted(digests.items())),
            "files": {name: xxhash.xxh3_128_hexdigest(data) for name, data in sorted(named.items())},
        },
    }
    files["mopt.json"] = json_bytes(manifest)
    return files | ({INDEX_NAME: index} if index is not None else {})


def _disk_bytes(reader: CheckpointReader, plan: RewritePlan, kind: Kind, report: Report, *, proven: bool) -> int:
    files = _small_files(reader, plan, kind, report, dict.fromkeys(plan.steps, DIGEST), proven=proven)
    return disk_bytes([*shard_sizes(plan.shards), *(len(data) for data in files.values())])


def _check(stage: Path, plan: RewritePlan, base: Location | None, request: RewriteRequest, report: Report) -> None:
    """Reopen what was written; with a base, prove it."""
    with CheckpointReader(stage, need_config=False) as written:
        found = {name: (info.dtype, info.shape) for name, info in written.tensors.items()}
    planned = {name: (step.output.dtype, step.output.shape) for name, step in plan.steps.items()}
    report.checks.append({"name": "structure", "status": "pass" if found == planned else "fail", "failures": []})
    if found != planned:
        raise CheckFailedError("the finished checkpoint is not the planned one", code="check.structure")
    if base is None:
        return
    modules = _look(stage, base, request.max_error)
    field, wanted = _FIELD[request.kind], _WANTED[request.kind]
    wrong = [name for name, one in modules.items() if getattr(one, field) not in (wanted, "equivalent")]
    report.checks.append({"name": "proof", "status": "fail" if wrong else "pass", "failures": wrong[:10]})
    if wrong:
        raise CheckFailedError(
            f"{len(wrong)} rewritten modules are not {wanted} against the base ({wrong[0]} first)",
            code="check.proof",
            hint="this is a bug in mopt; nothing was published",
        )


def _note(report: Report, plan: RewritePlan, chosen: frozenset[str], *, proven: bool) -> None:
    report.ledger = {"source": dict(plan.fates)}
    report.counts = {"source": dict(sorted(Counter(plan.fates.values()).items()))}
    report.output.tensors = len(plan.steps)
    report.output.bytes = plan.total_bytes
    report.output.shards = [
        {"file": shard.file, "bytes": sum(spec.num_bytes for spec in shard.tensors)} for shard in plan.shards
    ]
    if not proven:
        report.warn(
            "layout.unproven",
            f"{len(chosen)} modules are rewritten as told; without --base nothing proves they needed it",
        )
