"""Plan ``build-nvfp4`` and ``convert-fp8`` from headers and configs alone. Pure: opens no file, imports no torch.

Both inputs must be the same model, every pattern must match, no fused group may be kept in part; then every tensor of
both gets its fate.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec

from modelopt_convert.checkpoint.header import TensorInfo, TensorSpec
from modelopt_convert.checkpoint.names import module_of, natural_key
from modelopt_convert.dialects.calibration import Calibration
from modelopt_convert.dialects.modelopt.dialect import output_config, split_keys
from modelopt_convert.dialects.modelopt.export import check_exported, check_quant_config
from modelopt_convert.dialects.packed import (
    UNCALIBRATED,
    Evidence,
    PackedModule,
    add_faults,
    find_packed,
    is_layout_marker,
    is_quantizer_state,
    module_format,
)
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.formats.format import Format
from modelopt_convert.plan.ignore import ignore_list, merged_modules
from modelopt_convert.plan.inputs import (
    check_base,
    check_configs,
    check_merged,
    check_not_exchanged,
    check_plain,
    check_preset,
    model_tensors,
    one_sided_words,
)
from modelopt_convert.plan.keeps import (
    apply_patterns,
    count_rules,
    fused_groups,
    keep_fp32,
    plain_dtype,
    structural_warnings,
    with_keep,
)
from modelopt_convert.plan.plan import BuildPlan, Keeps, Op, Part, Source, Step, split_into_shards
from modelopt_convert.preset.patterns import PatternMatcher, ignored
from modelopt_convert.preset.preset import preset_of_class
from modelopt_convert.run.errors import Faults, InputError, joint

_SHAPE = "export.shape"


def plan_mixed(
    target: Format,
    export: Source,
    base: Source | None,
    keeps: Keeps,
    faults: Faults,
    *,
    max_shard_size: int,
    calibration: Calibration | None = None,
    output: str | None = None,
) -> BuildPlan | None:
    """Plan a transformer repo of which part is quantized and part BF16.

    Args:
        target: The format, of the export and of the output.
        export: A ModelOpt diffusers export.
        base: The unquantized transformer it was made from; only FP8 can do without.
        keeps: What stays in BF16.
        faults: Gets what is wrong with headers, configs and patterns.
        max_shard_size: Largest output file, in bytes of tensors.
        calibration: Amax values from a ``--checkpoint``, FP8 only.
        output: OUT as the command line has it, for messages.

    Returns:
        The plan. Where modules have faults it is that of all others, to look at their data and to write nothing. None
        where what is wrong is not of a module: a pattern, a fused group, a key of config.json or a whole input.

    Raises:
        InputError: The export is not one of this format and model.
    """
    where = export.config_place
    if base is not None:
        check_not_exchanged(export, base)
        check_merged(base, "base")
    check_exported(export.config, export.tensors, path=where)
    quant_config = check_quant_config(
        export.config,
        target,
        path=where,
        export=str(export.path),
        base="BASE" if base is None else str(base.path),
        output=output,
    )
    check_merged(export, "export")
    # Another model altogether would make a fault of everything that follows.
    check_preset(keeps.preset, export)
    if base is not None:
        with faults.taken():
            check_configs(export, base)
    modules, refused = _find_modules(target, export, base, calibration or {}, quant_config.get("ignore"), faults)
    if not modules:
        return None
    with faults.taken():
        if base is not None:
            check_base(export, base, modules, refused)
        else:
            check_plain(export, modules, refused)
    names = {*model_tensors(export), *(base.tensors if base else ())}
    matcher = PatternMatcher(sorted({module_of(name) for name in names}, key=natural_key))
    replaced, matched = apply_patterns(keeps, matcher, modules, faults)
    fused: tuple[tuple[str, ...], ...] = ()
    with faults.taken():
        fused = fused_groups(keeps.preset, modules, replaced, export, refused)
    _add_faults(faults, target, modules, replaced, fused, str(export.path), has_base=base is not None)
    fp32: frozenset[str] = frozenset()
    with faults.taken():
        fp32 = keep_fp32(keeps.preset, matcher, base or export)
    if faults.names:
        known_names = {*modules, *refused}
        broken = _broken(faults.names, known_names, export, base)
        otherwise = _broken(faults.names_but(UNCALIBRATED), known_names, export, base)
        if broken is None or otherwise is None:
            return None
        # A weight is looked at without its input scale: an export that was never calibrated may be damaged, too.
        broken -= {name for name, one in modules.items() if one.has_weight} - otherwise
        modules = {name: one if name in replaced else replace(one, fault=None) for name, one in modules.items()}
        export, base = _sound(export, broken), _sound(base, broken) if base is not None else None
        modules = {name: one for name, one in modules.items() if name not in broken}
        replaced = {name: by for name, by in replaced.items() if name not in broken}
        fused = tuple(group for group in fused if broken.isdisjoint(group))
    elif len(replaced) == len(modules):
        raise InputError(
            f"{export.path}: all {len(modules)} packed modules would be kept in BF16, nothing would be quantized",
            code="preset.nothing_left",
            path=str(export.path),
            hint="use the base as it is, or keep fewer modules",
        )
    merged = merged_modules(modules, keeps.preset, export.config)
    build = _Build(target, export, base, modules, replaced, fp32, merged)
    build.run()
    steps = dict(sorted(build.steps.items(), key=lambda item: natural_key(item[0])))
    keys, dropped = split_keys(quant_config)
    packed = modules.keys() - replaced.keys()
    # Without a preset, too, engines look modules up by the names of the class.
    known = keeps.preset or preset_of_class(export.config)
    ignore = ignore_list(steps, target, packed, known, export.config)
    return BuildPlan(
        format=target,
        steps=steps,
        shards=split_into_shards([step.output for step in steps.values()], max_shard_size),
        config=output_config(export.config, keys, ignore, target),
        modules=modules,
        replaced=replaced,
        fused=fused,
        rules=tuple(count_rules(keeps, matched, replaced, steps)),
        ledger={"export": build.export_fates} | ({"base": build.base_fates} if base else {}),
        dequantized=tuple(build.dequantized),
        must_equal=tuple(build.must_equal),
        may_differ=tuple(build.may_differ),
        warnings=(
            *_config_warnings(dropped, quant_config.get("ignore"), modules, where),
            *(("config.one_sided", words) for words in _one_sided(export, base)),
            *(
                structural_warnings(known, target, matcher, packed, export.config)
                if keeps.preset is None and known
                else ()
            ),
        ),
    )


def _broken(
    names: Collection[str], modules: Collection[str], export: Source, base: Source | None
) -> frozenset[str] | None:
    """The modules of which all that is wrong is; None if something is not of a module."""
    tensors = export.tensors.keys() | (base.tensors.keys() if base is not None else ())
    if not all(name in modules or name in tensors for name in names):
        return None
    return frozenset(module_of(name) if name in tensors else name for name in names)


def _sound(source: Source, broken: Collection[str]) -> Source:
    """A checkpoint without some modules."""
    tensors = {name: one for name, one in source.tensors.items() if module_of(name) not in broken}
    return Part(source.path, source.folder, source.config_place, tensors, source.config)


def needs_base(fault: InputError) -> InputError:
    """The fault of a module that is kept in BF16: without a base its scale is all that its weight can be had from."""
    hint = "give --base, which modules kept in BF16 are taken from; or export again"
    return joint(
        [
            (name, InputError(one.message, code=one.code, path=one.path, hint=hint))
            for name, one in fault.parts or (("", fault),)
        ]
    )


def _find_modules(
    target: Format, export: Source, base: Source | None, calibration: Calibration, ignore: object, faults: Faults
) -> tuple[dict[str, PackedModule], Collection[str]]:
    """The quantized modules, and the modules and tensors that are refused, whose faults are added."""
    true_shapes = {name: info.shape for name, info in base.tensors.items()} if base else {}
    evidence = Evidence(true_shapes, calibration, ignore)
    found = find_packed(export.tensors, target, evidence, path=str(export.path))
    for name, fault in found.refused.items():
        faults.add(name, fault)
    if not found.modules and not faults.names:
        raise InputError(
            f"{export.path}: expected {target.quant_algo} modules ({target.packed_dtype} weights), found none",
            code="export.nothing_quantized",
            path=str(export.path),
            hint=f"the export failed before its end or was never calibrated; export again{target.older}",
        )
    return found.modules, found.refused.keys()


def _add_faults(
    faults: Faults,
    target: Format,
    modules: Mapping[str, PackedModule],
    replaced: Mapping[str, str],
    fused: Sequence[Sequence[str]],
    where: str,
    *,
    has_base: bool,
) -> None:
    """Add the faults of scales, of modules that stay quantized and of those that are dequantized for want of a base."""
    # Of a format that has an entry in this room a base is quantized without an export.
    without = "leave out --export, or " if find_spec(f"modelopt_convert.plan.{target.algorithm}") is not None else ""
    hint = f"never calibrated: {without}calibrate with real prompts and export again"
    told = faults.names
    due = {
        name: one if one.fault is None else replace(one, fault=with_keep(one.fault, name, fused))
        for name, one in modules.items()
        if name not in replaced and not _is_cut(one, told)
    }
    add_faults(faults, due, where, hint)
    for name in () if has_base else replaced:
        if (fault := modules[name].fault) is not None and _is_coded(modules[name]):
            faults.add(name, needs_base(fault))


def _is_cut(module: PackedModule, told: Collection[str]) -> bool:
    """Whether the shape of the weight is told already: scales that do not fit it are no other fault."""
    fault = module.fault
    return fault is not None and module.weight.name in told and {one.code for one in fault.each()} == {_SHAPE}


def _is_coded(module: PackedModule) -> bool:
    """Whether the weight is stored as codes, which mean nothing without their scale."""
    return module.weight.dtype not in HALF_AND_FLOAT


class _Build:
    """Walks both inputs once and gives every tensor its fate."""

    def __init__(
        self,
        target: Format,
        export: Source,
        base: Source | None,
        modules: Mapping[str, PackedModule],
        replaced: Mapping[str, str],
        keep_fp32: frozenset[str],
        merged: frozenset[str],
    ) -> None:
        self._target = target
        self._export = export
        self._base: Mapping[str, TensorInfo] | None = base.tensors if base else None
        self._modules = modules
        self._replaced = replaced
        self._keep_fp32 = keep_fp32
        self._merged = merged
        self.steps: dict[str, Step] = {}
        self.export_fates: dict[str, str] = {}
        self.base_fates: dict[str, str] = {}
        self.dequantized: list[str] = []
        self.must_equal: list[str] = []
        self.may_differ: list[str] = []

    def run(self) -> None:
        for name, info in self._export.tensors.items():
            if is_quantizer_state(name):
                self.export_fates[name] = "dropped: calibration state"
                continue
            if is_layout_marker(name):
                self.export_fates[name] = "dropped: layout marker of another loader"
                continue
            module = self._modules.get(module_of(name))
            if module is None:
                self._plain(name, "unquantized")
            elif module.name in self._replaced:
                self._replace(module, info)
            elif info is module.bias:
                self._bias(info)
            else:
                self._keep(info, module)
        for module in self._modules.values():
            for role, value in module.calibrated.items() if module.name not in self._replaced else ():
                self._put(f"{module.name}.{role}", "F32", (1,), "write_scale", value)
        for name in self._base or ():
            self.base_fates.setdefault(name, "unused: packed in the output")

    def _put(self, name: str, dtype: str, shape: tuple[int, ...], op: Op, value: float | None = None) -> None:
        self.steps[name] = Step(TensorSpec(name, dtype, shape), "export", op, value)

    def _plain(self, name: str, fate: str) -> None:
        """A tensor that the export did not quantize."""
        if self._base is not None:
            self._from_base(self._base, name, f"from base: {fate}")
            self.must_equal.append(name)
            return
        info = self._export.tensors[name]
        dtype = plain_dtype(info, self._keep_fp32)
        self._put(name, dtype, info.shape, "copy" if dtype == info.dtype else "cast_bf16")
        self.export_fates[name] = f"kept: {fate}" + ("" if dtype == info.dtype else f", {info.dtype} to {dtype}")

    def _bias(self, info: TensorInfo) -> None:
        """Of a module that stays quantized: the export's, unless it was rounded to another dtype there."""
        if info.dtype != "BF16":
            self._plain(info.name, f"{info.dtype} bias of a packed module")
            return
        self._put(info.name, info.dtype, info.shape, "copy")
        self.export_fates[info.name] = "kept"
        if self._base is not None:
            self.may_differ.append(info.name)

    def _keep(self, info: TensorInfo, module: PackedModule) -> None:
        """A weight or scale of a module that stays quantized."""
        role = info.name.rpartition(".")[2]
        shape = module_format(self._target).shape(module, role, is_merged=module.name in self._merged)
        if info is not module.weight or _is_coded(module):
            checked = info is module.weight and info.dtype == "F8_E4M3"  # whose codes can be NaN
            self._put(info.name, info.dtype, shape, "copy_e4m3" if checked else "copy")
            self.export_fates[info.name] = "kept"
            return
        self._put(info.name, self._target.packed_dtype, shape, "quantize_fp8", module.calibrated.get("weight_scale"))
        self.export_fates[info.name] = f"quantized: {info.dtype} to {self._target.packed_dtype}"
        if self._base is not None:
            self.must_equal.append(info.name)

    def _replace(self, module: PackedModule, info: TensorInfo) -> None:
        """A tensor of a quantized module that shall be BF16."""
        if info is not module.weight and info is not module.bias:
            self.export_fates[info.name] = "dropped: scale of a module kept in BF16"
        elif self._base is not None and info.name in self._base:
            self._from_base(self._base, info.name, "replaced: kept in BF16")
        elif info is module.weight and _is_coded(module):
            self._put(info.name, "BF16", info.shape, "dequantize_fp8", module.calibrated.get("weight_scale"))
            self.export_fates[info.name] = "dequantized: kept in BF16"
            self.dequantized.append(module.name)
        else:
            self._plain(info.name, "kept in BF16")

    def _from_base(self, base: Mapping[str, TensorInfo], name: str, fate: str) -> None:
        info = base[name]
        dtype = plain_dtype(info, self._keep_fp32)
        as_is = dtype == info.dtype
        self.steps[name] = Step(TensorSpec(name, dtype, info.shape), "base", "copy" if as_is else "cast_bf16")
        exported = self._export.tensors[name].dtype
        same = exported in (dtype, self._target.packed_dtype)
        self.export_fates[name] = fate if same else f"{fate}, {exported} to {dtype}"
        self.base_fates[name] = "used" if as_is else f"used: cast {info.dtype} to BF16"


def _one_sided(export: Source, base: Source | None) -> list[str]:
    return one_sided_words(export.config, base.config, "the export") if base is not None else []


def _config_warnings(
    dropped: Sequence[str], ignore: object, modules: Mapping[str, PackedModule], where: str
) -> Iterator[tuple[str, str]]:
    if dropped:
        yield "config.dropped_keys", f"not carried into quantization_config: {', '.join(dropped)}"
    covered = ignored(ignore, modules, path=where)
    listed = [name for name in modules if name in covered]
    if listed:
        yield (
            "config.stale_ignore",
            f"the export's `ignore` lists {len(listed)} modules that are packed ({listed[0]} first); it is rebuilt",
        )
