"""``mopt swap-nibbles`` and ``mopt unswizzle-scales``: rewrite the layout of a checkpoint's packed modules.

Everything else streams through. The config keys are set to what is true then, and markers by which a loader would guess
otherwise are stripped. With a base only modules that need it are rewritten, and the result is proven.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelopt_convert.checkpoint.location import local_path
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.pipeline import resolve_component
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.checkpoint.record import RECORD, write_record
from modelopt_convert.commands.beside import present_transformer
from modelopt_convert.commands.build.files import counted, proof_record
from modelopt_convert.commands.build.space import CONTENT_BYTES, LONGEST
from modelopt_convert.commands.closing import Closed, opened_stage, refuse_failed, structure_checked, written_faults
from modelopt_convert.commands.command import (
    Clock,
    Inputs,
    Warned,
    ending,
    foreign_warnings,
    not_finite_warnings,
    output_report,
    peak_rss_bytes,
    published_warnings,
    throughput,
    versions,
    warnings_of,
)
from modelopt_convert.commands.requests import RewriteRequest
from modelopt_convert.commands.rewrite.plan import (
    BASIS,
    Kind,
    RewritePlan,
    add_parts,
    against_words,
    choose,
    config_and_index,
    has_input_scales,
    plan_rewrite,
    proven_answers,
    refuse_names,
    scale_faults,
)
from modelopt_convert.commands.rewrite.proof import (
    REWRITE,
    compare_bases,
    compare_configs,
    prove_rewritten,
    proven_layouts,
    refuse_unproven,
    rewritten_report,
)
from modelopt_convert.dialects.presented import present_under_names_of
from modelopt_convert.formats.nvfp4.format import FORMAT
from modelopt_convert.inspection.component import inspect_component
from modelopt_convert.plan.inputs import check_roles
from modelopt_convert.plan.plan import Origin
from modelopt_convert.report.inspect import ModuleLayout
from modelopt_convert.report.report import ProofReport, Report
from modelopt_convert.run.errors import CheckFailedError, Faults, kinds
from modelopt_convert.run.progress import Progress
from modelopt_convert.stage.directory import Published, StagingDir
from modelopt_convert.stage.output_rules import canonical_output, check_output_allowed
from modelopt_convert.stage.space import DIGEST, disk_bytes, shard_sizes
from modelopt_convert.write.executors import open_executor, refuse_far
from modelopt_convert.write.stream import stream


class RewriteCommand:
    """Rewrite the layout of a checkpoint."""

    def __init__(self, request: RewriteRequest) -> None:
        """Do nothing yet."""
        self._request = request
        self._kind: Kind = request.kind
        self._clock = Clock()
        self._inputs = Inputs(variant=request.variant, variant_of_base=request.base is not None)
        self._output = str(Path(request.output))
        self._plan: RewritePlan | None = None
        self._beside: dict[str, str] = {}
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
        named = (source, source_path, base, base_path)
        inputs = [path for path in map(local_path, named) if path is not None]
        standing = check_output_allowed(output, inputs, **request.consent)
        with ExitStack() as stack:
            executor = stack.enter_context(open_executor(request.executor))
            stack.enter_context(self._inputs)
            with self._clock.timed("open"):
                reader = self._inputs.open("source", source_path)
                self._beside, warned = present_transformer(reader)
                self._warned += warned
            refuse_names(reader, request)
            stage: StagingDir | None = None
            if not request.dry_run:
                # Before tensors are read: if another run holds OUT, that is said first. What fits is known after that.
                stage = stack.enter_context(StagingDir(output, inputs, **request.consent, need_bytes=0, copies=()))
            with self._clock.timed("open"):
                against = self._inputs.open("base", base_path, is_base=True) if base_path is not None else None
            check_roles(reader, against)
            if against is not None:
                present_under_names_of(against, reader)
                self._warned += compare_configs(reader, against)
            faults = Faults()
            with self._clock.timed("inspect"):
                modules = self._look(reader, against, faults)
                self._evidence = {name: getattr(one, BASIS[self._kind]) for name, one in modules.items()}
            try:
                chosen = choose(modules, self._kind, reader, against, faults)
            except CheckFailedError:  # what is in order and was never calibrated is not to be used as it is
                for name, fault in scale_faults(reader, against, needs_inputs=True) if against is not None else ():
                    faults.add(name, fault)
                faults.refuse()
                raise
            if faults and against is not None and not request.dry_run:
                # What would be refused once it is written is told with what is known now.
                with self._clock.timed("inspect"), faults.taken():
                    found = prove_rewritten(reader, against, request, Faults()).but_for(faults.names)
                    found = replace(found, misdeclared=[])  # which is what shall be mended
                    refuse_unproven(found, str(source_path), REWRITE, accept_near=request.accept_near)
            faults.refuse()
            plan = self._plan = plan_rewrite(reader, modules, chosen, self._kind)
            if against is None:
                message = f"{len(chosen)} modules are rewritten as told; without --base nothing proves they needed it"
                self._warned.append(("layout.unproven", message + against_words(modules, chosen, self._kind)))
            if stage is None:
                self._warned += foreign_warnings(standing.foreign if standing is not None else (), "would go")
                return
            stage.check_space(self._disk_bytes(reader, plan, modules if against is not None else None))
            with self._clock.timed("stream"):
                readers: dict[Origin, CheckpointReader] = {"export": reader}
                done = stream(stage, plan, readers, progress, workers=request.worker_count, executor=executor)
            reader.check_unchanged()
            self._warned += not_finite_warnings(done.not_finite)
            files = config_and_index(reader, plan, self._kind, modules if against is not None else None)
            for name, data in files.items():
                stage.write_file(name, data)
            with self._clock.timed("check"):
                self._close(stage.path, plan, against, str(source_path))
            if against is not None and not source_path.is_file():
                self._warned += compare_bases(reader, against)
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
            output=output_report(self._output, shards, {}, self._published, error),
            ledger={"source": dict(plan.fates) | self._beside} if plan else {},
            counts={"source": counted(dict(plan.fates) | self._beside)} if plan else {},
            proof=self._proof,
            evidence=self._evidence,
            checks=self._checks,
            peak_rss_bytes=self._peak,
            throughput_bytes_per_s=throughput(self._clock, [plan]) if plan and self._peak is not None else None,
            timings_s=self._clock.seconds,
            warnings=warnings_of([*self._inputs.left_aside(), *self._warned]),
            versions=versions(),
            **ending(error, "planned" if self._request.dry_run else "ok"),
        )

    def _look(self, reader: CheckpointReader, base: CheckpointReader | None, faults: Faults) -> dict[str, ModuleLayout]:
        found = inspect_component(reader, base, every_scale=False, max_error=self._request.max_error)
        modules = {name: one for name, one in found.modules.items() if one.algorithm == FORMAT.quant_algo}
        add_parts(reader, modules, faults)
        if modules:
            lacking, told = scale_faults(reader, base, needs_inputs=has_input_scales(reader)), faults.names
            if base is None:  # it is done as told
                self._warned += [(one.code, f"{one.line}: {one.hint}") for one in kinds(lacking)]
            for name, fault in lacking if base is not None else ():
                if told.isdisjoint((name, module_of(name))):
                    faults.add(name, fault)
        if base is not None and modules:  # a few rows may not tell what the whole weight does
            for name, layout in proven_layouts(reader, base, self._request, Faults()).items():
                modules[name] = proven_answers(modules[name], layout)
        return modules

    def _close(self, stage: Path, plan: RewritePlan, base: CheckpointReader | None, source: str) -> None:
        """Reopen what was written; with a base, prove all of it.

        Raises:
            CheckFailedError: ``check.structure`` or ``check.proof``.
        """
        with opened_stage(stage, need_config=False) as written:
            self._keep(structure_checked(written_faults(written, plan.steps, plan.shards)))
            if base is None:
                return
            found = prove_rewritten(written, base, self._request)
            if not written.config and found.misdeclared:  # one order of two was asked for, and no config can say it
                words = f"OUT has no config.json that says how it lies: {found.misdeclared[0]}"
                self._warned.append(("layout.undeclared", f"{words} ({len(found.misdeclared)} such)"))
                found = replace(found, misdeclared=[])
        self._proof = found.report
        self._warned += [("export.odd_input_scale", words) for words in found.odd]
        self._warned += [("proof.scale_factor", words) for words in found.scales]
        failures = [*found.wrong, *found.misdeclared]
        check = {"name": "proof", "status": "fail" if failures else "pass", "failures": failures[:10]}
        self._checks.append(check)
        refuse_unproven(found, source, REWRITE, accept_near=self._request.accept_near)

    def _keep(self, closed: Closed) -> None:
        self._checks.append(closed.check)
        refuse_failed(closed)

    def _record(
        self, plan: RewritePlan, files: Mapping[str, bytes], digests: Mapping[str, str], proof: ProofReport | None
    ) -> bytes:
        more: dict[str, Any] = {
            "sources": {name: reader.identity() for name, reader in self._inputs.readers.items()},
            "counts": {"source": counted(dict(plan.fates) | self._beside)},
        }
        more |= {"proof": proof_record(proof)} if proof is not None else {}
        headers = ([step.output for step in plan.steps.values()], {shard.file: shard.metadata for shard in plan.shards})
        return write_record(self._request.command, more, tensors=digests, files=files, headers=headers)

    def _disk_bytes(
        self, reader: CheckpointReader, plan: RewritePlan, proven: Mapping[str, ModuleLayout] | None
    ) -> int:
        files = config_and_index(reader, plan, self._kind, proven)
        proof = None
        if proven is not None:
            longest = dict.fromkeys(proven, LONGEST)
            proof = rewritten_report(longest, self._request.max_error, "x" * 120, like=["x"])
        record = self._record(plan, files, dict.fromkeys(plan.steps, DIGEST), proof)
        return disk_bytes([*shard_sizes(plan.shards), len(record) + CONTENT_BYTES, *map(len, files.values())])
