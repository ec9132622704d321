"""Plan ``build-nvfp4`` without an export: the base itself is quantized. Pure: opens no file, imports no torch.

What is quantized is every weight of two dimensions that the preset does not keep. Headers cannot tell an embedding from
a Linear, so there has to be a preset, which knows the model.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from modelopt_convert import __version__
from modelopt_convert.checkpoint.header import TensorInfo, TensorSpec
from modelopt_convert.checkpoint.names import module_of, natural_key
from modelopt_convert.dialects.modelopt.export import PackedModule
from modelopt_convert.dialects.modelopt.nvfp4 import BLOCK_SIZE
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.formats.table import NVFP4
from modelopt_convert.plan.ignore import ignore_list, merged_modules
from modelopt_convert.plan.inputs import check_preset, check_unquantized
from modelopt_convert.plan.keeps import apply_patterns, count_rules, fused_groups, keep_fp32, plain_dtype, siblings
from modelopt_convert.plan.plan import BuildPlan, Keeps, Op, Source, Step, split_into_shards
from modelopt_convert.preset.patterns import PatternMatcher
from modelopt_convert.preset.preset import Preset
from modelopt_convert.run.errors import InputError

# As ModelOpt 0.47's convert_hf_config.py has them, but for the inputs: these are scaled by the engine.
_DECLARED: Mapping[str, Any] = {
    "quant_method": "modelopt",
    "quant_algo": NVFP4.quant_algo,
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": True, "num_bits": 4, "type": "float", "group_size": BLOCK_SIZE},
            "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK_SIZE},
            "targets": ["Linear"],
        }
    },
    "producer": {"name": "mopt", "version": __version__},
    "dynamic_input_scale": True,
}


def preset_required() -> InputError:
    """The refusal of ``--preset none`` where there is no export either."""
    return InputError(
        "--preset none without --export: nothing says which weights are those of Linears",
        code="preset.required",
        hint="name a preset (`mopt presets` lists them), leave --preset out, or give the ModelOpt export as --export",
    )


def plan_quantized(base: Source, keeps: Keeps, *, max_shard_size: int) -> BuildPlan:
    """Plan a transformer repo whose weights are quantized here.

    Args:
        base: The unquantized transformer, in BF16, F16 or F32.
        keeps: What stays in BF16; with a preset.
        max_shard_size: Largest output file, in bytes of tensors.

    Returns:
        The plan; its scales are known once the base was measured (``BuildPlan.with_scales``).

    Raises:
        InputError: The base is quantized or not the preset's model, a pattern does not fit, a weight has no whole
            blocks.
    """
    preset = keeps.preset
    if preset is None:
        raise preset_required()
    check_unquantized(base)
    check_preset(preset, base)
    modules = {module.name: module for module in _linears(base)}
    matcher = PatternMatcher(sorted({module_of(name) for name in base.tensors}, key=natural_key))
    replaced, matched = apply_patterns(keeps, matcher, modules)
    for module in modules.values():
        if module.fault is not None and module.name not in replaced:
            raise module.fault
    if len(replaced) == len(modules):
        raise InputError(
            f"{base.path}: all {len(modules)} Linears would be kept in BF16, nothing would be quantized",
            code="preset.nothing_left",
            path=str(base.path),
            hint="use the base as it is, or keep fewer modules",
        )
    packed = {name: module for name, module in modules.items() if name not in replaced}
    fp32 = keep_fp32(preset, matcher, base)
    merged = merged_modules(modules, preset, base.config)
    found: dict[str, Step] = {}
    fates: dict[str, str] = {}
    for name, info in base.tensors.items():
        if name == f"{module_of(name)}.weight" and module_of(name) in packed:
            module = packed[module_of(name)]
            found |= {step.output.name: step for step in _quantized(module, module.name in merged)}
            fates[name] = "quantized" + ("" if info.dtype == "BF16" else f": {info.dtype} rounded to BF16 first")
        else:
            dtype = plain_dtype(info, fp32)
            cast = dtype != info.dtype
            found[name] = Step(TensorSpec(name, dtype, info.shape), "base", "cast_bf16" if cast else "copy")
            fates[name] = f"used: cast {info.dtype} to {dtype}" if cast else "used"
    steps = dict(sorted(found.items(), key=lambda item: natural_key(item[0])))
    ignore = ignore_list(steps, NVFP4, packed, preset, base.config)
    # _name_or_path is where the machine that saved it kept the model.
    rest = {key: value for key, value in base.config.items() if key != "_name_or_path"}
    return BuildPlan(
        format=NVFP4,
        steps=steps,
        shards=split_into_shards([step.output for step in steps.values()], max_shard_size),
        config=rest | {"quantization_config": {**_DECLARED, "ignore": ignore, **NVFP4.declared}},
        modules=modules,
        replaced=replaced,
        fused=fused_groups(preset, modules, replaced, base),
        rules=tuple(count_rules(keeps, matched, replaced, steps)),
        ledger={"base": fates},
        dequantized=(),
        must_equal=(),
        may_differ=(),
        shared=_shared_groups(preset, packed),
    )


def _linears(base: Source) -> Iterator[PackedModule]:
    """What ModelOpt would see as a Linear, if nothing were kept."""
    for name, info in base.tensors.items():
        if not name.endswith(".weight") or len(info.shape) != 2 or 0 in info.shape or info.dtype not in HALF_AND_FLOAT:
            continue
        rows, columns = info.shape
        bias = base.tensors.get(f"{module_of(name)}.bias")
        yield PackedModule(module_of(name), rows, columns, info, {}, bias, _block_fault(base, info))


def _block_fault(base: Source, info: TensorInfo) -> InputError | None:
    """ModelOpt's exporter asserts the same (``NVFP4QTensor.get_weights_scaling_factor``)."""
    if info.shape[1] % BLOCK_SIZE == 0:
        return None
    where = f"{base.path}/{info.file}"
    return InputError(
        f"{where}: tensor {info.name!r}: expected K divisible by {BLOCK_SIZE}, found K = {info.shape[1]}",
        code="base.block_size",
        path=where,
        hint=f"NVFP4 scales blocks of {BLOCK_SIZE} columns: --keep-bf16 '{module_of(info.name)}'",
    )


def _quantized(module: PackedModule, is_merged: bool) -> Iterator[Step]:
    outputs: dict[str, tuple[str, tuple[int, ...], Op]] = {
        "weight": (NVFP4.packed_dtype, (module.rows, module.columns // 2), "quantize_nvfp4"),
        "weight_scale": ("F8_E4M3", (module.rows, module.columns // BLOCK_SIZE), "block_scales"),
        # A loader that joins modules into one cannot join scales of no dimension.
        "weight_scale_2": ("F32", (1,) if is_merged else (), "write_scale"),
    }
    for role, (dtype, shape, op) in outputs.items():
        yield Step(TensorSpec(f"{module.name}.{role}", dtype, shape), "base", op)


def _shared_groups(preset: Preset, packed: Mapping[str, PackedModule]) -> tuple[tuple[str, ...], ...]:
    """Packed modules that get one global scale, as ModelOpt's export gives it (``_fuse_qkv_linears_diffusion``).

    Raises:
        InputError: ``preset.shared_scale``.
    """
    if preset.shared_scale is None:
        raise InputError(
            f"preset {preset.name}: does not say which modules share a global scale",
            code="preset.shared_scale",
            hint="add shared_scale: the groups with one input (q, k and v of self-attention), or [] for none",
        )
    groups = [group for group in siblings(preset.shared_scale, packed) if len(group) > 1]
    members = [module for group in groups for module in group]
    twice = next((module for module in members if members.count(module) > 1), None)
    if twice is not None:
        raise InputError(
            f"preset {preset.name}: {twice} is in two groups of shared_scale",
            code="preset.shared_scale",
            hint="a module has one global scale: name it in one group",
        )
    return tuple(groups)
