"""The units of a transformer: what is kept in BF16 or packed together, with its bytes either way. Pure, no torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from modelopt_convert.checkpoint.calibration import Calibrated
from modelopt_convert.checkpoint.names import module_of, natural_key
from modelopt_convert.formats.format import Format
from modelopt_convert.plan.from_base import plan_quantized
from modelopt_convert.plan.ignore import spellings
from modelopt_convert.plan.plan import BuildPlan, Keeps, Source
from modelopt_convert.preset.block_lists import literal
from modelopt_convert.preset.patterns import siblings
from modelopt_convert.preset.preset import Preset

_SHARD = 5 * 10**9  # how it would be written does not matter here


@dataclass(frozen=True, slots=True)
class Unit:
    """Modules of which all are packed, or none.

    Attributes:
        name: The module; of several the parent that they share, and what follows it of each, with ``+`` between.
        members: Their names, in natural order.
        weights: Elements of their weights.
        bytes_kept: Of their weights in BF16.
        bytes_packed: Of their codes and scales.
    """

    name: str
    members: tuple[str, ...]
    weights: int
    bytes_kept: int
    bytes_packed: int


@dataclass(frozen=True, slots=True)
class Choices:
    """What there is to choose.

    Attributes:
        plan: Of the transformer with every unit packed.
        units: In natural order.
        structural: Linears that are no choice, in natural order: the preset's structural set, and those that the format
            cannot hold.
    """

    plan: BuildPlan
    units: tuple[Unit, ...]
    structural: tuple[str, ...]

    @property
    def least_bytes(self) -> int:
        """Tensor bytes of the output with every unit packed."""
        return self.plan.total_bytes

    @property
    def most_bytes(self) -> int:
        """Tensor bytes of the output with every unit kept."""
        return self.least_bytes + sum(unit.bytes_kept - unit.bytes_packed for unit in self.units)

    @property
    def weights(self) -> int:
        """Elements of all units' weights."""
        return sum(unit.weights for unit in self.units)

    def bits(self, num_bytes: int) -> float:
        """Bits for each weight of the units, scales included, in an output of so many bytes."""
        outside = self.least_bytes - sum(unit.bytes_packed for unit in self.units)
        return 8 * (num_bytes - outside) / self.weights

    def bytes_of_bits(self, bits: float) -> int:
        """The most bytes of an output whose units take no more than so many bits a weight: ``bits`` backwards."""
        outside = self.least_bytes - sum(unit.bytes_packed for unit in self.units)
        return outside + int(bits * self.weights / 8)


def choices_of(target: Format, base: Source, preset: Preset, calibrated: Calibrated | None = None) -> Choices:
    """The units of a base: what a preset keeps for quality is free, what it keeps for the runtime is not.

    Args:
        target: The format that units are packed in.
        base: The unquantized transformer.
        preset: The model's.
        calibrated: What input scales are made of; None for inputs that the engine scales as they come.

    Raises:
        InputError: As ``plan_quantized`` raises for the preset as it is, or without its quality set.
    """
    rules = preset.rules(target.algorithm)
    as_is = plan_quantized(target, base, Keeps(preset, rules, ()), max_shard_size=_SHARD, calibrated=calibrated)
    cannot = tuple(literal(name) for name, module in as_is.modules.items() if module.fault is not None)
    free = rules.model_copy(update={"quality": []})
    plan = plan_quantized(target, base, Keeps(preset, free, cannot), max_shard_size=_SHARD, calibrated=calibrated)
    groups = _joined(plan.packed, preset, base.config, plan.shared)
    packed = dict.fromkeys(plan.packed, 0)
    for name, step in plan.steps.items():
        if module_of(name) in packed and not name.endswith(".bias"):
            packed[module_of(name)] += step.output.num_bytes
    units = [
        Unit(
            _name(members),
            members,
            weights := sum(plan.modules[name].rows * plan.modules[name].columns for name in members),
            2 * weights,
            sum(packed[name] for name in members),
        )
        for members in groups
    ]
    return Choices(plan, tuple(units), tuple(sorted(plan.replaced, key=natural_key)))


def _joined(
    packed: list[str], preset: Preset, config: Mapping[str, Any], shared: Iterable[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """Packed modules in groups: those that a runtime fuses, that share a scale, or that have one name there."""
    names: dict[str, list[str]] = {}
    for module in packed:
        for spelling in spellings(module, preset, config) - {module}:
            names.setdefault(spelling, []).append(module)
    of = {module: {module} for module in packed}
    for group in (*siblings(preset.fused, packed), *shared, *names.values()):
        whole = set[str]().union(*(of[module] for module in group))
        of |= dict.fromkeys(whole, whole)
    groups = {id(whole): tuple(sorted(whole, key=natural_key)) for whole in of.values()}
    return sorted(groups.values(), key=lambda members: natural_key(members[0]))


def _name(members: tuple[str, ...]) -> str:
    parents = {member.rpartition(".")[0] for member in members}
    if len(members) == 1 or len(parents) > 1:
        return "+".join(members)
    parent = f"{parents.pop()}."
    return parent.removeprefix(".") + "+".join(member.removeprefix(parent) for member in members)
