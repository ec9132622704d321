"""What one transformer is, how each module is laid out and how that is known, and what is wrong with it.

Headers and a few rows only, unless every scale is asked for. A fault found here is data, not a failure. torch is
imported only where the bytes of a packed module are compared with a base.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from modelopt_convert.checkpoint.names import natural_key
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.comfyui import COMFYUI, COMFYUI_HEADER, COMFYUI_MXFP8
from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.dialects.modelopt.dialect import MODELOPT, MODELOPT_FP8, MODELOPT_OTHER
from modelopt_convert.dialects.packed import Evidence, PackedModule, find_packed
from modelopt_convert.dialects.table import detect_dialect
from modelopt_convert.engines.belief import Belief
from modelopt_convert.engines.limits import DEFAULT, declared, limits
from modelopt_convert.engines.sglang import believe, misread
from modelopt_convert.formats.format import Format, entry
from modelopt_convert.formats.layout import BASES, Basis, Layout
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.formats.table import FORMATS, declares_dynamic_inputs
from modelopt_convert.inspection.engines import engine_reports, sglang_reading
from modelopt_convert.inspection.lint import (
    config_faults,
    fused_faults,
    marker_faults,
    role_faults,
    saved_faults,
    transformed_faults,
)
from modelopt_convert.report.inspect import (
    ComponentReport,
    DialectReport,
    EngineReport,
    LayoutReport,
    LintReport,
    ModuleLayout,
    TotalsReport,
)

# Of a file that nothing marks the order is not known: comfy-kitchen's and ModelOpt's have the same shape.
_MXFP8_SCALES: Mapping[str, tuple[str, Basis]] = {
    COMFYUI_MXFP8.name: ("128x4", "declared"),
    COMFYUI.name: ("128x4", "declared"),
    COMFYUI_HEADER.name: ("128x4", "declared"),
    MODELOPT_FP8.name: ("linear", "declared"),
    MODELOPT_OTHER.name: ("linear", "declared"),
}


@dataclass(frozen=True, slots=True)
class Subject:
    """What is looked at.

    Attributes:
        reader: The opened transformer.
        base: Its base, or None.
        every_scale: Look at every scale of every module, not at a sample of modules.
        max_error: Largest relative error of a reading that is accepted without reproducing the codes.
        declared: How packed modules are declared to lie.
        scales_of_mxfp8: The order of the scales of MXFP8 modules, and how that is known.
    """

    reader: CheckpointReader
    base: CheckpointReader | None
    every_scale: bool
    max_error: float
    declared: Layout
    scales_of_mxfp8: tuple[str, Basis] = ("undetermined", "none")


@dataclass(frozen=True, slots=True)
class Seen:
    """What was found of the modules of one format.

    Attributes:
        modules: By name.
        packed: Those that an engine might take for packed NVFP4.
        faults: What is wrong with them.
    """

    modules: Mapping[str, ModuleLayout]
    packed: Mapping[str, PackedModule]
    faults: list[LintReport]


class FormatInspection(Protocol):
    """How modules of one format are looked at: the entry of a format in this room."""

    def see(self, subject: Subject, found: Mapping[str, PackedModule], coded: Mapping[str, list[int]]) -> Seen:
        """Look at the modules.

        Args:
            subject: Where they are.
            found: Modules as far as they can be made out.
            coded: Shapes of all weights that are stored in the format's dtype, by module.
        """


def inspect_component(
    reader: CheckpointReader, base: CheckpointReader | None, *, every_scale: bool, max_error: float
) -> ComponentReport:
    """What one opened transformer is; ``Subject`` says what each argument means."""
    roles, saved = role_faults(reader, base), saved_faults(reader)
    base = None if roles else base  # what is said of the layout would be about another thing
    headers = Headers(reader.tensors, reader.metadata, reader.config, reader.skipped)
    dialect, evidence = detect_dialect(headers)
    mxfp8 = _MXFP8_SCALES.get(dialect.name, ("undetermined", "none"))
    subject = Subject(reader, base, every_scale, max_error, dialect.layout(headers), mxfp8)
    seen = [_see(subject, target) for target in FORMATS.values()]
    modules = {name: one for each in seen for name, one in each.modules.items()}
    packed = {name: one for each in seen for name, one in each.packed.items()}
    belief = believe(reader.tensors, reader.metadata, reader.config, reader.stored.keys())
    layout = _layout([modules[name] for name in packed], subject.declared, belief)
    engine = _engine(belief, layout, frozenset(packed)) if packed else None
    misreads = list(engine.misreads) if engine is not None else []
    if engine is not None and not misreads and (reading := sglang_reading(reader)).outcome == "refuses":
        engine = engine.model_copy(update={"misreads": [f"{belief.engine} {reading.how}"]})
    return ComponentReport(
        dialect=DialectReport(name=dialect.name, evidence=evidence),
        layout=layout,
        modules=modules,
        lint=[
            *roles,
            *(fault for each in seen for fault in each.faults),
            *(LintReport(code="engine.misread", message=words, module=None) for words in misreads),
            *marker_faults(reader, headers),
            *transformed_faults(reader),
            *_known(reader.config, modules, dialect.name),
            *fused_faults(reader, packed),
            *(saved or config_faults(reader, packed)),
        ],
        totals=_totals(reader),
        engine=engine,
        engines=[*([engine] if engine is not None else []), *engine_reports(reader, modules, layout)],
    )


def module_layout(
    target: Format, shape: Iterable[int], layout: Layout | None, error: float | None = None
) -> ModuleLayout:
    """One module's line of the report: [N, K] without padding; ``layout`` is None where the format has but one."""
    return ModuleLayout(
        algorithm=target.quant_algo,
        shape=list(shape),
        nibble_order="none" if layout is None else layout.nibbles,
        scale_layout="none" if layout is None else layout.scales,
        global_scale="none" if layout is None else layout.global_scale,
        basis="none" if layout is None else layout.basis,
        nibble_basis="none" if layout is None else layout.nibbles_by,
        scale_basis="none" if layout is None else layout.scales_by,
        relative_error=error,
    )


def _known(config: Mapping[str, Any], modules: Collection[str], dialect: str) -> Iterator[LintReport]:
    """What is known of the engine and a checkpoint as mopt writes it; of other dialects the facts say nothing."""
    algorithm = declared(config)
    if modules and dialect in (MODELOPT.name, MODELOPT_FP8.name) and algorithm is not None:
        for one in limits(config, algorithm):
            if one.engine == DEFAULT:
                yield LintReport(code=f"engine.{one.grade}", message=one.words, module=None)


def _see(subject: Subject, target: Format) -> Seen:
    reader, base = subject.reader, subject.base
    shapes = {name: info.shape for name, info in base.tensors.items()} if base else {}
    evidence = Evidence(shapes, dynamic_inputs=declares_dynamic_inputs(reader.config))
    modules = find_packed(reader.tensors, target, evidence, path=str(reader.path)).modules
    coded = {
        name.removesuffix(".weight"): list(info.shape)
        for name, info in reader.tensors.items()
        if name.endswith(".weight") and info.dtype == target.packed_dtype
    }
    inspection: FormatInspection = entry("modelopt_convert.inspection", target.algorithm)
    return inspection.see(subject, dict(sorted(modules.items(), key=lambda item: natural_key(item[0]))), coded)


def _layout(packed: list[ModuleLayout], declared: Layout, belief: Belief) -> LayoutReport:
    if not packed:
        return LayoutReport(nibble_order="none", scale_layout="none", global_scale="none", basis="none")
    nibbles = common_answer([one.nibble_order for one in packed])
    known = [one.basis for one in packed if one.basis != "none"]
    told = declared.over(belief.layout)
    return LayoutReport(
        # The contract has no word for a mixture of nibble orders: one file would be read in neither.
        nibble_order="undetermined" if nibbles in ("mixed", "equivalent") else nibbles,
        scale_layout=common_answer([one.scale_layout for one in packed]),
        global_scale=common_answer([one.global_scale for one in packed]).replace("mixed", "undetermined"),
        basis=min(known, key=BASES.index) if known else "none",
        modules_proven=sum(one.basis == "proven" for one in packed),
        modules_undetermined=sum("undetermined" in (one.nibble_order, one.scale_layout) for one in packed),
        modules_contradicting=sum(_contradicts(one, told) for one in packed),
    )


def _contradicts(one: ModuleLayout, told: Layout) -> bool:
    """Whether a proven answer contradicts what is declared, or what the engine would believe."""
    known_nibbles = one.nibble_basis == "proven" and one.nibble_order in ("low", "high")
    known_scales = one.scale_basis in ("proven", "shape") and one.scale_layout in ("linear", "128x4")
    wrong_nibbles = known_nibbles and one.nibble_order != told.nibbles
    return wrong_nibbles or (known_scales and one.scale_layout != told.scales)


def _engine(belief: Belief, layout: LayoutReport, packed: frozenset[str]) -> EngineReport:
    faults = misread(belief, layout.nibble_order, layout.scale_layout, group_size=BLOCK_SIZE, packed=packed)
    if layout.scale_layout == "mixed":
        faults.append(f"{belief.engine} reads all scales as {belief.layout.scales}, they are mixed")
    return EngineReport(
        name=belief.engine,
        believes={
            "nibble_order": belief.layout.nibbles,
            "scale_layout": belief.layout.scales,
            "group_size": belief.group_size,
            "packed_modules": len(belief.modules),
            "input_scales": belief.input_scales,
        },
        because=list(belief.because),
        misreads=faults,
    )


def _totals(reader: CheckpointReader) -> TotalsReport:
    """Of all that the files hold, whatever is looked at."""
    counts = Counter(info.dtype for info in reader.stored.values())
    sizes: Counter[str] = Counter()
    for info in reader.stored.values():
        sizes[info.dtype] += info.num_bytes
    return TotalsReport(
        tensors=len(reader.stored),
        bytes=sum(sizes.values()),
        by_dtype={dtype: {"tensors": counts[dtype], "bytes": sizes[dtype]} for dtype in sorted(counts)},
    )


def common_answer(answers: Iterable[str]) -> str:
    """One answer for a file from those of its modules: the decided ones, if they agree; ``mixed`` if they do not."""
    found = set(answers)
    decided = found - {"equivalent", "undetermined"}
    if len(decided) > 1:
        return "mixed"
    if decided:
        return decided.pop()
    if not found:
        return "none"
    return "equivalent" if found == {"equivalent"} else "undetermined"
