"""Faults that ``mopt inspect`` looks for: data to be shown, never a reason to stop."""

import itertools
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.names import module_of, natural_key
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.modelopt.export import SCALE_ROLES
from modelopt_convert.dialects.modelopt.nvfp4 import BLOCK_SIZE, declares_dynamic_inputs
from modelopt_convert.engines.sglang import DYNAMIC_INPUTS, FLAT_METADATA_KEYS
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.formats.nvfp4.shapes import packed_shapes, scale_shapes
from modelopt_convert.preset.patterns import ignored
from modelopt_convert.preset.preset import load_preset, preset_names
from modelopt_convert.report.inspect import LintReport


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


@dataclass(frozen=True, slots=True)
class OddScales:
    """How many block scales of a module are not positive numbers; of zeros those that the padding does not explain."""

    nan: int
    negative: int
    zero: int


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


def orders_by_shape(packed: Packed) -> set[Literal["linear", "128x4"]]:
    """The orders that the shape of the scales allows."""
    return {
        "128x4" if shape.swizzled else "linear"
        for shape in scale_shapes(packed.rows, packed.columns // BLOCK_SIZE)
        if shape.stored == packed.scale.shape
    }


class Linter:
    """Collects the faults of one component.

    Attributes:
        found: What was found so far.
    """

    def __init__(self, reader: CheckpointReader, packed: Mapping[str, Packed], found: list[LintReport]) -> None:
        """Begin with what was found while modules were made out."""
        self._reader = reader
        self._packed = packed
        self._dynamic = declares_dynamic_inputs(reader.config)
        self.found = found
        # All modules have an input_scale, or none.
        calibrated = [name for name, one in packed.items() if "input_scale" in one.others]
        if self._dynamic and 0 < len(calibrated) < len(packed):
            message = "has an input_scale, though config.json declares dynamic_input_scale, as others need it"
            self.found += [LintReport(code="input_scale.mixed", message=message, module=name) for name in calibrated]
        elif self._dynamic and packed and not calibrated:
            self.found.append(LintReport(code="input_scale.dynamic", message=DYNAMIC_INPUTS, module=None))

    def global_scale(self, packed: Packed) -> float | None:
        """``weight_scale_2``, if it is there and of the right kind."""
        info = packed.others.get("weight_scale_2")
        if info is None or info.dtype != "F32" or info.num_bytes != 4:
            return None
        return self._float32(info)

    def _float32(self, info: TensorInfo) -> float:
        (value,) = struct.unpack("<f", self._reader.read(info.name))
        return float(value)

    def scales(self, packed: Packed, odd: OddScales) -> None:
        """NaN, negative and zero block scales."""
        for count, code, what in (
            (odd.nan, "scale.nan", "NaN"),
            (odd.negative, "scale.unusable", "negative"),
            (odd.zero, "scale.zero", "zero"),
        ):
            if count:
                self.found.append(LintReport(code=code, message=f"{count} block scales are {what}", module=packed.name))

    def module(self, packed: Packed) -> None:
        """Missing or unusable scales, padded shapes, a module spread over files."""
        for role in SCALE_ROLES[1:]:
            info = packed.others.get(role)
            if info is None and role == "input_scale" and self._dynamic:
                continue
            if info is None:
                code = "input_scale.missing" if role == "input_scale" else "global_scale.missing"
                self.found.append(LintReport(code=code, message=f"no {role}; SGLang puts 1.0", module=packed.name))
            elif info.dtype != "F32" or info.num_bytes != 4:
                message = f"{role} is {info.dtype} {list(info.shape)}, expected F32 []"
                self.found.append(LintReport(code="scale.unusable", message=message, module=packed.name))
            else:
                value = self._float32(info)
                if not 0.0 < value < float("inf"):
                    self.found.append(
                        LintReport(code="scale.unusable", message=f"{role} is {value}", module=packed.name)
                    )
        if packed.weight.shape != (packed.rows, packed.columns // 2):
            self.found.append(
                LintReport(
                    code="shape.padded",
                    message=f"{list(packed.weight.shape)} stored for [{packed.rows}, {packed.columns}]",
                    module=packed.name,
                )
            )
        elif packed.scale.shape != (packed.rows, packed.columns // BLOCK_SIZE):
            self.found.append(
                LintReport(
                    code="shape.padded", message=f"scales stored as {list(packed.scale.shape)}", module=packed.name
                )
            )
        if packed.weight.file != packed.scale.file:
            self.found.append(
                LintReport(
                    code="module.split",
                    message=f"weight in {packed.weight.file}, scales in {packed.scale.file}",
                    module=packed.name,
                )
            )

    def fp8(self) -> None:
        """FP8 modules: missing or unusable scales."""
        for name, info in self._reader.tensors.items():
            module = name.removesuffix(".weight")
            if module == name or info.dtype != "F8_E4M3":
                continue
            for role in ("weight_scale", "input_scale"):
                scale = self._reader.tensors.get(f"{module}.{role}")
                if scale is None:
                    self.found.append(LintReport(code=f"{role}.missing", message=f"FP8 without {role}", module=module))
                elif scale.dtype == "F32" and scale.num_bytes == 4:
                    value = self._float32(scale)
                    if not 0.0 < value < float("inf"):
                        self.found.append(
                            LintReport(code="scale.unusable", message=f"{role} is {value}", module=module)
                        )

    def fused(self) -> None:
        """Fused siblings whose global scales differ."""
        groups = _fused_leaves(self._reader.config)
        for group, parent in itertools.product(groups, sorted({module_of(name) for name in self._packed})):
            values = {
                leaf: self.global_scale(self._packed[f"{parent}.{leaf}"])
                for leaf in group
                if f"{parent}.{leaf}" in self._packed
            }
            if len(set(values.values())) > 1:
                self.found.append(
                    LintReport(
                        code="fused.global_scale",
                        message=f"{', '.join(values)} differ in weight_scale_2; SGLang rebases them",
                        module=parent,
                    )
                )

    def config(self) -> None:
        """``ignore`` against tensors both ways, and a flat config where ComfyUI expects layers."""
        found = self._reader.config.get("quantization_config")
        keys = found if isinstance(found, dict) else {}
        if keys.get("quant_method") == "modelopt":
            linears = [
                module_of(name)
                for name, info in self._reader.tensors.items()
                if name.endswith(".weight") and len(info.shape) == 2 and info.dtype in HALF_AND_FLOAT
            ]
            coded = [
                module_of(name)
                for name, info in self._reader.tensors.items()
                if name.endswith(".weight") and info.dtype == "F8_E4M3"
            ]
            names = {*self._packed, *coded, *linears}
            covered = ignored(keys.get("ignore"), names, path=str(self._reader.path / "config.json"))
            for name in (*self._packed, *coded):
                if name in covered:
                    self.found.append(
                        LintReport(code="ignore.lists_packed", message="in `ignore`, yet packed", module=name)
                    )
            for name in linears:
                if name not in covered:
                    self.found.append(
                        LintReport(
                            code="ignore.misses_unpacked", message="not packed, yet not in `ignore`", module=name
                        )
                    )
        for file, entries in self._reader.metadata.items():
            flat = FLAT_METADATA_KEYS[0] in entries and '"layers"' not in entries[FLAT_METADATA_KEYS[0]]
            if flat:
                self.found.append(
                    LintReport(
                        code="metadata.clash",
                        message=f"{file}: a flat config under _quantization_metadata, where ComfyUI expects layers",
                        module=None,
                    )
                )


def _fused_leaves(config: Mapping[str, object]) -> list[list[str]]:
    for name in preset_names():
        preset = load_preset(name).preset
        if preset.class_name == config.get("_class_name"):
            return preset.fused
    return []
