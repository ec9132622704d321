"""The last step of a build ``--to`` another dialect: from the canonical checkpoint in the stage to OUT's files.

The build writes and proves its checkpoint in a folder of the stage. This step reads that folder, writes the target's
files beside it, reads these back, and takes the folder out again. All of it is one publication of OUT.
"""

import shlex
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.checkpoint.record import RECORD, read_record, write_record
from modelopt_convert.commands.build.card import converted_card
from modelopt_convert.commands.build.inputs import Opened
from modelopt_convert.commands.build.space import CONTENT_BYTES
from modelopt_convert.commands.closing import Closed, opened_stage
from modelopt_convert.commands.command import Clock, Warned, not_finite_warnings
from modelopt_convert.commands.convert.inexact import BASE
from modelopt_convert.commands.convert.output import ConvertPlan, plan_output, small_files
from modelopt_convert.commands.convert.plan import Unequal, fused_groups, refuse_without_map, unequal_groups
from modelopt_convert.commands.convert.told import convert_report
from modelopt_convert.commands.convert.way_back import KEY, Kept, keep
from modelopt_convert.commands.convert.written import read_back, stream_converted
from modelopt_convert.commands.requests import BuildRequest, ConvertRequest
from modelopt_convert.dialects.form import Algorithm, Canonical, Quantized, constant, grouped
from modelopt_convert.dialects.source import describe
from modelopt_convert.dialects.targets import CHECKS, FORMS
from modelopt_convert.families.family import Family
from modelopt_convert.families.table import recognise
from modelopt_convert.plan.plan import BuildPlan, Step
from modelopt_convert.report.convert import ConvertReport
from modelopt_convert.report.report import ProofReport
from modelopt_convert.run.errors import InputError, about
from modelopt_convert.run.progress import Progress
from modelopt_convert.run.workers import torch_on_one_thread
from modelopt_convert.stage.directory import StagingDir
from modelopt_convert.stage.space import DIGEST, disk_bytes, shard_sizes
from modelopt_convert.write.stream import Executor

STAGED = "transformer"
"""The folder of the stage in which the canonical checkpoint stands, until OUT's files are proven equal to it."""
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Fits:
    """Whether a target can hold what a build will write.

    Attributes:
        bf16_bytes: By how many bytes the target's files are larger, because fused modules are in BF16.
        warned: That cost, in words.
    """

    bf16_bytes: int
    warned: list[Warned]


def refuse_inexact(part: Opened, plan: BuildPlan, request: BuildRequest) -> Fits:
    """Find the modules that the target fuses and that the build makes unequal: from headers and scales.

    Raises:
        InputError: ``convert.inexact``, ``convert.family``, ``convert.no_input_scale``.
    """
    target, where = FORMS[request.to], str(part.model.path)
    if request.to == "bf16":
        weights = (plan.modules[name].rows * plan.modules[name].columns * 2 for name in plan.packed)
        return Fits(sum(weights), [])
    described = _planned(part, plan)
    if request.to in CHECKS:
        with about(where):
            CHECKS[request.to](described)
    found = recognise({name: info.shape for name, info in described.tensors.items()})
    family = found.family if found is not None else Family("", str(plan.config.get("_class_name")), (), (), ())
    refuse_without_map(family, target, target.naming, where)
    read = (part.export or part.model).read_of
    unequal = unequal_groups(described, fused_groups(described, family, target.naming), read)
    if not unequal:
        return Fits(0, [])
    by_module = grouped(described.tensors.values())
    members = [name for one in unequal for name in one.members if name in described.modules]
    now = sum(info.num_bytes for name in members for role, info in by_module[name].items() if role != "bias")
    then = sum(2 * described.modules[name].rows * described.modules[name].columns for name in members)
    cost = then - now
    many = "1 fused module" if len(unequal) == 1 else f"{len(unequal)} fused modules"
    words = f"{many} of {target.name}, made of {len(members)} quantized ones, are BF16: {cost} bytes more"
    if request.inexact == "bf16":
        return Fits(cost, [("convert.bf16", f"{words} ({unequal[0].native}: {unequal[0].why})")])
    shown = "; ".join(f"{one.native}: {one.why}" for one in unequal[:_SHOWN])
    raise InputError(
        f"{where}: {many} of {target.name} cannot be written exactly: {shown}",
        code="convert.inexact",
        path=where,
        hint=f"--inexact bf16 writes these in BF16, {cost} bytes more for {len(members)} quantized modules"
        + _afterwards(unequal, part, request),
    )


def _afterwards(unequal: Sequence[Unequal], part: Opened, request: BuildRequest) -> str:
    """What a person can do instead, once a checkpoint is built without ``--to``: a command that runs as it is."""
    built = str(request.output or "OUT")
    words = ["mopt", "convert", built, f"{built}-{request.to}", "--to", request.to, "--inexact"]
    base = part.base or (part.model if part.export is None else None)
    if all(one.rebases for one in unequal):
        words += ["rebase"]
    elif base is not None and all(one.requantizes for one in unequal):
        words += ["requantize", "--base", str(base.path)]
    else:
        return ""
    return f"; or build without --to, then `{shlex.join(words)}`"


def room_needed(build: int, plan: BuildPlan, fits: Fits) -> int:
    """Room for the canonical checkpoint and, beside it, the target's files: at most, until these are planned."""
    return build + plan.total_bytes + fits.bf16_bytes


def _planned(part: Opened, plan: BuildPlan) -> Canonical:
    """What the build will write, as far as it is known before.

    The scale of a module that is quantized here is not known yet, but the modules that share it are known: a number
    stands for the scale.
    """
    sharing = {name: number for number, group in enumerate(plan.shared) for name in group}
    numbers = {name: sharing.get(name, len(plan.shared) + place) for place, name in enumerate(plan.packed)}
    tensors = {name: _info(name, step, part, numbers) for name, step in plan.steps.items()}
    algorithm = cast(Algorithm, plan.format.algorithm)  # what is built can be described
    modules = {name: Quantized(algorithm, plan.modules[name].rows, plan.modules[name].columns) for name in plan.packed}
    return Canonical(tensors, modules, {}, plan.config)


def _info(name: str, step: Step, part: Opened, numbers: Mapping[str, int]) -> TensorInfo:
    """A tensor of the output; only what a scale has to be compared with can be read."""
    spec, module = step.output, module_of(name)
    if spec.shape or spec.dtype != "F32" or module not in numbers:
        return TensorInfo(name, spec.dtype, spec.shape, "", 0, spec.num_bytes)
    stored = part.export.tensors.get(name) if part.export is not None else None
    if stored is not None and stored.num_bytes == spec.num_bytes:
        return stored
    known = struct.pack("<f", step.value) if step.value is not None else struct.pack("<I", numbers[module])
    return constant(name, "F32", (), known, "")


@dataclass(slots=True)
class Converted:
    """What became of a build in the target's dialect, as far as that is known.

    Attributes:
        plan: What is written.
        report: What a conversion tells.
        closed: The checks of what was written.
        warned: What the user should know.
    """

    plan: ConvertPlan
    report: ConvertReport
    closed: list[Closed]
    warned: list[Warned]


def convert_staged(
    stage: StagingDir,
    part: Opened,
    proof: ProofReport,
    request: BuildRequest,
    executor: Executor,
    progress: Progress,
    clock: Clock,
) -> Converted:
    """Write the target's files into the stage, from the checkpoint that stands in its folder.

    Args:
        stage: The stage of OUT.
        part: The build's inputs. A module that cannot be quantized in the target gets the base's values.
        proof: What the build proved of the checkpoint.
        request: What is asked for.
        executor: Writes the shards.
        progress: Told how far the work is.
        clock: Measures the steps of the run.

    Raises:
        InputError: As ``plan_output``.
        StorageError: ``storage.no_space``.
    """
    asked = ConvertRequest(
        source=stage.path / STAGED,
        output=stage.output,
        to=request.to,
        inexact=request.inexact,
        max_shard_size=request.max_shard_size,
        workers=request.workers,
    )
    with opened_stage(stage.path / STAGED) as reader:
        with clock.timed("plan"):
            source = describe(reader, "modelopt", {})
            if part.base is not None:
                reader.take_beside(BASE, part.base)
            plan = plan_output(reader, source, part.base, None, asked, measure=True)
            config = (stage.path / STAGED / "config.json").read_text()
            kept = keep(reader, source, plan.settled, plan.expected, config, request.to)
        card = (stage.path / STAGED / "README.md").read_text()
        in_bf16 = [(one.module, one.why) for one in plan.lossy]
        files = {"README.md": converted_card(card, request.to, in_bf16).encode()}
        files |= small_files(plan)
        sizes = [len(_record(reader, plan, kept, files, dict.fromkeys(plan.steps, DIGEST))), *map(len, files.values())]
        stage.check_space(disk_bytes([*shard_sizes(plan.shards), CONTENT_BYTES, *sizes]))
        with clock.timed("convert"), torch_on_one_thread():
            done = stream_converted(stage, reader, plan, progress, request.worker_count, executor)
        for name, data in files.items():
            stage.write_file(name, data)
        stage.write_file(RECORD, _record(reader, plan, kept, files, done.digests))
        with clock.timed("check"):
            compared, closed = read_back(stage.path, reader, plan, request.to, request.worker_count)
        told = convert_report(source, request.to, plan, kept, compared, proof.words)
    return Converted(plan, told, closed, not_finite_warnings(done.not_finite))


def _record(
    reader: CheckpointReader, plan: ConvertPlan, kept: Kept, files: Mapping[str, bytes], digests: Mapping[str, str]
) -> bytes:
    """The build's record, and what the way back to the build's checkpoint needs."""
    built = read_record(reader.folder)
    assert built is not None  # the build wrote it
    own = ("schema", "tool", "command", "digests")
    more = {key: value for key, value in built.items() if key not in own} | {KEY: kept.entry}
    headers = ([step.output for step in plan.steps.values()], {shard.file: shard.metadata for shard in plan.shards})
    return write_record(str(built["command"]), more, tensors=digests, files=files, headers=headers)
