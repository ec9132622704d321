"""The report of a run: one JSON object for every outcome, whose fields are only ever added. No torch."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Status = Literal["ok", "planned", "mismatch", "refused", "error", "interrupted"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class InputReport(_Model):
    """An input as it was opened."""

    path: str
    identity: dict[str, str]
    tensors: int
    bytes: int
    files: list[str]
    skipped_files: list[str]


class OutputReport(_Model):
    """What stands, or was planned to stand, at OUT."""

    path: str
    tensors: int = 0
    bytes: int = 0
    shards: list[dict[str, Any]] = Field(default_factory=list)
    published: bool = False
    method: str | None = None
    durable: bool | None = None
    kept_at: str | None = None


class RuleReport(_Model):
    """What one pattern matched and replaced."""

    kind: str
    pattern: str
    matched: int
    replaced: int
    bytes: int


class ModuleReport(_Model):
    """The proof of one packed module; numbers are of the sampled rows."""

    verdict: str
    codes: int = 0
    codes_equal: int = 0
    relative_error: float | None = None
    gain: float | None = None
    worst_row: float | None = None
    worst_column: float | None = None
    reading: str | None = None
    reason: str | None = None


class ProofReport(_Model):
    """The proof of the input against the base."""

    method: str
    status: Literal["pass", "fail"]
    max_error: float
    counts: dict[str, int]
    fused_scales_differ: dict[str, float]
    biases_differ: list[str]
    modules: dict[str, ModuleReport]


class ErrorReport(_Model):
    """Why a run ended without a checkpoint."""

    code: str
    message: str
    hint: str | None
    path: str | None


class Report(_Model):
    """Everything one run has to say."""

    schema_: Literal["mopt.report/1"] = Field(default="mopt.report/1", alias="schema")
    status: Status = "ok"
    exit_code: int = 0
    command: str
    versions: dict[str, str] = Field(default_factory=dict)
    inputs: dict[str, InputReport] = Field(default_factory=dict)
    preset: dict[str, Any] | None = None
    output: OutputReport
    rules: list[RuleReport] = Field(default_factory=list)
    counts: dict[str, dict[str, int]] = Field(
        default_factory=dict, description="for each input, how many tensors met each fate"
    )
    ledger: dict[str, dict[str, str]] = Field(
        default_factory=dict, description="for each input, the fate of every tensor"
    )
    proof: ProofReport | None = None
    checks: list[dict[str, Any]] = Field(default_factory=list)
    free_bytes: int | None = None
    peak_working_bytes: int | None = None
    peak_rss_bytes: int | None = None
    timings_s: dict[str, float] = Field(default_factory=dict)
    warnings: list[dict[str, str]] = Field(default_factory=list)
    error: ErrorReport | None = None

    def to_json(self) -> str:
        """The report as one line of ASCII JSON; what a terminal could act on is escaped."""
        return self.model_dump_json(by_alias=True, ensure_ascii=True)

    def warn(self, code: str, message: str) -> None:
        """Add a warning."""
        self.warnings.append({"code": code, "message": message})
