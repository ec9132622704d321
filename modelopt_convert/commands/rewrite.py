"""``mopt swap-nibbles`` and ``mopt unswizzle-scales``: rewrite the layout of a checkpoint's packed modules.

Everything else streams through. The config keys are set to what is true then, and markers by which a loader would guess
otherwise are stripped. With a base only modules that need it are rewritten, and the result is proven.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modelopt_convert.checkpoint.header import METADATA, TensorSpec
from modelopt_convert.checkpoint.location import local_path
from modelopt_convert.checkpoint.names import natural_key
from modelopt_convert.checkpoint.pipeline import resolve_component
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.checkpoint.record import RECORD, write_record
from modelopt_convert.checkpoint.strict_json import json_bytes
from modelopt_convert.commands.build.files import counted, proof_record
from modelopt_convert.commands.build.proof import module_report, verdict_counts
from modelopt_convert.commands.build.space import LONGEST
from modelopt_convert.commands.closing import Closed, refuse_failed, structure_checked, written_faults
from modelopt_convert.commands.command import (
    Clock,
    Inputs,
    Warned,
    ending,
    output_report,
    peak_rss_bytes,
    published_warnings,
    throughput,
    versions,
    warnings_of,
)
from modelopt_convert.commands.requests import RewriteRequest
from modelopt_convert.dialects.modelopt.dialect import INDEX_NAME
from modelopt_convert.dialects.packed import is_layout_marker
from modelopt_convert.engines.sglang import FLAT_METADATA_KEYS, PACKED_QKV
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.formats.layout import BASES, Layout
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE, FORMAT
from modelopt_convert.formats.nvfp4.shapes import padded_shape
from modelopt_convert.inspection.component import inspect_component
from modelopt_convert.plan.plan import Origin, ShardPlan, Step
from modelopt_convert.report.inspect import ModuleLayout
from modelopt_convert.report.report import (
    MISMATCH_WORDS,
    NEAR_WORDS,
    PROVEN_WORDS,
    REFUTED,
    ModuleReport,
    ProofReport,
    Report,
)
from modelopt_convert.run.errors import CheckFailedError, InputError
from modelopt_convert.run.progress import Progress
from modelopt_convert.run.workers import torch_on_one_thread
from modelopt_convert.stage.directory import Published, StagingDir
from modelopt_convert.stage.output_rules import canonical_output, check_output_allowed
from modelopt_convert.stage.space import DIGEST, disk_bytes, shard_sizes
from modelopt_convert.verification.options import VerifyOptions
from modelopt_convert.write.executors import open_executor, refuse_far
from modelopt_convert.write.stream import stream

Kind = Literal["swap", "unswizzle", "swizzle"]
_FIELD: Mapping[Kind, Literal["nibble_order", "scale_layout"]] = {
    "swap": "nibble_order",
    "unswizzle": "scale_layout",
    "swizzle": "scale_layout",
}
_BASIS: Mapping[Kind, Literal["nibble_basis", "scale_basis"]] = {
    "swap": "nibble_basis",
    "unswizzle": "scale_basis",
    "swizzle": "scale_basis",
}
# What SGLang's loader needs besides the layout keys.
_KEYS = {"quant_method": "modelopt", "quant_algo": FORMAT.quant_algo, "group_size": BLOCK_SIZE, "ignore": []}
_WANTED: Mapping[Kind, str] = {"swap": "low", "unswizzle": "linear", "swizzle": "128x4"}


@dataclass(frozen=True, slots=True)
class RewritePlan:
    """What the rewrite will do; the parts that streaming needs."""

    steps: Mapping[str, Step]
    shards: tuple[ShardPlan, ...]
    fates: Mapping[str, str]


class RewriteCommand:
    """Rewrite the layout of a checkpoint."""

    def __init__(self, request: RewriteRequest) -> None:
        """Do nothing yet."""
        self._request = request
        self._kind: Kind = request.kind
        self._clock = Clock()
        self._inputs = Inputs()
        self._output = str(Path(request.output))
        self._plan: RewritePlan | None = None
        self._warned: list[Warned] = []
        self._checks: list[dict[str, Any]] = []
        self._proof: ProofReport | None = None
        self._evidence: dict[str, str] = {}
        self._published: Published | None = None
        self._peak: int | None = None

    def run(self, progress: Progress) -> None:
        """Rewrite.

        Raises:
            MoptError: One of its kinds; nothing was published unless a StorageError says so.
        """
        request = self._request
        source, base = request.locate("source"), request.locate("base")
        assert source is not None  # the request requires it
        refuse_far(request.executor, source)
        source_path = source if source.is_file() else resolve_component(source, what="source")
        base_path = resolve_component(base, what="base") if base else None
        output = canonical_output(Path(request.output))
        self._output = str(output)
        folder = source_path.parent if source_path.is_file() else source_path
        named = (source if source.is_dir() else folder, folder, base, base_path)
        inputs = [path for path in map(local_path, named) if path is not None]
        check_output_allowed(output, inputs, overwrite=request.overwrite)
        with ExitStack() as stack:
            executor = stack.enter_context(open_executor(request.executor))
            stack.enter_context(self._inputs)
            with self._clock.timed("open"):
                reader = self._inputs.open("source", source_path)
            _refuse_names(reader, request)
            stage: StagingDir | None = None
            if not request.dry_run:
                # Before tensors are read: if another run holds OUT, that is said first. What fits is known after that.
                stage = stack.enter_context(StagingDir(output, inputs, overwrite=request.overwrite, need_bytes=0))
            with self._clock.timed("open"):
                against = self._inputs.open("base", base_path) if base_path is not None else None
            with self._clock.timed("inspect"):
                modules = self._look(reader, against)
                self._evidence = {name: getattr(one, _BASIS[self._kind]) for name, one in modules.items()}
            chosen = _choose(modules, self._kind, reader, against)
            plan = self._plan = _plan(reader, modules, chosen, self._kind)
            if against is None:
                message = f"{len(chosen)} modules are rewritten as told; without --base nothing proves they needed it"
                self._warned.append(("layout.unproven", message + _against(modules, chosen, self._kind)))
            if stage is None:
                return
            stage.check_space(self._disk_bytes(reader, plan, list(modules) if against is not None else None))
            with self._clock.timed("stream"), torch_on_one_thread():
                readers: dict[Origin, CheckpointReader] = {"export": reader}
                done = stream(stage, plan, readers, progress, workers=request.worker_count, executor=executor)
            reader.check_unchanged()
            files = _config_and_index(reader, plan, self._kind, proven=against is not None)
            for name, data in files.items():
                stage.write_file(name, data)
            with self._clock.timed("check"):
                self._close(stage.path, plan, against)
            stage.write_file(RECORD, self._record(plan, files, done.digests, self._proof))
            with self._clock.timed("publish"):
                try:
                    stage.publish()
                finally:  # also when a signal that was held acts right after the swap
                    self._published = stage.published
                    self._warned += published_warnings(stage.published)
        self._peak = peak_rss_bytes()

    def report(self, error: BaseException | None = None) -> Report:
        """What happened, also after a failure."""
        plan = self._plan
        shards = {shard.file: shard.tensors for shard in plan.shards} if plan else {}
        return Report(
            command=self._request.command,
            inputs=self._inputs.reports(),
            network=self._inputs.network(),
            output=output_report(self._output, shards, self._published, error),
            ledger={"source": dict(plan.fates)} if plan else {},
            counts={"source": counted(plan.fates)} if plan else {},
            proof=self._proof,
            evidence=self._evidence,
            checks=self._checks,
            peak_rss_bytes=self._peak,
            throughput_bytes_per_s=throughput(self._clock, [plan]) if plan and self._peak is not None else None,
            timings_s=self._clock.seconds,
            warnings=warnings_of(self._warned),
            versions=versions(),
            **ending(error, "planned" if self._request.dry_run else "ok"),
        )

    def _look(self, reader: CheckpointReader, base: CheckpointReader | None) -> dict[str, ModuleLayout]:
        found = inspect_component(reader, base, every_scale=False, max_error=self._request.max_error)
        return {name: one for name, one in found.modules.items() if one.algorithm == FORMAT.quant_algo}

    def _close(self, stage: Path, plan: RewritePlan, base: CheckpointReader | None) -> None:
        """Reopen what was written; with a base, prove all of it.

        Raises:
            CheckFailedError: ``check.structure`` or ``check.proof``.
        """
        with CheckpointReader(stage, need_config=False) as written:
            self._keep(structure_checked(written_faults(written, plan.steps, plan.shards)))
            if base is None:
                return
            field, wanted = _FIELD[self._kind], _WANTED[self._kind]
            wrong = [
                f"{name} is not {wanted} against the base"
                for name, one in self._look(written, base).items()
                if getattr(one, field) not in (wanted, "equivalent")
            ]
            self._proof = proof = _proven(written, base, self._request)
        wrong += [f"{name} is not the base's" for name, one in proof.modules.items() if one.verdict in REFUTED]
        near = [name for name, one in proof.modules.items() if one.verdict == "near"]
        check = {"name": "proof", "status": "fail" if wrong else "pass", "failures": wrong[:10]}
        self._keep(Closed(check, f"{len(wrong)} rewritten modules are wrong: {wrong[0]} first" if wrong else None))
        if near and not self._request.accept_near:
            raise CheckFailedError(
                f"{self._output}: {len(near)} of {len(proof.modules)} modules are near the base, and not quantized "
                f"from it as it is ({near[0]} first)",
                code="check.proof",
                path=self._output,
                hint="give the base that was quantized, or --accept-near to write what is not proven; nothing was "
                "published",
            )
        if differ := proof.unquantized_differ:
            told = f"recorded as not proven: {len(differ)} other tensors are not the base's; {differ[0]} first"
            self._warned.append(("layout.not_the_base", told))

    def _keep(self, closed: Closed) -> None:
        self._checks.append(closed.check)
        refuse_failed(closed)

    def _record(
        self, plan: RewritePlan, files: Mapping[str, bytes], digests: Mapping[str, str], proof: ProofReport | None
    ) -> bytes:
        more: dict[str, Any] = {
            "sources": {name: reader.identity() for name, reader in self._inputs.readers.items()},
            "counts": {"source": counted(plan.fates)},
        }
        more |= {"proof": proof_record(proof)} if proof is not None else {}
        headers = ([step.output for step in plan.steps.values()], [shard.metadata for shard in plan.shards])
        return write_record(self._request.command, more, tensors=digests, files=files, headers=headers)

    def _disk_bytes(self, reader: CheckpointReader, plan: RewritePlan, proven: list[str] | None) -> int:
        files = _config_and_index(reader, plan, self._kind, proven=proven is not None)
        proof = None
        if proven is not None:
            longest = dict.fromkeys(proven, LONGEST)
            proof = _proof_report(longest, self._request.max_error, "x" * 120, differ=["x"])
        record = self._record(plan, files, dict.fromkeys(plan.steps, DIGEST), proof)
        return disk_bytes([*shard_sizes(plan.shards), len(record), *map(len, files.values())])


def _proven(reader: CheckpointReader, base: CheckpointReader, request: RewriteRequest) -> ProofReport:
    """Prove every byte of every packed module, and every other tensor, as ``verify`` does."""
    import torch

    from modelopt_convert.proof.judgement import format_proof
    from modelopt_convert.verification.levels.decode import judge_modules, unlike_base
    from modelopt_convert.verification.subject import find_subject

    subject, limit = find_subject(reader, base), request.max_error
    options = VerifyOptions(workers=request.worker_count)
    with torch.inference_mode():
        found, unreadable = judge_modules(subject, base, options, limit, lambda _: None)
    unlike, like = unlike_base(subject, base, limit, options.workers, lambda _: None)
    modules = {name: module_report(one) for name, one in found.items()}
    modules |= {name: ModuleReport(verdict="mismatch", reason=why) for name, why in unreadable.items()}
    return _proof_report(modules, limit, format_proof(FORMAT.algorithm).method, differ=[*unlike, *like])


def _proof_report(
    modules: Mapping[str, ModuleReport], max_error: float, method: str, *, differ: list[str]
) -> ProofReport:
    failing = any(one.verdict in REFUTED for one in modules.values())
    near = bool(differ) or any(one.verdict == "near" for one in modules.values())
    return ProofReport(
        method=method,
        status="fail" if failing else "not proven" if near else "pass",
        words=MISMATCH_WORDS if failing else NEAR_WORDS if near else PROVEN_WORDS,
        max_error=max_error,
        counts=verdict_counts(modules),
        fused_scales_differ={},
        biases_differ=[],
        unquantized_differ=differ,
        modules=dict(sorted(modules.items())),
    )


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


def _choose(
    modules: Mapping[str, ModuleLayout], kind: Kind, reader: CheckpointReader, base: CheckpointReader | None
) -> frozenset[str]:
    """The modules that need the rewrite."""
    where, field, wanted = str(reader.path), _FIELD[kind], _WANTED[kind]
    if not modules:
        raise InputError(
            f"{where}: expected NVFP4 modules (U8 weights with E4M3 scales), found none",
            code="layout.nothing_packed",
            path=where,
            hint="`mopt inspect` says what this is",
        )
    answers = {name: getattr(one, field) for name, one in modules.items()}
    if base is not None:
        told = {name for name, one in modules.items() if _is_weight(base, name, one.shape)}
        unclear = [name for name, answer in answers.items() if answer == "undetermined" or name not in told]
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
        known = {name for name, one in modules.items() if one.scale_basis == "shape" and kind != "swap"}
        chosen = {name for name in modules if name not in known or answers[name] != wanted}
    if kind != "swap":
        chosen = {name for name in chosen if _can(reader, modules[name], name, kind)}
    if not chosen:
        raise CheckFailedError(
            f"{where}: already in order: all {len(modules)} packed modules are {wanted}",
            code="check.already_in_order",
            path=where,
            hint="use it as it is. Nothing was written",
        )
    return frozenset(chosen)


def _against(modules: Mapping[str, ModuleLayout], chosen: frozenset[str], kind: Kind) -> str:
    """The best evidence that modules do not need the rewrite, in words; empty if there is none."""
    right = [modules[name] for name in chosen if getattr(modules[name], _FIELD[kind]) == _WANTED[kind]]
    if not right:
        return ""
    best = max((getattr(one, _BASIS[kind]) for one in right), key=BASES.index)
    words = {"hint": "by what their scales hint at", "declared": "by what config.json declares"}
    return f"; {len(right)} of them are {_WANTED[kind]} already, {words.get(best, f'by {best}')}"


def _is_weight(base: CheckpointReader, name: str, shape: list[int]) -> bool:
    """Whether the base has a module's weight, in this shape and in a dtype that can be compared."""
    info = base.tensors.get(f"{name}.weight")
    return info is not None and list(info.shape) == shape and info.dtype in HALF_AND_FLOAT


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
                for key, value in sorted(({**METADATA} | reader.metadata[file]).items())
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


def _config_and_index(reader: CheckpointReader, plan: RewritePlan, kind: Kind, *, proven: bool) -> dict[str, bytes]:
    """config.json, if the source had one, and the index of several shards, last."""
    config = _output_config(reader.config, kind, proven=proven)
    files = {"config.json": json_bytes(config)} if config is not None else {}
    if len(plan.shards) > 1:
        weight_map = {spec.name: shard.file for shard in plan.shards for spec in shard.tensors}
        total = {"total_size": sum(step.output.num_bytes for step in plan.steps.values())}
        files[INDEX_NAME] = json_bytes({"metadata": total, "weight_map": dict(sorted(weight_map.items()))})
    return files
