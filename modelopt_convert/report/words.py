"""Words of reports that other rooms read back; without pydantic, since a record is read before any report is made."""

from typing import Literal

QUANTIZED_HERE: Literal["quantized here"] = "quantized here"
PROVEN = ("reproduced", "reproduced but for ties", "nearest")
"""Verdicts on a module that is the base, quantized."""
REFUTED = ("undetermined", "unrelated", "mismatch")
"""Verdicts on a module that is not."""
ALL_NEAREST = "all codes nearest"
"""The rule of modules that are near, and whose scales alone are not the base's."""
PROVEN_WORDS = "proven"
SAMPLED_WORDS = "not proven: sampled"
NEAR_WORDS = "not proven: near"
NO_BASE_WORDS = "not proven: no base"
UNCHANGED_WORDS = "unchanged"
UNCALIBRATED_WORDS = "weights proven, never calibrated"
NOT_CALIBRATED_WORDS = "quantized here, not calibrated"
CALIBRATED_WORDS = "quantized here, inputs calibrated"
UNCOMPARED_WORDS = "not proven: nothing compared"
MISMATCH_WORDS = "mismatch"
PROOFS = (
    "",
    PROVEN_WORDS,
    CALIBRATED_WORDS,
    NOT_CALIBRATED_WORDS,
    UNCHANGED_WORDS,
    UNCALIBRATED_WORDS,
    SAMPLED_WORDS,
    NEAR_WORDS,
    NO_BASE_WORDS,
    UNCOMPARED_WORDS,
    MISMATCH_WORDS,
)
"""What is said of a whole transformer, from strongest to weakest; empty where nothing was verified."""
