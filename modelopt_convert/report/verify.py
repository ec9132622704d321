"""What ``mopt verify`` found, as it stands under ``verify`` in the report. No torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

LevelStatus = Literal["pass", "warn", "fail", "skipped"]
# ``prewarmed``: kernels were built, and nothing was verified.
Verdict = Literal["prewarmed", "pass", "fail", "inconclusive", "backend broken", "backends disagree"]

# From best to worst; what was skipped says nothing about the rest.
_WORST: tuple[LevelStatus, ...] = ("skipped", "pass", "warn", "fail")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LevelReport(_Model):
    """One level; ``reason`` says why it was skipped, or what it rests on."""

    level: str
    title: str
    status: LevelStatus
    reason: str = ""
    failures: list[str] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)


class DeviceReport(_Model):
    """Where it ran."""

    name: str
    capability: str | None
    torch: str
    cuda: str | None


class BackendReport(_Model):
    """One backend; ``broken`` if its self-test failed."""

    name: str
    kind: str
    status: Literal["pass", "warn", "fail", "skipped", "broken"]
    reason: str = ""
    modules: int = 0


class AgreementReport(_Model):
    """Two native backends: on how many modules both ran, and returned the same weight bit for bit."""

    backends: list[str]
    modules: int
    bitwise_equal: int


class ProbeReport(_Model):
    """One probe of one backend on one module; ``sizes`` is every M all of whose rows were compared."""

    status: str
    detail: str = ""
    rows: list[int] = Field(default_factory=list)
    columns: list[int] = Field(default_factory=list)
    sizes: list[int] = Field(default_factory=list)
    calc_diff: float | None = None
    relative_frobenius: float | None = None
    gain: float | None = None
    worst_row: float | None = None
    worst_column: float | None = None
    sqnr_db: float | None = None


class ModuleVerify(_Model):
    """One quantized module, against the base; errors are of sampled rows, unless the verdict is near or mismatch."""

    shape: list[int]
    status: LevelStatus = "pass"
    verdict: str | None = None
    compared: Literal["all", "sampled rows"] | None = None
    first: str | None = None
    relative_error: float | None = None
    gain: float | None = None
    worst_row: float | None = None
    worst_column: float | None = None
    sqnr_db: float | None = None
    codes: int = 0
    codes_equal: int = 0
    scales: int = 0
    scales_equal: int = 0
    digest: str | None = None
    probes: dict[str, dict[str, ProbeReport]] = Field(default_factory=dict)

    def worsen(self, status: LevelStatus) -> None:
        """Take over a status if it is worse."""
        self.status = max(self.status, status, key=_WORST.index)


class VerifyReport(_Model):
    """Everything that was found of one checkpoint."""

    model_config = ConfigDict(frozen=True)
    checkpoint: str = ""
    algorithm: str = ""
    preset: str = Field(default="", description="what mopt.json names, which is its author's claim")
    verdict: Verdict = "inconclusive"
    proof: str = ""
    statement: str = ""
    device: DeviceReport | None = None
    levels: list[LevelReport] = Field(default_factory=list)
    backends: list[BackendReport] = Field(default_factory=list)
    modules: dict[str, ModuleVerify] = Field(default_factory=dict)
    agreement: list[AgreementReport] = Field(default_factory=list)
    native_executed: str = ""
    peak_gpu_bytes: int | None = None
    thresholds: dict[str, float] = Field(default_factory=dict)

    def level(self, name: str) -> LevelReport:
        """A level by its short name."""
        return next(level for level in self.levels if level.level == name)


def worst(statuses: list[LevelStatus]) -> LevelStatus:
    """The worst of several; ``skipped`` if there is none."""
    return max(statuses, key=_WORST.index, default="skipped")
