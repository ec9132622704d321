"""A quantized checkpoint as diffusers' transformer, in which an emulated layer stands for each packed module."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.fidelity.emulation import Emulated, Rule
from modelopt_convert.fidelity.memory import free_bytes
from modelopt_convert.fidelity.transformer import load_transformer
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.formats.format import Format
from modelopt_convert.formats.table import declares_dynamic_inputs
from modelopt_convert.plan.inputs import model_tensors
from modelopt_convert.proof.scale_values import tensor_scale
from modelopt_convert.run.errors import Faults, InputError, joint
from modelopt_convert.verification.gemm.operands import Weight
from modelopt_convert.verification.subject import find_subject

_SCALE = "input_scale"


@dataclass(frozen=True, slots=True)
class Quantized:
    """What of a checkpoint is quantized, and how its engine runs it.

    Attributes:
        format: Of its modules.
        rule: How activations are quantized.
        weights: By module.
        input_scales: By module, for ``static``.
        unquantized: How many tensors it has beside them.
    """

    format: Format
    rule: Rule
    weights: Mapping[str, Weight]
    input_scales: Mapping[str, float]
    unquantized: int

    @property
    def words(self) -> str:
        """The rule as people know it: ``W4A4, static input scales``."""
        bits = self.format.bits
        if self.rule == "weight-only":
            return f"W{bits}A16"
        return f"W{bits}A{bits}, {self.rule} input scales"

    def layers(self, *, keep: bool = False, compiled: bool = False) -> dict[str, Emulated]:
        """An emulated layer for each module, as ``Emulated`` has them."""
        return {
            name: Emulated(weight, self.rule, self.input_scales.get(name), keep=keep, compiled=compiled)
            for name, weight in self.weights.items()
        }


def read_quantized(reader: CheckpointReader, base: CheckpointReader, rule: Rule | None) -> tuple[Quantized, nn.Module]:
    """A checkpoint's modules, and its transformer, in which their layers are empty.

    Args:
        reader: The opened checkpoint, with diffusers' names.
        base: The opened base.
        rule: How activations are quantized; None for what config.json declares.

    Raises:
        InputError: A scale cannot be used, a module is not the base's, or what ``find_subject`` and
            ``load_transformer`` refuse.
    """
    subject = find_subject(reader, base)
    _check_declared(reader, subject.format)
    _check_tensors(reader, base, subject.modules)
    declared: Rule = "dynamic" if declares_dynamic_inputs(reader.config) else "static"
    chosen = rule if rule is not None else declared
    ignored = () if chosen == "static" else (f"export.missing_{_SCALE}", "export.mixed_input_scale")
    faults = [
        (name, fault)
        for name, one in subject.modules.items()
        for fault in (one.fault.each() if one.fault is not None else ())
        if fault.code not in ignored
    ]
    if faults:
        raise joint(faults)
    weights: dict[str, Weight] = {}
    scales: dict[str, float] = {}
    for name, module in subject.modules.items():
        try:
            weights[name] = subject.operands(module)
        except ValueError as error:
            raise InputError(
                f"{reader.path}: {name}: {error}",
                code="fidelity.layout",
                path=str(reader.path),
                hint="`mopt verify` says how the checkpoint lies, and which command brings it in order",
            ) from None
        if chosen == "static":
            if _SCALE not in module.scales:
                raise InputError(
                    f"{reader.path}: {name}: expected {_SCALE} for static input scales, found none",
                    code="fidelity.no_input_scale",
                    path=str(reader.path),
                    hint="give --rule dynamic or weight-only",
                )
            scales[name] = tensor_scale(reader, module, _SCALE)
    model = load_transformer(reader, packed=subject.modules)
    layers = dict(model.named_modules())
    for name, weight in weights.items():
        found = layers.get(name)
        if not isinstance(found, nn.Linear) or (found.out_features, found.in_features) != weight.shape:
            raise InputError(
                f"{reader.path}: {name}: expected a linear layer {list(weight.shape)} in diffusers' "
                f"{type(model).__name__}, found {type(found).__name__ if found is not None else 'no such module'}",
                code="fidelity.module",
                path=str(reader.path),
                hint="give the checkpoint of the base's own class",
            )
    theirs = sum(len(one.tensors) + (one.bias is not None) for one in subject.modules.values())
    return Quantized(subject.format, chosen, weights, scales, len(reader.tensors) - theirs), model


def _check_declared(reader: CheckpointReader, target: Format) -> None:
    """Require that config.json does not declare another format than the tensors have.

    Raises:
        InputError: ``fidelity.declared``.
    """
    keys = reader.config.get("quantization_config")
    declared = keys.get("quant_algo", target.quant_algo) if isinstance(keys, dict) else target.quant_algo
    if declared != target.quant_algo:
        raise InputError(
            f"{reader.config_place}: quant_algo: expected {target.quant_algo!r}, which the tensors are, found "
            f"{declared!r}",
            code="fidelity.declared",
            path=reader.config_place,
            hint="an engine would load it wrongly; give the checkpoint with its own config.json",
        )


def _check_tensors(reader: CheckpointReader, base: CheckpointReader, modules: Mapping[str, PackedModule]) -> None:
    """Require that a checkpoint has the base's tensors, by names, shapes and dtypes, and none beside.

    Args:
        reader: The opened checkpoint.
        base: The opened base.
        modules: What is quantized.

    Raises:
        InputError: ``fidelity.tensors``, of everything that is wrong.
    """
    theirs = {info.name for one in modules.values() for info in one.tensors if info.name != one.weight.name}
    shapes = {name: info.shape for name, info in reader.tensors.items()}
    shapes |= {one.weight.name: (one.rows, one.columns) for one in modules.values()}
    packed = {one.weight.name for one in modules.values()}
    faults = Faults()

    def refuse(name: str, words: str) -> None:
        info = reader.tensors.get(name)
        place = f"{reader.folder}/{info.file}" if info is not None else str(reader.path)
        fault = InputError(
            f"{place}: tensor {name!r}: {words}",
            code="fidelity.tensors",
            path=place,
            hint=f"give the whole checkpoint that was made from the base {base.path}",
        )
        faults.add(name, fault)

    for name, wanted in base.tensors.items():
        info = reader.tensors.get(name)
        if info is None:
            refuse(name, f"expected {wanted.dtype} {list(wanted.shape)} as in the base, found no such tensor")
        elif shapes[name] != wanted.shape:
            refuse(name, f"expected {list(wanted.shape)} as in the base, found {list(shapes[name])}")
        elif name not in packed and not (info.dtype == wanted.dtype or {info.dtype, wanted.dtype} <= HALF_AND_FLOAT):
            refuse(name, f"expected {wanted.dtype} as in the base, found {info.dtype}")
    for name in model_tensors(reader):
        if name not in base.tensors and name not in theirs | packed:  # diffusers' class tells of packed ones
            refuse(name, "expected the tensors of the base alone, which has none of this name")
    faults.refuse()


def put_layers(model: nn.Module, layers: Mapping[str, Emulated]) -> nn.Module:
    """The transformer with these layers in place of its own."""
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return model.eval()


def has_room(weights: Mapping[str, Weight], device: torch.device) -> bool:
    """Whether decoded copies of all weights take no more than half of the free memory of a device."""
    needed = 2 * sum(weight.shape[0] * weight.shape[1] for weight in weights.values())
    return needed < free_bytes(device) // 2
