"""The report of a run: one JSON object for every outcome, whose fields are only ever added. No torch."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json

from modelopt_convert.report.convert import ConvertReport
from modelopt_convert.report.verify import VerifyReport
from modelopt_convert.run.text import unicode_text

Status = Literal["ok", "planned", "mismatch", "inconclusive", "refused", "error", "interrupted"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)


def one_line(report: BaseModel) -> str:
    """A report as one line of ASCII JSON: what a terminal could act on, and bytes of a path that are no text, escaped.

    The models themselves hold paths as they are, for whoever goes on with them.
    """
    return to_json(_unicode(report.model_dump()), ensure_ascii=True, inf_nan_mode="null").decode()


def _unicode(value: Any) -> Any:
    match value:
        case str():
            return unicode_text(value)
        case dict():
            return {_unicode(name): _unicode(one) for name, one in value.items()}
        case list():
            return [_unicode(one) for one in value]
        case _:
            return value


class InputReport(_Model):
    """An input as it was opened."""

    path: str
    identity: dict[str, str]
    tensors: int
    bytes: int
    files: list[str]
    skipped_files: list[str]
    config_from: str | None = Field(
        default=None,
        description="where its config is from: config.json, --config, header, beside the file, or export",
    )
    renamed: dict[str, str] = Field(
        default_factory=dict, description="output name of each tensor, by the input's own, where another naming was met"
    )


class NetworkReport(_Model):
    """What an input on the Hub cost to read; ranges asked for ahead of a failure count too."""

    repo: str
    commit: str
    of_bytes: int
    to_fetch_bytes: int | None = Field(default=None, description="planned, beyond headers and what is cached")
    fetched_bytes: int = 0
    requests: int = 0


class EngineLimitReport(_Model):
    """What a version of an engine is known not to make right of a checkpoint: docs/engines.md."""

    engine: str
    version: str
    grade: Literal["fails", "wrong", "loss"]
    what: str
    figure: str


class OutputReport(_Model):
    """What stands, or was planned to stand, at OUT."""

    path: str
    tensors: int = 0
    bytes: int = 0
    shards: list[dict[str, Any]] = Field(default_factory=list)
    copied: list[dict[str, Any]] = Field(default_factory=list, description="files of --pipeline-output")
    load: str | None = Field(default=None, description="SGLang's command that loads a whole pipeline")
    published: bool = False
    method: str | None = None
    durable: bool | None = None
    kept_at: str | None = None


class RuleReport(_Model):
    """What one pattern matched and replaced; ``component`` where several transformers are built."""

    component: str | None = None
    kind: str
    pattern: str
    matched: int
    replaced: int
    bytes: int


class ModuleReport(_Model):
    """The proof of one packed module."""

    verdict: str
    compared: Literal["all", "sampled rows"] | None = None
    codes: int = Field(default=0, description="compared with the base, quantized again")
    codes_equal: int = 0
    codes_tied: int = Field(default=0, description="the other neighbour of a value midway between two codes")
    zero_signs: int = Field(default=0, description="zeros of the other sign")
    scales: int = Field(default=0, description="block scales compared with those of max calibration")
    scales_equal: int = 0
    scales_tied: int = 0
    scales_idle: int = Field(default=0, description="other scales over codes that are all zero")
    blocks_above: int = Field(default=0, description="blocks with a larger error than under max calibration")
    padding: int = Field(default=0, description="bytes of padding, all zero, that are not written")
    scale_factor: float | None = Field(
        default=None, description="the tensor scale over that of max calibration, where it was chosen otherwise"
    )
    group_scale_factor: float | None = Field(
        default=None, description="likewise, over that of max calibration of all modules with this scale"
    )
    cast: str | None = Field(default=None, description="dtype in which the base was quantized")
    first: str | None = Field(default=None, description="where the first byte that differs lies")
    relative_error: float | None = Field(
        default=None, description="with the next three: of sampled rows, unless the verdict is near or mismatch"
    )
    gain: float | None = None
    worst_row: float | None = None
    worst_column: float | None = None
    reading: str | None = None
    rule: str | None = None
    reason: str | None = None


class ClippedReport(_Model):
    """Values of a weight that its scale is too small for; of sampled rows where no more was compared."""

    count: int
    largest: float


class ProofReport(_Model):
    """The proof of the input against the base.

    ``pass``: every byte of every packed module was compared; ``not proven``: ``words`` says why; ``quantized here``:
    there was no export to prove.
    """

    method: str
    status: Literal["pass", "fail", "not proven", "quantized here"]
    words: str = Field(default="", description="proven, or why not")
    max_error: float
    counts: dict[str, int]
    fused_scales_differ: dict[str, float]
    fused_losses: dict[str, dict[str, float]] = Field(
        default_factory=dict,
        description="of these groups, the relative error that an engine adds by one global scale, by engine",
    )
    biases_differ: list[str]
    unquantized_differ: list[str] = Field(default_factory=list, description="accepted, and written as the base has it")
    modules: dict[str, ModuleReport]


class PushedReport(_Model):
    """What stands, or was planned to stand, on the Hub; ``commit`` is None where nothing was committed."""

    repo_id: str
    revision: str
    url: str
    commit: str | None = None
    pull_request: str | None = None
    sent: list[str] = Field(default_factory=list)
    same: list[str] = Field(default_factory=list, description="files that were there already, and equal")
    deleted: list[str] = Field(default_factory=list, description="shards and indexes of the checkpoint before")
    not_published: list[str] = Field(default_factory=list, description="what else the local folder holds")
    bytes_sent: int = Field(default=0, description="size of `sent`; of what the Hub held already, less was transferred")
    load: str | None = Field(default=None, description="the command that loads it, if one is known to")


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
    network: dict[str, NetworkReport] = Field(default_factory=dict, description="for each input that is on the Hub")
    preset: dict[str, Any] | None = None
    engine: str | None = Field(default=None, description="whom the checkpoint is for")
    engines: list[EngineLimitReport] = Field(
        default_factory=list, description="what is known of all engines for this class and format"
    )
    output: OutputReport
    rules: list[RuleReport] = Field(default_factory=list)
    counts: dict[str, dict[str, int]] = Field(
        default_factory=dict, description="for each input, how many tensors met each fate"
    )
    ledger: dict[str, dict[str, str]] = Field(
        default_factory=dict, description="for each input, the fate of every tensor"
    )
    proof: ProofReport | None = None
    evidence: dict[str, str] = Field(
        default_factory=dict, description="of a rewrite: how the layout of each module was known before"
    )
    calibration: Literal["none"] | None = Field(
        default=None, description="none: mopt quantized the base itself; null: the export's, as it was calibrated"
    )
    clipped: dict[str, ClippedReport] = Field(default_factory=dict, description="by module")
    dequantized: list[str] = Field(
        default_factory=list, description="modules kept in BF16 by way of their scale, for want of a base"
    )
    checks: list[dict[str, Any]] = Field(default_factory=list)
    convert: ConvertReport | None = None
    verify: VerifyReport | None = None
    pushed: PushedReport | None = None
    free_bytes: int | None = None
    peak_working_bytes: int | None = None
    peak_rss_bytes: int | None = None
    throughput_bytes_per_s: int | None = Field(
        default=None,
        description="tensor bytes of the output by the seconds of `stream`; null where nothing was streamed",
    )
    device: str | None = Field(default=None, description="the GPU that quantized the base, with --device cuda")
    peak_gpu_bytes: int | None = Field(default=None, description="of measuring and quantizing there")
    timings_s: dict[str, float] = Field(default_factory=dict)
    warnings: list[dict[str, str]] = Field(default_factory=list)
    error: ErrorReport | None = None

    def to_json(self) -> str:
        """The report as one line of ASCII JSON; what a terminal could act on is escaped."""
        return one_line(self)


class VerifiedReport(Report):
    """The report of a ``verify`` that came to a verdict; it has the same fields."""

    verify: VerifyReport


class PublishedReport(Report):
    """The report of a ``push`` that found or made the checkpoint on the Hub; it has the same fields."""

    pushed: PushedReport
