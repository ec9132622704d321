"""The structure check of a finished stage: headers, index and config against the plan and each other. No torch."""

from pathlib import Path

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.commands.closing import opened_stage, written_faults
from modelopt_convert.dialects.modelopt.export import check_quant_config
from modelopt_convert.dialects.packed import Evidence, find_packed
from modelopt_convert.engines.sglang import GUESSED, believe, ignored_by, misread
from modelopt_convert.formats.layout import CANONICAL
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.formats.table import declares_dynamic_inputs
from modelopt_convert.plan.plan import BuildPlan
from modelopt_convert.preset.patterns import ignored
from modelopt_convert.run.errors import InputError


def check_structure(folder: Path, plan: BuildPlan) -> list[str]:
    """Open what was written as any reader would, and compare.

    Returns:
        What is wrong, in words; empty if nothing is.

    Raises:
        CheckFailedError, StorageError: What ``opened_stage`` raises.
    """
    with opened_stage(folder) as reader:
        faults = written_faults(reader, plan.steps, plan.shards)
        evidence = Evidence(dynamic_inputs=declares_dynamic_inputs(plan.config))
        modules = find_packed(reader.tensors, plan.format, evidence, path=str(folder)).or_raise()
        faults += [module.fault.message for module in modules.values() if module.fault is not None]
        if sorted(modules) != sorted(plan.packed):
            faults.append("the packed modules are not the planned ones")
        for module in modules.values():
            if len({info.file for info in module.tensors}) > 1:
                faults.append(f"{module.name} is spread over several files")
        for group in plan.fused:
            if not set(group) <= modules.keys():
                faults.append(f"fused group {', '.join(group)} is not whole")
        faults += _config_faults(reader, plan, set(modules), str(folder))
    return faults


def refuse_misread(plan: BuildPlan, path: str) -> None:
    """Refuse, before any work, what the target engine would misread although it is written right.

    Of other formats the engine guesses nothing; ``ignore`` is settled where the list is made.

    Raises:
        InputError: ``engine.misread``.
    """
    if plan.format.algorithm not in GUESSED:
        return
    tensors = {
        spec.name: TensorInfo(spec.name, spec.dtype, spec.shape, shard.file, 0, spec.num_bytes)
        for shard in plan.shards
        for spec in shard.tensors
    }
    metadata = {shard.file: shard.metadata for shard in plan.shards}
    belief = believe(tensors, metadata, plan.config)
    faults = misread(belief, CANONICAL.nibbles, CANONICAL.scales, group_size=BLOCK_SIZE, packed=frozenset(plan.packed))
    if faults:
        raise InputError(
            f"{path}: {faults[0]} ({belief.because[0]})",
            code="engine.misread",
            path=path,
            hint="give export and base in diffusers' naming; nothing else can change what the engine believes",
        )


def _config_faults(reader: CheckpointReader, plan: BuildPlan, packed: set[str], path: str) -> list[str]:
    config = check_quant_config(reader.config, plan.format, path=path)
    linears = {
        module_of(name) for name, info in reader.tensors.items() if name.endswith(".weight") and len(info.shape) >= 2
    }
    ignore = ignored(config["ignore"], {*packed, *linears}, path=path) | set(config["ignore"])
    faults = [f"`ignore` lists the packed module {name}" for name in sorted(packed) if ignored_by(ignore, name)]
    faults += [f"`ignore` does not list {name}, which is not packed" for name in sorted(linears - packed - ignore)]
    planned = {**plan.config["quantization_config"], **plan.format.declared}
    faults += [f"{key} is {config.get(key)!r}" for key, value in planned.items() if config.get(key) != value]
    return faults
