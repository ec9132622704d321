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

    level: str = Field(description="record, L0, L1, L2 or L3: docs/verify.md")
    title: str = Field(description="its name")
    status: LevelStatus = Field(description="how it ended")
    reason: str = Field(default="", description="why it was skipped, or what it rests on")
    failures: list[str] = Field(default_factory=list, description="what is wrong")
    warnings: list[str] = Field(default_factory=list, description="what a user should know")


class DeviceReport(_Model):
    """Where it ran."""

    name: str = Field(description="of the GPU, or cpu")
    capability: str | None = Field(description="the GPU's compute capability; null for a CPU")
    torch: str = Field(description="the version of torch")
    cuda: str | None = Field(description="torch's version of CUDA")


class BackendReport(_Model):
    """One backend; ``broken`` if its self-test failed."""

    name: str = Field(description="the backend")
    kind: str = Field(description="native, emulated or reference")
    status: Literal["pass", "warn", "fail", "skipped", "broken"] = Field(description="broken: its self-test failed")
    reason: str = Field(default="", description="why it was skipped, or is broken")
    modules: int = Field(default=0, description="how many it multiplied")


class AgreementReport(_Model):
    """Two native backends: on how many modules both ran, and returned the same weight bit for bit."""

    backends: list[str] = Field(description="the two")
    modules: int = Field(description="on which both ran")
    bitwise_equal: int = Field(description="on how many of these the weight was the same bit for bit")


class ProbeReport(_Model):
    """One probe of one backend on one module; ``sizes`` is every M all of whose rows were compared."""

    status: str = Field(description="how it ended")
    detail: str = Field(default="", description="in words")
    rows: list[int] = Field(default_factory=list, description="rows of the weight that are wrong")
    columns: list[int] = Field(default_factory=list, description="columns of the weight that are wrong")
    sizes: list[int] = Field(default_factory=list, description="each M, all of whose rows were compared")
    calc_diff: float | None = Field(default=None, description="1 - 2<x, y> / (|x|^2 + |y|^2); 0 for equal")
    relative_frobenius: float | None = Field(
        default=None, description="norm of the difference over that of the exact product"
    )
    gain: float | None = Field(default=None, description="<output, exact> / <exact, exact>; 1 is right")
    worst_row: float | None = Field(default=None, description="the largest relative error of a row of activations")
    worst_column: float | None = Field(default=None, description="the largest relative error of an output feature")
    sqnr_db: float | None = Field(default=None, description="signal to noise in decibels")


class ModuleVerify(_Model):
    """One quantized module, against the base; errors are of sampled rows, unless the verdict is near or mismatch."""

    shape: list[int] = Field(description="[N, K] of the decoded weight")
    status: LevelStatus = Field(default="pass", description="the worst of what was found")
    verdict: str | None = Field(default=None, description="docs/proven.md lists them; null without a base")
    compared: Literal["all", "sampled rows"] | None = Field(default=None, description="null where nothing was compared")
    rule: str | None = Field(
        default=None, description="how ModelOpt made the codes of the base, where all are explained"
    )
    first: str | None = Field(default=None, description="where the first byte that differs lies")
    relative_error: float | None = Field(default=None, description="of the decoded weight against the base's")
    gain: float | None = Field(default=None, description="<decoded, base> / <base, base>; 1 is right")
    worst_row: float | None = Field(default=None, description="the largest relative error of a row")
    worst_column: float | None = Field(default=None, description="the largest relative error of a column")
    sqnr_db: float | None = Field(default=None, description="signal to noise in decibels")
    codes: int = Field(default=0, description="compared with the base, quantized again")
    codes_equal: int = Field(default=0, description="of these equal")
    scales: int = Field(default=0, description="block scales compared")
    scales_equal: int = Field(default=0, description="of these equal")
    digest: str | None = Field(default=None, description="xxh3-128 of decoded rows, the same on every machine")
    probes: dict[str, dict[str, ProbeReport]] = Field(
        default_factory=dict, description="by backend and probe, what the kernels returned"
    )

    def worsen(self, status: LevelStatus) -> None:
        """Take over a status if it is worse."""
        self.status = max(self.status, status, key=_WORST.index)


class VerifyReport(_Model):
    """Everything that was found of one checkpoint."""

    model_config = ConfigDict(frozen=True)
    checkpoint: str = Field(default="", description="as it was given; empty for a self-test")
    algorithm: str = Field(default="", description="nvfp4 or fp8")
    preset: str = Field(default="", description="what mopt.json names, which is its author's claim")
    verdict: Verdict = Field(default="inconclusive", description="the answer")
    proof: str = Field(default="", description="what is known of the weights: docs/verify.md lists the words")
    statement: str = Field(default="", description="the answer in a sentence")
    device: DeviceReport | None = Field(default=None, description="where it ran")
    levels: list[LevelReport] = Field(default_factory=list, description="each level")
    backends: list[BackendReport] = Field(default_factory=list, description="each backend")
    modules: dict[str, ModuleVerify] = Field(default_factory=dict, description="each quantized module")
    agreement: list[AgreementReport] = Field(default_factory=list, description="native backends against each other")
    native_executed: str = Field(default="", description="of how many modules native kernels ran, as N of M")
    peak_gpu_bytes: int | None = Field(default=None, description="the most memory that was taken of the GPU")
    thresholds: dict[str, float] = Field(default_factory=dict, description="the limits that were applied")

    def level(self, name: str) -> LevelReport:
        """A level by its short name."""
        return next(level for level in self.levels if level.level == name)


def worst(statuses: list[LevelStatus]) -> LevelStatus:
    """The worst of several; ``skipped`` if there is none."""
    return max(statuses, key=_WORST.index, default="skipped")
