"""What a conversion will write: tensors, files and config, from headers and small tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from modelopt_convert.checkpoint.header import TensorSpec
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.checkpoint.strict_json import json_bytes
from modelopt_convert.commands.command import Warned, without_quantization
from modelopt_convert.commands.convert.awq import settle_transformed
from modelopt_convert.commands.convert.engine_names import with_engine_names
from modelopt_convert.commands.convert.inexact import Lossy, settle, unpacked
from modelopt_convert.commands.convert.nunchaku import is_nunchaku, settle_decoded
from modelopt_convert.commands.convert.plan import fused_groups, refuse_unequal, refuse_without_map, unequal_groups
from modelopt_convert.commands.convert.restore import Restored, changed_since, other_model, restore
from modelopt_convert.commands.convert.restored_config import claimed_architecture, claimed_config
from modelopt_convert.commands.convert.way_back import Claim, named
from modelopt_convert.commands.requests import ConvertRequest
from modelopt_convert.dialects.form import Canonical, Form, Naming, Written
from modelopt_convert.dialects.modelopt.dialect import INDEX_NAME
from modelopt_convert.dialects.renaming import under_diffusers_names
from modelopt_convert.dialects.source import Source
from modelopt_convert.dialects.targets import FORMS
from modelopt_convert.engines.comfyui import factors, row_scales
from modelopt_convert.families.family import Family
from modelopt_convert.families.table import Found
from modelopt_convert.plan.plan import ShardPlan, Step, split_into_shards
from modelopt_convert.run.errors import InputError, about

# Of these nothing but config.json says that the weights are quantized, and how.
SAID_BY_CONFIG = frozenset({"modelopt", "torchao", "compressed-tensors"})


_RECORD = "the record, mopt.json beside SOURCE, says what the source was made from"


@dataclass(frozen=True, slots=True)
class ConvertPlan:
    """What will be written.

    Attributes:
        steps: By tensor.
        shards: With their tensors and metadata.
        written: The output in the target's dialect.
        config: The bytes of config.json; None where the dialect has none.
        settled: The description that it stands for, under diffusers' names.
        lossy: What became of modules that the target cannot hold.
        told: What else changed, in words, by tensor.
        expected: What a reader of the output will find of it.
        announced: Why a tensor of the description is not written as it is, by name, and whether it is left out.
        restored: What a record gave; in words why none of it, or None where there was none.
    """

    steps: Mapping[str, Step]
    shards: tuple[ShardPlan, ...]
    written: Written
    config: bytes | None
    settled: Canonical
    lossy: tuple[Lossy, ...]
    told: Mapping[str, str]
    expected: Canonical
    announced: Mapping[str, tuple[str, bool]]
    restored: Restored | str | None
    warned: tuple[Warned, ...] = ()


def plan_output(
    reader: CheckpointReader,
    source: Source,
    base: CheckpointReader | None,
    claim: Claim | None,
    request: ConvertRequest,
    *,
    measure: bool,
) -> ConvertPlan:
    """Plan the output.

    Args:
        reader: The source; the base's files are beside it.
        source: What was made out of it.
        base: The base, if one is given.
        claim: What a record says of a checkpoint in this dialect, which the source was made from.
        request: What is asked for.
        measure: Whether weights may be read for scales and errors.

    Raises:
        InputError: ``convert.inexact``, ``convert.config``, ``convert.no_place``, ``naming.*`` or ``base.*``.
    """
    target, family, where = FORMS[request.to], source.found.family, str(reader.path)
    described = _with_config(source.described, base)
    spelling: Naming = target.naming
    prefix = ""
    restored: Restored | str | None = None
    if claim is not None and (restored := other_model(claim, source.found)) is not None:
        claim = None
    if claim is not None:
        spelling, prefix = claim.spelling, claim.prefix
    refuse_without_map(family, target, spelling, where)
    if is_nunchaku(source):
        first = settle_decoded(described, reader.read_of, measure=measure)
    else:
        first = settle_transformed(
            described, target.name, family, spelling, request.inexact, base, reader.read_of, where, measure=measure
        )
    described = first.described
    groups = fused_groups(described, family, spelling)
    found = unequal_groups(described, groups, reader.read_of)
    refuse_unequal(found, request.inexact, target.name, where, has_base=base is not None)
    settled = settle(described, found, request.inexact, base, reader.read_of, measure=measure)
    with about(where):
        now = named(settled.described, family, spelling, prefix)
        written = target.write(now, reader.read_of)
    expected = written.expected(now)
    if spelling != "diffusers" or prefix:
        expected = under_diffusers_names(expected, Found(family, spelling, prefix, []), where)
    announced = _by_diffusers(written, family, spelling, prefix)
    lossy = (*first.lossy, *settled.lossy, *unpacked(settled.described, expected, reader.read_of))
    shards = _shards(written, target, settled.described, source, request)
    if claim is not None:
        said = claimed_config(claim, described.config, now, target, family, reader.read_of)
        restored = restore(written, claim, target, source, expected, reader.tensors, reader.read_of, where, said)
        if isinstance(restored, Restored):
            written, shards = restored.written, restored.shards
            expected = replace(expected, tensors={**expected.tensors, **restored.found})
    warned = _in_comfyui(written) if target.name == "comfyui" else ()
    is_claimed = claim is not None and not described.config
    if isinstance(restored, Restored) and restored.config.text is not None:
        config: bytes | None = restored.config.text.encode()
    else:
        # What the tensors contradict is forged, or of another file: nothing of it is taken, its architecture neither.
        is_refuted = isinstance(restored, Restored) and bool(restored.config.not_used)
        taken = claim if is_claimed and not is_refuted else None
        if taken is not None and changed_since(taken.digests, reader.tensors, reader.read_of) is None:
            again = replace(now, config=claimed_architecture(taken, family))
            written = replace(written, config=target.write(again, reader.read_of).config)
        if target.name == "modelopt" and spelling == "diffusers" and not prefix:
            written, warned = with_engine_names(written, now.modules)
        config = json_bytes(written.config) if written.config is not None else None
    is_lacking = config is None and target.name in SAID_BY_CONFIG
    if is_lacking or (written.config is not None and not written.config.get("_class_name")):
        raise InputError(
            f"{where}: expected a config.json of {family.class_names[0]}, which {target.name} needs, "
            + (f"found one of {source.other_class}" if source.other_class else "found none")
            + _unused_config(restored),
            code="convert.config",
            path=where,
            hint="--base gives its own; without a base --config names a config.json, or a folder that has one",
        )
    specs = [TensorSpec(one.name, one.dtype, one.shape) for one in written.tensors.values()]
    steps = {spec.name: Step(spec, "export", "copy") for spec in specs}
    if is_claimed and config is not None:
        claimed = "config.json is what the record of SOURCE claims: no file here says the same; --base checks it"
        warned = (*warned, ("convert.config_claimed", claimed))
    kept = (settled.described, lossy, {**first.told, **settled.told})
    return ConvertPlan(steps, shards, written, config, *kept, expected, announced, restored, warned)


def _in_comfyui(written: Written) -> tuple[Warned, ...]:
    """What not every ComfyUI computes with as it is meant."""
    words, by_row = factors(written.tensors), row_scales(written.tensors)
    found = [("convert.factors", f"ComfyUI: {words}")] if words is not None else []
    if by_row:
        many = f"{len(by_row)} FP8 weights have a scale for each row ({by_row[0]} first)"
        found.append(("convert.row_scales", f"ComfyUI: {many}: it loads them, and raises when it multiplies by them"))
    return tuple(found)


def small_files(plan: ConvertPlan) -> dict[str, bytes]:
    """The files beside the weights, but for the record: the index, if any, last."""
    files = {"config.json": plan.config} if plan.config is not None else {}
    if len(plan.shards) > 1:
        weight_map = {spec.name: shard.file for shard in plan.shards for spec in shard.tensors}
        total = {"total_size": sum(step.output.num_bytes for step in plan.steps.values())}
        files[INDEX_NAME] = json_bytes({"metadata": total, "weight_map": dict(sorted(weight_map.items()))})
    return files


def not_restored_warnings(plan: ConvertPlan) -> list[Warned]:
    """What of the record of the source was not used."""
    found = plan.restored
    if isinstance(found, Restored):
        told: list[Warned] = []
        if found.alone:
            claimed = f"{len(found.alone)} scales are what the record of SOURCE claims ({found.alone[0]!r} first)"
            told.append(("convert.scales_claimed", f"{claimed}: no file here says the same, and nothing checks them"))
        return [*told, *_not_used(found)]
    if found is None:
        return []
    words = f"nothing of it was used ({found})"
    return [("convert.not_restored", f"{_RECORD}; {words}")]


def _unused_config(restored: Restored | str | None) -> str:
    """Why a config.json that a record has is not taken, for a message."""
    if restored is None:
        return ""
    why = restored if isinstance(restored, str) else next(iter(restored.not_used), "it has none")
    return f", and that of the record, mopt.json beside SOURCE, is not used ({why})"


def _not_used(found: Restored) -> list[Warned]:
    if not found.not_used:
        return []
    words = f"{len(found.not_used)} of its entries were not used ({found.not_used[0]})"
    return [("convert.not_restored", f"{_RECORD}; {words}")]


def _with_config(described: Canonical, base: CheckpointReader | None) -> Canonical:
    """A description with the base's config, where the source has none."""
    if described.config or base is None:
        return described
    return replace(described, config=without_quantization(base.config))


def _shards(
    written: Written, target: Form, settled: Canonical, source: Source, request: ConvertRequest
) -> tuple[ShardPlan, ...]:
    specs = [TensorSpec(one.name, one.dtype, one.shape) for one in written.tensors.values()]
    if target.naming == "diffusers":
        split = split_into_shards(specs, request.shard_bytes)
        return tuple(ShardPlan(one.file, one.tensors, written.metadata) for one in split)
    algorithm = min({str(one.algorithm) for one in settled.modules.values()}, default="bf16")
    return (ShardPlan(f"{source.found.family.name}-{algorithm}.safetensors", tuple(specs), written.metadata),)


def _by_diffusers(written: Written, family: Family, spelling: Naming, prefix: str) -> dict[str, tuple[str, bool]]:
    """Why tensors are not written as they are, by diffusers' names: every member of a fused module has its scales."""
    found: dict[str, tuple[str, bool]] = {}
    for name in written.changed.keys() | written.instead.keys():
        told = written.why.get(name, ""), name in written.changed and written.changed[name] is None
        names = family.tensor(name.removeprefix(prefix)) if spelling != "diffusers" or prefix else None
        found |= dict.fromkeys(names or (name,), told)
    return found
