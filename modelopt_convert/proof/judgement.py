"""The judgement on one packed module, and what a format has to know for that.

A verdict is about exactly the bytes that were compared, and says how many. What is compared whole is proven or not;
sampled rows choose what is tried first, and prove nothing.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import TYPE_CHECKING, Literal, Protocol

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.calibration import Calibration
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.format import WEIGHTS_WORDS, Algorithm, entry
from modelopt_convert.formats.fp8.codes import Clipped
from modelopt_convert.formats.layout import Layout
from modelopt_convert.proof.closeness import Closeness
from modelopt_convert.proof.due import Due
from modelopt_convert.report.words import PROVEN
from modelopt_convert.run.text import few

if TYPE_CHECKING:
    from modelopt_convert.proof.blocks import BlockTally
    from modelopt_convert.proof.tensors import Quantizer

Verdict = Literal["reproduced", "reproduced but for ties", "nearest", "near", "undetermined", "unrelated", "mismatch"]


COMPRESSED = "max calibration, --compress: block scales rounded twice"
"""A rule that holds only where another module has the scale of the group."""
SWEPT, WEIGHTED, COMPENSATED = (WEIGHTS_WORDS[rule] for rule in ("sweep", "sweep-weighted", "gptq"))
"""The rules of ``formats/nvfp4/sweep.py``: every byte is theirs."""
OF_CALIBRATION = (WEIGHTED, COMPENSATED)
"""Of these, the rules that can be run again where their calibration is at hand, and say nothing without."""

AMPLE = 256.0
"""A scale so many times that of max calibration still tells the weights apart. Above, codes may be right and say
nothing: a weight of which all codes are zero is its base, quantized under a scale that is far too large."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What was compared of one module.

    Attributes:
        codes: Codes compared.
        codes_equal: Of them equal to the base's, quantized again.
        codes_tied: Of the rest, other neighbours of a midpoint.
        zero_signs: Of the rest, zeros of the other sign.
        scales: NVFP4: block scales compared.
        scales_equal: Of them equal to those of max calibration; of ``reproduced`` ones, to those of their rule.
        scales_tied: Of the rest, other neighbours of a midpoint.
        scales_idle: Of the rest, those over codes that are all zero.
        blocks_above: Blocks whose squared error is above that of max calibration.
        padding: Bytes of padding beside the codes and scales, all of them zero; of a module that was compared whole.
    """

    codes: int
    codes_equal: int
    codes_tied: int = 0
    zero_signs: int = 0
    scales: int = 0
    scales_equal: int = 0
    scales_tied: int = 0
    scales_idle: int = 0
    blocks_above: int = 0
    padding: int = 0

    @classmethod
    def of(cls, tally: "BlockTally") -> "Counts":
        """The counts of an NVFP4 weight."""
        return cls(
            tally.codes,
            tally.codes_equal,
            tally.codes_tied,
            tally.zero_signs,
            tally.scales,
            tally.scales_equal + tally.scales_zero,
            tally.scales_tied,
            tally.scales_idle,
            tally.blocks_above,
        )


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on one module.

    Attributes:
        verdict: ``reproduced``, ``reproduced but for ties`` and ``nearest`` prove a module if all of it was compared;
            ``near``: the layout is right, the weights are not the base's rounded; ``undetermined``: several readings
            come near; ``unrelated``: none resembles the base; ``mismatch``: one resembles it, but not enough.
        is_whole: Whether all of it was compared, or sampled rows.
        counts: How much was compared.
        amax: Largest magnitude of the base, as far as it was compared.
        scale: The scale of the whole tensor.
        closeness: Of the dequantized rows; where it decides nothing, of sampled rows.
        reading: NVFP4: the reading that fits best.
        rule: How the codes are made of the base, if they are reproduced.
        cast: The dtype that the base was quantized from.
        first: Where the first byte that differs lies, in words.
        clipped: Base values that the scale is too small for, if any.
        factor: The scale over that of max calibration.
        group_factor: The scale over that of max calibration of all modules that have it.
    """

    verdict: Verdict
    is_whole: bool
    counts: Counts
    amax: float
    scale: float
    closeness: Closeness | None = None
    reading: Layout | None = None
    rule: str | None = None
    cast: str | None = None
    first: str | None = None
    clipped: Clipped | None = None
    factor: float = 1.0
    group_factor: float = 1.0

    @property
    def passed(self) -> bool:
        """Whether the module is the base, quantized."""
        return self.verdict in PROVEN


class FormatProof(Protocol):
    """How modules of one format are proven: the entry of a format in this room.

    Attributes:
        method: In words.
        tensor_scale: Role of the scale of the whole weight.
        never_excused: Codes of faults that are told although the base replaces the module.
        is_rebased: Whether a runtime brings the tensor scales of a fused group to one.
    """

    method: str
    tensor_scale: str
    never_excused: frozenset[str]
    is_rebased: bool

    def scale(
        self, export: CheckpointReader, base: CheckpointReader | None, module: PackedModule, calibration: Calibration
    ) -> float:
        """The tensor scale, after all scales of the module were looked at.

        A float: many small tensors held between large ones keep the allocator from giving memory back.

        Raises:
            InputError: A scale that cannot be used.
        """

    def scale_of(self, amax: float) -> float:
        """The tensor scale that max calibration gives to the largest magnitude."""

    def look(self, export: CheckpointReader, base: CheckpointReader, due: Due) -> Judgement:
        """Look at a few rows: what is to be tried first on all of them.

        Returns:
            A judgement on those rows. ``near`` where all rows have to be seen.

        Raises:
            InputError: Export or base cannot be judged.
        """

    def compare(
        self,
        export: CheckpointReader,
        base: CheckpointReader,
        due: Due,
        stopped: Event,
        rows: Sequence[int] | None,
        gpu: "Quantizer | None" = None,
    ) -> Judgement:
        """Compare all rows, or those given. All rows of NVFP4 are quantized again on the GPU, if there is one.

        Raises:
            InputError: Export or base cannot be judged.
            Stopped: The event was set meanwhile.
        """

    def name_cause(self, export: CheckpointReader, modules: Mapping[str, Judgement]) -> None:
        """Turn a failure of modules whose cause is known into an InputError that says so."""


def format_proof(algorithm: Algorithm) -> FormatProof:
    """How modules of a format are proven."""
    found: FormatProof = entry("modelopt_convert.proof", algorithm)
    return found


def with_shared_scales(rules: FormatProof, modules: Mapping[str, Judgement]) -> dict[str, Judgement]:
    """The judgements once all modules are compared: whether each tensor scale is the one of max calibration.

    Modules with one and the same scale may have been calibrated as one, so that the largest of them all counts. A
    scale that no module's largest magnitude gives was chosen otherwise: such a module is ``nearest`` at best.

    Args:
        rules: Of the format.
        modules: By name.
    """
    largest: defaultdict[float, float] = defaultdict(float)
    for one in modules.values():
        largest[one.scale] = max(largest[one.scale], one.amax)
    judged = dict(modules)
    for name, one in modules.items():
        if not (one.is_whole and one.passed):
            continue
        calibrated = [rules.scale_of(amax) for amax in (one.amax, largest[one.scale])]
        if one.scale not in calibrated:
            # Codes are of another scale there, or errors not the least plain ones.
            verdict: Verdict = "near" if one.rule in (COMPRESSED, *OF_CALIBRATION) else "nearest"
            factor, of_group = (one.scale / scale if scale else 1.0 for scale in calibrated)
            words = f"{rules.tensor_scale} is {factor:.9g} times that of max calibration" if factor != 1.0 else None
            if words is not None and of_group != factor:
                words += f", {of_group:.9g} times that of all modules with this scale"
            judged[name] = replace(one, verdict=verdict, factor=factor, group_factor=of_group, first=one.first or words)
    return judged


def scale_words(modules: Mapping[str, Judgement], groups: Iterable[Sequence[str]]) -> list[str]:
    """What is to be known of scales that are not those of max calibration, though every code is the base's.

    Args:
        modules: By name, after ``with_shared_scales``.
        groups: The members of each fused weight, which max calibration gives one scale.
    """
    words = []
    if factors := {name: one.factor for name, one in modules.items() if one.passed and one.factor != 1.0}:
        told = (
            f"{len(factors)} modules have a tensor scale that is not max calibration's ({next(iter(factors))} first), "
            f"{min(factors.values()):.9g} to {max(factors.values()):.9g} times what their own largest value gives"
        )
        if parted := _parted(modules, factors, groups):
            told += (
                f"; {few(parted)} no longer {'has' if len(parted) == 1 else 'have'} the scale of the fused group, so "
                "that the factor is not over the group's"
            )
        words.append(told)
    idle = {name: one.counts.scales_idle for name, one in modules.items() if one.passed and one.counts.scales_idle}
    if idle:
        words.append(
            f"{sum(idle.values())} idle scales in {len(idle)} modules ({next(iter(idle))} first): block scales over "
            "zeros that are not max calibration's, and have no effect"
        )
    return words


def _parted(modules: Mapping[str, Judgement], odd: Collection[str], groups: Iterable[Sequence[str]]) -> list[str]:
    """Of the odd modules those that share their scale with no other member of their fused group."""
    found: dict[str, None] = {}
    for group in groups:
        scales = Counter(modules[name].scale for name in group if name in modules)
        if len(scales) > 1:
            found |= {name: None for name in group if name in odd and scales[modules[name].scale] == 1}
    return list(found)
