"""Which modules a rewrite changes, and what becomes of every tensor and of config.json. No torch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from modelopt_convert.checkpoint.header import METADATA, TensorSpec
from modelopt_convert.checkpoint.names import natural_key
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.checkpoint.strict_json import json_bytes
from modelopt_convert.commands.requests import RewriteRequest
from modelopt_convert.dialects.modelopt.dialect import INDEX_NAME
from modelopt_convert.dialects.packed import Evidence, add_faults, find_packed, is_layout_marker
from modelopt_convert.engines.sglang import FLAT_METADATA_KEYS, PACKED_QKV
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.formats.layout import BASES, CANONICAL, UNDETERMINED, Layout, declared_layout
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE, FORMAT
from modelopt_convert.formats.nvfp4.shapes import padded_shape
from modelopt_convert.formats.table import declares_dynamic_inputs
from modelopt_convert.plan.plan import ShardPlan, Step
from modelopt_convert.report.inspect import ModuleLayout
from modelopt_convert.run.errors import CheckFailedError, Faults, InputError, Parts

Kind = Literal["swap", "unswizzle", "swizzle"]
# The field of ``ModuleLayout`` that a kind of rewrite changes, that which says how it is known, and what it shall be.
_FIELD: Mapping[Kind, Literal["nibble_order", "scale_layout"]] = {
    "swap": "nibble_order",
    "unswizzle": "scale_layout",
    "swizzle": "scale_layout",
}
BASIS: Mapping[Kind, Literal["nibble_basis", "scale_basis"]] = {
    "swap": "nibble_basis",
    "unswizzle": "scale_basis",
    "swizzle": "scale_basis",
}
# What SGLang's loader needs besides the layout keys.
_KEYS = {"quant_method": "modelopt", "quant_algo": FORMAT.quant_algo, "group_size": BLOCK_SIZE, "ignore": []}
_SCALE_DTYPES = frozenset({"F8_E4M3", "U8"})
_WANTED: Mapping[Kind, str] = {"swap": "low", "unswizzle": "linear", "swizzle": "128x4"}


@dataclass(frozen=True, slots=True)
class RewritePlan:
    """What the rewrite will do; the parts that streaming needs.

    Attributes:
        steps: By tensor.
        shards: With their tensors and metadata.
        fates: What becomes of each tensor of the source, in words.
    """

    steps: Mapping[str, Step]
    shards: tuple[ShardPlan, ...]
    fates: Mapping[str, str]


def refuse_names(reader: CheckpointReader, request: RewriteRequest) -> None:
    """Refuse what SGLang would misread once it is rewritten.

    Raises:
        InputError: ``layout.names_decide``.
    """
    named = next((name for name in reader.tensors if PACKED_QKV.match(name)), None)
    if named is None or request.force_names or request.kind == "swizzle":
        return
    raise InputError(
        f"{reader.path}: SGLang already reads this file right; rewritten under these names ({named!r}) it would not",
        code="layout.names_decide",
        path=str(reader.path),
        hint="serve it as it is; --force-names rewrites it all the same, for a loader that does not guess from names",
    )


def choose(
    modules: Mapping[str, ModuleLayout],
    kind: Kind,
    reader: CheckpointReader,
    base: CheckpointReader | None,
    faults: Faults,
) -> frozenset[str]:
    """The modules that need the rewrite.

    Args:
        modules: What is known of each packed module, by name.
        kind: Of rewrite.
        reader: The source.
        base: Its base, or None: then the rewrite is done as told.
        faults: What is wrong with modules already; gets ``layout.undetermined`` and ``layout.shape``.

    Raises:
        InputError: ``layout.nothing_packed``.
        CheckFailedError: ``check.already_in_order``.
    """
    where, field, wanted = str(reader.path), _FIELD[kind], _WANTED[kind]
    if not modules:
        raise InputError(
            f"{where}: expected NVFP4 modules (U8 weights with E4M3 scales), found none",
            code="layout.nothing_packed",
            path=where,
            hint="`mopt inspect` says what this is",
        )
    answers = {name: getattr(one, field) for name, one in modules.items()}
    refused = faults.names
    if base is not None:
        told = {name for name, one in modules.items() if _is_weight(base, name, one.shape)}
        unclear = [
            name
            for name, answer in answers.items()
            if name not in refused and (answer == "undetermined" or name not in told)
        ]
        if unclear:
            fault = InputError(
                f"{where}: the base does not tell the layout of {len(unclear)} of {len(modules)} modules",
                code="layout.undetermined",
                path=where,
                hint="give the base that the checkpoint was made from; without --base all is rewritten, unproven",
            )
            faults.add("", fault.at(unclear))
        chosen = {name for name, answer in answers.items() if answer not in (wanted, "equivalent")}
    else:
        # The shape of the scales is evidence too; a guess is not.
        known = {name for name, one in modules.items() if one.scale_basis == "shape" and kind != "swap"}
        chosen = {name for name in modules if name not in known or answers[name] != wanted}
    if kind != "swap":
        asked, chosen = [name for name in modules if name in chosen and name not in refused], set()
        for name in asked:
            with faults.taken(name):
                chosen |= {name} if _can(reader, modules[name], name, kind) else set()
    if not chosen and not faults:
        raise CheckFailedError(
            f"{where}: already in order: {_in_order(wanted, len(modules))}",
            code="check.already_in_order",
            path=where,
            hint="use it as it is. Nothing was written",
        )
    return frozenset(chosen)


def add_parts(reader: CheckpointReader, modules: Collection[str], faults: Faults) -> None:
    """Add packed weights without usable block scales: the rest would be rewritten, and these left as they are.

    Args:
        reader: The source.
        modules: The NVFP4 modules that were recognised; if there are none, something else is said.
        faults: Gets ``layout.scale``.
    """
    for info in reader.tensors.values() if modules else ():
        module, _, role = info.name.rpartition(".")
        if role != "weight" or info.dtype != FORMAT.packed_dtype or len(info.shape) != 2:
            continue
        scale, path = reader.tensors.get(f"{module}.weight_scale"), str(reader.folder / info.file)
        if module not in modules or scale is None or scale.dtype not in _SCALE_DTYPES:
            found = "none" if scale is None else f"{scale.dtype} {list(scale.shape)}"
            fault = InputError(
                f"{path}: tensor {info.name!r}: expected F8_E4M3 block scales beside it, found {found}",
                code="layout.scale",
                path=path,
                hint="the checkpoint is incomplete or damaged: get it again, or export again",
            )
            faults.add(module, fault)


def has_input_scales(reader: CheckpointReader) -> bool:
    """Whether any module has one: a file without, as ComfyUI's may be, is whole, and a rewrite takes none away."""
    return any(name.endswith(".input_scale") for name in reader.tensors)


def scale_faults(reader: CheckpointReader, base: CheckpointReader | None, *, needs_inputs: bool) -> Parts:
    """What is wrong with the scales of modules, by headers; with a base also what is no NVFP4 module at all."""
    true_shapes = {name: info.shape for name, info in base.tensors.items()} if base is not None else {}
    without_inputs = not needs_inputs or declares_dynamic_inputs(reader.config)
    evidence = Evidence(true_shapes, dynamic_inputs=without_inputs)
    found, faults = find_packed(reader.tensors, FORMAT, evidence, path=str(reader.path)), Faults()
    for name, fault in found.refused.items() if base is not None else ():
        faults.add(name, fault)
    add_faults(faults, found.modules, str(reader.path))
    return faults.parts()


def _in_order(wanted: str, count: int) -> str:
    """How all modules lie, in words."""
    orders = {"linear": "have their scales row by row", "128x4": "have their scales in the 128x4 order"}
    return f"all {count} packed modules {orders.get(wanted, f'have the even column in the {wanted} nibble')}"


def against_words(modules: Mapping[str, ModuleLayout], chosen: frozenset[str], kind: Kind) -> str:
    """The best evidence that modules do not need the rewrite, in words; empty if there is none."""
    right = [modules[name] for name in chosen if getattr(modules[name], _FIELD[kind]) == _WANTED[kind]]
    if not right:
        return ""
    best = max((getattr(one, BASIS[kind]) for one in right), key=BASES.index)
    words = {"hint": "by what their scales hint at", "declared": "by what config.json declares"}
    return f"; {len(right)} of them are {_WANTED[kind]} already, {words.get(best, f'by {best}')}"


def _is_weight(base: CheckpointReader, name: str, shape: list[int]) -> bool:
    """Whether the base has a module's weight, in this shape and in a dtype that can be compared."""
    info = base.tensors.get(f"{name}.weight")
    return info is not None and list(info.shape) == shape and info.dtype in HALF_AND_FLOAT


def _can(reader: CheckpointReader, module: ModuleLayout, name: str, kind: Kind) -> bool:
    """Whether the shape of the stored scales allows the rewrite at all.

    Raises:
        InputError: The shape is none that the order to be undone has.
    """
    rows, columns = module.shape[0], module.shape[1] // BLOCK_SIZE
    info = reader.tensors[f"{name}.weight_scale"]
    linear = info.shape == (rows, columns)
    size = padded_shape(rows, columns)
    if kind == "swizzle":
        return linear
    if not linear or size == (rows, columns):
        return True
    raise InputError(
        f"{reader.folder / info.file}: tensor {info.name!r}: expected {list(size)} as 128x4 scales have, "
        f"found {list(info.shape)}",
        code="layout.shape",
        path=str(reader.folder / info.file),
        hint="scales of this shape are row-major; `mopt inspect --base` proves it",
    )


def plan_rewrite(
    reader: CheckpointReader, modules: Mapping[str, ModuleLayout], chosen: frozenset[str], kind: Kind
) -> RewritePlan:
    """What becomes of every tensor of the source.

    Args:
        reader: The source.
        modules: What is known of each packed module, by name.
        chosen: Those to be rewritten.
        kind: Of rewrite.
    """
    steps: dict[str, Step] = {}
    fates: dict[str, str] = {}
    for name, info in reader.tensors.items():
        if is_layout_marker(name):
            fates[name] = "dropped: layout marker that would be wrong"
            continue
        module = name.rpartition(".")[0]
        shape: tuple[int, ...] = info.shape
        step = Step(TensorSpec(name, info.dtype, shape), "export", "copy")
        fates[name] = "kept"
        if module in chosen:
            rows, columns = modules[module].shape
            if name.endswith(".weight"):
                cut = kind == "unswizzle" and shape != (rows, columns // 2)
                if kind == "swap":
                    step, fates[name] = (
                        Step(TensorSpec(name, "U8", shape), "export", "repack", layout=Layout(nibbles="high")),
                        "rewritten: nibbles swapped",
                    )
                elif cut:
                    spec = TensorSpec(name, "U8", (rows, columns // 2))
                    step, fates[name] = Step(spec, "export", "repack"), "rewritten: padding cut"
            elif name.endswith(".weight_scale") and kind == "unswizzle":
                spec = TensorSpec(name, info.dtype, (rows, columns // BLOCK_SIZE))
                step, fates[name] = (
                    Step(spec, "export", "reorder_scales", layout=Layout(scales="128x4")),
                    "rewritten: 128x4 to row-major",
                )
            elif name.endswith(".weight_scale") and kind == "swizzle":
                spec = TensorSpec(name, info.dtype, padded_shape(rows, columns // BLOCK_SIZE))
                step, fates[name] = Step(spec, "export", "swizzle_scales"), "rewritten: row-major to 128x4"
        steps[name] = step
    shards = tuple(
        ShardPlan(
            file,
            tuple(step.output for name, step in steps.items() if reader.tensors[name].file == file),
            {
                key: value
                for key, value in sorted(({**METADATA} | reader.metadata[file]).items())
                if key not in FLAT_METADATA_KEYS
            },
        )
        for file in reader.files
    )
    return RewritePlan(dict(sorted(steps.items(), key=lambda item: natural_key(item[0]))), shards, fates)


def first_layout(kind: Kind) -> Layout:
    """The layout that a module is tried under first: one that fits under it needs no rewrite."""
    return Layout(scales="128x4") if kind == "swizzle" else CANONICAL


def proven_answers(module: ModuleLayout, layout: Layout) -> ModuleLayout:
    """What is known of a module once all of its bytes are the base's under a layout."""
    answers = {"nibble_order": layout.nibbles, "scale_layout": layout.scales, "global_scale": layout.global_scale}
    return module.model_copy(update=answers | dict.fromkeys(("basis", "nibble_basis", "scale_basis"), "proven"))


def _output_config(
    config: Mapping[str, Any], kind: Kind, proven: Mapping[str, ModuleLayout] | None
) -> dict[str, Any] | None:
    """config.json with the keys set to what is true now; None if the source had none."""
    if not config:
        return None
    found = config.get("quantization_config")
    keys = dict(found) if isinstance(found, dict) else dict(_KEYS)
    if kind == "swap":
        # Proven, the low nibble is first now. Else a declared order is turned round, and where nothing was declared
        # the user has said that the order was the other one.
        is_turned = proven is None and declared_layout(keys).nibbles == "low"
        layout = replace(UNDETERMINED, nibbles="high" if is_turned else "low")
    else:
        layout = replace(UNDETERMINED, scales="linear" if kind == "unswizzle" else "128x4")
    # The order that is left as it was is declared too, where it is not what a loader takes for granted.
    if proven is not None and kind == "swap" and any(one.scale_layout == "128x4" for one in proven.values()):
        layout = replace(layout, scales="128x4")
    if proven is not None and kind != "swap" and any(one.nibble_order == "high" for one in proven.values()):
        layout = replace(layout, nibbles="high")
    return {**config, "quantization_config": keys | layout.config_keys()}


def config_and_index(
    reader: CheckpointReader, plan: RewritePlan, kind: Kind, proven: Mapping[str, ModuleLayout] | None
) -> dict[str, bytes]:
    """config.json, if the source had one, and the index of several shards, last.

    Args:
        reader: The source.
        plan: Of the rewrite.
        kind: Of rewrite.
        proven: How modules lay in the source, as the base tells; None without a base.
    """
    config = _output_config(reader.config, kind, proven)
    files = {"config.json": json_bytes(config)} if config is not None else {}
    if len(plan.shards) > 1:
        weight_map = {spec.name: shard.file for shard in plan.shards for spec in shard.tensors}
        total = {"total_size": sum(step.output.num_bytes for step in plan.steps.values())}
        files[INDEX_NAME] = json_bytes({"metadata": total, "weight_map": dict(sorted(weight_map.items()))})
    return files
