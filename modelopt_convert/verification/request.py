"""What the user asked of verify. No torch."""

from dataclasses import dataclass, field

from modelopt_convert.checkpoint.location import Location
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.run.workers import default_workers

DEFAULT_ERROR = {"nvfp4": 0.15, "fp8": 0.1}
DEFAULT_SAMPLE = 16


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """What the user asked of ``verify``.

    Attributes:
        checkpoint: The transformer, or the pipeline that holds it.
        base: The unquantized base, or None.
        backends: ``best``, ``all``, or names.
        device: ``cuda`` or ``cpu``; None for the GPU if there is one.
        sample: Rows of each module for L2; None for all.
        require: ``native`` or ``gpu``: that the kernel level ran so; or None.
        max_error: Limit of the relative error where codes are not reproduced; None for the format's own.
        prewarm: Build the kernels for this checkpoint's shapes, and stop.
        preferred: The backend that ``best`` takes if it runs.
        workers: Modules that are decoded at a time.
    """

    checkpoint: Location
    base: Location | None
    backends: tuple[str, ...]
    device: str | None
    sample: int | None
    require: str | None
    max_error: float | None
    prewarm: bool = False
    preferred: str | None = None
    workers: int = field(default_factory=default_workers)


@dataclass(frozen=True, slots=True)
class OpenedTransformer:
    """One transformer of a checkpoint.

    Attributes:
        prefix: Its folder with a slash where there are several, else empty.
        reader: Opened.
        base: Its base, opened, or None.
    """

    prefix: str
    reader: CheckpointReader
    base: CheckpointReader | None
