"""The report of a run: one JSON object for every outcome, whose fields are only ever added. No torch."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json

from modelopt_convert.formats.format import Weights
from modelopt_convert.report.calibrate import CalibrationReport
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

    path: str = Field(description="as it was given")
    identity: dict[str, str] = Field(description="what identifies it: docs/reports.md, `sources` of the record")
    tensors: int = Field(description="how many it has")
    bytes: int = Field(description="of all its tensors")
    files: list[str] = Field(description="its weight files")
    skipped_files: list[str] = Field(description="files beside them that were not read")
    config_from: str | None = Field(
        default=None,
        description="where its config is from: config.json, --config, header, beside the file, export, base, "
        "or family, which says the class and no more",
    )
    renamed: dict[str, str] = Field(
        default_factory=dict, description="output name of each tensor, by the input's own, where another naming was met"
    )


class NetworkReport(_Model):
    """What an input on the Hub cost to read; ranges asked for ahead of a failure count too."""

    repo: str = Field(description="ORGANIZATION/NAME")
    commit: str = Field(description="the commit that was read")
    of_bytes: int = Field(description="size of the input's weight files")
    to_fetch_bytes: int | None = Field(default=None, description="planned, beyond headers and what is cached")
    fetched_bytes: int = Field(default=0, description="what came over the network")
    requests: int = Field(default=0, description="how many were sent for parts of files")


class EngineLimitReport(_Model):
    """What a version of an engine is known not to make right of a checkpoint: docs/engines.md."""

    engine: str = Field(description="its name")
    version: str = Field(description="its version")
    grade: Literal["fails", "wrong", "loss"] = Field(description="what becomes of the checkpoint there")
    what: str = Field(description="in words")
    figure: str = Field(description="what was measured of it, if anything was")


class OutputReport(_Model):
    """What stands, or was planned to stand, at OUT."""

    path: str = Field(description="OUT; empty for a command that writes none")
    tensors: int = Field(default=0, description="how many it has")
    bytes: int = Field(default=0, description="of all its tensors")
    shards: list[dict[str, Any]] = Field(default_factory=list, description="its weight files, with the size of each")
    copied: list[dict[str, Any]] = Field(default_factory=list, description="files of --pipeline-output")
    load: str | None = Field(default=None, description="SGLang's command that loads a whole pipeline")
    published: bool = Field(default=False, description="whether the new checkpoint stands at OUT")
    method: str | None = Field(default=None, description="how it was put there: rename, exchange or two-renames")
    durable: bool | None = Field(default=None, description="whether the disk confirmed it")
    kept_at: str | None = Field(
        default=None, description="where a finished checkpoint was left that could not be put at OUT"
    )


class RuleReport(_Model):
    """What one pattern matched and replaced; ``component`` where several transformers are built."""

    component: str | None = Field(default=None, description="the transformer, where several are built")
    kind: str = Field(description="structural or quality, of the preset; user, of --keep-bf16")
    pattern: str = Field(description="the pattern")
    matched: int = Field(description="how many modules it matched")
    replaced: int = Field(description="packed modules that it, before any other pattern, puts back to BF16")
    bytes: int = Field(description="of all that it matches, in OUT")


class ModuleReport(_Model):
    """The proof of one packed module."""

    verdict: str = Field(description="docs/proven.md lists them")
    compared: Literal["all", "sampled rows"] | None = Field(default=None, description="null where nothing was compared")
    codes: int = Field(default=0, description="compared with the base, quantized again")
    codes_equal: int = Field(default=0, description="of these equal")
    codes_tied: int = Field(default=0, description="the other neighbour of a value midway between two codes")
    zero_signs: int = Field(default=0, description="zeros of the other sign")
    scales: int = Field(default=0, description="block scales compared with those of max calibration")
    scales_equal: int = Field(default=0, description="of these equal")
    scales_tied: int = Field(default=0, description="the other neighbour of a scale midway between two values")
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
    gain: float | None = Field(default=None, description="<decoded, base> / <base, base>; 1 is right")
    worst_row: float | None = Field(default=None, description="the largest relative error of a row")
    worst_column: float | None = Field(default=None, description="the largest relative error of a column")
    reading: str | None = Field(
        default=None, description="the layout in which it was read, where that is not the canonical one"
    )
    rule: str | None = Field(default=None, description="FP8: by which rule the exporter divided")
    reason: str | None = Field(default=None, description="why the verdict is not better")


class ClippedReport(_Model):
    """Values of a weight that its scale is too small for; of sampled rows where no more was compared."""

    count: int = Field(description="how many")
    largest: float = Field(description="the largest, over its scale; 448 is the most that fits")


class ProofReport(_Model):
    """The proof of the input against the base.

    ``pass``: every byte of every packed module was compared; ``not proven``: ``words`` says why; ``quantized here``:
    there was no export to prove.
    """

    method: str = Field(description="what was compared, in words")
    status: Literal["pass", "fail", "not proven", "quantized here"] = Field(description="see above")
    words: str = Field(default="", description="proven, or why not")
    max_error: float = Field(description="the limit of `relative_error`")
    counts: dict[str, int] = Field(description="how many modules got each verdict")
    fused_scales_differ: dict[str, float] = Field(
        description="groups that an engine joins, with the largest global scale over the smallest"
    )
    fused_losses: dict[str, dict[str, float]] = Field(
        default_factory=dict,
        description="of these groups, the relative error that an engine adds by one global scale, by engine",
    )
    biases_differ: list[str] = Field(description="packed modules whose bias is not the base's")
    unquantized_differ: list[str] = Field(default_factory=list, description="accepted, and written as the base has it")
    modules: dict[str, ModuleReport] = Field(description="each packed module")


class PushedReport(_Model):
    """What stands, or was planned to stand, on the Hub; ``commit`` is None where nothing was committed."""

    repo_id: str = Field(description="ORGANIZATION/NAME")
    revision: str = Field(description="the branch")
    url: str = Field(description="the page of the commit, pull request or repo")
    commit: str | None = Field(default=None, description="null where nothing was committed")
    pull_request: str | None = Field(default=None, description="its page, with --create-pr")
    sent: list[str] = Field(default_factory=list, description="files that were sent, or would be")
    same: list[str] = Field(default_factory=list, description="files that were there already, and equal")
    deleted: list[str] = Field(default_factory=list, description="shards and indexes of the checkpoint before")
    not_published: list[str] = Field(default_factory=list, description="what else the local folder holds")
    bytes_sent: int = Field(default=0, description="size of `sent`; of what the Hub held already, less was transferred")
    load: str | None = Field(default=None, description="the command that loads it, if one is known to")


class FaultReport(_Model):
    """The faults of one kind that a run was refused for."""

    code: str = Field(description="docs/errors.md lists them")
    message: str = Field(description="what is wrong with the first, how many there are, and their first names")
    hint: str | None = Field(description="what to do about the first")
    path: str | None = Field(description="the file of the first, if there is one")
    names: list[str] = Field(description="all modules, tensors, patterns or keys that have the fault")


class ErrorReport(_Model):
    """Why a run ended without a checkpoint."""

    code: str = Field(description="docs/errors.md lists them")
    message: str = Field(description="what is wrong, in one line")
    hint: str | None = Field(description="what to do")
    path: str | None = Field(description="the file concerned, if one is")
    faults: list[FaultReport] = Field(
        default=[], description="where faults have names: all that was found together, kind by kind"
    )


class Report(_Model):
    """Everything one run has to say."""

    schema_: Literal["mopt.report/1"] = Field(
        default="mopt.report/1", alias="schema", description="the version of these fields"
    )
    status: Status = Field(default="ok", description="how the run ended")
    exit_code: int = Field(default=0, description="docs/exit-codes.md lists them")
    command: str = Field(description="the command line's name of it")
    versions: dict[str, str] = Field(default_factory=dict, description="of mopt, Python and torch")
    inputs: dict[str, InputReport] = Field(
        default_factory=dict, description="each input by its role, such as export or base"
    )
    network: dict[str, NetworkReport] = Field(default_factory=dict, description="for each input that is on the Hub")
    preset: dict[str, Any] | None = Field(default=None, description="the preset that was used")
    engine: str | None = Field(default=None, description="whom the checkpoint is for")
    engines: list[EngineLimitReport] = Field(
        default_factory=list, description="what is known of all engines for this class and format"
    )
    output: OutputReport = Field(description="what stands at OUT")
    rules: list[RuleReport] = Field(default_factory=list, description="what each pattern matched")
    counts: dict[str, dict[str, int]] = Field(
        default_factory=dict, description="for each input, how many tensors met each fate"
    )
    ledger: dict[str, dict[str, str]] = Field(
        default_factory=dict, description="for each input, the fate of every tensor"
    )
    proof: ProofReport | None = Field(default=None, description="null where nothing was proven")
    evidence: dict[str, str] = Field(
        default_factory=dict, description="of a rewrite: how the layout of each module was known before"
    )
    calibration: Literal["none", "inputs"] | None = Field(
        default=None,
        description="none: mopt quantized the base itself; inputs: likewise, with input scales of --calibration; null: "
        "the export's, as it was calibrated",
    )
    calibrated: CalibrationReport | None = Field(
        default=None, description="what `mopt calibrate` made, or --calibration named"
    )
    weights: Weights | None = Field(
        default=None,
        description="how the block scales of a base were chosen: by largest values, or swept for the least squared "
        "error, which a calibration may weigh; gptq: the last, with codes by GPTQ; null where mopt quantized nothing "
        "itself",
    )
    clipped: dict[str, ClippedReport] = Field(default_factory=dict, description="by module")
    dequantized: list[str] = Field(
        default_factory=list,
        description="modules kept in BF16 and dequantized with their scale, since there was no base",
    )
    checks: list[dict[str, Any]] = Field(
        default_factory=list, description="what was checked of OUT before it was published"
    )
    convert: ConvertReport | None = Field(default=None, description="what `mopt convert` did")
    verify: VerifyReport | None = Field(
        default=None, description="what `mopt verify`, or the closing step of a build, found"
    )
    pushed: PushedReport | None = Field(
        default=None, description="what stands on the Hub, where something was published"
    )
    free_bytes: int | None = Field(default=None, description="free space beside OUT, before the run")
    peak_working_bytes: int | None = Field(default=None, description="planned memory beyond start-up")
    peak_rss_bytes: int | None = Field(default=None, description="the most memory that the process held")
    throughput_bytes_per_s: int | None = Field(
        default=None,
        description="tensor bytes of the output by the seconds of `stream`; null where nothing was streamed",
    )
    device: str | None = Field(default=None, description="the GPU that quantized the base, with --device cuda")
    peak_gpu_bytes: int | None = Field(default=None, description="of measuring and quantizing there")
    timings_s: dict[str, float] = Field(default_factory=dict, description="seconds of each phase")
    warnings: list[dict[str, str]] = Field(default_factory=list, description="each with code and message")
    error: ErrorReport | None = Field(default=None, description="null where the run did what was asked for")

    def to_json(self) -> str:
        """The report as one line of ASCII JSON; what a terminal could act on is escaped."""
        return one_line(self)


class VerifiedReport(Report):
    """The report of a ``verify`` that came to a verdict; it has the same fields."""

    verify: VerifyReport = Field(description="what was found")


class PublishedReport(Report):
    """The report of a ``push`` that found or made the checkpoint on the Hub; it has the same fields."""

    pushed: PushedReport = Field(description="what stands on the Hub")
