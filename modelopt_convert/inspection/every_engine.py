"""What each engine makes of one transformer: its view of the file, against what is known of the modules."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from modelopt_convert.checkpoint.header import json_object
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.dialects.table import detect_dialect
from modelopt_convert.engines import comfyui, diffusers, sglang, vllm_omni
from modelopt_convert.engines.belief import TAKEN_FOR_PACKED, TAKEN_FOR_PLAIN, UNSET, Belief, differences, mistaken
from modelopt_convert.engines.limits import EngineName, Limit, declared, limits
from modelopt_convert.engines.outcome import Reading, Shown, is_quantized
from modelopt_convert.engines.sglang_files import NAMES_RUN
from modelopt_convert.families.table import recognise
from modelopt_convert.formats.layout import Layout
from modelopt_convert.inspection.engines import beliefs, is_one_file, linears_of, sglang_reading
from modelopt_convert.inspection.lint import float32_of, fused_groups, is_float32
from modelopt_convert.preset.preset import preset_of_class
from modelopt_convert.report.inspect import EngineVerdict, ModuleLayout

Word = Literal["right", "assumes", "loss", "misreads", "refuses", "unknown"]
# From good to bad: of several findings the last one is the verdict.
_ORDER: tuple[Word, ...] = ("right", "assumes", "unknown", "loss", "misreads", "refuses")
_GRADES: Mapping[str, Word] = {"loss": "loss", "wrong": "misreads", "fails": "refuses"}
_OUTCOMES: Mapping[str, Word] = {"reads": "right", "misreads": "misreads", "refuses": "refuses", "unknown": "unknown"}
_TRTLLM = "1.3.0rc"
_MARKER_BYTES = 1 << 16
_OTHER_NIBBLE, _OTHER_ORDER = "even columns read from the other nibble", "scales read in the other order"
_REBASED, _LARGEST = "block scales rounded again", "decoded by the largest global scale of its group"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Finding:
    """One fact about an engine and this file."""

    word: Word
    how: str
    source: str
    shown: Shown
    modules: Mapping[str, Sequence[str]] = field(default_factory=dict)
    figure: float | None = None


def engine_verdicts(reader: CheckpointReader, modules: Mapping[str, ModuleLayout]) -> list[EngineVerdict]:
    """What SGLang, vLLM-omni, ComfyUI, diffusers and TensorRT-LLM make of a transformer; nothing if none is quantized.

    Args:
        reader: The opened transformer, which is presented alone where its files hold more.
        modules: Its quantized modules, and how each is known to lie.

    Raises:
        InputError: ``config.ignore``.
    """
    if not is_quantized(reader.tensors):
        return []
    headers = Headers(reader.tensors, reader.metadata, reader.config, reader.skipped)
    told = detect_dialect(headers)[0].layout(headers)
    algorithm = declared(reader.config)
    views = {one.engine.partition("@")[0]: one for one in beliefs(reader)} if algorithm is not None else {}
    facts = limits(reader.config, algorithm) if views and algorithm is not None else ()
    tensors, config, is_file = reader.tensors, reader.config, is_one_file(reader)
    beside = {name: one for name, one in reader.stored.items() if name not in tensors}
    readings: dict[EngineName, Reading | None] = {
        "sglang": sglang_reading(reader) if "sglang" not in views else None,
        "vllm-omni": vllm_omni.read(tensors, config, is_file=is_file) if "vllm-omni" not in views else None,
        "comfyui": comfyui.read(tensors, reader.metadata, markers_of(reader), legacy_ones(reader)),
        "diffusers": diffusers.read(tensors, config, is_file=is_file, beside=beside),
        "tensorrt-llm": None,
    }
    found = []
    for engine, reading in readings.items():
        belief = views.get(engine)
        own = engine in ("sglang", "vllm-omni", "tensorrt-llm")
        findings = [
            *(_by_reading(reading) if reading is not None else ()),
            *(_by_belief(belief, modules, linears_of(reader)) if belief is not None else ()),
            *(_by_limit(one) for one in facts if one.engine == engine and own and not one.unequal),
            *_fused(reader, modules, engine, belief),
        ]
        if engine == "tensorrt-llm" and not findings:
            findings = [_unrun(is_declared=bool(views))]
        view = reading if reading is not None else belief
        layout = (
            view.layout if view is not None and any(one.nibble_order != "none" for one in modules.values()) else None
        )
        depends, notes = (reading.depends, list(reading.notes)) if reading is not None else ("", [])
        if all(one.word != "refuses" for one in findings):
            findings += _by_layout(layout, modules, told, engine) if layout is not None else []
            depends = _sglang_names(reader, is_file=is_file) if engine == "sglang" else depends
        if engine == "comfyui" and len(reader.files) > 1:
            notes.append(f"it takes one file: this is said of all {len(reader.files)} as one")
        found.append(_verdict(engine, findings, layout, depends, notes))
    return found


def _unrun(*, is_declared: bool) -> _Finding:
    how = "no fault is known of it; its code was read, not run" if is_declared else "this form was not looked at"
    return _Finding(word="unknown", how=how, source="engines/tensorrt_llm.py", shown="read")


def _sglang_names(reader: CheckpointReader, *, is_file: bool) -> str:
    """What is not known of the names that SGLang's class has; of the classes that presets are for, it is."""
    if is_file:
        found = recognise({name: info.shape for name, info in reader.tensors.items()})
        known = found is not None and found.family.name in NAMES_RUN
        return "" if known else "whether its class knows the names of this file was not judged"
    if preset_of_class(reader.config) is not None:
        return ""
    name = reader.config.get("_class_name")
    return "no config names its class" if name is None else f"whether it has {name} is not known here"


def _verdict(
    engine: EngineName, findings: Sequence[_Finding], layout: Layout | None, depends: str, notes: list[str]
) -> EngineVerdict:
    worst: Word = max((one.word for one in findings), key=_ORDER.index)
    # What is good is said where nothing is bad.
    telling = [one for one in findings if one.word == worst or _ORDER.index(one.word) > _ORDER.index("unknown")]
    unsure = depends or any(one.shown == "inferred" for one in telling)
    parts: dict[str, set[str]] = {}
    for one in findings:
        for what, names in one.modules.items():
            parts.setdefault(what, set()).update(names)
    return EngineVerdict(
        engine=engine,
        version=_version(engine),
        verdict="assumes" if unsure and worst == "right" else worst,
        how="; ".join(dict.fromkeys(one.how for one in telling)),
        assumes={} if layout is None else {"nibble_order": layout.nibbles, "scale_layout": layout.scales},
        depends=depends,
        notes=notes,
        modules={what: sorted(names) for what, names in parts.items()},
        figure=max((one.figure for one in findings if one.figure is not None), default=None),
        source=list(dict.fromkeys(one.source for one in telling)),
        shown=min((one.shown for one in telling), key=get_args(Shown)[::-1].index),
    )


def _version(engine: EngineName) -> str:
    names = (sglang.VERSION, vllm_omni.VERSION, comfyui.VERSION, diffusers.VERSION, f"tensorrt-llm@{_TRTLLM}")
    return dict(one.split("@") for one in names)[engine]


def _by_reading(reading: Reading) -> Iterator[_Finding]:
    yield _Finding(
        word=_OUTCOMES[reading.outcome],
        how=reading.how,
        source=reading.source,
        shown=reading.shown,
        modules=reading.modules,
    )


def _by_limit(one: Limit) -> _Finding:
    figure = f" ({one.figure})" if one.figure else ""
    source = one.source or ("docs/engines.json" if one.shown == "run" else "engines/limits.toml")
    return _Finding(word=_GRADES[one.grade], how=f"{one.what}{figure}", source=source, shown=one.shown)


def _by_belief(belief: Belief, modules: Mapping[str, ModuleLayout], linears: Sequence[str]) -> Iterator[_Finding]:
    """Which modules the engine takes for something else; where packed and plain weights differ in shape, it fails."""
    source = belief.because[0] if belief.because else "docs/engines.json"
    wrong = differences(belief, modules, [*linears, *modules])
    said = mistaken(belief, modules, [*linears, *modules])
    is_nvfp4 = belief.group_size is not None
    words: Mapping[str, Word] = {
        TAKEN_FOR_PLAIN: "loss" if belief.decodes else "refuses",
        TAKEN_FOR_PACKED: "refuses" if is_nvfp4 else "misreads",
        UNSET: "misreads",
    }
    if belief.refuses is not None:
        how = belief.refuses.removeprefix(belief.engine).strip()
        yield _Finding(word="refuses", how=how, source=source, shown="run")
    else:
        for (what, names), sentence in zip(wrong.items(), said, strict=True):
            how = sentence.removeprefix(f"{belief.engine} ")
            yield _Finding(word=words[what], how=how, source=source, shown="run", modules={what: sorted(names)})
        if not wrong:
            yield _Finding(word="right", how=f"takes {len(modules)} modules for packed", source=source, shown="run")


def _by_layout(
    layout: Layout, modules: Mapping[str, ModuleLayout], told: Layout, engine: EngineName
) -> Iterator[_Finding]:
    """The layout that an engine assumes, against the proven one; scales that are padded tell their order themselves."""
    packed = {name: one for name, one in modules.items() if one.nibble_order != "none"}
    nibbles = [
        name
        for name, one in packed.items()
        if one.nibble_basis == "proven" and one.nibble_order in ("low", "high") and one.nibble_order != layout.nibbles
    ]
    scales = [
        name
        for name, one in packed.items()
        if one.scale_basis in ("proven", "shape")
        and one.scale_layout in ("linear", "128x4")
        and one.scale_layout != layout.scales
    ]
    wrong = {_OTHER_NIBBLE: nibbles, _OTHER_ORDER: scales}
    wrong = {what: names for what, names in wrong.items() if names}
    source, assumed = f"engines/{engine.replace('-', '_')}.py", _layout_words(layout.nibbles, layout.scales)
    if wrong:
        how = "; ".join(f"{what}: {len(names)} of {len(packed)} modules" for what, names in wrong.items())
        yield _Finding(word="misreads", how=how, source=source, shown="read", modules=wrong)
        return
    open_ones = [name for name, one in packed.items() if not _is_known(one)]
    if open_ones:
        said = _layout_words(told.nibbles, told.scales)
        how = f"assumes {assumed}; {f'declared {said}' if said else 'nothing declares it'}, not proven"
        if told.nibbles not in ("undetermined", layout.nibbles) or told.scales not in ("undetermined", layout.scales):
            how += ": misread if that is true"
        yield _Finding(word="assumes", how=how, source=source, shown="read")
    elif packed:
        how = f"reads {len(packed)} modules with {assumed}, as they are proven to lie"
        yield _Finding(word="right", how=how, source=source, shown="read")


def _is_known(one: ModuleLayout) -> bool:
    known = one.nibble_basis == "proven" and one.scale_basis in ("proven", "shape")
    return known and "undetermined" not in (one.nibble_order, one.scale_layout)


def _layout_words(nibbles: str, scales: str) -> str:
    parts = [f"{nibbles} nibble first"] if nibbles in ("low", "high") else []
    return ", ".join([*parts, f"scales {scales}"] if scales in ("linear", "128x4") else parts)


def _fused(
    reader: CheckpointReader, modules: Mapping[str, ModuleLayout], engine: EngineName, belief: Belief | None
) -> Iterator[_Finding]:
    """What one global scale for the parts of a fused module costs, from the scales of this file."""
    packed = {name for name, one in modules.items() if one.nibble_order != "none"}
    if engine == "sglang":
        groups = fused_groups(reader.config, packed)
    elif engine == "vllm-omni" and belief is not None:
        groups = [group for group in belief.fused if set(group) <= packed]
    else:
        return
    losses: dict[tuple[str, ...], float] = {}
    for group in groups:
        if len(_globals(reader, group)) == len(group) and len(set(_globals(reader, group).values())) > 1:
            from modelopt_convert.proof.fused import fused_losses

            losses[group] = fused_losses(reader, group)[engine]
    if not losses:
        return
    largest, few = max(losses.values()), f"{len(losses)} fused modules"
    if engine == "sglang":
        how = f"brings {few} to one global scale each and rounds their block scales: up to {largest:.1%} off"
        what, source = _REBASED, "_rebase_partition_weight_scales in modelopt_quant.py"
    else:
        how = f"misreads parts of {few}, by the largest global scale of each: up to {largest:.1%} off"
        what, source = _LARGEST, "model_executor/layers/quantization/modelopt.py"
    off = [
        name
        for group in losses
        for name, value in _globals(reader, group).items()
        if value != max(_globals(reader, group).values())
    ]
    yield _Finding(word="loss", how=how, source=source, shown="run", modules={what: off}, figure=largest)


def _globals(reader: CheckpointReader, group: Sequence[str]) -> dict[str, float]:
    """``weight_scale_2`` of the members that have one."""
    found = {name: reader.tensors.get(f"{name}.weight_scale_2") for name in group}
    return {name: float32_of(reader, one) for name, one in found.items() if one is not None and is_float32(one)}


def markers_of(reader: CheckpointReader) -> dict[str, dict[str, object]]:
    """What ComfyUI's marker tensors say; one that is no JSON object says nothing."""
    found = {}
    for name, one in reader.tensors.items():
        if name.endswith(sglang.MARKER) and one.num_bytes <= _MARKER_BYTES:
            found[name.removesuffix(sglang.MARKER)] = json_object(reader.read(name).decode("utf-8", "replace"))
    return found


def legacy_ones(reader: CheckpointReader) -> list[str]:
    """The legacy input scales whose value is 1.0."""
    legacy = {name: one for name, one in reader.tensors.items() if name.endswith(".scale_input")}
    return [name for name, one in legacy.items() if is_float32(one) and float32_of(reader, one) == 1.0]
