"""The straight line of ``convert``: open, describe, prove, settle, write, read back, publish.

Everything is moved by recipes: what is written is a copy of tensors that the source's reader presents.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from modelopt_convert.checkpoint.header import TensorSpec
from modelopt_convert.checkpoint.location import local_path
from modelopt_convert.checkpoint.pipeline import resolve_component
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.checkpoint.record import RECORD, write_record
from modelopt_convert.checkpoint.strict_json import json_bytes
from modelopt_convert.commands.build.files import counted
from modelopt_convert.commands.build.space import CONTENT_BYTES
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
from modelopt_convert.commands.convert.plan import fused_groups, refuse_unequal, unequal_groups
from modelopt_convert.commands.convert.proof import Compared, compare
from modelopt_convert.commands.requests import ConvertRequest
from modelopt_convert.dialects.form import Canonical, Form, Written
from modelopt_convert.dialects.forms import FORMS
from modelopt_convert.dialects.modelopt.dialect import INDEX_NAME
from modelopt_convert.dialects.naming import under_diffusers_names, under_native_names
from modelopt_convert.dialects.source import Source, describe
from modelopt_convert.families.table import Found
from modelopt_convert.plan.plan import Origin, ShardPlan, Step, split_into_shards
from modelopt_convert.report.report import Report
from modelopt_convert.run.progress import Progress
from modelopt_convert.run.workers import torch_on_one_thread
from modelopt_convert.stage.directory import Published, StagingDir
from modelopt_convert.stage.output_rules import canonical_output, check_output_allowed
from modelopt_convert.stage.space import DIGEST, disk_bytes, shard_sizes
from modelopt_convert.write.executors import open_executor
from modelopt_convert.write.stream import stream


@dataclass(frozen=True, slots=True)
class ConvertPlan:
    """What will be written.

    Attributes:
        steps: By tensor.
        shards: With their tensors and metadata.
        written: The output in the target's dialect.
        settled: The description that a reader of the output will find, under diffusers' names.
    """

    steps: Mapping[str, Step]
    shards: tuple[ShardPlan, ...]
    written: Written
    settled: Canonical


class ConvertCommand:
    """Convert a checkpoint."""

    def __init__(self, request: ConvertRequest) -> None:
        """Do nothing yet."""
        self._request = request
        self._clock = Clock()
        self._inputs = Inputs()
        self._output = str(Path(request.output))
        self._source: Source | None = None
        self._plan: ConvertPlan | None = None
        self._compared: Compared | None = None
        self._warned: list[Warned] = []
        self._checks: list[dict[str, object]] = []
        self._published: Published | None = None
        self._peak: int | None = None

    def run(self, progress: Progress) -> None:
        """Convert.

        Raises:
            MoptError: One of its kinds; nothing was published unless a StorageError says so.
        """
        request = self._request
        source, base = request.locate("source"), request.locate("base")
        assert source is not None  # the request requires it
        source_path = source if source.is_file() else resolve_component(source, what="source")
        base_path = resolve_component(base, what="base") if base else None
        output = canonical_output(Path(request.output))
        self._output = str(output)
        inputs = [path for path in map(local_path, (source, source_path, base, base_path)) if path is not None]
        standing = check_output_allowed(output, inputs, **request.consent)
        target = FORMS[request.to]
        with ExitStack() as stack:
            executor = stack.enter_context(open_executor("threads"))
            stack.enter_context(self._inputs)
            with self._clock.timed("open"):
                reader = self._inputs.open("source", source_path)
                against = self._inputs.open("base", base_path, is_base=True) if base_path is not None else None
            with self._clock.timed("plan"):
                found = self._source = describe(reader, request.from_, against.tensors if against is not None else {})
                plan = self._plan = self._planned(reader, found, target)
            if request.dry_run:
                self._warned += foreign_warnings(standing.foreign if standing is not None else (), "would go")
                return
            with StagingDir(output, inputs, **request.consent, need_bytes=self._disk_bytes(plan), copies=()) as stage:
                reader.present(plan.written.tensors)
                readers: dict[Origin, CheckpointReader] = {"export": reader}
                with self._clock.timed("stream"), torch_on_one_thread():
                    done = stream(stage, plan, readers, progress, workers=request.worker_count, executor=executor)
                self._warned += not_finite_warnings(done.not_finite)
                files = self._files(plan)
                for name, data in files.items():
                    stage.write_file(name, data)
                with self._clock.timed("check"):
                    self._close(stage.path, reader, plan, target)
                reader.check_unchanged()
                stage.write_file(RECORD, self._record(plan, files, done.digests))
                with self._clock.timed("publish"):
                    try:
                        stage.publish()
                    finally:  # also when a signal that was held acts right after the swap
                        self._published = stage.published
                        self._warned += published_warnings(stage.published)
        self._peak = peak_rss_bytes()

    def report(self, error: BaseException | None = None) -> Report:
        """What happened, also after a failure."""
        plan, source = self._plan, self._source
        shards = {shard.file: shard.tensors for shard in plan.shards} if plan else {}
        fates = dict(source.described.fates) if source else {}
        return Report(
            command=self._request.command,
            inputs=self._inputs.reports(),
            network=self._inputs.network(),
            output=output_report(self._output, shards, {}, self._published, error),
            ledger={"source": fates} if fates else {},
            counts={"source": counted(fates)} if fates else {},
            checks=self._checks,
            peak_rss_bytes=self._peak,
            throughput_bytes_per_s=throughput(self._clock, [plan]) if plan and self._peak is not None else None,
            timings_s=self._clock.seconds,
            warnings=warnings_of(self._warned),
            versions=versions(),
            **ending(error, "planned" if self._request.dry_run else "ok"),
        )

    def _planned(self, reader: CheckpointReader, source: Source, target: Form) -> ConvertPlan:
        described, family = source.described, source.found.family
        groups = fused_groups(described, family, target)
        refuse_unequal(unequal_groups(described, groups, reader.read_of), target.name, str(reader.path))
        named = described if target.naming == "diffusers" else under_native_names(described, family, target.naming, "")
        written = target.write(named, reader.read_of)
        specs = [TensorSpec(one.name, one.dtype, one.shape) for one in written.tensors.values()]
        steps = {spec.name: Step(spec, "export", "copy") for spec in specs}
        if target.naming == "diffusers":
            split = split_into_shards(specs, self._request.shard_bytes)
            shards = tuple(ShardPlan(one.file, one.tensors, written.metadata) for one in split)
        else:
            algorithm = min({one.algorithm for one in described.modules.values()}, default="bf16", key=str)
            shards = (ShardPlan(f"{family.name}-{algorithm}.safetensors", tuple(specs), written.metadata),)
        expected = written.expected(named)
        if target.naming != "diffusers":
            expected = under_diffusers_names(expected, Found(family, target.naming, "", []), str(reader.path))
        return ConvertPlan(steps, shards, written, expected)

    def _files(self, plan: ConvertPlan) -> dict[str, bytes]:
        files = {"config.json": json_bytes(plan.written.config)} if plan.written.config is not None else {}
        if len(plan.shards) > 1:
            weight_map = {spec.name: shard.file for shard in plan.shards for spec in shard.tensors}
            total = {"total_size": sum(step.output.num_bytes for step in plan.steps.values())}
            files[INDEX_NAME] = json_bytes({"metadata": total, "weight_map": dict(sorted(weight_map.items()))})
        return files

    def _close(self, stage: Path, reader: CheckpointReader, plan: ConvertPlan, target: Form) -> None:
        """Reopen what was written, and compare all of it with the source.

        Raises:
            CheckFailedError: ``check.structure`` or ``check.converted``.
        """
        with opened_stage(stage, need_config=plan.written.config is not None) as written:
            self._keep(structure_checked(written_faults(written, plan.steps, plan.shards)))
            again = describe(written, target.name, plan.settled.tensors)
            found = self._compared = compare(reader, plan.settled, written, again.described)
        check = {"name": "converted", "status": "fail" if found.failures else "pass", "failures": found.failures[:10]}
        failure = f"read back, {found.failures[0]} ({len(found.failures)} in all)" if found.failures else None
        self._keep(Closed(check, failure))

    def _keep(self, closed: Closed) -> None:
        self._checks.append(closed.check)
        refuse_failed(closed)

    def _record(self, plan: ConvertPlan, files: Mapping[str, bytes], digests: Mapping[str, str]) -> bytes:
        more = {
            "sources": {name: reader.identity() for name, reader in self._inputs.readers.items()},
            "counts": {"source": counted(self._source.described.fates)} if self._source else {},
        }
        headers = ([step.output for step in plan.steps.values()], {shard.file: shard.metadata for shard in plan.shards})
        return write_record(self._request.command, more, tensors=digests, files=files, headers=headers)

    def _disk_bytes(self, plan: ConvertPlan) -> int:
        files = self._files(plan)
        record = self._record(plan, files, dict.fromkeys(plan.steps, DIGEST))
        return disk_bytes([*shard_sizes(plan.shards), len(record) + CONTENT_BYTES, *map(len, files.values())])
