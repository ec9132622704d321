"""Prove an NVFP4 module: every code and every block scale against what ModelOpt makes of the base.

A few rows say which reading of the bytes is tried first. All rows decide, under one reading for the whole tensor.
Where one is refuted, the others are tried, so that another layout is found and not mistaken for damage.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Event

import torch
from torch import Tensor

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.calibration import Calibration
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.dtypes import E4M3_MAX
from modelopt_convert.formats.layout import CANONICAL, Layout, ScaleOrder
from modelopt_convert.formats.nvfp4.codes import (
    E2M1_MAX,
    block_scales,
    decode_e2m1,
    quantize_codes,
    quantize_nvfp4,
    quantize_nvfp4_amax,
    shared_global_scale,
    swap_nibbles,
    unpack_e2m1,
)
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.formats.nvfp4.gptq import VALUES, Compensation
from modelopt_convert.formats.nvfp4.scales import scale_readings
from modelopt_convert.formats.nvfp4.shapes import ROW_TILE
from modelopt_convert.formats.nvfp4.stored import all_positive
from modelopt_convert.formats.nvfp4.sweep import quantize
from modelopt_convert.formats.rows import SAMPLED_ROWS, sample_rows
from modelopt_convert.formats.tensor_bytes import first_place, from_bytes
from modelopt_convert.proof.blocks import BlockTally
from modelopt_convert.proof.closeness import TiledNearness
from modelopt_convert.proof.detector import RELATED_COSINE, RUNNER_UP_FACTOR, detect_with_base, telling_rows, worst_row
from modelopt_convert.proof.due import Due
from modelopt_convert.proof.judgement import (
    AMPLE,
    COMPENSATED,
    COMPRESSED,
    OF_CALIBRATION,
    SWEPT,
    WEIGHTED,
    Counts,
    FormatProof,
    Judgement,
    Verdict,
)
from modelopt_convert.proof.padding import not_padding, padding_bytes
from modelopt_convert.proof.scale_values import tensor_scale, unusable_scale
from modelopt_convert.proof.tensors import (
    MANY_VALUES,
    Again,
    Quantizer,
    Tile,
    cast_to,
    finite,
    finite_amax,
    load,
    load_rows,
    stored_rows,
    tiles,
)
from modelopt_convert.report.words import ALL_NEAREST, PROVEN
from modelopt_convert.run.errors import Faults, InputError
from modelopt_convert.run.workers import until

# Half of the smallest positive E4M3 value, 2^-9: scales up to here round to zero (ties go to the even code).
_UNDERFLOW = 2.0**-10
# Beside the spread rows, those in which the two orders of the scales differ most.
TELLING_ROWS = 4
# An attempt is given up where more than this share of the first blocks cannot be what it supposes.
_HOPELESS = 0.25
_FIRST_BLOCKS = 4096
# A module of which fewer sampled codes are reproduced, and which is not near either, is refused at once.
_REPRODUCED = 0.98
# A global scale is a quotient, so the largest value need not come out at 448 scales of 6 exactly.
_CLIPPED = 1 + 1e-6


def _unexplained_zeros(
    base: CheckpointReader, module: PackedModule, zero: Tensor, global_scale: float
) -> tuple[int, str]:
    """How many block scales are zero over base blocks that are too large to have underflowed, and the first's place.

    ModelOpt up to 0.44 had no clamp.
    """
    count, first = 0, ""
    divisor = 6.0 * torch.tensor(global_scale, dtype=torch.float32)
    for row in zero.any(dim=1).nonzero().flatten().tolist():
        block_amax = (
            load_rows(base, module.weight.name, [row])[0].to(torch.float32).abs().view(-1, BLOCK_SIZE).amax(dim=1)
        )
        unexplained = zero[row] & (block_amax / divisor > _UNDERFLOW)
        if not first and bool(unexplained.any()):
            first = f"first at [{row}, {int(unexplained.nonzero()[0])}]"
        count += int(unexplained.sum())
    return count, first


def _scale_readings(export: CheckpointReader, module: PackedModule) -> dict[ScaleOrder, Tensor]:
    info = module.scales["weight_scale"]
    readings = scale_readings(load(export, info.name), module.rows, module.columns // BLOCK_SIZE)
    if not readings:
        raise not_padding(export, info, "scales")
    return readings


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A reading and a cast, and what came of comparing under them.

    Attributes:
        reading: How the export is read.
        cast: What the base is brought to.
        tally: Of all blocks that were seen.
        amax: Largest magnitude of the base.
        is_complete: Whether all blocks were seen.
        swept: The rule of mopt's own that gives every byte, if one does.
    """

    reading: Layout
    cast: str
    tally: BlockTally
    amax: float
    is_complete: bool
    swept: str | None = None

    @property
    def counts(self) -> Counts:
        """Of what was compared; what a calibration reproduces equals what it makes, to the last byte."""
        found = Counts.of(self.tally)
        if self.swept not in OF_CALIBRATION:
            return found
        return Counts(found.codes, found.codes, scales=found.scales, scales_equal=found.scales)

    @property
    def verdict(self) -> Verdict:
        """What an attempt that explains the export makes of it.

        A plain sweep needs no other word than any search by plain error: both are held to the same law.
        """
        if self.tally.is_exact or self.swept in OF_CALIBRATION:
            return "reproduced"
        return "reproduced but for ties" if self.tally.is_tied else "nearest"

    @property
    def rule(self) -> str:
        """How the bytes are made of the base."""
        searched = "nearest codes under searched scales"
        return self.swept or (searched if self.verdict == "nearest" else "max calibration")


@dataclass(frozen=True, slots=True)
class _Comparison:
    """All that the attempts on one module share."""

    export: CheckpointReader
    base: CheckpointReader
    due: Due
    scales: Mapping[ScaleOrder, Tensor]
    stopped: Event
    rows: Sequence[int] | None
    gpu: Quantizer | None = None

    def tiles(self, cast: str, num_values: int = MANY_VALUES) -> Iterator[Tile]:
        """Rows of both, the base's in the dtype given."""
        return until(self.stopped, tiles(self.export, self.base, self.due.module, cast, "U8", self.rows, num_values))

    @property
    def first(self) -> Layout:
        """The likeliest reading, of those that the stored shape allows."""
        found = self.due.reading or CANONICAL
        return found if found.scales in self.scales else dataclasses.replace(found, scales=next(iter(self.scales)))

    def readings(self) -> list[Layout]:
        """All readings, the likeliest first."""
        first = self.first
        both = itertools.product(("low", "high"), self.scales)
        rest = (Layout(nibbles, order, first.global_scale) for nibbles, order in both)  # type: ignore[arg-type]
        return [first, *(one for one in rest if one != first)]

    def global_scale(self, reading: Layout) -> Tensor:
        """float32 []: what block scales are multiplied by."""
        scale = torch.tensor(self.due.scale, dtype=torch.float32)
        return 1.0 / scale if reading.global_scale == "divide" else scale

    def quantized(self, cast: str, factor: Tensor) -> Iterator[tuple[Tile, Again]]:
        """Rows of both, the base's quantized again under the export's global scale."""
        info = self.base.tensors[self.due.module.weight.name]
        height = 0
        if self.gpu is not None and self.rows is None:
            height = self.gpu.height(info.num_bytes // info.shape[0])
        if self.gpu is None or not height:
            for tile in self.tiles(cast):
                packed, scale, amax = quantize_nvfp4_amax(tile.base, factor)
                finite(self.base, self.due.module, amax)
                yield tile, Again(tile.base, packed, scale.view(torch.uint8), amax)
            return
        pieces = zip(
            self.gpu.again(self.base, info, cast, float(factor), height),
            stored_rows(self.export, self.due.module, "U8", height),
            strict=False,  # the export may be padded by further rows
        )
        for number, (again, stored) in enumerate(until(self.stopped, pieces)):
            finite(self.base, self.due.module, again.amax)
            count, top = len(again.base), number * height
            yield Tile(slice(top, top + count), again.base, stored[:count]), again

    def attempt(self, reading: Layout, cast: str, *, to_the_end: bool = False) -> _Attempt:
        """Compare under one reading of the export and one cast of the base."""
        factor, scales = self.global_scale(reading), self.scales[reading.scales].view(torch.uint8)
        tally, amax = BlockTally(self.due.module.columns, factor), 0.0
        per_row = self.due.module.columns // BLOCK_SIZE
        for tile, again in self.quantized(cast, factor):
            amax = max(amax, again.amax)
            codes = _canonical(tile.stored, reading)
            found_scales = scales[tile.rows]
            # Nearly always: then nothing else is made, which would take Python's lock from other workers.
            if torch.equal(codes, again.packed) and torch.equal(found_scales, again.scale):
                tally.add_equal(found_scales.numel())
                continue
            tally.add(
                tile.base.reshape(-1, BLOCK_SIZE),
                (codes.view(-1, BLOCK_SIZE // 2), found_scales.reshape(-1)),
                (again.packed.view(-1, BLOCK_SIZE // 2), again.scale.view(-1)),
                tile.parts(per_row),
            )
            enough = tally.scales >= min(_FIRST_BLOCKS, scales.numel())
            if enough and not to_the_end and not tally.is_nearest and tally.odd_blocks > _HOPELESS * tally.scales:
                return _Attempt(reading, cast, tally, amax, is_complete=False)
        return _Attempt(reading, cast, tally, amax, is_complete=True)

    def best(self) -> _Attempt | None:
        """The attempt that explains the export best; None if none does.

        Another cast may give the same codes but for ties, or a magnitude that the global scale was not made of: only an
        attempt that explains all of it ends the search, and a tie ends that of its reading.
        """
        nearest: _Attempt | None = None
        beyond: _Attempt | None = None
        stored = self.base.tensors[self.due.module.weight.name].dtype
        # Quotients are taken in float32: a value of 16 bits is the same there.
        casts = dict.fromkeys(stored if cast == "F32" else cast for cast in self.due.casts)
        for reading in self.readings():
            tied: _Attempt | None = None
            for cast in casts:
                one = self.attempt(reading, cast)
                is_like = one.tally.is_exact or one.tally.is_tied
                if not is_like and not (one.is_complete and one.tally.is_nearest and not one.tally.is_damaged):
                    continue
                if not self.is_scaled(one):
                    beyond = beyond or one
                elif one.tally.is_exact:
                    return one
                elif is_like:
                    tied = tied or one
                else:
                    nearest = nearest or one
            if tied is not None:
                return tied
        return self.swept() or nearest or beyond

    def is_scaled(self, one: _Attempt) -> bool:
        """Whether the global scale reaches the largest magnitude that was seen."""
        return one.amax <= float(self.global_scale(one.reading)) * E2M1_MAX * E4M3_MAX * _CLIPPED

    def swept(self) -> _Attempt | None:
        """The attempt under the reading in which all bytes are those of a rule of mopt's own; None if there is none.

        A calibration can be made up so that its rule gives anything. So what comes of one has to be near, too.

        The rule is run again on the base, rounded to BF16 as a build rounds it: nothing that a record says is needed.
        Those of a calibration come first, where one is at hand: they prove more.
        """
        cast, columns = "BF16", self.due.module.columns
        rules: dict[str, tuple[Tensor | None, Compensation | None]] = {}
        importance = from_bytes(self.due.importance, "F32", (columns,)) if self.due.importance else None
        if importance is not None:
            rules[WEIGHTED] = importance, None
        if self.due.compensation is not None:
            rules[COMPENSATED] = importance, Compensation.from_bytes(*self.due.compensation.read())
        rules[SWEPT] = None, None
        for (rule, needed), reading in itertools.product(rules.items(), self.readings()):
            factor, scales = self.global_scale(reading), self.scales[reading.scales].view(torch.uint8)
            for tile in self.tiles(cast, MANY_VALUES if needed[1] is None else VALUES):
                packed, scale = quantize("sweep", tile.base, factor, *needed)
                same = torch.equal(scale.view(torch.uint8), scales[tile.rows])
                if not same or not torch.equal(packed, _canonical(tile.stored, reading)):
                    break
            else:
                found = dataclasses.replace(self.attempt(reading, cast, to_the_end=True), swept=rule)
                is_free = rule in OF_CALIBRATION and not self.is_near(reading)
                if self.is_scaled(found) and not is_free:  # else BF16 is not what the global scale was made of
                    return found
        return None

    def is_near(self, reading: Layout) -> bool:
        """Whether all rows, and every tile of 128 rows, are within the limits of weights that are near."""
        sums, limit = self.nearness(reading), self.due.max_error
        return sums.whole.closeness().within(limit) and sums.worst_strip() <= limit

    def amax(self, cast: str) -> float:
        """Largest magnitude of the base."""
        return max(finite_amax(self.base, self.due.module, tile.base) for tile in self.tiles(cast))

    def compressed(self) -> tuple[str, float] | None:
        """The cast, and the largest magnitude, if ``mtq.compress`` made the export; else None.

        It quantizes under the weight's own global scale. Where the weight is fused with a larger one, the export
        brings the block scales to the scale of the group, and so rounds them to E4M3 a second time.
        """
        reading = self.first
        scales = self.scales[reading.scales].view(torch.uint8)
        for cast in self.due.casts:
            amax, factor = self.amax(cast), self.global_scale(reading)
            own = shared_global_scale([torch.tensor(amax)])
            if not 0.0 < float(own) < float(factor):
                continue
            for tile in self.tiles(cast):
                packed, first = quantize_nvfp4(tile.base, own)
                second = (first.to(torch.float32) * own / factor).clamp(2.0**-9, E4M3_MAX).to(torch.float8_e4m3fn)
                if not torch.equal(packed, _canonical(tile.stored, reading)) or not torch.equal(
                    second.view(torch.uint8), scales[tile.rows]
                ):
                    break
            else:
                return cast, amax
        return None

    def nearness(self, reading: Layout) -> TiledNearness:
        """How near all rows, and every tile of 128 rows, are to the base."""
        factor = self.global_scale(reading)
        found = TiledNearness(self.due.module.columns, ROW_TILE)
        cast = self.due.casts[0]
        smaller = tiles(self.export, self.base, self.due.module, cast, "U8", self.rows)
        for tile in until(self.stopped, smaller):
            codes = unpack_e2m1(_canonical(tile.stored, reading))
            scale = self.scales[reading.scales][tile.rows]
            factors = block_scales(scale, factor)
            again = decode_e2m1(quantize_codes(tile.base, scale, factor)) * factors
            dequantized = decode_e2m1(codes) * factors
            found.add(*(one.to(torch.float64) for one in (tile.base, dequantized, again)))
        return found

    def is_clear(self, reading: Layout, error: float) -> bool:
        """Whether every other reading is far worse than the one chosen, or says the same."""
        for other in self.readings():
            if other == reading or self._same(reading, other):
                continue
            if self.nearness(other).whole.closeness().relative_error < RUNNER_UP_FACTOR * error:
                return False
        return True

    def _same(self, one: Layout, other: Layout) -> bool:
        """Whether two readings decode alike: exact, by all bytes."""
        first, second = (self.scales[reading.scales].view(torch.uint8) for reading in (one, other))
        if not torch.equal(first, second):
            return False
        if one.nibbles == other.nibbles:
            return True
        return all(
            torch.equal(tile.stored, swap_nibbles(tile.stored.contiguous())) for tile in self.tiles(self.due.casts[0])
        )

    def judged(self) -> Judgement:
        """The verdict."""
        found, is_whole = self.best(), self.rows is None
        verdict: Verdict
        if found is not None and self.is_scaled(found):
            tally, near, verdict = found.tally, None, found.verdict
            if is_whole and float(self.global_scale(found.reading)) > AMPLE * found.amax / (E2M1_MAX * E4M3_MAX):
                near = self.nearness(found.reading).whole.closeness()
                verdict = verdict if near.within(self.due.max_error) else "mismatch"
            first = tally.first.in_words() if tally.first is not None and found.swept is None else None
            return Judgement(
                verdict,
                is_whole,
                found.counts,
                found.amax,
                self.due.scale,
                near,
                reading=found.reading,
                rule=found.rule,
                cast=found.cast,
                first=first,
            )
        reading = found.reading if found is not None else self.first
        tried = self.attempt(reading, self.due.casts[0], to_the_end=True)
        compressed = self.compressed() if found is None else None
        sums, limit = self.nearness(reading), self.due.max_error
        near = sums.whole.closeness()
        counts = Counts.of(tried.tally)
        if compressed is not None:
            cast, amax = compressed
            equal = Counts(counts.codes, counts.codes, scales=counts.scales, scales_equal=counts.scales)
            return Judgement(
                "reproduced",
                is_whole,
                equal,
                amax,
                self.due.scale,
                near,
                reading,
                COMPRESSED,
                cast,
            )
        verdict = "mismatch" if abs(near.cosine) >= RELATED_COSINE else "unrelated"
        if near.within(limit) and sums.worst_strip() <= limit and not tried.tally.is_damaged:
            verdict = "near" if self.is_clear(reading, near.relative_error) else "undetermined"
        first = tried.tally.first.in_words() if tried.tally.first is not None else None
        rule = ALL_NEAREST if tried.tally.wrong_codes == 0 else None
        return Judgement(
            verdict, is_whole, counts, tried.amax, self.due.scale, near, reading, rule, self.due.casts[0], first
        )


def _canonical(stored: Tensor, reading: Layout) -> Tensor:
    """Packed codes with the even column in the low nibble, contiguous."""
    return swap_nibbles(stored) if reading.nibbles == "high" else stored.contiguous()


class _Nvfp4Proof:
    method = "every code and block scale against the base, quantized again; modelopt NVFP4QTensor arithmetic"
    tensor_scale = "weight_scale_2"
    never_excused: frozenset[str] = frozenset()
    is_rebased = True

    def scale(
        self, export: CheckpointReader, base: CheckpointReader | None, module: PackedModule, calibration: Calibration
    ) -> float:
        assert base is not None  # the command requires it
        faults, global_scale = Faults(), 0.0
        with faults.taken(module.name):
            global_scale = tensor_scale(export, module, "weight_scale_2")
        if "input_scale" in module.scales:  # headers tell what lacks one
            with faults.taken(module.name):
                tensor_scale(export, module, "input_scale")
        with faults.taken(module.name):
            self._check_block_scales(export, base, module, global_scale)
        faults.refuse()
        return global_scale

    def _check_block_scales(
        self, export: CheckpointReader, base: CheckpointReader, module: PackedModule, global_scale: float
    ) -> None:
        raw = load(export, module.scales["weight_scale"].name).view(torch.uint8)
        if all_positive(raw.numpy()):
            return
        for wrong, what, expected in (
            ((raw & 0x7F) == 0x7F, "NaN", "finite scales"),
            (raw > 0x80, "negative", "positive scales"),
        ):
            if count := int(wrong.count_nonzero()):
                found = f"{count} {what} of {raw.numel()}, {first_place(wrong)}"
                raise unusable_scale(export, module, "weight_scale", expected, found)
        if global_scale and bool(((raw & 0x7F) == 0).any()):
            # In padding zeros are right; where they are is known for each reading. One reading must explain them all.
            counts = [
                _unexplained_zeros(base, module, (reading.view(torch.uint8) & 0x7F) == 0, global_scale)
                for reading in _scale_readings(export, module).values()
            ]
            count, first = min(counts)
            if count:
                found = f"{count} zero that no underflow explains, {first}"
                raise unusable_scale(export, module, "weight_scale", "non-zero scales", found)

    def scale_of(self, amax: float) -> float:
        return float(shared_global_scale([torch.tensor(amax, dtype=torch.float32)]))

    def look(self, export: CheckpointReader, base: CheckpointReader, due: Due) -> Judgement:
        module, readings = due.module, _scale_readings(export, due.module)
        rows = sorted({*sample_rows(module.rows, SAMPLED_ROWS), *telling_rows(readings, TELLING_ROWS)})
        seen = list(tiles(export, base, module, base.tensors[module.weight.name].dtype, "U8", rows))
        values, packed = torch.cat([tile.base for tile in seen]), torch.cat([tile.stored for tile in seen])
        casts = [cast_to(values, cast) for cast in due.casts]
        amax = finite_amax(base, module, casts[0])
        factor = torch.tensor(due.scale, dtype=torch.float32)
        found = detect_with_base(casts, packed, readings, rows, factor, max_error=due.max_error)
        verdict: Verdict = "mismatch" if found.related else "unrelated"
        if found.reproduced:
            verdict = "reproduced"
        elif found.closeness.within(due.max_error) or found.codes_equal >= _REPRODUCED * found.codes:
            verdict = "near"
        counts = Counts(found.codes, found.codes_equal)
        best, first = found.best, None
        if verdict != "reproduced":
            scale = readings[best.scales][torch.tensor(rows)]
            under = 1.0 / factor if best.global_scale == "divide" else factor
            first = worst_row(rows, casts[0], unpack_e2m1(_canonical(packed, best)), scale, under)
        return Judgement(verdict, False, counts, amax, due.scale, found.closeness, best, first=first)

    def compare(
        self,
        export: CheckpointReader,
        base: CheckpointReader,
        due: Due,
        stopped: Event,
        rows: Sequence[int] | None,
        gpu: Quantizer | None = None,
    ) -> Judgement:
        found = _Comparison(export, base, due, _scale_readings(export, due.module), stopped, rows, gpu).judged()
        if rows is not None:
            return found
        padding = padding_bytes(export, due.module, stopped)
        return dataclasses.replace(found, counts=dataclasses.replace(found.counts, padding=padding))

    def name_cause(self, export: CheckpointReader, modules: Mapping[str, Judgement]) -> None:
        readings = {name: one.reading for name, one in modules.items() if one.reading is not None}
        faults = Faults()
        reciprocal = [
            name
            for name, reading in readings.items()
            if modules[name].verdict in (*PROVEN, "near") and reading.global_scale == "divide"
        ]
        if reciprocal:
            fault = InputError(
                f"{export.path}: {len(reciprocal)} of {len(modules)} modules have a reciprocal weight_scale_2",
                code="export.layout",
                path=str(export.path),
                hint="that is compressed-tensors' convention under ModelOpt's names; export again with ModelOpt",
            )
            faults.add("", fault.at(reciprocal))
        unclear = [name for name in readings if modules[name].verdict == "undetermined"]
        if unclear:
            fault = InputError(
                f"{export.path}: {len(unclear)} of {len(modules)} modules fit the base in several layouts, the nearest "
                f"of the first being {readings[unclear[0]].in_words()}",
                code="export.layout",
                path=str(export.path),
                hint="what cannot be proven is not converted; export again without post-processing",
            )
            faults.add("", fault.at(unclear))
        faults.refuse()


ENTRY: FormatProof = _Nvfp4Proof()
