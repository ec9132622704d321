"""``mopt inspect``: what a checkpoint is, how each module is laid out and how that is known, and what is wrong with it.

Headers and a few rows only, unless every scale is asked for. A fault found here is data, not a failure. torch is
imported only where the bytes of a packed module are looked at.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.detect import Dialect, Looked, detect_dialect
from modelopt_convert.dialects.modelopt.nvfp4 import BLOCK_SIZE
from modelopt_convert.engines.sglang import Belief, believe, misread
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.inspection.lint import Linter, Packed, find_packed, orders_by_shape
from modelopt_convert.report.inspect import (
    Basis,
    ComponentReport,
    DialectReport,
    EngineReport,
    LayoutReport,
    LintReport,
    ModuleLayout,
    TotalsReport,
)

if TYPE_CHECKING:
    from modelopt_convert.inspection.module_bytes import Looks

SAMPLED_MODULES = 8
_ORDER: tuple[Basis, ...] = ("none", "hint", "shape", "declared", "proven")  # from weak to strong


def inspect_component(
    reader: CheckpointReader, base: CheckpointReader | None, *, every_scale: bool, max_error: float
) -> ComponentReport:
    """What one opened transformer is; arguments as those of ``inspect``."""
    return _Inspection(reader, base, every_scale, max_error).run()


class _Inspection:
    """One component."""

    def __init__(
        self, reader: CheckpointReader, base: CheckpointReader | None, every_scale: bool, max_error: float
    ) -> None:
        self._reader = reader
        self._base = base
        self._every_scale = every_scale
        self._max_error = max_error
        shapes = {name: info.shape for name, info in base.tensors.items()} if base else {}
        self._packed, faults = find_packed(reader.tensors, shapes)
        self._linter = Linter(reader, self._packed, faults)
        looked = Looked(reader.tensors, reader.metadata, reader.config, reader.skipped)
        self._dialect: Dialect = detect_dialect(looked)
        self._belief: Belief = believe(reader.tensors, reader.metadata, reader.config)
        self._declared = self._declarations()

    def run(self) -> ComponentReport:
        sampled = set(_spread(list(self._packed), SAMPLED_MODULES))
        modules = {
            name: self._module(packed, sampled=self._every_scale or name in sampled)
            for name, packed in self._packed.items()
        }
        modules |= self._fp8_modules()
        layout = self._layout(modules)
        engine = self._engine(layout) if self._packed else None
        self._linter.fp8()
        self._linter.fused()
        self._linter.config()
        return ComponentReport(
            dialect=DialectReport(name=self._dialect.name, evidence=list(self._dialect.evidence)),
            layout=layout,
            modules=modules,
            lint=self._linter.found,
            totals=self._totals(),
            engine=engine,
        )

    def _declarations(self) -> dict[str, str]:
        """What keys, markers or names say outright: ``nibbles`` and ``scales``."""
        if self._dialect.name in ("comfyui", "comfyui-header", "bfl"):
            return {"nibbles": "high", "scales": "128x4"}
        found = self._reader.config.get("quantization_config")
        keys = found if isinstance(found, dict) else {}
        said: dict[str, str] = {}
        if isinstance(keys.get("swap_weight_nibbles"), bool):
            said["nibbles"] = "high" if keys["swap_weight_nibbles"] else "low"
        layouts = {"linear": "linear", "swizzled": "128x4"}
        layout = layouts.get(str(keys.get("checkpoint_weight_scale_layout")))
        if layout is not None:
            said["scales"] = layout
        return said

    def _module(self, packed: Packed, *, sampled: bool) -> ModuleLayout:
        # Without a base, modules that are not sampled are judged by shape and declaration, from headers alone.
        looks = self._looks(packed) if sampled or self._base is not None else None
        global_scale = self._linter.global_scale(packed)
        if looks is not None:
            self._linter.scales(packed, looks.odd_scales())
        self._linter.module(packed)
        if self._base is not None and looks is not None and global_scale is not None:
            proven = self._prove(self._base, packed, looks, global_scale)
            if proven is not None:
                return proven
        nibbles, scales = self._declared.get("nibbles", "undetermined"), self._declared.get("scales", "undetermined")
        nibble_basis: Basis = "declared" if nibbles != "undetermined" else "none"
        scale_basis: Basis = "declared" if scales != "undetermined" else "none"
        orders = orders_by_shape(packed)
        if len(orders) == 1:
            scales, scale_basis = next(iter(orders)), "shape"
        elif scale_basis == "none" and looks is not None:
            scales = looks.hint()
            scale_basis = "hint" if scales != "undetermined" else "none"
        convention = "undetermined"
        if global_scale is not None:
            # amax / 2688 is far below one for any trained weight, its reciprocal far above.
            convention = "multiply" if global_scale < 1.0 else "divide"
        return self._entry(packed, nibbles, scales, convention, nibble_basis, scale_basis, None)

    def _prove(
        self, base: CheckpointReader, packed: Packed, looks: "Looks", global_scale: float
    ) -> ModuleLayout | None:
        info = base.tensors.get(packed.weight.name)
        if info is None or info.shape != (packed.rows, packed.columns) or info.dtype not in HALF_AND_FLOAT:
            self._linter.found.append(
                LintReport(code="base.no_counterpart", message="the base has no such weight", module=packed.name)
            )
            return None
        found = looks.against(base, info, global_scale, self._max_error) if 0.0 < global_scale < float("inf") else None
        if found is None:
            return None
        decided = "undetermined" not in (found.nibbles, found.scales)
        basis: Basis = "proven" if decided else "none"
        return self._entry(
            packed,
            found.nibbles,
            found.scales,
            found.global_scale,
            "proven" if found.nibbles != "undetermined" else "none",
            "proven" if found.scales != "undetermined" else basis,
            found.closeness.relative_error,
        )

    def _entry(
        self,
        packed: Packed,
        nibbles: str,
        scales: str,
        convention: str,
        nibble_basis: Basis,
        scale_basis: Basis,
        error: float | None,
    ) -> ModuleLayout:
        return ModuleLayout(
            algorithm="NVFP4",
            shape=[packed.rows, packed.columns],
            nibble_order=nibbles,
            scale_layout=scales,
            global_scale=convention,
            basis=min(nibble_basis, scale_basis, key=_ORDER.index),
            nibble_basis=nibble_basis,
            scale_basis=scale_basis,
            relative_error=error,
        )

    def _looks(self, packed: Packed) -> "Looks":
        from modelopt_convert.inspection.module_bytes import Looks

        return Looks(self._reader, packed, self._reader.read(packed.scale.name))

    def _fp8_modules(self) -> dict[str, ModuleLayout]:
        return {
            name.removesuffix(".weight"): ModuleLayout(
                algorithm="FP8",
                shape=list(info.shape),
                nibble_order="none",
                scale_layout="none",
                global_scale="none",
                basis="none",
                nibble_basis="none",
                scale_basis="none",
                relative_error=None,
            )
            for name, info in self._reader.tensors.items()
            if name.endswith(".weight") and info.dtype == "F8_E4M3"
        }

    def _layout(self, modules: Mapping[str, ModuleLayout]) -> LayoutReport:
        packed = [one for one in modules.values() if one.algorithm == "NVFP4"]
        if not packed:
            return LayoutReport(nibble_order="none", scale_layout="none", global_scale="none", basis="none")
        nibbles = common_answer([one.nibble_order for one in packed])
        scales = common_answer([one.scale_layout for one in packed])
        known = [one.basis for one in packed if one.basis != "none"]
        return LayoutReport(
            # The contract has no word for a mixture of nibble orders: one file would be read in neither.
            nibble_order="undetermined" if nibbles in ("mixed", "equivalent") else nibbles,
            scale_layout=scales,
            global_scale=common_answer([one.global_scale for one in packed]).replace("mixed", "undetermined"),
            basis=min(known, key=_ORDER.index) if known else "none",
            modules_proven=sum(one.basis == "proven" for one in packed),
            modules_undetermined=sum("undetermined" in (one.nibble_order, one.scale_layout) for one in packed),
            modules_contradicting=sum(self._contradicts(one) for one in packed),
        )

    def _contradicts(self, one: ModuleLayout) -> bool:
        """Whether a proven answer contradicts what is declared, or what the engine would believe."""
        nibbles = self._declared.get("nibbles", self._belief.nibble_order)
        scales = self._declared.get("scales", self._belief.scale_layout)
        wrong_nibbles = (
            one.nibble_basis == "proven" and one.nibble_order in ("low", "high") and one.nibble_order != nibbles
        )
        known_scales = one.scale_basis in ("proven", "shape") and one.scale_layout in ("linear", "128x4")
        return wrong_nibbles or (known_scales and one.scale_layout != scales)

    def _engine(self, layout: LayoutReport) -> EngineReport:
        faults = misread(
            self._belief,
            nibbles=layout.nibble_order,
            scales=layout.scale_layout,
            group_size=BLOCK_SIZE,
            packed=frozenset(self._packed),
        )
        if layout.scale_layout == "mixed":
            faults.append(f"{self._belief.engine} reads all scales as {self._belief.scale_layout}, they are mixed")
        self._linter.found += [LintReport(code="engine.misread", message=fault, module=None) for fault in faults]
        return EngineReport(
            name=self._belief.engine,
            believes={
                "nibble_order": self._belief.nibble_order,
                "scale_layout": self._belief.scale_layout,
                "group_size": self._belief.group_size,
                "packed_modules": len(self._belief.modules),
                "input_scales": self._belief.input_scales,
            },
            because=list(self._belief.because),
            misreads=faults,
        )

    def _totals(self) -> TotalsReport:
        counts = Counter(info.dtype for info in self._reader.tensors.values())
        sizes: Counter[str] = Counter()
        for info in self._reader.tensors.values():
            sizes[info.dtype] += info.num_bytes
        return TotalsReport(
            tensors=len(self._reader.tensors),
            bytes=sum(sizes.values()),
            by_dtype={dtype: {"tensors": counts[dtype], "bytes": sizes[dtype]} for dtype in sorted(counts)},
        )


def _spread(names: list[str], count: int) -> list[str]:
    if len(names) <= count:
        return names
    return [names[index * len(names) // count] for index in range(count)]


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
