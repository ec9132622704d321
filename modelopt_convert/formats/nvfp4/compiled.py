"""Quantizing weights of 16 bits on the CPU, compiled by LLVM in 20 ms when first wanted.

A block is loaded, measured, encoded and stored without leaving the registers, and without Python's lock. The codes of a
block follow from comparing bits with the bounds of its scale, and torch computes the bounds of all scales, exactly,
before (``codes.py``). Under max calibration no arithmetic is done on values; a sweep sums squared errors in float64, in
an order that is written down (``sweep.py``), so that torch gives the same bits.
"""

import ctypes
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

_CODES = 8  # magnitudes of E2M1
_HALVES = (0, 1, 2, 3, 4, 6, 8, 12)  # what they are worth, in halves
_LANES = 16  # values of a block

# Without their sign, the bits of 16-bit floats are in the order of magnitudes, NaN above infinity. `bounds` has for
# each scale byte the least bits that keep their sign, and those that reach code 1 to 7: a code is the number of bounds
# reached.
_SOURCE = """
declare i16 @llvm.vector.reduce.umax.v16i16(<16 x i16>)
declare i32 @llvm.smax.i32(i32, i32)
declare i32 @llvm.smin.i32(i32, i32)

{constants}

define i16 @{name}(ptr %values, ptr %by_amax, ptr %bounds, ptr noalias %packed, ptr noalias %scales, i64 %count,
                   ptr %halves, ptr %importance, i64 %per_row) {
start:
  br label %block
block:
  %i = phi i64 [0, %start], [%next, %encode]
  %column = phi i64 [0, %start], [%next_column, %encode]
  %largest = phi i16 [0, %start], [%larger, %encode]
  %from = getelementptr <16 x i16>, ptr %values, i64 %i
  %bits = load <16 x i16>, ptr %from, align 2
  %size = and <16 x i16> %bits, splat (i16 32767)
  %amax = call i16 @llvm.vector.reduce.umax.v16i16(<16 x i16> %size)
  %is_larger = icmp ugt i16 %amax, %largest
  %larger = select i1 %is_larger, i16 %amax, i16 %largest
  %place = zext i16 %amax to i64
  %scale_from = getelementptr i8, ptr %by_amax, i64 %place
  %max_scale = load i8, ptr %scale_from
{chosen}
  %scale_to = getelementptr i8, ptr %scales, i64 %i
  store i8 {scale}, ptr %scale_to
  %row = zext i8 {scale} to i64
  %row_from = getelementptr <8 x i16>, ptr %bounds, i64 %row
  %reach = load <8 x i16>, ptr %row_from, align 2
{counted}
  %negative = lshr <16 x i16> %bits, splat (i16 15)
  %signed = and <16 x i16> %negative, %reached0
  %sign = shl <16 x i16> %signed, splat (i16 3)
  %code = or <16 x i16> %sign, %count7
  %pairs = bitcast <16 x i16> %code to <8 x i32>
  %second = lshr <8 x i32> %pairs, splat (i32 12)
  %both = or <8 x i32> %pairs, %second
  %bytes = trunc <8 x i32> %both to <8 x i8>
  %to = getelementptr <8 x i8>, ptr %packed, i64 %i
  store <8 x i8> %bytes, ptr %to, align 1
  %next = add nuw i64 %i, 1
  %column_after = add nuw i64 %column, 1
  %is_row_done = icmp eq i64 %column_after, %per_row
  %next_column = select i1 %is_row_done, i64 0, i64 %column_after
  %more = icmp ult i64 %next, %count
  br i1 %more, label %block, label %done
done:
  ret i16 %larger
}
"""
_MAX = """  br label %encode
encode:"""
# `halves` has half of each scale's factor in float64, `importance` a factor for each column. NaN is never less.
_SWEEP = """  %words = zext <16 x i16> %size to <16 x i32>
  %raised = shl <16 x i32> %words, splat (i32 16)
  %singles = bitcast <16 x i32> %raised to <16 x float>
  %wanted = fpext <16 x float> %singles to <16 x double>
  %weight_from = getelementptr <16 x double>, ptr %importance, i64 %column
  %weight = load <16 x double>, ptr %weight_from, align 8
  %middle = zext i8 %max_scale to i32
  br label %try
try:
  %step = phi i64 [0, %block], [%next_step, %try]
  %best = phi i8 [%max_scale, %block], [%better, %try]
  %least = phi double [0x7FF0000000000000, %block], [%lesser, %try]
  %step_from = getelementptr i32, ptr @steps, i64 %step
  %away = load i32, ptr %step_from
  %tried = add nsw i32 %middle, %away
  %floored = call i32 @llvm.smax.i32(i32 %tried, i32 1)
  %candidate = call i32 @llvm.smin.i32(i32 %floored, i32 126)
  %candidate_row = zext nneg i32 %candidate to i64
  %half_from = getelementptr double, ptr %halves, i64 %candidate_row
  %half = load double, ptr %half_from
  %tried_from = getelementptr <8 x i16>, ptr %bounds, i64 %candidate_row
  %tried_reach = load <8 x i16>, ptr %tried_from, align 2
{tried}
  %wide = zext nneg <16 x i16> %worth7 to <16 x i32>
  %worth = sitofp <16 x i32> %wide to <16 x double>
  %half0 = insertelement <16 x double> poison, double %half, i32 0
  %half_all = shufflevector <16 x double> %half0, <16 x double> poison, <16 x i32> zeroinitializer
  %decoded = fmul <16 x double> %worth, %half_all
  %off = fsub <16 x double> %decoded, %wanted
  %square = fmul <16 x double> %off, %off
  %error16 = fmul <16 x double> %square, %weight
{summed}
  %error = extractelement <1 x double> %error1, i32 0
  %is_better = fcmp olt double %error, %least
  %lesser = select i1 %is_better, double %error, double %least
  %narrow = trunc i32 %candidate to i8
  %better = select i1 %is_better, i8 %narrow, i8 %best
  %next_step = add nuw i64 %step, 1
  %is_last = icmp eq i64 %next_step, {count}
  br i1 %is_last, label %encode, label %try
encode:"""


def _indented(lines: Iterable[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)


def _counted() -> Iterator[str]:
    """Compare all values with each bound, and count what is reached."""
    yield "%count0 = bitcast <16 x i16> zeroinitializer to <16 x i16>"
    for code in range(_CODES):
        yield f"%bound{code} = shufflevector <8 x i16> %reach, <8 x i16> poison, <16 x i32> splat (i32 {code})"
        yield f"%is{code} = icmp uge <16 x i16> %size, %bound{code}"
        yield f"%reached{code} = zext <16 x i1> %is{code} to <16 x i16>"
        if code:
            yield f"%count{code} = add <16 x i16> %count{code - 1}, %reached{code}"


def _tried() -> Iterator[str]:
    """Compare all values with each bound, and add up what each code is worth more than the one before, in halves."""
    yield "%worth0 = bitcast <16 x i16> zeroinitializer to <16 x i16>"
    for code in range(1, _CODES):
        more = _HALVES[code] - _HALVES[code - 1]
        yield f"%edge{code} = shufflevector <8 x i16> %tried_reach, <8 x i16> poison, <16 x i32> splat (i32 {code})"
        yield f"%beyond{code} = icmp uge <16 x i16> %size, %edge{code}"
        yield f"%more{code} = select <16 x i1> %beyond{code}, <16 x i16> splat (i16 {more}), <16 x i16> zeroinitializer"
        yield f"%worth{code} = add <16 x i16> %worth{code - 1}, %more{code}"


def _summed() -> Iterator[str]:
    """Add the upper half of the lanes to the lower until one is left."""
    width = _LANES
    while width > 1:
        half = width // 2
        for part, first in (("low", 0), ("high", half)):
            lanes = ", ".join(f"i32 {lane}" for lane in range(first, first + half))
            whole = f"<{width} x double>"
            yield f"%{part}{half} = shufflevector {whole} %error{width}, {whole} poison, <{half} x i32> <{lanes}>"
        yield f"%error{half} = fadd <{half} x double> %low{half}, %high{half}"
        width = half


def _source(name: str, steps: Sequence[int]) -> str:
    """The text of a function that goes through blocks, and looks for a scale so many steps from max calibration's."""
    listed = ", ".join(f"i32 {step}" for step in steps)
    filled = {
        "name": name,
        "constants": f"@steps = private constant [{len(steps)} x i32] [{listed}]" if steps else "",
        "chosen": _SWEEP if steps else _MAX,
        "scale": "%better" if steps else "%max_scale",
        "count": str(len(steps)),
        "counted": _indented(_counted()),
        "tried": _indented(_tried()),
        "summed": _indented(_summed()),
    }
    text = _SOURCE
    for what, words in filled.items():
        text = text.replace(f"{{{what}}}", words)
    return text


class _Kernel:
    """A compiled function; memory that it runs in is freed with its engine, so there is one for good."""

    def __init__(self, name: str, steps: Sequence[int] = ()) -> None:
        self._name, self._steps = name, steps
        self._lock = threading.Lock()
        self._engine: Any = None
        self._function: Any = None

    def function(self) -> Any:
        """The function, compiled by whichever thread comes first."""
        with self._lock:
            if self._function is None:
                self._compile()
        return self._function

    def _compile(self) -> None:
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
        )
        module = llvm.parse_assembly(_source(self._name, self._steps))
        module.verify()
        self._engine = llvm.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()
        addresses, number = ctypes.c_void_p, ctypes.c_int64
        prototype = ctypes.CFUNCTYPE(ctypes.c_uint16, *[addresses] * 5, number, *[addresses] * 2, number)
        self._function = prototype(self._engine.get_function_address(self._name))


STEPS = (0, 7, 6, 5, 4, 3, 2, 1, -1, -2)
"""Scales that a sweep tries, in this order: E4M3 bytes away from that of max calibration. ``sweep.py`` says why."""
_quantize, _sweep = _Kernel("quantize"), _Kernel("sweep", STEPS)


def quantize_blocks(values: int, by_amax: int, bounds: int, packed: int, scales: int, count: int) -> int:
    """Quantize blocks of 16 values; all arguments but the last are addresses, of contiguous memory.

    Args:
        values: BF16 or F16 [count, 16].
        by_amax: uint8 [32768]: the byte of a block's scale, by the bits of its largest magnitude.
        bounds: uint16 [256, 8]: by that byte, the least bits that keep their sign, and that reach code 1 to 7.
        packed: Gets uint8 [count, 8], low nibble first.
        scales: Gets uint8 [count].
        count: At least 1.

    Returns:
        The bits of the largest magnitude. Where it is NaN, what was written is void.
    """
    return int(_quantize.function()(values, by_amax, bounds, packed, scales, count, None, None, 0))


def sweep_blocks(
    values: int,
    by_amax: int,
    bounds: int,
    packed: int,
    scales: int,
    count: int,
    halves: int,
    importance: int,
    per_row: int,
) -> None:
    """Quantize blocks of 16 values under the scales that ``sweep.py`` describes.

    Args:
        values: BF16 [count, 16], as for ``quantize_blocks``, and so the next five.
        by_amax: The scale of max calibration.
        bounds: Of every scale.
        packed: Gets the codes.
        scales: Gets the scales that were chosen.
        count: At least 1.
        halves: float64 [256]: half of the factor that codes have under each scale.
        importance: float64 [per_row, 16]: a factor of the squared error of each column.
        per_row: Blocks of a row.
    """
    _sweep.function()(values, by_amax, bounds, packed, scales, count, halves, importance, per_row)
