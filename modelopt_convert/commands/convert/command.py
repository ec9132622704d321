"""The straight line of ``convert``: open, describe, prove, settle, write, read back, publish.

Everything is moved by recipes: what is written is a copy of tensors that the source's reader presents.
"""

from collections.abc import Collection
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from modelopt_convert.checkpoint.config import OWN
from modelopt_convert.checkpoint.header import json_object
from modelopt_convert.checkpoint.location import local_path, read_small
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.pipeline import resolve_component
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.checkpoint.record import RECORD, write_record
from modelopt_convert.checkpoint.strict_json import json_bytes
from modelopt_convert.commands.beside import beside_transformer
from modelopt_convert.commands.build.files import counted, proof_record
from modelopt_convert.commands.build.space import CONTENT_BYTES, LONGEST
from modelopt_convert.commands.closing import refuse_failed
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
from modelopt_convert.commands.convert.awq import prove_near
from modelopt_convert.commands.convert.engine_names import known_of_engines, limit_warnings
from modelopt_convert.commands.convert.inexact import BASE
from modelopt_convert.commands.convert.nunchaku import is_nunchaku, prove_near_nunchaku, refuse_other_targets
from modelopt_convert.commands.convert.output import (
    SAID_BY_CONFIG,
    ConvertPlan,
    not_restored_warnings,
    plan_output,
    small_files,
)
from modelopt_convert.commands.convert.proof import (
    Compared,
    check_blocks,
    check_whole,
    no_proof,
    prove_source,
    silent_markers,
    uncalibrated,
    unscaled,
    unusable_scales,
)
from modelopt_convert.commands.convert.told import convert_report, written_proof
from modelopt_convert.commands.convert.way_back import KEY, Claim, Kept, keep, read_claim
from modelopt_convert.commands.convert.written import read_back, stream_converted
from modelopt_convert.commands.requests import ConvertRequest
from modelopt_convert.commands.rewrite.proof import compare_bases, compare_configs, rewritten_report
from modelopt_convert.dialects.awq import transformed_modules
from modelopt_convert.dialects.source import Source, describe_sound
from modelopt_convert.engines.limits import DEFAULT
from modelopt_convert.plan.inputs import check_config_unquantized
from modelopt_convert.report.report import EngineLimitReport, ProofReport, Report
from modelopt_convert.report.words import NO_BASE_WORDS
from modelopt_convert.run.errors import Faults, InputError
from modelopt_convert.run.progress import Progress
from modelopt_convert.run.workers import torch_on_one_thread
from modelopt_convert.stage.directory import Published, StagingDir
from modelopt_convert.stage.output_rules import canonical_output, check_output_allowed
from modelopt_convert.stage.space import DIGEST, disk_bytes, shard_sizes
from modelopt_convert.write.executors import open_executor

_MAX_CONFIG = 1 << 24


class ConvertCommand:
    """Convert a checkpoint."""

    def __init__(self, request: ConvertRequest) -> None:
        """Do nothing yet."""
        self._request = request
        self._clock = Clock()
        self._inputs = Inputs(
            request.locate("config"), variant=request.variant, variant_of_base=request.base is not None
        )
        self._output = str(Path(request.output))
        self._source: Source | None = None
        self._plan: ConvertPlan | None = None
        self._kept: Kept | None = None
        self._compared: Compared | None = None
        self._proof: ProofReport | None = None
        self._words = NO_BASE_WORDS
        self._warned: list[Warned] = []
        self._checks: list[dict[str, Any]] = []
        self._published: Published | None = None
        self._engines: tuple[list[EngineLimitReport], list[Warned]] | None = None
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
        with ExitStack() as stack:
            executor = stack.enter_context(open_executor("threads"))
            stack.enter_context(self._inputs)
            with self._clock.timed("open"):
                reader = self._inputs.open("source", source_path)
            stage: StagingDir | None = None
            if not request.dry_run:
                # Before tensors are read: if another run holds OUT, that is said first. What fits is known after that.
                stage = stack.enter_context(StagingDir(output, inputs, **request.consent, need_bytes=0, copies=()))
            with self._clock.timed("open"):
                against = self._inputs.open("base", base_path, is_base=True) if base_path is not None else None
            if against is not None:
                check_config_unquantized(against)
                self._warned += self._inputs.present("base")
            with self._clock.timed("plan"):
                known, faults = against.tensors if against is not None else {}, Faults()
                found = self._source = describe_sound(reader, request.from_, known, faults)
                if against is None or stage is None:  # no data is compared
                    faults.refuse()
            if request.config is not None and found.other_class is not None:
                raise InputError(
                    f"{request.config}: expected a config.json of {found.found.family.class_names[0]}, as the names of "
                    f"SOURCE are, found one of {found.other_class}",
                    code="convert.config",
                    path=str(request.config),
                    hint="--config is for the model that SOURCE is; without it a base or the record gives one",
                )
            refuse_other_targets(found, request.to, str(reader.path))
            self._warned += beside_transformer(reader, found.found)[1]
            if against is None:
                check_blocks(found, str(reader.path))
            else:
                reader.take_beside(BASE, against)
                self._warned += _configs_compared(reader, found, against)
                told = faults.names.union(module_of(name) for name in faults.names if name in reader.stored)
                with faults.taken():
                    check_whole(found.described, against, str(reader.path), told)
                if stage is not None:
                    with self._clock.timed("prove"), torch_on_one_thread(), faults.taken():
                        self._prove(reader, found, against, told | faults.names)
                faults.refuse()
            with self._clock.timed("plan"):
                claim = self._claim(reader, found, source_path.name if source_path.is_file() else None)
                plan = self._plan = plan_output(reader, found, against, claim, request, measure=stage is not None)
                self._kept = keep(reader, found, plan.settled, plan.expected, _kept_config(reader, found), request.to)
            self._warned += [*plan.warned, *not_restored_warnings(plan)]
            if request.to == "modelopt" and plan.config is not None:
                config = json_object(plan.config.decode())
                self._engines = known_of_engines(config, plan.steps.keys(), plan.settled.modules)
                self._warned += self._engines[1] if self._engines is not None else []
                self._warned += limit_warnings(config)
            self._warned += [*unusable_scales(found.described, reader.read_of), *unscaled(found.described)]
            self._warned += silent_markers(found.described)
            if request.to != "bf16":  # which has no inputs that are scaled
                self._warned += uncalibrated(found.described, plan.expected)
            if stage is None:
                self._warned += foreign_warnings(standing.foreign if standing is not None else (), "would go")
                return
            stage.check_space(self._disk_bytes(plan))
            # A conversion that only reorders does without torch, which takes longer to import than much of the rest.
            computes = bool(plan.lossy or transformed_modules(found.described))
            with self._clock.timed("stream"), torch_on_one_thread() if computes else nullcontext():
                done = stream_converted(stage, reader, plan, progress, request.worker_count, executor)
            self._warned += not_finite_warnings(done.not_finite)
            for name, data in small_files(plan).items():
                stage.write_file(name, data)
            with self._clock.timed("check"):
                self._close(stage.path, reader, plan)
            self._inputs.check_unchanged()
            if against is not None and not source_path.is_file():
                self._warned += compare_bases(reader, against)
            stage.write_file(RECORD, self._record(plan, done.digests, self._proof))
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
        told = None
        if plan is not None and source is not None and self._kept is not None:
            told = convert_report(source, self._request.to, plan, self._kept, self._compared, self._words)
        return Report(
            command=self._request.command,
            inputs=self._inputs.reports(),
            network=self._inputs.network(),
            output=output_report(self._output, shards, {}, self._published, error),
            ledger={"source": fates} if fates else {},
            counts={"source": counted(fates)} if fates else {},
            proof=self._proof,
            convert=told,
            engine=DEFAULT if self._engines is not None else None,
            engines=self._engines[0] if self._engines is not None else [],
            checks=self._checks,
            peak_rss_bytes=self._peak,
            throughput_bytes_per_s=throughput(self._clock, [plan]) if plan and self._peak is not None else None,
            timings_s=self._clock.seconds,
            warnings=warnings_of([*self._inputs.left_aside(), *self._warned]),
            versions=versions(),
            **ending(error, "planned" if self._request.dry_run else "ok"),
        )

    def _prove(self, reader: CheckpointReader, source: Source, base: CheckpointReader, told: Collection[str]) -> None:
        if transformed_modules(source.described):
            self._words = prove_near(reader, source.described, base, self._request.max_error)
            return
        if is_nunchaku(source):
            self._words = prove_near_nunchaku(reader, source.described, base, self._request.max_error)
            return
        why = no_proof(source.described)
        if why is not None:
            self._words = why
            return
        found = prove_source(reader, source.described, base, self._request, told)
        self._proof, self._words = found.report, found.report.words
        self._warned += [("proof.scale_factor", words) for words in found.scales]

    def _claim(self, reader: CheckpointReader, source: Source, single: str | None) -> Claim | None:
        """What a record says of a checkpoint in the target's dialect that SOURCE was made from.

        Raises:
            InputError: ``convert.dialect``: it says that SOURCE is in another dialect than it was taken for.
        """
        try:
            claim = read_claim(reader, single)
        except InputError as error:
            self._warned.append((error.code, error.message))
            return None
        if claim is not None and claim.malformed:
            where, many = reader.folder / RECORD, len(claim.malformed)
            self._warned.append(("record.content", f"{where}: {many} entries are not used: {claim.malformed[0]}"))
        if claim is not None and claim.to not in (None, source.form.name) and self._request.from_ is None:
            # Two dialects may have the same names, dtypes and shapes, and another order of nibbles.
            raise InputError(
                f"{reader.path}: expected {claim.to}, as mopt.json says, found what is read as {source.form.name}",
                code="convert.dialect",
                path=str(reader.path),
                hint=f"--from {claim.to} reads it as that; for weights that mopt did not write, name theirs",
            )
        return claim if claim is not None and claim.dialect == self._request.to else None

    def _close(self, stage: Path, reader: CheckpointReader, plan: ConvertPlan) -> None:
        """Reopen what was written, and compare all of it with the source.

        Raises:
            CheckFailedError: ``check.structure`` or ``check.converted``.
        """
        self._compared, found = read_back(stage, reader, plan, self._request.to, self._request.worker_count)
        for closed in found:
            self._checks.append(closed.check)
            refuse_failed(closed)
        if self._compared is not None and (odd := sorted(self._compared.nan_scales)):
            words = f"block scales of {len(odd)} modules hold NaN, as those of SOURCE do ({odd[0]!r} first)"
            self._warned.append(("scale.nan", words))

    def _record(self, plan: ConvertPlan, digests: dict[str, str], proof: ProofReport | None) -> bytes:
        assert self._source is not None and self._kept is not None  # a plan is made of them
        more: dict[str, Any] = {
            "sources": {name: reader.identity() for name, reader in self._inputs.readers.items()},
            "counts": {"source": counted(self._source.described.fates)},
            KEY: self._kept.entry,
        }
        more |= {"proof": proof_record(written_proof(proof, plan))} if proof is not None else {}
        headers = ([step.output for step in plan.steps.values()], {shard.file: shard.metadata for shard in plan.shards})
        return write_record(self._request.command, more, tensors=digests, files=small_files(plan), headers=headers)

    def _disk_bytes(self, plan: ConvertPlan) -> int:
        proof = self._proof
        if proof is not None:
            longest = dict.fromkeys(proof.modules, LONGEST)
            proof = rewritten_report(longest, self._request.max_error, "x" * 120, like=["x"])
        record = self._record(plan, dict.fromkeys(plan.steps, DIGEST), proof)
        small = map(len, small_files(plan).values())
        return disk_bytes([*shard_sizes(plan.shards), len(record) + CONTENT_BYTES, *small])


def _configs_compared(reader: CheckpointReader, source: Source, base: CheckpointReader) -> list[Warned]:
    if source.other_class is not None:
        words = f"the config at {reader.path} is of {source.other_class}: the two configs are not compared"
        return [("config.not_compared", words)]
    return compare_configs(reader, base)


def _kept_config(reader: CheckpointReader, source: Source) -> str | None:
    """The text of a folder's own config.json; of a file whose dialect needs one, what stood in for it."""
    if reader.config_from == OWN:
        return read_small(reader.folder / "config.json", _MAX_CONFIG, code="config").decode()
    return json_bytes(reader.config).decode() if reader.config and source.form.name in SAID_BY_CONFIG else None
