"""Conditions on figures, such as ``cosine>=0.99,psnr>=26``. No torch."""

import importlib.util
import math
import re
from dataclasses import dataclass

LEAST_PAIRS = 8
"""Of fewer pairs no bound says anything: seeds alone move PSNR by a decibel and more."""
_LARGE = ("cosine", "psnr", "ssim", "sqnr_db")
_SMALL = ("rmse", "lpips")
METRICS = (*_LARGE, *_SMALL)
_CONDITION = re.compile(r"([a-z_]+)\s*(>=|<=)\s*([0-9.eE+-]+)")


def has_lpips() -> bool:
    """Whether the package that measures LPIPS is installed."""
    return importlib.util.find_spec("lpips") is not None


@dataclass(frozen=True, slots=True)
class Threshold:
    """One condition.

    Attributes:
        metric: One of ``METRICS``.
        is_least: Whether the figure must be at least the limit; else at most.
        limit: The number.
    """

    metric: str
    is_least: bool
    limit: float

    @property
    def words(self) -> str:
        """As it is written."""
        return f"{self.metric}{'>=' if self.is_least else '<='}{self.limit:g}"

    def holds(self, bound: float | None) -> bool:
        """Whether a bound of the mean meets it; one that is not known does not."""
        return bound is not None and (bound >= self.limit if self.is_least else bound <= self.limit)


def parse_thresholds(text: str) -> tuple[Threshold, ...]:
    """The conditions of ``--require``.

    Raises:
        ValueError: With what is wrong, in words.
    """
    return tuple(_one(part.strip()) for part in text.split(","))


def _one(text: str) -> Threshold:
    found = _CONDITION.fullmatch(text)
    metric, sign, number = found.groups() if found else ("", "", "")
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if metric not in METRICS or not math.isfinite(limit):
        raise ValueError(f"{text!r} is no condition such as cosine>=0.99; figures are {', '.join(METRICS)}")
    if (sign == ">=") != (metric in _LARGE):
        raise ValueError(f"{text!r}: {metric} is better the {'larger' if metric in _LARGE else 'smaller'} it is")
    return Threshold(metric, sign == ">=", limit)
