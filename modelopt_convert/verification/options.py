"""What verify is to run. No torch."""

from dataclasses import dataclass, field

from modelopt_convert.checkpoint.calibration import Calibrated
from modelopt_convert.run.workers import default_workers


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """What verify is to run.

    Attributes:
        backends: ``best``, ``all``, or names.
        device: ``cuda`` or ``cpu``; None for the GPU if there is one.
        sample: Rows of each module for L2; None for all.
        accept_near: Whether modules may be near the base and not the base's.
        require: ``native`` or ``gpu``: that the kernel level ran so; or None.
        max_error: Limit of the relative error where codes are not reproduced; None for the format's own.
        prewarm: Build the kernels for this checkpoint's shapes, and stop.
        preferred: The backend that ``best`` takes if it runs.
        workers: Modules that are decoded at a time.
        calibrated: The calibration that may have weighed the choice of block scales, if it is at hand.
    """

    backends: tuple[str, ...] = ("best",)
    device: str | None = None
    sample: int | None = None
    accept_near: bool = False
    require: str | None = None
    max_error: float | None = None
    prewarm: bool = False
    preferred: str | None = None
    workers: int = field(default_factory=default_workers)
    calibrated: Calibrated | None = None

    @property
    def names_backends(self) -> bool:
        """Whether some backend is asked for by its name, and so also where there is no GPU."""
        return self.backends not in (("best",), ("all",))
