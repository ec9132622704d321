"""The judgement on one packed module, and what a format has to know for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.calibration import Calibration
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.format import Algorithm, entry
from modelopt_convert.formats.fp8.codes import Clipped
from modelopt_convert.formats.layout import Layout
from modelopt_convert.proof.closeness import Closeness
from modelopt_convert.report.report import PASSING

Verdict = Literal["reproduced", "within limits", "undetermined", "unrelated", "mismatch"]


# Below so many codes the error of a right module scatters.
_ENOUGH_CODES = 1024


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on one module.

    Attributes:
        verdict: ``reproduced`` and ``within limits`` pass; ``undetermined``: several readings come near; ``unrelated``:
            none resembles the base; ``mismatch``: one resembles it, but not enough.
        codes: Codes compared.
        codes_equal: Of them equal to the base's, quantized again.
        closeness: Of the dequantized rows.
        reading: NVFP4: the reading that fits best.
        rule: FP8: how the exporter divided, if the codes are reproduced.
        clipped: FP8: base values in these rows that the scale is too small for, if any.
    """

    verdict: Verdict
    codes: int
    codes_equal: int
    closeness: Closeness
    reading: Layout | None = None
    rule: str | None = None
    clipped: Clipped | None = None

    @property
    def passed(self) -> bool:
        """Whether the module is what the base says it should be."""
        return self.verdict in PASSING


def of_reproduced(near: Closeness, num_codes: int, max_error: float) -> Verdict:
    """A stale global scale clips the weight, and the clipped codes are reproduced all the same: the error tells."""
    limit = max_error if num_codes >= _ENOUGH_CODES else 2 * max_error
    return "reproduced" if near.relative_error <= limit else "mismatch"


class FormatProof(Protocol):
    """How modules of one format are proven: the entry of a format in this room.

    Attributes:
        method: In words.
        never_excused: Codes of faults that are told although the base replaces the module.
        is_rebased: Whether a runtime brings the tensor scales of a fused group to one.
    """

    method: str
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

    def judge(
        self,
        export: CheckpointReader,
        base: CheckpointReader,
        module: PackedModule,
        common_dtype: str,
        scale: float,
        max_error: float,
        rows: list[int] | None = None,
    ) -> Judgement:
        """Judge one module by the rows given, or by rows that the format samples.

        Raises:
            InputError: Export or base cannot be judged.
        """

    def name_cause(self, export: CheckpointReader, modules: Mapping[str, Judgement]) -> None:
        """Turn a failure of modules whose cause is known into an InputError that says so."""


def format_proof(algorithm: Algorithm) -> FormatProof:
    """How modules of a format are proven."""
    found: FormatProof = entry("modelopt_convert.proof", algorithm)
    return found
