"""Every block of an NVFP4 weight against what max calibration makes of the base's block. Pure.

A block is 16 values under one E4M3 scale. Blocks that are bit for bit those of ModelOpt's max calibration are only
counted. What differs is looked at value by value, in float64: another rounding of a tie, a scale that was searched, or
damage.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_convert.formats.nvfp4.codes import E2M1_MAX, E2M1_VALUES, decode_e2m1, encode_e2m1, unpack_e2m1
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE

# Producers that multiply by reciprocals, divide in two steps or round ties away were measured to differ from true
# division at values within 5.4e-8 of the midpoint only: half an ulp of float32. Allowed are 2 ulp.
TIE = 2.4e-7
# Blocks that are looked at in float64 at a time: several copies of them are made.
_LOOKED = 1 << 14
# Rounding of the comparison itself.
_ROUNDING = 1e-5
# A search changes blocks all over a weight; where fewer blocks than this share differ, it is damage.
FEW = 0.01


@dataclass(frozen=True, slots=True)
class Difference:
    """A byte that is not the one that max calibration gives.

    Attributes:
        row: Of the weight.
        column: Of the weight; of a scale, its block's first column.
        role: ``weight`` or ``weight_scale``.
        expected: The code, or the byte of the scale.
        found: Likewise.
    """

    row: int
    column: int
    role: str
    expected: int
    found: int

    def in_words(self) -> str:
        """Where, and what."""
        if self.role == "weight":
            return f"row {self.row}, column {self.column}: expected code {self.expected}, found {self.found}"
        place = f"row {self.row}, columns {self.column} to {self.column + BLOCK_SIZE - 1}"
        return f"{place}: expected the scale byte {self.expected:#04x}, found {self.found:#04x}"


class BlockTally:
    """Counts over the blocks of one weight, as far as they were given to ``add``.

    Attributes:
        codes: Values compared.
        codes_equal: Codes that are the base's under the export's scales.
        codes_tied: Codes that are the other neighbour of a midpoint, within ``TIE``.
        zero_signs: Codes that differ by the sign of zero alone.
        scales: Block scales compared.
        scales_equal: Scales that max calibration gives.
        scales_zero: Scales that underflowed to zero, as in ModelOpt up to 0.44.
        scales_tied: Scales that are the other neighbour of a midpoint, within ``TIE``.
        scales_idle: Other scales over codes that are all zero: they have no effect.
        odd_blocks: Blocks with another code or scale, ties and zero bytes over zeros aside.
        wrong_codes: Codes that are not the nearest under the export's scale.
        blocks_above: Blocks whose squared error is above that of max calibration under the same global scale.
        first: In the first block with a wrong code or an error above; if there is none, the first byte that no tie
            explains.
    """

    def __init__(self, columns: int, global_scale: Tensor) -> None:
        """Count nothing yet.

        Args:
            columns: K.
            global_scale: float32 [].
        """
        self._per_row = columns // BLOCK_SIZE
        self._global_scale = global_scale
        self.codes = self.codes_equal = self.codes_tied = self.zero_signs = self.wrong_codes = 0
        self.scales = self.scales_equal = self.scales_zero = self.scales_tied = self.scales_idle = 0
        self.odd_blocks = self.blocks_above = 0
        self._first_wrong: Difference | None = None
        self._first_other: Difference | None = None

    @property
    def first(self) -> Difference | None:
        """The place to be named: a search differs from max calibration in many blocks that are right."""
        return self._first_wrong or self._first_other

    @property
    def is_exact(self) -> bool:
        """Whether every code and scale is the one of max calibration, by one of ModelOpt's two lower clamps."""
        return self.codes_equal == self.codes and self.scales_equal + self.scales_zero == self.scales

    @property
    def is_tied(self) -> bool:
        """Whether every code and scale is, but for ties and signs of zero."""
        codes = self.codes_equal + self.codes_tied + self.zero_signs
        return codes == self.codes and self.scales_equal + self.scales_zero + self.scales_tied == self.scales

    @property
    def is_nearest(self) -> bool:
        """Whether every code is the nearest one, and no scale worse than the one of max calibration."""
        return self.wrong_codes == 0 and self.blocks_above == 0

    @property
    def is_damaged(self) -> bool:
        """Whether nearly all blocks are those of max calibration, so that the rest is no search."""
        return 0 < self.odd_blocks < FEW * self.scales

    def add_equal(self, count: int) -> None:
        """Count so many blocks, of which each byte is that of max calibration."""
        self.codes += count * BLOCK_SIZE
        self.codes_equal += count * BLOCK_SIZE
        self.scales += count
        self.scales_equal += count

    def add(
        self,
        blocks: Tensor,
        found: tuple[Tensor, Tensor],
        expected: tuple[Tensor, Tensor],
        places: Tensor | int,
    ) -> None:
        """Count some blocks.

        Args:
            blocks: The base's values [M, 16] in the dtype that was quantized.
            found: The export's packed codes uint8 [M, 8], low nibble first, and scales uint8 [M].
            expected: Those of max calibration under the export's global scale.
            places: The number of each block in the weight, int64 [M]; or of the first, if they are consecutive.
        """
        differs = found[0].view(torch.int64).view(-1) != expected[0].view(torch.int64).view(-1)
        differs |= found[1] != expected[1]
        where = differs.nonzero().view(-1)
        self.add_equal(len(blocks) - len(where))
        self.codes += len(where) * BLOCK_SIZE
        self.scales += len(where)
        for some in torch.split(where, _LOOKED) if len(where) else ():
            self._look(
                blocks[some].to(torch.float32),
                unpack_e2m1(found[0][some]),
                found[1][some],
                (unpack_e2m1(expected[0][some]), expected[1][some]),
                some + places if isinstance(places, int) else places[some],
            )

    def _look(
        self, blocks: Tensor, codes: Tensor, scale: Tensor, expected: tuple[Tensor, Tensor], places: Tensor
    ) -> None:
        """Count blocks that differ: values [M, 16] float32, codes uint8 [M, 16], scale bytes [M]."""
        max_codes, max_scale = expected
        values, max_values = _e4m3(scale), _e4m3(max_scale)
        same_scale = scale == max_scale
        idle = ((codes & 7) == 0).all(dim=1) & ~same_scale
        # The scale of an idle block says nothing: its codes are judged as max calibration's are.
        divisor = torch.where(idle, max_values, values) * self._global_scale
        nearest = encode_e2m1(blocks / divisor.unsqueeze(1))
        equal = codes == nearest
        zero_sign = ~equal & ((codes & 7) == 0) & ((nearest & 7) == 0)
        quotient = blocks.to(torch.float64).abs() / divisor.to(torch.float64).unsqueeze(1)
        tied = ~equal & ~zero_sign & _is_tie(codes, nearest, quotient)
        wrong = ~(equal | zero_sign | tied)
        zero = (scale == 0) & ~same_scale & ~idle & equal.all(dim=1) & self._underflows(blocks)
        scale_tied = ~same_scale & ~idle & ~zero & self._is_scale_tie(blocks, values, max_values)
        self.codes_equal += int(equal.sum())
        self.zero_signs += int(zero_sign.sum())
        self.codes_tied += int(tied.sum())
        self.wrong_codes += int(wrong.sum())
        self.scales_equal += int(same_scale.sum())
        self.scales_zero += int(zero.sum())
        self.scales_tied += int(scale_tied.sum())
        self.scales_idle += int(idle.sum())
        fine = (same_scale | zero | scale_tied | (idle & (scale == 0))) & ~wrong.any(dim=1)
        odd = (~fine).nonzero().view(-1)
        self.odd_blocks += len(odd)
        if not len(odd):
            return
        base = blocks[odd].to(torch.float64)
        error = _squared_error(base, codes[odd], values[odd] * self._global_scale)
        least = self._least(base, max_codes[odd], max_scale[odd])
        above = error > least * (1 + _ROUNDING)
        self.blocks_above += int(above.sum())
        places, codes, nearest, wrong = places[odd], codes[odd], nearest[odd], wrong[odd]
        scales = scale[odd], max_scale[odd]

        def difference(block: int) -> Difference:
            row, column = divmod(int(places[block]), self._per_row)
            column *= BLOCK_SIZE
            found, common = (int(one[block]) for one in scales)
            # Of another scale with other codes than max calibration's, the codes are what is wrong: it was searched.
            if found != common and not (wrong[block].any() and (codes[block] != max_codes[odd[block]]).any()):
                return Difference(row, column, "weight_scale", common, found)
            within = int(wrong[block].nonzero()[0])
            return Difference(row, column + within, "weight", int(nearest[block, within]), int(codes[block, within]))

        self._first_other = self._first_other or difference(0)
        bad = (above | wrong.any(dim=1)).nonzero().view(-1)
        if self._first_wrong is None and len(bad):
            self._first_wrong = difference(int(bad[0]))

    def _least(self, base: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        """Squared error under max calibration: base float64 [M, 16], codes uint8 [M, 16], scale bytes [M].

        Where the scale lies at a midpoint, the producer may have rounded it to the other neighbour.
        """
        values = _e4m3(scale)
        error = _squared_error(base, codes, values * self._global_scale)
        for step in (-1, 1):
            other = _e4m3((scale.to(torch.int16) + step).to(torch.uint8))
            tied = self._is_scale_tie(base, other, values).nonzero().view(-1)
            if len(tied):
                factor = other[tied] * self._global_scale
                again = encode_e2m1(base[tied].to(torch.float32) / factor.unsqueeze(1))
                error[tied] = torch.maximum(error[tied], _squared_error(base[tied], again, factor))
        return error

    def _underflows(self, blocks: Tensor) -> Tensor:
        """Whether the scale of max calibration rounds to zero where it is not clamped."""
        wanted = blocks.abs().amax(dim=1) / (E2M1_MAX * self._global_scale)
        return (wanted > 0) & (wanted.to(torch.float8_e4m3fn).to(torch.float32) == 0)

    def _is_scale_tie(self, blocks: Tensor, values: Tensor, max_values: Tensor) -> Tensor:
        # Only a neighbour has its midpoint there: the scale of max calibration is the nearest.
        wanted = blocks.to(torch.float64).abs().amax(dim=1) / (E2M1_MAX * self._global_scale.to(torch.float64))
        middle = (values.to(torch.float64) + max_values.to(torch.float64)) / 2
        return (wanted - middle).abs() <= TIE * middle


def _e4m3(raw: Tensor) -> Tensor:
    """float32 values of E4M3 bytes."""
    return raw.view(torch.float8_e4m3fn).to(torch.float32)


def _is_tie(codes: Tensor, nearest: Tensor, quotient: Tensor) -> Tensor:
    """Whether a code is the neighbour of the nearest one, and the value lies at the midpoint of both."""
    grid = torch.tensor(E2M1_VALUES, dtype=torch.float64, device=codes.device)
    low = torch.minimum(codes & 7, nearest & 7).long().clamp(max=len(E2M1_VALUES) - 2)
    middle = (grid[low] + grid[low + 1]) / 2
    neighbours = ((codes & 7).to(torch.int16) - (nearest & 7).to(torch.int16)).abs() == 1
    # A code of zero may have either sign; the nearest one has the sign of the value, zero or not.
    same_sign = ((codes >> 3) == (nearest >> 3)) | ((codes & 7) == 0)
    return neighbours & same_sign & ((quotient - middle).abs() <= TIE * middle)


def _squared_error(base: Tensor, codes: Tensor, factor: Tensor) -> Tensor:
    """Of each block: base float64 [M, 16], codes uint8 [M, 16], factor float32 [M]."""
    return (decode_e2m1(codes).to(torch.float64) * factor.to(torch.float64).unsqueeze(1) - base).square().sum(dim=1)
