"""The one finder of quantized modules: which tensors belong together, by dtype and shape. Pure, no torch.

What a module of a format consists of is the format's entry, in the folder ``modelopt``: names and roles are ModelOpt's
in every checkpoint that mopt reads today.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.names import inside, module_of
from modelopt_convert.dialects.calibration import Calibration
from modelopt_convert.formats.format import Format, entry
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.run.errors import Faults, InputError, joint

Roles = Mapping[str, TensorInfo]
"""The tensors of one module by role, such as ``weight_scale``."""

SCALE_SHAPES: tuple[tuple[int, ...], ...] = ((), (1,))  # of a scale per tensor: ModelOpt's, and that of some loaders

SCALE_ROLES = frozenset(role for one in FORMATS.values() for role in one.scales)

UNCALIBRATED = frozenset({"export.missing_input_scale", "export.mixed_input_scale"})
"""Codes of faults of input scales: a weight is decoded without them."""

# Tensors that AWQ and SVDQuant leave beside a packed weight: without them the weight means something else.
TRANSFORM_ROLES: Mapping[str, str] = {
    "pre_quant_scale": "AWQ or SVDQuant",
    "_pre_quant_scale": "AWQ or SVDQuant",
    "svdquant_lora_a": "SVDQuant",
    "svdquant_lora_b": "SVDQuant",
}


@dataclass(frozen=True, slots=True)
class PackedModule:
    """One quantized module.

    Attributes:
        name: Full module name.
        rows: N, the number of output features, without padding.
        columns: K, the number of input features, without padding.
        weight: NVFP4: U8 [N, K/2], or padded as ModelOpt's post-processing does. FP8: F8_E4M3 [N, K], or still BF16.
            Without an export: the base's [N, K].
        scales: Those of the format's scales that are there, by role.
        bias: The bias, if the module has one.
        fault: Why the scales cannot be used, or None; of several reasons the joint one. Only a module about to be
            replaced may have one.
        calibrated: Scales by role that come from a ``--checkpoint``, for those that the export lacks.
    """

    # For a job that travels to another process; its modules have no faults.
    __pydantic_config__: ClassVar[Mapping[str, bool]] = {"arbitrary_types_allowed": True}

    name: str
    rows: int
    columns: int
    weight: TensorInfo
    scales: Roles
    bias: TensorInfo | None
    fault: InputError | None
    calibrated: Mapping[str, float] = field(default_factory=dict)

    @property
    def has_weight(self) -> bool:
        """Whether the weight can be decoded: what is wrong with input scales alone does not touch it."""
        return self.fault is None or all(one.code in UNCALIBRATED for one in self.fault.each())

    @property
    def tensors(self) -> list[TensorInfo]:
        """Everything but the bias."""
        return [self.weight, *self.scales.values()]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of modules beside their tensors.

    Attributes:
        true_shapes: Shapes [N, K] of weights by tensor name, as far as a base tells them: what lies beyond is padding.
        calibration: What a ``--checkpoint`` knows.
        ignore: The checkpoint's own ``ignore``. It is asked only where no weight is quantized yet.
        dynamic_inputs: Whether modules may do without ``input_scale``: all of them, or none.
    """

    true_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=dict)
    ignore: object = ()
    dynamic_inputs: bool = False


class ModuleFormat(Protocol):
    """How the modules of one format are packed: the entry of a format in ``modelopt``."""

    def names(self, grouped: Mapping[str, Roles], evidence: Evidence, path: str) -> list[str]:
        """The quantized modules."""

    def module(self, name: str, roles: Roles, evidence: Evidence, path: str) -> PackedModule:
        """One of them; an InputError if no scale and no kept module can excuse it."""

    def shape(self, module: PackedModule, role: str, *, is_merged: bool) -> tuple[int, ...]:
        """The shape under which a weight or scale is written, in the canonical layout."""

    def check_together(self, found: dict[str, PackedModule], evidence: Evidence, path: str) -> None:
        """Give a fault to what cannot be beside the others."""


def module_format(target: Format) -> ModuleFormat:
    """How modules of a format are packed."""
    found: ModuleFormat = entry("modelopt_convert.dialects.modelopt", target.algorithm)
    return found


@dataclass(frozen=True, slots=True)
class Found:
    """The quantized modules of a checkpoint.

    Attributes:
        modules: By name. Unquantized tensors are in none of them.
        refused: What no module that is kept can excuse (AWQ, SVDQuant, a mixture of formats), by tensor or module.
    """

    modules: dict[str, PackedModule]
    refused: Mapping[str, InputError]

    def or_raise(self) -> dict[str, PackedModule]:
        """The modules.

        Raises:
            InputError: What is refused: ``export.transformed``, ``export.mixed`` or ``export.weight``.
        """
        if self.refused:
            raise joint(list(self.refused.items()))
        return self.modules


def find_packed(tensors: Mapping[str, TensorInfo], target: Format, evidence: Evidence, *, path: str) -> Found:
    """Group tensors into the quantized modules of a format, judged by dtype and shape.

    Args:
        tensors: All of the checkpoint.
        target: The format.
        evidence: What else is known.
        path: The checkpoint's folder, for messages.
    """
    packing, modules = module_format(target), dict[str, PackedModule]()
    refused = dict(_transformed(tensors, path))
    grouped = _group(tensors)
    for name in packing.names(grouped, evidence, path):
        try:
            modules[name] = packing.module(name, grouped[name], evidence, path)
        except InputError as error:
            refused[name] = error
    packing.check_together(modules, evidence, path)
    return Found(modules, refused)


def format_of(tensors: Mapping[str, TensorInfo]) -> Format:
    """The format of a checkpoint's quantized modules, of several the one of fewer bits; the last if there are none."""
    grouped = _group(tensors).values()
    dtypes = {roles["weight"].dtype for roles in grouped if "weight" in roles}
    return next((one for one in FORMATS.values() if one.packed_dtype in dtypes), [*FORMATS.values()][-1])


def is_layout_marker(name: str) -> bool:
    """Whether a tensor is ComfyUI's per-module marker, by which loaders guess the layout."""
    return name.endswith(".comfy_quant")


def is_quantizer_state(name: str) -> bool:
    """Whether a tensor is calibration state that ModelOpt leaks into exports (``q_bmm_quantizer._amax``)."""
    return "_quantizer." in name


def check_calibrated(found: dict[str, PackedModule], evidence: Evidence, path: str) -> None:
    """Give a fault to modules that have an input scale where others have none."""
    calibrated = [module for module in found.values() if "input_scale" in module.scales]
    if not evidence.dynamic_inputs or not 0 < len(calibrated) < len(found):
        return
    fault = InputError(
        f"{path}: {len(calibrated)} of {len(found)} modules have an input_scale, though config.json declares "
        "dynamic_input_scale",
        code="export.mixed_input_scale",
        path=path,
        hint="all modules must have one, or none; export or build again",
    )
    found |= {module.name: replace(module, fault=fault) for module in calibrated}


def missing_scale(module: str, role: str, expected: str, where: str) -> InputError:
    """The fault of a quantized module that lacks a scale."""
    return InputError(
        f"{where}: tensor {module + '.' + role!r}: expected {expected}, found no such tensor",
        code=f"export.missing_{role}",
        path=where,
        hint=(
            "calibration never reached this module; calibrate with real prompts and export again"
            if role == "input_scale"
            else "the export is incomplete; export again"
        ),
    )


def one_fault(module: str, faults: Iterable[InputError]) -> InputError | None:
    """All that is wrong with a module's scales as one, or None."""
    found = [(module, fault) for fault in faults]
    return joint(found) if found else None


def add_faults(
    faults: Faults,
    modules: Mapping[str, PackedModule],
    where: str,
    uncalibrated: str = "never calibrated: calibrate with real prompts and export again",
) -> None:
    """Add all that is wrong with scales; what several modules lack is said once of all.

    Args:
        faults: Gets it.
        modules: All that have to have scales.
        where: The checkpoint, for messages.
        uncalibrated: What to do where no module has an input scale.
    """
    found = [(name, one) for name, module in modules.items() if module.fault is not None for one in module.fault.each()]
    lacking = Counter(fault.code for _, fault in found)
    for name, fault in found:
        role, count = fault.code.removeprefix("export.missing_"), lacking[fault.code]
        if role != fault.code and count > 1:
            hint = uncalibrated if role == "input_scale" and count == len(modules) else fault.hint
            words = f"{where}: {count} of {len(modules)} modules have no {role}"
            faults.add(name, InputError(words, code=fault.code, path=where, hint=hint))
        else:
            faults.add(name, fault)


def _group(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of every module by role; calibration state and markers left out."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        if not is_quantizer_state(name) and not is_layout_marker(name):
            modules.setdefault(module_of(name), {})[name.rpartition(".")[2]] = info
    return modules


def _transformed(tensors: Mapping[str, TensorInfo], path: str) -> Iterator[tuple[str, InputError]]:
    for name, info in tensors.items():
        if transform := TRANSFORM_ROLES.get(name.rpartition(".")[2]):
            yield (
                name,
                InputError(
                    f"{inside(path, info.file)}: tensor {name!r}: expected a plain export, found {transform}",
                    code="export.transformed",
                    path=inside(path, info.file),
                    hint="`mopt convert` undoes that with --to bf16; or export again with ModelOpt's --quant-algo max",
                ),
            )
