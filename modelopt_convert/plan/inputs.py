"""Require that export, base and preset are of one model, from headers and configs alone. Pure, no torch."""

import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.dialects.packed import (
    SCALE_ROLES,
    TRANSFORM_ROLES,
    PackedModule,
    is_layout_marker,
    is_quantizer_state,
)
from modelopt_convert.families.blocks import lacking
from modelopt_convert.families.table import FAMILIES
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.plan.plan import Source
from modelopt_convert.preset.preset import OF_YOUR_OWN, Preset, fits_any, refuse_other_kind
from modelopt_convert.run.errors import Faults, InputError

_QUANTIZATION = "quantization_config"
_SHOWN_CHARS = 120  # of a key with its value
_SHOWN_KEYS = 20
_ADAPTER = re.compile(r"(^|\.)(base_model\.model\.|base_layer\.|lora_(A|B|up|down|magnitude_vector)\.)")
_BLOCK = re.compile(r"\.[0-9]+\.")
Shapes = Mapping[str, tuple[int, ...]]
_INTEGER_DTYPES = frozenset({"BOOL", "I8", "I16", "U16", "I32", "U32", "I64", "U64"})


def model_tensors(export: Source) -> list[str]:
    """Names of the tensors that are part of the model, sorted: no calibration state, no markers."""
    return sorted(name for name in export.tensors if not is_quantizer_state(name) and not is_layout_marker(name))


def check_config_unquantized(base: Source) -> None:
    """Require a config.json that declares no quantization.

    Raises:
        InputError: ``base.quantized``.
    """
    path = base.config_place
    if base.config.get("quantization_config") is not None:
        raise InputError(
            f"{path}: expected an unquantized base, found a quantization_config",
            code="base.quantized",
            path=path,
            hint="give the original model as the base; what is quantized is the export or the checkpoint",
        )


def check_unquantized(base: Source) -> None:
    """Require, where there is no export to compare with, that nothing of a base is quantized or belongs to a quantizer.

    Raises:
        InputError: ``base.quantized`` or ``base.dtype``.
    """
    check_config_unquantized(base)  # that there are scales, too, is no second fault
    faults = Faults()
    for name, info in base.tensors.items():
        where = f"{base.folder}/{info.file}"
        role = name.rpartition(".")[2]
        if role in SCALE_ROLES | TRANSFORM_ROLES.keys() or is_quantizer_state(name) or is_layout_marker(name):
            fault = InputError(
                f"{where}: tensor {name!r}: expected an unquantized base, found a quantizer's tensor",
                code="base.quantized",
                path=where,
                hint="give the original model as the base; a build takes a ModelOpt export as --export",
            )
            faults.add(name, fault)
            continue
        is_weight = name.endswith(".weight")
        if info.dtype not in (HALF_AND_FLOAT if is_weight else HALF_AND_FLOAT | _INTEGER_DTYPES):
            fault = InputError(
                f"{where}: tensor {name!r}: expected BF16, F16 or F32, found {info.dtype}",
                code="base.dtype",
                path=where,
                hint="give an unquantized base",
            )
            faults.add(name, fault)
    faults.refuse()


def check_configs(export: Source, base: Source) -> None:
    """Require a base that is not quantized and has the export's config.

    Raises:
        InputError: ``base.quantized`` or ``base.config``.
    """
    check_config_unquantized(base)
    check_same_config(export, base, "export")


def check_same_config(mine: Source, base: Source, what: str) -> None:
    """Require that no key of both configs has another value in the base.

    Args:
        mine: What was made from the base.
        base: The base.
        what: What messages call the first.

    Raises:
        InputError: ``base.config``.
    """
    path, faults = base.config_place, Faults()
    for key, left, right in differing_keys(mine.config, base.config):
        fault = InputError(
            f"{path}: {key}: expected {left!r} as in the {what}, found {right!r} ({what}: {mine.config_place})",
            code="base.config",
            path=path,
            hint=f"give the base that the {what} was made from",
        )
        faults.add(key, fault)
    faults.refuse()


def one_sided_words(mine: Mapping[str, object], theirs: Mapping[str, object], what: str) -> list[str]:
    """Keys of the model that only one of two configs has, in words; empty if there are none.

    Writers leave out what they do not know, so such a key is no proof of another model. But a loader takes the default
    of a key that is missing.

    Args:
        mine: Of what was made from the base, and is loaded.
        theirs: Of the base.
        what: What messages call the first.
    """
    found = []
    for side, one, other in ((what, mine, theirs), ("the base", theirs, mine)):
        keys = sorted(key for key in one.keys() - other.keys() if key != _QUANTIZATION and not key.startswith("_"))
        if keys:
            shown = [f"{key} = {one[key]!r}"[:_SHOWN_CHARS] for key in keys[:_SHOWN_KEYS]]
            more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
            found.append(f"only {side} has {', '.join(shown)}{more}")
    if not found:
        return []
    return [
        f"config.json: {'; '.join(found)}; {what}'s config.json decides, and loaders take defaults for what it lacks"
    ]


def differing_keys(mine: Mapping[str, object], theirs: Mapping[str, object]) -> Iterator[tuple[str, object, object]]:
    """Where two configs are not of one model: the key and both values; writers leave out what they do not know."""
    for key in ("_class_name", *sorted(mine.keys() & theirs.keys() - {"_class_name", _QUANTIZATION})):
        # Keys with an underscore say who wrote the file, not what the model is.
        if (key == "_class_name" or not key.startswith("_")) and mine.get(key) != theirs.get(key):
            yield key, mine.get(key), theirs.get(key)


def check_merged(source: Source, what: str) -> None:
    """Require the names of a model, not those of a model with an adapter beside its weights.

    Args:
        source: The checkpoint.
        what: ``export`` or ``base``.

    Raises:
        InputError: ``export.lora`` or ``base.lora``.
    """
    found = [name for name in source.tensors if _ADAPTER.search(name)]
    if found:
        fault = InputError(
            f"{source.path}: expected the weights of a model, found {len(found)} tensors of a LoRA that is not merged "
            f"(PEFT's names, {found[0][:_SHOWN_CHARS]!r} first)",
            code=f"{what}.lora",
            path=str(source.path),
            hint="merge it with pipe.fuse_lora() and pipe.unload_lora_weights(), then "
            + ("quantize and export again" if what == "export" else "save the model with save_pretrained"),
        )
        raise fault.at(found)


def check_not_exchanged(export: Source, base: Source) -> None:
    """Require that the quantized one of two checkpoints is the export.

    Raises:
        InputError: ``export.exchanged``.
    """
    if export.config.get(_QUANTIZATION) is None and base.config.get(_QUANTIZATION) is not None:
        right = shlex.join(["--export", str(base.path), "--base", str(export.path)])
        raise InputError(
            f"{export.path}: --export is not quantized and --base is: they look exchanged",
            code="export.exchanged",
            path=str(export.path),
            hint=f"give {right}",
        )


def check_roles(source: Source, base: Source | None) -> None:
    """Require of a checkpoint that is not built, but looked at or rewritten, that it and its base are what they seem.

    Raises:
        InputError: ``export.exchanged``, ``base.quantized``, ``base.lora`` or ``export.lora``.
    """
    if base is not None:
        plain = HALF_AND_FLOAT | _INTEGER_DTYPES
        if base.config.get(_QUANTIZATION) is not None and all(one.dtype in plain for one in source.tensors.values()):
            raise InputError(
                f"{source.path}: the checkpoint is not quantized and --base is: they look exchanged",
                code="export.exchanged",
                path=str(source.path),
                hint=f"give {shlex.join([str(base.path), '--base', str(source.path)])}",
            )
        check_config_unquantized(base)
        check_merged(base, "base")
    check_merged(source, "export")


def check_preset(preset: Preset | None, export: Source) -> None:
    """Require that the preset is of the export's model.

    Raises:
        InputError: ``preset.wrong_model`` or ``preset.not_diffusion``.
    """
    refuse_other_kind(export.config, export.config_place)
    if preset is None:
        return
    faults = Faults()
    for key, expected in preset.misfits(export.config):
        fault = InputError(
            f"{export.config_place}: {key}: preset {preset.name} expects {expected}, found {export.config.get(key)!r}",
            code="preset.wrong_model",
            path=export.config_place,
            hint="leave --preset out to have it chosen, or name the model's own"
            if fits_any(export.config)
            else OF_YOUR_OWN,
        )
        faults.add(key, fault)
    faults.refuse()


def check_base(export: Source, base: Source, modules: Mapping[str, PackedModule], refused: Collection[str]) -> None:
    """Require that both inputs are the same model: same tensors, same shapes, and a base in plain dtypes.

    Args:
        export: The export.
        base: The base.
        modules: The export's quantized modules.
        refused: Its modules and tensors that are no module of the format, of which nothing is said here.

    Raises:
        InputError: ``base.naming``, ``base.missing_tensor``, ``base.shape``, ``base.dtype``, ``export.shape``
            or ``export.missing_tensor``.
    """
    # What the export's tensors were before quantization.
    logical = {name: export.tensors[name].shape for name in model_tensors(export)}
    # A fault of the module's own, or what else is quantized, is no sign of another base.
    odd = {name for name in (*logical, *base.tensors) if name in refused or module_of(name) in refused}
    for module in modules.values():
        for role in module.scales:
            del logical[f"{module.name}.{role}"]
        logical[module.weight.name] = (module.rows, module.columns)
    if not logical.keys() & base.tensors.keys():
        raise InputError(
            f"{base.path}: holds none of the export's {len(logical)} tensors ({min(logical)!r} for one; "
            f"export: {export.path})",
            code="base.naming",
            path=str(base.path),
            hint="the names are neither diffusers' nor those of a whole model that mopt knows; give the base whole",
        )
    faults = Faults()
    for name, fault in _base_faults({name: logical[name] for name in logical if name not in odd}, export, base):
        faults.add(name, fault)
    for name, info in base.tensors.items():
        if name not in logical and name not in odd:
            fault = InputError(
                f"{base.folder}/{info.file}: tensor {name!r} has no counterpart in the export (export: {export.path})",
                code="export.missing_tensor",
                path=str(export.path),
                hint="the export is incomplete, or was made from another base: export again, or give that base",
            )
            faults.add(name, fault)
    faults.refuse()


def _base_faults(
    logical: Mapping[str, tuple[int, ...]], export: Source, base: Source
) -> Iterator[tuple[str, InputError]]:
    shapes = {name: info.shape for name, info in base.tensors.items()}
    usual = [_by_place(side) for side in (logical, shapes)]
    for name, shape in logical.items():
        info = base.tensors.get(name)
        if info is None:
            yield (
                name,
                InputError(
                    f"{base.path}: expected tensor {name!r} {list(shape)} as in the export, found no such tensor "
                    f"(export: {export.path})",
                    code="base.missing_tensor",
                    path=str(base.path),
                    hint="give the base that the export was made from, whole",
                ),
            )
        elif info.shape != shape:
            yield name, _shape_fault(name, logical, export, base, usual)
        elif info.dtype not in HALF_AND_FLOAT and not (
            info.dtype in _INTEGER_DTYPES and info.dtype == export.tensors[name].dtype
        ):
            yield (
                name,
                InputError(
                    f"{base.folder}/{info.file}: tensor {name!r}: expected BF16, F16 or F32, found {info.dtype}",
                    code="base.dtype",
                    path=f"{base.folder}/{info.file}",
                    hint="give an unquantized base",
                ),
            )


def _by_place(shapes: Shapes) -> dict[str, Counter[tuple[int, ...]]]:
    """How often each shape occurs at one place of all blocks."""
    found: dict[str, Counter[tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        found.setdefault(_BLOCK.sub(".#.", name), Counter())[shape] += 1
    return found


def _shape_fault(
    name: str, logical: Shapes, export: Source, base: Source, usual: Sequence[Mapping[str, Counter[tuple[int, ...]]]]
) -> InputError:
    """The fault of a tensor that has two shapes: of the file that the other blocks, or the bias, of both tell.

    Args:
        name: Of the tensor.
        logical: The export's shapes, unpacked.
        export: The export.
        base: The base.
        usual: Of the export and of the base, by ``_by_place``.
    """
    mine, theirs, place = logical[name], base.tensors[name].shape, _BLOCK.sub(".#.", name)
    others = [side[place] - Counter([own]) for side, own in zip(usual, (mine, theirs), strict=True)]
    told = {max(side, key=lambda shape: side[shape]) if side else None for side in others}
    bias, bias_of_base = (logical.get(f"{module_of(name)}.bias"), base.tensors.get(f"{module_of(name)}.bias"))
    is_right = [told == {shape} for shape in (mine, theirs)]
    if not any(is_right) and bias is not None and bias_of_base is not None and bias == bias_of_base.shape:
        is_right = [shape[:1] == bias for shape in (mine, theirs)]
    mine_at, theirs_at = (f"{one.folder}/{one.tensors[name].file}" for one in (export, base))
    if is_right == [False, True]:
        return InputError(
            f"{mine_at}: tensor {name!r}: expected {list(theirs)} as in {theirs_at}, found {list(mine)}",
            code="export.shape",
            path=mine_at,
            hint="the export is cut or mixed up; export again",
        )
    either = "" if is_right == [True, False] else "; or export again, if it is the export that is damaged"
    return InputError(
        f"{theirs_at}: tensor {name!r}: expected {list(mine)} as in {mine_at}, found {list(theirs)}",
        code="base.shape",
        path=theirs_at,
        hint=f"give the base that the export was made from, whole{either}",
    )


def check_plain(export: Source, modules: Mapping[str, PackedModule], refused: Collection[str]) -> None:
    """Require, where there is no base, that whatever is not quantized is of a plain dtype.

    Args:
        export: The export.
        modules: Its quantized modules.
        refused: As in ``check_base``.

    Raises:
        InputError: ``export.dtype``.
    """
    faults, known = Faults(), modules.keys() | set(refused)
    for name in model_tensors(export):
        info = export.tensors[name]
        if known.isdisjoint((name, module_of(name))) and info.dtype not in HALF_AND_FLOAT | _INTEGER_DTYPES:
            fault = InputError(
                f"{export.folder}/{info.file}: tensor {name!r}: expected BF16, F16 or F32, found {info.dtype}",
                code="export.dtype",
                path=f"{export.folder}/{info.file}",
                hint="this export is not plain FP8; give the --base, or export again",
            )
            faults.add(name, fault)
    faults.refuse()


def check_blocks(base: Source) -> None:
    """Require that no block of a base is missing: of a part of the model a preset's patterns would match nothing.

    Raises:
        InputError: ``base.missing_tensor``.
    """
    family = next((one for one in FAMILIES if base.config.get("_class_name") in one.class_names), None)
    plain = [
        name for name in model_tensors(base) if name.rpartition(".")[2] not in SCALE_ROLES | TRANSFORM_ROLES.keys()
    ]
    found = lacking(family, plain, base.config) if family is not None else None
    if found is not None:
        raise InputError(
            f"{base.path}: expected all blocks of the model, found {found}",
            code="base.missing_tensor",
            path=str(base.path),
            hint="the base is incomplete: give it whole",
        )
