"""Max calibration of weights of 16 bits on the CPU, compiled by LLVM in 10 ms when first wanted.

A block is loaded, measured, encoded and stored without leaving the registers, and without Python's lock. No arithmetic
is done on values: the codes of a block follow from comparing bits with the bounds of its scale, and torch computes the
bounds of all scales, exactly, before (``codes.py``).
"""

import ctypes
import threading
from typing import Any

_CODES = 8  # magnitudes of E2M1

# Without their sign, the bits of 16-bit floats are in the order of magnitudes, NaN above infinity. `bounds` has for
# each scale byte the least bits that keep their sign, and those that reach code 1 to 7: a code is the number of bounds
# reached.
_SOURCE = """
declare i16 @llvm.vector.reduce.umax.v16i16(<16 x i16>)

define i16 @quantize(ptr %values, ptr %by_amax, ptr %bounds, ptr noalias %packed, ptr noalias %scales, i64 %count) {
start:
  br label %block
block:
  %i = phi i64 [0, %start], [%next, %block]
  %largest = phi i16 [0, %start], [%larger, %block]
  %from = getelementptr <16 x i16>, ptr %values, i64 %i
  %bits = load <16 x i16>, ptr %from, align 2
  %size = and <16 x i16> %bits, splat (i16 32767)
  %amax = call i16 @llvm.vector.reduce.umax.v16i16(<16 x i16> %size)
  %is_larger = icmp ugt i16 %amax, %largest
  %larger = select i1 %is_larger, i16 %amax, i16 %largest
  %place = zext i16 %amax to i64
  %scale_from = getelementptr i8, ptr %by_amax, i64 %place
  %scale = load i8, ptr %scale_from
  %scale_to = getelementptr i8, ptr %scales, i64 %i
  store i8 %scale, ptr %scale_to
  %row = zext i8 %scale to i64
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
  %more = icmp ult i64 %next, %count
  br i1 %more, label %block, label %done
done:
  ret i16 %larger
}
"""


def _counted() -> str:
    """Compare all values with each bound, and count what is reached."""
    lines = ["%count0 = bitcast <16 x i16> zeroinitializer to <16 x i16>"]
    for code in range(_CODES):
        lines += [
            f"%bound{code} = shufflevector <8 x i16> %reach, <8 x i16> poison, <16 x i32> splat (i32 {code})",
            f"%is{code} = icmp uge <16 x i16> %size, %bound{code}",
            f"%reached{code} = zext <16 x i1> %is{code} to <16 x i16>",
        ]
        if code:
            lines.append(f"%count{code} = add <16 x i16> %count{code - 1}, %reached{code}")
    return "\n".join(f"  {line}" for line in lines)


class _Kernel:
    """The compiled function; memory that it runs in is freed with its engine, so there is one for good."""

    def __init__(self) -> None:
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
        module = llvm.parse_assembly(_SOURCE.replace("{counted}", _counted()))
        module.verify()
        self._engine = llvm.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()
        prototype = ctypes.CFUNCTYPE(ctypes.c_uint16, *[ctypes.c_void_p] * 5, ctypes.c_int64)
        self._function = prototype(self._engine.get_function_address("quantize"))


_kernel = _Kernel()


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
    return int(_kernel.function()(values, by_amax, bounds, packed, scales, count))
