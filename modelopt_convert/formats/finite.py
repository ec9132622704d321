"""NaN and infinity among unquantized values, found by their bits while the bytes pass. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelopt_convert.formats.dtypes import DTYPE_BITS

# The bits of infinity. NaN is above, in magnitude.
_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
_SHOWN = 10


@dataclass(frozen=True, slots=True)
class NotFinite:
    """Values of a tensor that are NaN or infinity.

    Attributes:
        count: How many.
        first: Indices of the first, one for each dimension.
    """

    count: int
    first: tuple[int, ...]


class FiniteWatch:
    """Looks at a tensor's values as its bytes pass."""

    def __init__(self, dtype: str, shape: Sequence[int]) -> None:
        """Nothing has passed yet.

        Args:
            dtype: ``BF16``, ``F16`` or ``F32``.
            shape: Of the tensor.
        """
        self._dtype = dtype
        self._shape = shape
        self._passed = self._count = self._first = 0

    def add(self, piece: bytes | memoryview) -> None:
        """Look at the next values.

        Args:
            piece: Their bytes, of whole values.
        """
        count, first = _not_finite(piece, self._dtype)
        if count and not self._count:
            self._first = self._passed + first
        self._count += count
        self._passed += memoryview(piece).nbytes * 8 // DTYPE_BITS[self._dtype]

    def found(self) -> NotFinite | None:
        """What passed that is not finite; None if there was nothing."""
        if not self._count:
            return None
        place, left = list[int](), self._first
        for size in reversed(self._shape):
            left, index = divmod(left, size)
            place.insert(0, index)
        return NotFinite(self._count, tuple(place))


def _not_finite(piece: bytes | memoryview, dtype: str) -> tuple[int, int]:
    """How many values are not finite, and the number of the first.

    As signed numbers, values without a sign are in the order of magnitudes. As unsigned ones, those with a sign are in
    that order, and above all others. So two largest values tell, and where all is finite no array is made.
    """
    import numpy as np

    width, infinity = DTYPE_BITS[dtype], _INFINITY[dtype]
    sign = 1 << (width - 1)
    bits = np.frombuffer(piece, f"u{width // 8}")
    if not bits.size or (bits.view(f"i{width // 8}").max() < infinity and bits.max() < sign | infinity):
        return 0, 0
    places = np.flatnonzero((bits & (sign - 1)) >= infinity)
    return len(places), int(places[0])


def check_e4m3(raw: bytes | memoryview) -> bytes | memoryview:
    """The same bytes, once it is known that no code is NaN.

    Raises:
        ValueError: Some codes are NaN; the message says how many.
    """
    import numpy as np

    codes = np.frombuffer(raw, np.uint8)
    # NaN is the largest of the codes without a sign, and of those with one: so two largest values tell.
    if codes.size and (codes.view(np.int8).max() == 0x7F or codes.max() == 0xFF):
        raise ValueError(f"expected finite codes, found {np.count_nonzero((codes & 0x7F) == 0x7F)} NaN")
    return raw


def not_finite_words(found: Mapping[str, NotFinite]) -> str:
    """Which tensors hold how many values that are not finite, and where the first ones lie.

    Args:
        found: By tensor, at least one.
    """
    shown = [f"{name} ({one.count}, first at {list(one.first)})" for name, one in list(found.items())[:_SHOWN]]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    total = sum(one.count for one in found.values())
    return (
        f"{total} values of {len(found)} tensors are NaN or infinity: {', '.join(shown)}{more}; engines compute with "
        "them as they are"
    )
