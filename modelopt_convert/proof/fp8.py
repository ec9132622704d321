"""Prove an FP8 module: every code against the base's values, quantized again.

The export's scale and one of the rules by which ModelOpt is known to divide must give every code.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Event

import torch
from torch import Tensor

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.calibration import Calibration
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.arithmetic import fp8_scale_of
from modelopt_convert.formats.dtypes import E4M3_MAX
from modelopt_convert.formats.fp8.codes import Clipped, clipped, dequantize_fp8, quantize_fp8
from modelopt_convert.formats.nvfp4.shapes import ROW_TILE
from modelopt_convert.formats.rows import SAMPLED_ROWS, sample_rows
from modelopt_convert.formats.tensor_bytes import TORCH_DTYPES
from modelopt_convert.proof.blocks import FEW
from modelopt_convert.proof.closeness import TiledNearness
from modelopt_convert.proof.detector import RELATED_COSINE
from modelopt_convert.proof.due import Due
from modelopt_convert.proof.judgement import AMPLE, Counts, FormatProof, Judgement, Verdict
from modelopt_convert.proof.scale_values import tensor_scale
from modelopt_convert.proof.tensors import Quantizer, Tile, finite_amax, tiles
from modelopt_convert.run.errors import Faults, InputError
from modelopt_convert.run.workers import until

_AMAX_DISAGREES = "export.amax_disagrees"
# A rule is given up where more than this share of the first codes is not what it gives.
_HOPELESS = 0.25
_FIRST_CODES = 1 << 16
_EVERY_16_BITS = 1 << 16


@dataclass(frozen=True, slots=True)
class _Rule:
    """How an exporter divided: the dtype of the weight, that of the quotient, and that of the scale."""

    cast: str
    quotient: str
    scale: str = "F32"

    def in_words(self) -> str:
        rounded = "" if self.scale == "F32" else f", scale rounded to {self.scale}"
        return f"quotient in {self.quotient}{rounded}"

    def codes(self, rows: Tensor, scale: float) -> Tensor:
        """uint8 codes of rows in ``cast``."""
        if self.cast == "F32":
            return _quantize(rows, self, scale)
        # A dtype of 16 bits has 65,536 values: the code of each is computed once, and then looked up.
        bits = rows.contiguous().view(torch.int16).reshape(-1).to(torch.int32).bitwise_and_(0xFFFF)
        return _table(self, scale).index_select(0, bits).view(rows.shape)


def _quantize(rows: Tensor, rule: _Rule, scale: float) -> Tensor:
    divisor = torch.tensor(scale, dtype=torch.float32)
    if rule.scale != "F32":
        divisor = divisor.to(TORCH_DTYPES[rule.scale])
    return quantize_fp8(rows.to(TORCH_DTYPES[rule.quotient]), divisor).view(torch.uint8)


@lru_cache(maxsize=16)
def _table(rule: _Rule, scale: float) -> Tensor:
    """uint8 [65536]: the code of every value of a dtype of 16 bits, by the value's bits."""
    values = torch.arange(_EVERY_16_BITS, dtype=torch.int32).to(torch.int16).view(TORCH_DTYPES[rule.cast])
    return _quantize(values, rule, scale)


def _rules(casts: Sequence[str], first: str | None) -> list[_Rule]:
    """Every rule that ModelOpt is known to follow, the likeliest first."""
    rules = [_Rule(dtype, dtype) for dtype in casts]
    # The exporter takes the dtype of the first parameter; where that is F32 (Wan) it divides 16-bit weights in F32.
    for dtype in casts:
        if dtype != "F32":
            rules += [_Rule(dtype, "F32"), _Rule(dtype, dtype, dtype)]
    return sorted(rules, key=lambda rule: rule.in_words() != first)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A rule, and what came of comparing by it."""

    rule: _Rule
    codes: int
    equal: int
    amax: float
    first: str | None
    clipped: Clipped

    @property
    def share(self) -> float:
        """Of the codes, those that the rule gives."""
        return self.equal / max(1, self.codes)


@dataclass(frozen=True, slots=True)
class _Comparison:
    """All that the attempts on one module share."""

    export: CheckpointReader
    base: CheckpointReader
    due: Due
    stopped: Event
    rows: Sequence[int] | None

    def tiles(self, cast: str) -> Iterator[Tile]:
        """Rows of both, the export's as codes, the base's in the dtype given."""
        stored = self.due.module.weight.dtype
        found = tiles(self.export, self.base, self.due.module, cast, stored, self.rows)
        for tile in until(self.stopped, found):
            if stored == "F8_E4M3":
                yield replace(tile, stored=self._finite(tile.stored.view(torch.uint8)))
            else:  # mopt will quantize these itself, and the weights must equal the base's
                yield replace(tile, stored=_Rule(stored, stored).codes(tile.stored, self.due.scale))

    def _finite(self, codes: Tensor) -> Tensor:
        if int((codes & 0x7F).amax()) == 0x7F:
            broken = int(((codes & 0x7F) == 0x7F).count_nonzero())
            weight = self.due.module.weight
            where = str(self.export.folder / weight.file)
            raise InputError(
                f"{where}: tensor {weight.name!r}: expected finite codes, found {broken} NaN in {len(codes)} rows",
                code="export.not_finite",
                path=where,
                hint="the export is damaged; export again",
            )
        return codes

    def attempt(self, rule: _Rule, *, to_the_end: bool = False) -> _Attempt:
        """Compare by one rule."""
        codes = equal = 0
        amax, first, cut = 0.0, None, Clipped(0, 0.0)
        scale = torch.tensor(self.due.scale, dtype=torch.float32)
        for tile in self.tiles(rule.cast):
            largest = finite_amax(self.base, self.due.module, tile.base)
            amax = max(amax, largest)
            if clipped(torch.tensor(largest), scale).count:
                cut = cut.plus(clipped(tile.base, scale))
            wanted = rule.codes(tile.base, self.due.scale)
            codes += wanted.numel()
            if torch.equal(wanted, tile.stored):
                equal += wanted.numel()
                continue
            differs = wanted != tile.stored
            wrong = int(differs.count_nonzero())
            equal += wanted.numel() - wrong
            if first is None:
                row, column = (int(one) for one in differs.nonzero()[0])
                first = (
                    f"row {int(tile.row_numbers()[row])}, column {column}: expected code "
                    f"{int(wanted[row, column]):#04x}, found {int(tile.stored[row, column]):#04x}"
                )
            if not to_the_end and codes >= _FIRST_CODES and codes - equal > _HOPELESS * codes:
                break
        return _Attempt(rule, codes, equal, amax, first, cut)

    def nearness(self) -> TiledNearness:
        """How near all rows, and every strip of 128 rows, are to the base."""
        scale = torch.tensor(self.due.scale, dtype=torch.float32)
        found = TiledNearness(self.due.module.columns, ROW_TILE)
        for tile in self.tiles(self.due.casts[0]):
            dequantized = dequantize_fp8(tile.stored.view(torch.float8_e4m3fn), scale)
            found.add(tile.base.to(torch.float64), dequantized.to(torch.float64))
        return found

    def judged(self) -> Judgement:
        """The verdict."""
        tried: list[_Attempt] = []
        for rule in _rules(self.due.casts, self.due.rule):
            tried.append(self.attempt(rule))
            if tried[-1].equal == tried[-1].codes:
                break
        found = max(tried, key=lambda one: one.share)
        is_whole, verdict, near = self.rows is None, "reproduced", None
        is_equal = found.equal == found.codes
        # Codes that are cut off, or round to zero, are the base's all the same, and may say nothing of it.
        is_odd = found.clipped.count > 0 or (is_whole and self.due.scale > AMPLE * found.amax / E4M3_MAX)
        if not is_equal or is_odd:
            found = found if is_equal else self.attempt(found.rule, to_the_end=True)
            sums, limit = self.nearness(), self.due.max_error
            near = sums.whole.closeness()
            is_damaged = is_whole and not is_equal and found.codes - found.equal < FEW * found.codes
            if not near.within(limit) or sums.worst_strip() > limit or is_damaged:
                verdict = "mismatch" if abs(near.cosine) >= RELATED_COSINE else "unrelated"
            elif not is_equal:
                verdict = "near"
        known: Verdict = verdict  # type: ignore[assignment]
        counts = Counts(found.codes, found.equal)
        return Judgement(
            known,
            is_whole,
            counts,
            found.amax,
            self.due.scale,
            near,
            rule=found.rule.in_words() if is_equal else None,
            cast=found.rule.cast,
            first=found.first,
            clipped=found.clipped if found.clipped.count else None,
        )


class _Fp8Proof:
    method = "every code against the base, quantized again; modelopt to_quantized_weight arithmetic"
    tensor_scale = "weight_scale"
    never_excused = frozenset({_AMAX_DISAGREES})  # two runs that were mixed up
    is_rebased = False

    def scale(
        self, export: CheckpointReader, base: CheckpointReader | None, module: PackedModule, calibration: Calibration
    ) -> float:
        found, faults = dict(module.calibrated), Faults()
        for role in module.scales:
            with faults.taken(module.name):
                found[role] = tensor_scale(export, module, role)
                amax = calibration.get(module.name, {}).get(role)
                if amax is not None and not amax.agrees(found[role]):
                    info = module.scales[role]
                    raise InputError(
                        f"{export.folder / info.file}: tensor {info.name!r} is {found[role]:.9g}, the checkpoint's "
                        f"amax {amax.value:.9g} gives {amax.scale:.9g}",
                        code=_AMAX_DISAGREES,
                        path=str(export.folder / info.file),
                        hint="export and checkpoint are of different runs; give those of one run, or no --checkpoint",
                    )
        faults.refuse()
        return found["weight_scale"]

    def scale_of(self, amax: float) -> float:
        return fp8_scale_of(amax)

    def look(self, export: CheckpointReader, base: CheckpointReader, due: Due) -> Judgement:
        rows = sample_rows(due.module.rows, SAMPLED_ROWS)
        found = _Comparison(export, base, due, Event(), rows)
        judged = found.judged()
        near = judged.closeness or found.nearness().whole.closeness()
        return replace(judged, closeness=near)

    def compare(
        self,
        export: CheckpointReader,
        base: CheckpointReader,
        due: Due,
        stopped: Event,
        rows: Sequence[int] | None,
        gpu: Quantizer | None = None,
    ) -> Judgement:
        return _Comparison(export, base, due, stopped, rows).judged()

    def name_cause(self, export: CheckpointReader, modules: Mapping[str, Judgement]) -> None:
        """FP8 has one layout: nothing is known to be named."""


ENTRY: FormatProof = _Fp8Proof()
