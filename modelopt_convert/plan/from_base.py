"""Plan a build without an export: the base itself is quantized. Pure: opens no file, imports no torch.

What is quantized is every weight of two dimensions that the preset does not keep. Headers cannot tell an embedding from
a Linear, so there has to be a preset, which knows the model.
"""

import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

from modelopt_convert import __version__
from modelopt_convert.checkpoint.calibration import Calibrated
from modelopt_convert.checkpoint.header import TensorInfo, TensorSpec
from modelopt_convert.checkpoint.names import module_of, natural_key
from modelopt_convert.dialects.modelopt.dialect import output_config
from modelopt_convert.dialects.packed import PackedModule, module_format
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.formats.format import Format, Weights, entry
from modelopt_convert.plan.ignore import ignore_list, ignored_layers, merged_modules, not_left
from modelopt_convert.plan.inputs import check_blocks, check_merged, check_preset, check_unquantized
from modelopt_convert.plan.keeps import apply_patterns, count_rules, fused_groups, keep_fp32, plain_dtype, with_keep
from modelopt_convert.plan.plan import BuildPlan, Keeps, Source, Step, split_into_shards
from modelopt_convert.preset.patterns import PatternMatcher, siblings
from modelopt_convert.preset.preset import Preset
from modelopt_convert.run.errors import Faults, InputError


class BaseFormat(Protocol):
    """What is made of a base that is quantized here: the entry of a format in this room.

    Attributes:
        inputs: What a quantizer of the format is in ``config_groups``, but for ``dynamic``.
        largest_input: What an input scale makes the largest input, in the format's units.
        shares: Whether ModelOpt's exporter gives one tensor scale to what has one input.
        by_layers: Whether engines read ``ignored_layers`` in place of ``ignore`` where there are no input scales.
    """

    inputs: Mapping[str, Any]
    largest_input: float
    shares: bool
    by_layers: bool

    def steps(self, module: PackedModule, class_name: object, *, is_merged: bool) -> Iterator[Step]:
        """The tensors of a weight in a model of a class; ``is_merged`` where the runtime makes one of several."""

    def fault(self, base: Source, info: TensorInfo) -> InputError | None:
        """Why a weight cannot be quantized, or None."""


def preset_required() -> InputError:
    """The refusal of ``--preset none`` where there is no export either."""
    return InputError(
        "--preset none without --export: nothing says which weights are those of Linears",
        code="preset.required",
        hint="leave --preset out, give the ModelOpt export as --export, or name a preset; `mopt presets` lists them",
    )


def plan_quantized(
    target: Format,
    base: Source,
    keeps: Keeps,
    *,
    max_shard_size: int,
    weights: Weights = "max",
    calibrated: Calibrated | None = None,
) -> BuildPlan:
    """Plan a transformer repo whose weights are quantized here.

    Args:
        target: The format.
        base: The unquantized transformer, in BF16, F16 or F32.
        keeps: What stays in BF16; with a preset.
        max_shard_size: Largest output file, in bytes of tensors.
        weights: How scales and codes are chosen.
        calibrated: What input scales are made of, and what ``sweep-weighted`` and ``gptq`` need; None for inputs that
            the engine scales as they come.

    Returns:
        The plan; its scales are known once the base was measured (``BuildPlan.with_scales``).

    Raises:
        InputError: The base is quantized or not the preset's model, a pattern does not fit, a weight has no whole
            blocks, or a module was not calibrated.
    """
    preset = keeps.preset
    if preset is None:
        raise preset_required()
    check_merged(base, "base")
    check_preset(preset, base)
    check_blocks(base)
    faults = Faults()
    with faults.taken():
        check_unquantized(base)
    quantizer: BaseFormat = entry("modelopt_convert.plan", target.algorithm)
    modules = {module.name: module for module in _linears(base, quantizer)}
    matcher = PatternMatcher(sorted({module_of(name) for name in base.tensors}, key=natural_key))
    replaced, matched = apply_patterns(keeps, matcher, modules, faults)
    packed = {name: module for name, module in modules.items() if name not in replaced}
    fused: tuple[tuple[str, ...], ...] = ()
    with faults.taken():
        fused = fused_groups(preset, modules, replaced, base)
    for name, module in packed.items():
        if module.fault is not None:
            faults.add(name, with_keep(module.fault, name, fused))
    fp32: frozenset[str] = frozenset()
    with faults.taken():
        fp32 = keep_fp32(preset, matcher, base)
    shared: tuple[tuple[str, ...], ...] = ()
    with faults.taken():
        shared = _shared_groups(preset, packed) if quantizer.shares else ()
    largest, found_of = dict[str, float](), dict[str, dict[str, Any]]()
    if calibrated is not None:
        for name, module in packed.items():
            with faults.taken(name):
                largest[name] = calibrated.largest(name)
                found_of[name] = calibrated.needed(weights, name, module.columns)
    faults.refuse()
    if len(replaced) == len(modules):
        raise InputError(
            f"{base.path}: all {len(modules)} Linears would be kept in BF16, nothing would be quantized",
            code="preset.nothing_left",
            path=str(base.path),
            hint="use the base as it is, or keep fewer modules",
        )
    merged = merged_modules(modules, preset, base.config)
    found: dict[str, Step] = {}
    fates: dict[str, str] = {}
    for name, info in base.tensors.items():
        if name == f"{module_of(name)}.weight" and module_of(name) in packed:
            module = packed[module_of(name)]
            made = quantizer.steps(module, base.config.get("_class_name"), is_merged=module.name in merged)
            needed = found_of.get(module.name, {})
            found |= {step.output.name: replace(step, weights=weights, **needed) for step in made}
            if calibrated is not None:
                group = next((one for one in shared if module.name in one), (module.name,))
                scale = input_scale(max(largest[one] for one in group), calibrated.headroom, quantizer.largest_input)
                shape = module_format(target).shape(module, "input_scale", is_merged=module.name in merged)
                spec = TensorSpec(f"{module.name}.input_scale", "F32", shape)
                found[spec.name] = Step(spec, "base", "write_scale", scale)
            fates[name] = "quantized" + ("" if info.dtype == "BF16" else f": {info.dtype} rounded to BF16 first")
        else:
            dtype = plain_dtype(info, fp32)
            cast = dtype != info.dtype
            found[name] = Step(TensorSpec(name, dtype, info.shape), "base", "cast_bf16" if cast else "copy")
            fates[name] = f"used: cast {info.dtype} to {dtype}" if cast else "used"
    steps = dict(sorted(found.items(), key=lambda item: natural_key(item[0])))
    ignore = ignore_list(steps, target, packed, preset, base.config)
    keys, warnings = declared(target, quantizer.inputs, is_static=calibrated is not None), []
    if quantizer.by_layers and calibrated is None:
        keys["ignored_layers"] = ignored_layers(ignore, packed, preset, base.config)
        rules = preset.rules(target.algorithm)
        loose = [name for name, pattern in replaced.items() if pattern not in rules.structural]
        warnings = list(_taken_for_packed(not_left(loose, keys["ignored_layers"], preset, base.config)))
    return BuildPlan(
        format=target,
        steps=steps,
        shards=split_into_shards([step.output for step in steps.values()], max_shard_size),
        config=output_config(base.config, keys, ignore, target),
        modules=modules,
        replaced=replaced,
        fused=fused,
        rules=tuple(count_rules(keeps, matched, replaced, steps)),
        ledger={"base": fates},
        dequantized=(),
        must_equal=(),
        may_differ=(),
        warnings=tuple(warnings),
        shared=shared,
        weights=weights,
    )


def declared(target: Format, inputs: Mapping[str, Any], *, is_static: bool) -> dict[str, Any]:
    """Keys of ``quantization_config`` beside ``ignore``, ``ignored_layers`` and what the format declares.

    Args:
        target: The format.
        inputs: See ``BaseFormat``.
        is_static: Whether modules have input scales: then all is as ModelOpt 0.47's convert_hf_config.py has it. Else
            the engine scales the inputs, and TensorRT-LLM does so where the group says it.
    """
    quantizer = {"dynamic": False, **inputs}
    group = {"input_activations": quantizer | {"dynamic": not is_static}, "weights": quantizer, "targets": ["Linear"]}
    return {
        "quant_algo": target.quant_algo,
        "config_groups": {"group_0": group},
        "producer": {"name": "mopt", "version": __version__},
        **({"quant_method": "modelopt"} if is_static else target.dynamic),
    }


def input_scale(amax: float, headroom: float, largest: float) -> float:
    """An input scale as ModelOpt's exporter makes it, in float32: ``get_activation_scaling_factor`` in quant_utils.py.

    Args:
        amax: Largest magnitude that was seen, a float32.
        headroom: By which it is multiplied first.
        largest: What it becomes under the scale: 6 x 448 of NVFP4, 448 of FP8.
    """
    return _float32(_float32(amax * headroom) / largest)


def _float32(value: float) -> float:
    """A float64 rounded to float32; a product or quotient of two float32 is so rounded as if it were rounded once."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _linears(base: Source, quantizer: "BaseFormat") -> Iterator[PackedModule]:
    """What ModelOpt would see as a Linear, if nothing were kept."""
    for name, info in base.tensors.items():
        if not name.endswith(".weight") or len(info.shape) != 2 or 0 in info.shape or info.dtype not in HALF_AND_FLOAT:
            continue
        rows, columns = info.shape
        bias = base.tensors.get(f"{module_of(name)}.bias")
        yield PackedModule(module_of(name), rows, columns, info, {}, bias, quantizer.fault(base, info))


def _taken_for_packed(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """What a user should know of modules that no entry of ``ignored_layers`` can name."""
    if modules:
        yield (
            "engine.shared_name",
            f"SGLang casts {len(modules)} modules kept in BF16 to FP8 ({min(modules)} first): it finds a module by any "
            "part of its name, and quantized ones have that part too",
        )


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
