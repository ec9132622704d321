"""Plan ``build-nvfp4`` from headers and configs alone. Pure: opens no file, imports no torch.

Both inputs must be the same model, every pattern must match, no fused group may be kept in part; then every tensor of
both gets its fate.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from modelopt_convert.dialects.modelopt import (
    BLOCK_SIZE,
    Nvfp4Module,
    check_nvfp4_config,
    find_nvfp4_modules,
    is_layout_marker,
    is_quantizer_state,
)
from modelopt_convert.dtypes import HALF_AND_FLOAT
from modelopt_convert.errors import InputError
from modelopt_convert.header import TensorInfo, TensorSpec
from modelopt_convert.patterns import PatternMatcher, check_pattern, module_of, rename
from modelopt_convert.plan import BuildPlan, Keeps, RuleCount, Source, Step, natural_key, split_into_shards
from modelopt_convert.preset import Preset

# Of an export's quantization_config these mean what they say in the output too; the rest is rebuilt or left out.
_KEPT_CONFIG_KEYS = ("quant_method", "quant_algo", "config_groups", "producer", "kv_cache_scheme")
_INTEGER_DTYPES = frozenset({"BOOL", "I8", "I16", "U16", "I32", "U32", "I64", "U64"})


def plan_nvfp4(export: Source, base: Source, keeps: Keeps, *, max_shard_size: int) -> BuildPlan:
    """Plan a mixed BF16+NVFP4 transformer repo.

    Args:
        export: A ModelOpt NVFP4 diffusers export.
        base: The unquantized transformer it was made from.
        keeps: What stays in BF16.
        max_shard_size: Largest output file, in bytes of tensors.

    Raises:
        InputError: The export is not plain NVFP4, the base does not fit it, or a pattern does not fit either.
    """
    where = str(export.path / "config.json")
    quant_config = check_nvfp4_config(export.config, path=where)
    _check_configs(export, base)
    _check_preset(keeps.preset, export)
    base_shapes = {name: info.shape for name, info in base.tensors.items()}
    modules = find_nvfp4_modules(export.tensors, base_shapes, path=str(export.path))
    if not modules:
        raise InputError(
            f"{export.path}: expected NVFP4 modules (U8 weights), found none",
            code="export.nothing_quantized",
            path=str(export.path),
            hint="the export failed half-way or was never calibrated; export again",
        )
    _check_base(export, base, modules)
    matcher = PatternMatcher(
        sorted({module_of(name) for name in _weights(export) | set(base.tensors)}, key=natural_key)
    )
    replaced, matched = _apply_patterns(keeps, matcher, modules)
    for module in modules.values():
        if module.fault is not None and module.name not in replaced:
            raise module.fault
    if len(replaced) == len(modules):
        raise InputError(
            f"{export.path}: all {len(modules)} packed modules would be kept in BF16, nothing would be quantized",
            code="preset.nothing_left",
            path=str(export.path),
            hint="use the base as it is, or keep fewer modules",
        )
    fused = _fused_groups(keeps.preset, modules, replaced, export)
    keep_fp32 = _keep_fp32(keeps.preset, matcher, base)
    build = _Build(export, base, modules, replaced, keep_fp32)
    build.run()
    steps = dict(sorted(build.steps.items(), key=lambda item: natural_key(item[0])))
    config = _output_config(export.config, quant_config, steps, keeps.preset)
    return BuildPlan(
        steps=steps,
        shards=split_into_shards([step.output for step in steps.values()], max_shard_size),
        config=config,
        modules=modules,
        replaced=replaced,
        fused=fused,
        rules=tuple(_count_rules(keeps, matched, replaced, steps)),
        ledger={"export": build.export_fates, "base": build.base_fates},
        must_equal=tuple(build.must_equal),
        may_differ=tuple(build.may_differ),
        warnings=tuple(_config_warnings(quant_config, modules, matcher)),
    )


def _weights(export: Source) -> set[str]:
    """Names of the tensors that are part of the model: no calibration state, no markers."""
    return {name for name in export.tensors if not is_quantizer_state(name) and not is_layout_marker(name)}


def _check_configs(export: Source, base: Source) -> None:
    path = str(base.path / "config.json")
    if base.config.get("quantization_config") is not None:
        raise InputError(
            f"{path}: expected an unquantized base, found a quantization_config",
            code="base.quantized",
            path=path,
            hint="give the original model as --base, and the ModelOpt export as --export",
        )
    for key in ("_class_name", *sorted(export.config.keys() & base.config.keys())):
        # Keys with an underscore say who wrote the file, not what the model is.
        if key.startswith("_") and key != "_class_name":
            continue
        left, right = export.config.get(key), base.config.get(key)
        if left != right:
            raise InputError(
                f"{path}: {key}: expected {left!r} as in the export, found {right!r}",
                code="base.config",
                path=path,
                hint="give the base that the export was made from",
            )


def _check_preset(preset: Preset | None, export: Source) -> None:
    if preset is None:
        return
    expected = {"_class_name": preset.class_name, **preset.config}
    for key, value in expected.items():
        found = export.config.get(key)
        if found != value:
            raise InputError(
                f"{export.path / 'config.json'}: {key}: preset {preset.name} expects {value!r}, found {found!r}",
                code="preset.wrong_model",
                path=str(export.path / "config.json"),
                hint="leave --preset out to have it chosen, or name the model's own",
            )


def _check_base(export: Source, base: Source, modules: Mapping[str, Nvfp4Module]) -> None:
    """Require that both inputs are the same model: same tensors, same shapes, and a base in plain dtypes."""
    # What the export's tensors were before quantization.
    logical = {name: export.tensors[name].shape for name in _weights(export)}
    for module in modules.values():
        for role in module.scales:
            del logical[f"{module.name}.{role}"]
        logical[module.weight.name] = (module.rows, module.columns)
    if not logical.keys() & base.tensors.keys():
        raise InputError(
            f"{base.path}: holds none of the export's {len(logical)} tensors ({min(logical)!r} for one)",
            code="base.naming",
            path=str(base.path),
            hint="the names follow another convention; give the base in the export's own (diffusers) naming",
        )
    _raise_first(_base_faults(logical, export, base))
    for name, info in base.tensors.items():
        if name not in logical:
            raise InputError(
                f"{base.path}/{info.file}: tensor {name!r} has no counterpart in the export",
                code="export.missing_tensor",
                path=str(export.path),
                hint="the export is incomplete, or was made from another base",
            )


def _base_faults(logical: Mapping[str, tuple[int, ...]], export: Source, base: Source) -> Iterator[InputError]:
    for name, shape in logical.items():
        info = base.tensors.get(name)
        if info is None:
            yield InputError(
                f"{base.path}: expected tensor {name!r} {list(shape)} as in the export, found no such tensor",
                code="base.missing_tensor",
                path=str(base.path),
                hint="give the base that the export was made from, whole",
            )
        elif info.shape != shape:
            yield InputError(
                f"{base.path}/{info.file}: tensor {name!r}: expected {list(shape)} as in the export, "
                f"found {list(info.shape)}",
                code="base.shape",
                path=f"{base.path}/{info.file}",
                hint="give the base that the export was made from",
            )
        elif info.dtype not in HALF_AND_FLOAT and not (
            info.dtype in _INTEGER_DTYPES and info.dtype == export.tensors[name].dtype
        ):
            yield InputError(
                f"{base.path}/{info.file}: tensor {name!r}: expected BF16, F16 or F32, found {info.dtype}",
                code="base.dtype",
                path=f"{base.path}/{info.file}",
                hint="give an unquantized base",
            )


def _raise_first(faults: Iterable[InputError]) -> None:
    found = list(faults)
    if not found:
        return
    first = found[0]
    same = sum(fault.code == first.code for fault in found)
    more = f" ({same} tensors in all)" if same > 1 else ""
    raise InputError(first.message + more, code=first.code, path=first.path, hint=first.hint)


def _apply_patterns(
    keeps: Keeps, matcher: PatternMatcher, modules: Mapping[str, Nvfp4Module]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Packed modules to replace with their first pattern, and every pattern's matches."""
    replaced: dict[str, str] = {}
    matched: dict[str, list[str]] = {}
    for _, pattern in keeps.patterns():
        check_pattern(pattern)
        matched[pattern] = matcher.find(pattern)
        for module in matched[pattern]:
            if module in modules:
                replaced.setdefault(module, pattern)
    return replaced, matched


def _count_rules(
    keeps: Keeps, matched: Mapping[str, Sequence[str]], replaced: Mapping[str, str], steps: Mapping[str, Step]
) -> Iterator[RuleCount]:
    sizes: dict[str, int] = {}
    for name, step in steps.items():
        sizes[module_of(name)] = sizes.get(module_of(name), 0) + step.output.num_bytes
    for kind, pattern in dict((pattern, (kind, pattern)) for kind, pattern in keeps.patterns()).values():
        yield RuleCount(
            kind,
            pattern,
            matched=len(matched[pattern]),
            replaced=sum(by == pattern for by in replaced.values()),
            num_bytes=sum(sizes.get(module, 0) for module in matched[pattern]),
        )


def _fused_groups(
    preset: Preset | None, modules: Mapping[str, Nvfp4Module], replaced: Mapping[str, str], export: Source
) -> tuple[tuple[str, ...], ...]:
    """Groups of sibling modules that stay packed together.

    Raises:
        InputError: ``preset.fused_group``: a group would be part packed, part BF16; runtimes refuse such a mix.
    """
    groups: list[tuple[str, ...]] = []
    linears = {module_of(name) for name in export.tensors if name.endswith(".weight")}
    for group in preset.fused if preset else []:
        parents = sorted({module_of(name) for name in linears if name.rpartition(".")[2] in group}, key=natural_key)
        for parent in parents:
            members = [f"{parent}.{leaf}" for leaf in group if f"{parent}.{leaf}" in linears]
            packed = tuple(member for member in members if member in modules and member not in replaced)
            if packed and len(packed) < len(members):
                rest = ", ".join(member for member in members if member not in packed)
                raise InputError(
                    f"{export.path}: the fused group {', '.join(members)} would be kept in part: {rest} in BF16",
                    code="preset.fused_group",
                    path=str(export.path),
                    hint="keep the whole group or none of it: " + " ".join(f"--keep-bf16 '{one}'" for one in members),
                )
            if packed:
                groups.append(packed)
    return tuple(groups)


def _keep_fp32(preset: Preset | None, matcher: PatternMatcher, base: Source) -> frozenset[str]:
    found: set[str] = set()
    for pattern in preset.keep_fp32 if preset else []:
        names = [name for name in base.tensors if matcher.matches(pattern, name)]
        if not names:
            raise InputError(
                f"keep_fp32 pattern {pattern!r} matches no tensor of the base",
                code="preset.no_match",
                path=str(base.path),
                hint="keep_fp32 patterns are matched against whole tensor names",
            )
        found.update(names)
    return frozenset(found)


class _Build:
    """Walks both inputs once and gives every tensor its fate."""

    def __init__(
        self,
        export: Source,
        base: Source,
        modules: Mapping[str, Nvfp4Module],
        replaced: Mapping[str, str],
        keep_fp32: frozenset[str],
    ) -> None:
        self._export = export
        self._base = base
        self._modules = modules
        self._replaced = replaced
        self._keep_fp32 = keep_fp32
        self.steps: dict[str, Step] = {}
        self.export_fates: dict[str, str] = {}
        self.base_fates: dict[str, str] = {}
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
                self._from_base(name, "from base: unquantized")
                self.must_equal.append(name)
            elif module.name in self._replaced:
                self._replace(name, info)
            elif info is module.bias and info.dtype != "BF16":
                self._from_base(name, f"from base: {info.dtype} bias of a packed module")
                self.must_equal.append(name)
            else:
                self._keep(info, module)
                if info is module.bias:
                    self.may_differ.append(name)
        for name in self._base.tensors:
            self.base_fates.setdefault(name, "unused: packed in the output")

    def _keep(self, info: TensorInfo, module: Nvfp4Module) -> None:
        shape: tuple[int, ...] = info.shape
        if info is module.weight:
            shape = (module.rows, module.columns // 2)
        elif info is module.scales.get("weight_scale"):
            shape = (module.rows, module.columns // BLOCK_SIZE)
        self.steps[info.name] = Step(TensorSpec(info.name, info.dtype, shape), "export", "copy")
        self.export_fates[info.name] = "kept"

    def _replace(self, name: str, info: TensorInfo) -> None:
        if name in self._base.tensors:
            self._from_base(name, "replaced: kept in BF16")
        else:
            self.export_fates[name] = "dropped: scale of a module kept in BF16"

    def _from_base(self, name: str, fate: str) -> None:
        info = self._base.tensors[name]
        as_is = info.dtype not in HALF_AND_FLOAT or info.dtype == "BF16" or name in self._keep_fp32
        dtype = info.dtype if as_is else "BF16"
        self.steps[name] = Step(TensorSpec(name, dtype, info.shape), "base", "copy" if as_is else "cast_bf16")
        exported = self._export.tensors[name].dtype
        self.export_fates[name] = fate if exported in (dtype, "U8") else f"{fate}, {exported} to {dtype}"
        self.base_fates[name] = "used" if as_is else f"used: cast {info.dtype} to BF16"


def _output_config(
    config: Mapping[str, Any], quant_config: Mapping[str, Any], steps: Mapping[str, Step], preset: Preset | None
) -> dict[str, Any]:
    kept = {key: quant_config[key] for key in _KEPT_CONFIG_KEYS if key in quant_config}
    ignore = {
        module_of(name)
        for name, step in steps.items()
        if name.endswith(".weight") and step.output.dtype != "U8" and len(step.output.shape) >= 2
    }
    runtime = preset.runtime_names if preset else {}
    renamed = {rename(module, disk, spelled) for module in ignore for disk, spelled in runtime.items()}
    spellings = ignore | {name for name in renamed if name is not None}
    quantization = kept | {
        "quant_type": "NVFP4",
        "group_size": BLOCK_SIZE,
        "ignore": sorted(spellings, key=natural_key),
        "swap_weight_nibbles": False,
        "checkpoint_weight_scale_layout": "linear",
    }
    # _name_or_path is where the exporting machine kept the model.
    rest = {key: value for key, value in config.items() if key not in ("_name_or_path", "quantization_config")}
    return rest | {"quantization_config": quantization}


def _config_warnings(
    quant_config: Mapping[str, Any], modules: Mapping[str, Nvfp4Module], matcher: PatternMatcher
) -> Iterator[tuple[str, str]]:
    dropped = sorted(quant_config.keys() - {*_KEPT_CONFIG_KEYS, "ignore", "quant_type", "group_size"})
    if dropped:
        yield "config.dropped_keys", f"not carried into quantization_config: {', '.join(dropped)}"
    ignore = quant_config.get("ignore")
    patterns = [entry for entry in ignore if isinstance(entry, str)] if isinstance(ignore, list) else []
    listed = [name for name in modules if any(matcher.ignores(pattern, name) for pattern in patterns)]
    if listed:
        yield (
            "config.stale_ignore",
            f"the export's `ignore` lists {len(listed)} modules that are packed ({listed[0]} first); it is rebuilt",
        )
