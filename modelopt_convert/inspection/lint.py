"""Faults that ``mopt inspect`` looks for: data to be shown, never a reason to stop."""

import itertools
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.comfyui_form import check_said
from modelopt_convert.dialects.comfyui_markers import MARKER, SILENT, is_sentinel, modern, said_of, sentinel_format
from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.dialects.form import grouped
from modelopt_convert.dialects.modelopt.export import check_exported
from modelopt_convert.dialects.packed import TRANSFORM_ROLES, PackedModule
from modelopt_convert.engines.sglang import FLAT_METADATA_KEYS, dynamic_words
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.formats.table import FORMATS, declares_dynamic_inputs, is_modelopts
from modelopt_convert.plan.ignore import ignored_layers, not_left, spellings
from modelopt_convert.plan.inputs import check_roles
from modelopt_convert.preset.patterns import ignored, siblings
from modelopt_convert.preset.preset import load_preset, preset_names, preset_of_class
from modelopt_convert.proof.input_scales import odd_input_scales
from modelopt_convert.report.inspect import LintReport
from modelopt_convert.run.errors import InputError

Modules = Mapping[str, PackedModule]
_ALGORITHMS = frozenset(one.quant_algo for one in FORMATS.values())
ONE_FOR_ALL = "SGLang rounds their block scales to one, vLLM-omni misreads all but those of the largest"


@dataclass(frozen=True, slots=True)
class OddScales:
    """How many block scales of a module are not positive numbers; of zeros those that the padding does not explain.

    ``first`` says where the first NaN or, if there is none, the first negative one is stored, in words.
    """

    nan: int
    negative: int
    zero: int
    first: str = ""


def role_faults(reader: CheckpointReader, base: CheckpointReader | None) -> list[LintReport]:
    """What builds refuse of a checkpoint and its base before all else: an unmerged LoRA, exchanged inputs."""
    try:
        check_roles(reader, base)
    except InputError as error:
        without = "; nothing was compared with the base" if base is not None else ""
        return [LintReport(code=error.code, message=f"{error.message}; {error.hint}{without}", module=None)]
    return []


def float32_of(reader: CheckpointReader, info: TensorInfo) -> float:
    """The value of a scale per tensor."""
    (value,) = struct.unpack("<f", reader.read(info.name))
    return float(value)


def is_float32(info: TensorInfo) -> bool:
    """Whether a tensor is one float32, as a scale per tensor must be."""
    return info.dtype == "F32" and info.num_bytes == 4


def global_scale(reader: CheckpointReader, module: PackedModule) -> float | None:
    """``weight_scale_2``, if it is there and of the right kind."""
    info = module.scales.get("weight_scale_2")
    return float32_of(reader, info) if info is not None and is_float32(info) else None


def transformed_faults(reader: CheckpointReader) -> Iterator[LintReport]:
    """Tensors of AWQ and SVDQuant, whatever the config says: the weights beside them are not the base's."""
    found: dict[str, list[str]] = {}
    for name in reader.tensors:
        if (role := name.rpartition(".")[2]) in TRANSFORM_ROLES:
            found.setdefault(role, []).append(module_of(name))
    for role, modules in found.items():
        many = "1 module has" if len(modules) == 1 else f"{len(modules)} modules have"
        yield LintReport(
            code="export.transformed",
            message=f"{many} {role} ({TRANSFORM_ROLES[role]}): the stored weights are not the base's, and readers that "
            "leave it out compute something else; `mopt convert` with --to bf16 multiplies them out",
            module=modules[0],
        )


def saved_faults(reader: CheckpointReader) -> list[LintReport]:
    """A quantized model that was saved and not exported, as builds refuse it."""
    try:
        check_exported(reader.config, reader.tensors, path=reader.config_place)
    except InputError as error:
        return [LintReport(code=error.code, message=f"{error.message}; {error.hint}", module=None)]
    return []


def marker_faults(reader: CheckpointReader, headers: Headers) -> Iterator[LintReport]:
    """What ComfyUI's markers, or a header, say of modules that their tensors are not, or leave unsaid."""
    layers, where = headers.layers(), str(reader.path)
    for module, spelled in grouped(headers.tensors.values()).items():
        if MARKER not in spelled and module not in layers:
            continue
        try:
            said = said_of(module, modern(spelled, where), layers.get(module), reader.read_of, where)
            if said.algorithm is not None:
                check_said(spelled, said.algorithm, where)
        except InputError as error:
            yield LintReport(code=error.code, message=error.message.removeprefix(f"{where}: "), module=module)
            continue
        if said.words.startswith(SILENT):
            yield LintReport(code="dialect.no_format", message=said.words.removeprefix("left out: "), module=module)
    for info in headers.tensors.values():
        if not is_sentinel(info.name):
            continue
        dtype, word = sentinel_format(info)
        odd = [name for name in headers.ending(".weight") if _is_other_fp8(headers, name, dtype)]
        if odd:
            message = f"{info.name} says {word} of all weights, and {len(odd)} are in another FP8 ({odd[0]!r} first)"
            yield LintReport(code="dialect.contradiction", message=message, module=None)


def _is_other_fp8(headers: Headers, weight: str, dtype: str) -> bool:
    is_scaled = f"{module_of(weight)}.scale_weight" in headers.tensors
    return is_scaled and headers.tensors[weight].dtype in {"F8_E4M3", "F8_E5M2"} - {dtype}


def odd_input_faults(reader: CheckpointReader, modules: Modules, role: str) -> Iterator[LintReport]:
    """Input scales that calibration does not make; ``role`` is that of the weight's tensor scale."""
    scales: dict[str, dict[str, float]] = {"input_scale": {}, role: {}}
    for name, module in modules.items():
        for kind, values in scales.items():
            info = module.scales.get(kind)
            if info is not None and is_float32(info) and 0.0 < (value := float32_of(reader, info)) < float("inf"):
                values[name] = value
    fused = list(siblings(_fused_leaves(reader.config), set(modules)))
    for words in odd_input_scales(scales["input_scale"], scales[role], fused):
        yield LintReport(code="input_scale.odd", message=words, module=None)


def input_scale_faults(reader: CheckpointReader, modules: Modules) -> Iterator[LintReport]:
    """What ``dynamic_input_scale`` means beside the modules: all of them have an ``input_scale``, or none."""
    if not declares_dynamic_inputs(reader.config):
        return
    calibrated = [name for name, one in modules.items() if "input_scale" in one.scales]
    if 0 < len(calibrated) < len(modules):
        mixed = "has an input_scale, though config.json declares dynamic_input_scale, as others need it"
        yield from (LintReport(code="input_scale.mixed", message=mixed, module=name) for name in calibrated)
    elif modules and not calibrated and (message := dynamic_words(reader.config)) is not None:
        yield LintReport(code="input_scale.dynamic", message=message, module=None)


def block_scale_faults(name: str, odd: OddScales) -> Iterator[LintReport]:
    """NaN, negative and zero block scales."""
    for count, code, what in (
        (odd.nan, "scale.nan", "NaN"),
        (odd.negative, "scale.unusable", "negative"),
        (odd.zero, "scale.zero", "zero"),
    ):
        if count:
            place = f", {odd.first}" if code == "scale.nan" or (code == "scale.unusable" and not odd.nan) else ""
            yield LintReport(code=code, message=f"{count} block scales are {what}{place}", module=name)


def module_faults(reader: CheckpointReader, module: PackedModule, block_size: int) -> Iterator[LintReport]:
    """Missing or unusable scales of an NVFP4 module, padded shapes, a module spread over files."""
    name, weight, scale = module.name, module.weight, module.scales["weight_scale"]
    for role in ("weight_scale_2", "input_scale"):
        info = module.scales.get(role)
        if info is None and role == "input_scale" and declares_dynamic_inputs(reader.config):
            continue
        if info is None:
            code = "input_scale.missing" if role == "input_scale" else "global_scale.missing"
            yield LintReport(code=code, message=f"no {role}; SGLang takes 1.0", module=name)
        elif not is_float32(info):
            message = f"{role} is {info.dtype} {list(info.shape)}, expected F32 []"
            yield LintReport(code="scale.unusable", message=message, module=name)
        else:
            yield from unusable(reader, info, name, role)
    if weight.shape != (module.rows, module.columns // 2):
        message = f"{list(weight.shape)} stored for [{module.rows}, {module.columns}]"
        yield LintReport(code="shape.padded", message=message, module=name)
    elif scale.shape != (module.rows, module.columns // block_size):
        yield LintReport(code="shape.padded", message=f"scales stored as {list(scale.shape)}", module=name)
    if weight.file != scale.file:
        yield LintReport(code="module.split", message=f"weight in {weight.file}, scales in {scale.file}", module=name)


def unusable(reader: CheckpointReader, info: TensorInfo, module: str, role: str) -> Iterator[LintReport]:
    """A scale per tensor that is not finite and positive."""
    value = float32_of(reader, info)
    if not 0.0 < value < float("inf"):
        yield LintReport(code="scale.unusable", message=f"{role} is {value}", module=module)


def fused_faults(reader: CheckpointReader, modules: Modules) -> Iterator[LintReport]:
    """Fused siblings whose global scales differ."""
    groups = _fused_leaves(reader.config)
    for group, parent in itertools.product(groups, sorted({module_of(name) for name in modules})):
        values = {
            leaf: global_scale(reader, modules[f"{parent}.{leaf}"]) for leaf in group if f"{parent}.{leaf}" in modules
        }
        if len(set(values.values())) > 1:
            message = f"{', '.join(values)} differ in weight_scale_2; {ONE_FOR_ALL}"
            yield LintReport(code="fused.global_scale", message=message, module=parent)


def fused_groups(config: Mapping[str, object], modules: Collection[str]) -> list[tuple[str, ...]]:
    """The modules that SGLang holds as one, by the preset of the class."""
    return list(siblings(_fused_leaves(config), modules))


def config_faults(reader: CheckpointReader, modules: Modules) -> Iterator[LintReport]:
    """``ignore`` against tensors both ways, and a flat config where ComfyUI expects layers."""
    found = reader.config.get("quantization_config")
    keys = found if isinstance(found, dict) else {}
    if is_modelopts(keys):
        weights = {module_of(name): info for name, info in reader.tensors.items() if name.endswith(".weight")}
        linears = [name for name, one in weights.items() if len(one.shape) == 2 and one.dtype in HALF_AND_FLOAT]
        coded = [*modules, *(name for name, one in weights.items() if one.dtype == "F8_E4M3")]
        covered = ignored(keys.get("ignore"), {*coded, *linears}, path=reader.config_place)
        if keys.get("quant_algo") in _ALGORITHMS and not coded:
            message = f"config.json says {keys['quant_algo']}, and no weight is quantized"
            yield LintReport(code="export.nothing_quantized", message=message, module=None)
            linears = []  # one fault, not one for each of them
        for name in coded:
            if name in covered:
                yield LintReport(code="ignore.lists_packed", message="in `ignore`, yet packed", module=name)
        for name in linears:
            if name not in covered:
                message = "not packed, yet not in `ignore`"
                yield LintReport(code="ignore.misses_unpacked", message=message, module=name)
        if keys["quant_method"] != "modelopt":  # of the dialect, and read by another key
            yield from _layer_faults(reader.config, keys.get("ignored_layers"), coded, linears)
        if declares_dynamic_inputs(reader.config) and not _are_dynamic(keys.get("config_groups", {})):
            message = (
                "config_groups says that inputs are not dynamic, dynamic_input_scale that they are: engines differ"
            )
            yield LintReport(code="input_scale.dynamic", message=message, module=None)
    for file, entries in reader.metadata.items():
        if FLAT_METADATA_KEYS[0] in entries and '"layers"' not in entries[FLAT_METADATA_KEYS[0]]:
            message = f"{file}: a flat config under _quantization_metadata, where ComfyUI expects layers"
            yield LintReport(code="metadata.clash", message=message, module=None)


def _layer_faults(
    config: Mapping[str, object], listed: object, packed: Sequence[str], linears: Sequence[str]
) -> Iterator[LintReport]:
    """``ignored_layers``, which SGLang's method ``fp8`` reads in place of ``ignore``, against tensors both ways."""
    entries = [one for one in listed if isinstance(one, str)] if isinstance(listed, list) else []
    preset = preset_of_class(config)
    for name in sorted(set(packed) - set(not_left(packed, entries, preset, config))):
        yield LintReport(code="ignore.lists_packed", message="in `ignored_layers`, yet packed", module=name)
    # No entry can name a module of whose name a packed one has every part.
    names = {spelling for name in linears for spelling in spellings(name, preset, config)}
    unnamed = set(not_left(linears, ignored_layers(names, packed, preset, config), preset, config))
    for name in not_left(linears, entries, preset, config):
        if name not in unnamed:
            message = "not packed, yet not in `ignored_layers`"
            yield LintReport(code="ignore.misses_unpacked", message=message, module=name)


def _are_dynamic(groups: object) -> bool:
    """Whether no group says that its inputs have scales; TensorRT-LLM goes by that."""
    inputs = (
        [one.get("input_activations") for one in groups.values() if isinstance(one, dict)]
        if isinstance(groups, dict)
        else []
    )
    return all(one.get("dynamic") is True for one in inputs if isinstance(one, dict))


def _fused_leaves(config: Mapping[str, object]) -> list[list[str]]:
    for name in preset_names():
        preset = load_preset(name).preset
        if preset.class_name == config.get("_class_name"):
            return preset.fused
    return []
