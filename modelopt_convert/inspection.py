"""``mopt inspect``: what a checkpoint is, how each module is laid out and how that is known, and what is wrong with it.

Headers and a few rows only, unless every scale is asked for. A fault found here is data, not a failure.
"""

import itertools
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from modelopt_convert.checkpoint import COMPONENTS, CheckpointReader, resolve_component
from modelopt_convert.dialects.detect import Dialect, Looked, detect_dialect
from modelopt_convert.dialects.modelopt import BLOCK_SIZE, SCALE_ROLES
from modelopt_convert.dtypes import HALF_AND_FLOAT
from modelopt_convert.engines.sglang import FLAT_METADATA_KEYS, Belief, believe, misread
from modelopt_convert.errors import InputError
from modelopt_convert.header import TensorInfo
from modelopt_convert.inspect_report import (
    Basis,
    ComponentReport,
    DialectReport,
    EngineReport,
    InspectReport,
    LayoutReport,
    LintReport,
    ModuleLayout,
    TotalsReport,
)
from modelopt_convert.layout import common_answer, detect_with_base, hint_scale_order, telling_rows
from modelopt_convert.patterns import PatternMatcher, module_of
from modelopt_convert.plan import SAMPLED_ROWS, natural_key
from modelopt_convert.preset import load_preset, preset_names
from modelopt_convert.proof import sample_rows
from modelopt_convert.scale_shapes import ROW_TILE, packed_shapes, scale_shapes
from modelopt_convert.transforms.raw import from_bytes
from modelopt_convert.transforms.scales import scale_readings

SAMPLED_MODULES = 8
_ORDER: tuple[Basis, ...] = ("none", "hint", "shape", "declared", "proven")  # from weak to strong


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed module as far as it can be made out; what is missing is a fault to report, not to raise.

    Attributes:
        name: Module name.
        weight: U8 codes.
        scale: E4M3 block scales.
        rows: N, without padding if a base, a bias or a marker tells it.
        columns: K.
        others: ``weight_scale_2``, ``input_scale``.
    """

    name: str
    weight: TensorInfo
    scale: TensorInfo
    rows: int
    columns: int
    others: Mapping[str, TensorInfo]


def inspect(source: Path, base: Path | None, report: InspectReport, *, every_scale: bool, max_error: float) -> None:
    """Fill ``report`` with what ``source`` is.

    Args:
        source: A transformer folder, a pipeline folder, or one .safetensors file.
        base: The unquantized base, or None.
        report: Filled component by component.
        every_scale: Look at every scale of every module, not at a sample of modules.
        max_error: Largest relative error of a reading that is accepted without reproducing the codes.

    Raises:
        InputError: Something cannot be read at all.
    """
    with torch.inference_mode():
        for name, path, base_path in _components(source, base):
            with ExitStack() as stack:
                reader = stack.enter_context(CheckpointReader(path, need_config=False))
                against = stack.enter_context(CheckpointReader(base_path)) if base_path else None
                component = _Inspection(reader, against, every_scale, max_error).run()
            report.components[name] = component
    first = next(iter(report.components.values()))
    report.dialect, report.layout, report.modules = first.dialect, first.layout, first.modules
    report.lint, report.totals, report.engine = first.lint, first.totals, first.engine


def _components(source: Path, base: Path | None) -> list[tuple[str, Path, Path | None]]:
    if source.is_file() or (source / "config.json").is_file():
        return [(".", source, resolve_component(base, what="base") if base else None)]
    found = [name for name in COMPONENTS if (source / name / "config.json").is_file()]
    if not found:
        path = source if any(source.glob("*.safetensors")) else resolve_component(source, what="source")
        return [(".", path, resolve_component(base, what="base") if base else None)]
    pairs: list[tuple[str, Path, Path | None]] = []
    for name in found:
        beside = base / name if base and (base / name / "config.json").is_file() else None
        if base and beside is None and len(found) == 1:
            beside = resolve_component(base, what="base")
        if base and beside is None:
            raise InputError(
                f"base {base}: expected {name}/ as in the source, found none",
                code="input.missing",
                path=str(base),
                hint="give the base pipeline, or inspect one component at a time",
            )
        pairs.append((name, source / name, beside))
    return pairs


def find_packed(
    tensors: Mapping[str, TensorInfo], true_shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Packed], list[LintReport]]:
    """Packed modules by name, and the U8 weights that cannot be one, as lint."""
    found: dict[str, Packed] = {}
    lint: list[LintReport] = []
    for name, weight in tensors.items():
        if not name.endswith(".weight") or weight.dtype != "U8" or len(weight.shape) != 2:
            continue
        module = name.removesuffix(".weight")
        scale = tensors.get(f"{module}.weight_scale")
        if scale is None or scale.dtype not in ("F8_E4M3", "U8"):
            lint.append(LintReport(code="scale.missing", message="packed weight without block scales", module=module))
            continue
        rows, columns = weight.shape[0], weight.shape[1] * 2
        bias = tensors.get(f"{module}.bias")
        true = true_shapes.get(name)
        if true is not None and len(true) == 2 and weight.shape in packed_shapes(*true):
            rows, columns = true
        elif bias is not None and len(bias.shape) == 1 and weight.shape in packed_shapes(bias.shape[0], columns):
            rows = bias.shape[0]
        others = {role: tensors[f"{module}.{role}"] for role in SCALE_ROLES[1:] if f"{module}.{role}" in tensors}
        found[module] = Packed(module, weight, scale, rows, columns, others)
    return dict(sorted(found.items(), key=lambda item: natural_key(item[0]))), lint


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
        self._packed, self._lint = find_packed(reader.tensors, shapes)
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
        self._lint_fp8()
        self._lint_fused()
        self._lint_config()
        return ComponentReport(
            dialect=DialectReport(name=self._dialect.name, evidence=list(self._dialect.evidence)),
            layout=layout,
            modules=modules,
            lint=self._lint,
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
        stored: Tensor | None = None
        if sampled or self._base is not None:
            stored = self._scales(packed)
        global_scale = self._global_scale(packed)
        if stored is not None:
            self._lint_scales(packed, stored)
        self._lint_module(packed)
        if self._base is not None and stored is not None and global_scale is not None:
            proven = self._prove(self._base, packed, stored, global_scale)
            if proven is not None:
                return proven
        nibbles, scales = self._declared.get("nibbles", "undetermined"), self._declared.get("scales", "undetermined")
        nibble_basis: Basis = "declared" if nibbles != "undetermined" else "none"
        scale_basis: Basis = "declared" if scales != "undetermined" else "none"
        orders = _orders_by_shape(packed)
        if len(orders) == 1:
            scales, scale_basis = next(iter(orders)), "shape"
        elif scale_basis == "none" and stored is not None:
            scales = self._hint(packed, stored)
            scale_basis = "hint" if scales != "undetermined" else "none"
        convention = "undetermined"
        if global_scale is not None:
            # amax / 2688 is far below one for any trained weight, its reciprocal far above.
            convention = "multiply" if global_scale < 1.0 else "divide"
        return self._entry(packed, nibbles, scales, convention, nibble_basis, scale_basis, None)

    def _prove(
        self, base: CheckpointReader, packed: Packed, stored: Tensor, global_scale: float
    ) -> ModuleLayout | None:
        info = base.tensors.get(packed.weight.name)
        if info is None or info.shape != (packed.rows, packed.columns) or info.dtype not in HALF_AND_FLOAT:
            self._lint.append(
                LintReport(code="base.no_counterpart", message="the base has no such weight", module=packed.name)
            )
            return None
        readings = scale_readings(stored, packed.rows, packed.columns // BLOCK_SIZE)
        if not readings or not 0.0 < global_scale < float("inf"):
            return None
        rows = sorted({*sample_rows(packed.rows, SAMPLED_ROWS), *telling_rows(readings, 4)})
        half, row_bytes = packed.columns // 2, info.num_bytes // packed.rows
        codes = b"".join(
            self._reader.read_range(packed.weight.name, row * packed.weight.shape[1], half) for row in rows
        )
        base_bytes = b"".join(base.read_range(info.name, row * row_bytes, row_bytes) for row in rows)
        base_rows = from_bytes(base_bytes, info.dtype, (len(rows), packed.columns))
        dtypes = (torch.bfloat16, torch.float16, base_rows.dtype)
        found = detect_with_base(
            [base_rows, *(base_rows.to(dtype) for dtype in dict.fromkeys(dtypes) if dtype != base_rows.dtype)],
            from_bytes(codes, "U8", (len(rows), half)),
            readings,
            rows,
            torch.tensor(global_scale, dtype=torch.float32),
            max_error=self._max_error,
        )
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

    def _scales(self, packed: Packed) -> Tensor:
        raw = self._reader.read(packed.scale.name)
        return from_bytes(raw, "F8_E4M3", packed.scale.shape)

    def _global_scale(self, packed: Packed) -> float | None:
        info = packed.others.get("weight_scale_2")
        if info is None or info.dtype != "F32" or info.num_bytes != 4:
            return None
        return float(from_bytes(self._reader.read(info.name), "F32", ()))

    def _hint(self, packed: Packed, stored: Tensor) -> str:
        columns = packed.columns // BLOCK_SIZE
        readings = scale_readings(stored, packed.rows, columns)
        if not readings:
            return "undetermined"
        # One tile of rows: both orders keep a scale within its tile of 128 rows.
        top = packed.rows // 2 // ROW_TILE * ROW_TILE
        height = min(ROW_TILE, packed.rows - top)
        stored_half = packed.weight.shape[1]
        raw = self._reader.read_range(packed.weight.name, top * stored_half, height * stored_half)
        codes = from_bytes(raw, "U8", (height, stored_half))[:, : packed.columns // 2].contiguous()
        return hint_scale_order(codes, {order: scale[top : top + height] for order, scale in readings.items()})

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
        self._lint += [LintReport(code="engine.misread", message=fault, module=None) for fault in faults]
        return EngineReport(
            name=self._belief.engine,
            believes={
                "nibble_order": self._belief.nibble_order,
                "scale_layout": self._belief.scale_layout,
                "group_size": self._belief.group_size,
                "packed_modules": len(self._belief.modules),
            },
            because=list(self._belief.because),
            misreads=faults,
        )

    def _lint_scales(self, packed: Packed, stored: Tensor) -> None:
        raw = stored.view(torch.uint8)
        broken = int(((raw & 0x7F) == 0x7F).sum())
        if broken:
            self._lint.append(
                LintReport(code="scale.nan", message=f"{broken} block scales are NaN", module=packed.name)
            )
        readings = scale_readings(stored, packed.rows, packed.columns // BLOCK_SIZE)
        zero = min((int((one.view(torch.uint8) == 0).sum()) for one in readings.values()), default=0)
        if zero:
            self._lint.append(
                LintReport(code="scale.zero", message=f"{zero} block scales are zero", module=packed.name)
            )

    def _lint_module(self, packed: Packed) -> None:
        for role in SCALE_ROLES[1:]:
            info = packed.others.get(role)
            if info is None:
                code = "input_scale.missing" if role == "input_scale" else "global_scale.missing"
                self._lint.append(LintReport(code=code, message=f"no {role}; SGLang puts 1.0", module=packed.name))
            elif info.dtype != "F32" or info.num_bytes != 4:
                message = f"{role} is {info.dtype} {list(info.shape)}, expected F32 []"
                self._lint.append(LintReport(code="scale.unusable", message=message, module=packed.name))
            else:
                value = float(from_bytes(self._reader.read(info.name), "F32", ()))
                if not 0.0 < value < float("inf"):
                    self._lint.append(
                        LintReport(code="scale.unusable", message=f"{role} is {value}", module=packed.name)
                    )
        if packed.weight.shape != (packed.rows, packed.columns // 2):
            self._lint.append(
                LintReport(
                    code="shape.padded",
                    message=f"{list(packed.weight.shape)} stored for [{packed.rows}, {packed.columns}]",
                    module=packed.name,
                )
            )
        elif packed.scale.shape != (packed.rows, packed.columns // BLOCK_SIZE):
            self._lint.append(
                LintReport(
                    code="shape.padded", message=f"scales stored as {list(packed.scale.shape)}", module=packed.name
                )
            )
        if packed.weight.file != packed.scale.file:
            self._lint.append(
                LintReport(
                    code="module.split",
                    message=f"weight in {packed.weight.file}, scales in {packed.scale.file}",
                    module=packed.name,
                )
            )

    def _lint_fp8(self) -> None:
        for name, info in self._reader.tensors.items():
            module = name.removesuffix(".weight")
            if module == name or info.dtype != "F8_E4M3":
                continue
            for role in ("weight_scale", "input_scale"):
                scale = self._reader.tensors.get(f"{module}.{role}")
                if scale is None:
                    self._lint.append(LintReport(code=f"{role}.missing", message=f"FP8 without {role}", module=module))
                elif scale.dtype == "F32" and scale.num_bytes == 4:
                    value = float(from_bytes(self._reader.read(scale.name), "F32", ()))
                    if not 0.0 < value < float("inf"):
                        self._lint.append(
                            LintReport(code="scale.unusable", message=f"{role} is {value}", module=module)
                        )

    def _lint_fused(self) -> None:
        groups = _fused_leaves(self._reader.config)
        for group, parent in itertools.product(groups, sorted({module_of(name) for name in self._packed})):
            values = {
                leaf: self._global_scale(self._packed[f"{parent}.{leaf}"])
                for leaf in group
                if f"{parent}.{leaf}" in self._packed
            }
            if len(set(values.values())) > 1:
                self._lint.append(
                    LintReport(
                        code="fused.global_scale",
                        message=f"{', '.join(values)} differ in weight_scale_2; SGLang rebases them",
                        module=parent,
                    )
                )

    def _lint_config(self) -> None:
        found = self._reader.config.get("quantization_config")
        keys = found if isinstance(found, dict) else {}
        listed = keys.get("ignore")
        ignore = [entry for entry in listed if isinstance(entry, str)] if isinstance(listed, list) else []
        if keys.get("quant_method") == "modelopt":
            linears = [
                module_of(name)
                for name, info in self._reader.tensors.items()
                if name.endswith(".weight") and len(info.shape) == 2 and info.dtype in HALF_AND_FLOAT
            ]
            for name in self._packed:
                if any(PatternMatcher.ignores(entry, name) for entry in ignore):
                    self._lint.append(
                        LintReport(code="ignore.lists_packed", message="in `ignore`, yet packed", module=name)
                    )
            for name in linears:
                if not any(PatternMatcher.ignores(entry, name) for entry in ignore):
                    self._lint.append(
                        LintReport(
                            code="ignore.misses_unpacked", message="not packed, yet not in `ignore`", module=name
                        )
                    )
        for file, entries in self._reader.metadata.items():
            flat = FLAT_METADATA_KEYS[0] in entries and '"layers"' not in entries[FLAT_METADATA_KEYS[0]]
            if flat:
                self._lint.append(
                    LintReport(
                        code="metadata.clash",
                        message=f"{file}: a flat config under _quantization_metadata, where ComfyUI expects layers",
                        module=None,
                    )
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


def _orders_by_shape(packed: Packed) -> set[Literal["linear", "128x4"]]:
    """The orders that the shape of the scales allows."""
    return {
        "128x4" if shape.swizzled else "linear"
        for shape in scale_shapes(packed.rows, packed.columns // BLOCK_SIZE)
        if shape.stored == packed.scale.shape
    }


def _fused_leaves(config: Mapping[str, object]) -> list[list[str]]:
    for name in preset_names():
        preset = load_preset(name).preset
        if preset.class_name == config.get("_class_name"):
            return preset.fused
    return []


def _spread(names: list[str], count: int) -> list[str]:
    if len(names) <= count:
        return names
    return [names[index * len(names) // count] for index in range(count)]
