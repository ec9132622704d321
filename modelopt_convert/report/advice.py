"""The report of ``mopt advise``: schema ``mopt.advice/1``, fields only added. No torch."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from modelopt_convert.report.report import ErrorReport, InputReport, NetworkReport, one_line


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)


class UnitReport(_Model):
    """Modules of which all are packed, or none: one Linear, or those that an engine joins or that share a scale."""

    name: str = Field(description="the module; of several their parent, and what follows it of each, with + between")
    members: list[str] = Field(description="the modules")
    bytes_kept: int = Field(description="of the weights in BF16")
    bytes_packed: int = Field(description="of codes and scales")
    error_alone: float = Field(description="mean squared error, as `score` has it, with this unit alone packed")


class MeasuredReport(_Model):
    """A choice that was run as a whole: all of its modules packed together."""

    error: float = Field(description="mean squared error, as `score` has it")
    psnr: float | None = Field(description="mean over pictures, in dB; null where all are equal to the base's")
    std: float | None = Field(description="of the sample, in dB; null of fewer than two pictures")
    lower95: float | None = Field(
        description="the mean is above it, with 95% confidence; null of fewer than two pictures"
    )
    n: int = Field(description="how many pictures")


class PointReport(_Model):
    """One choice."""

    bytes: int = Field(description="tensor bytes of the whole output")
    bits: float = Field(description="for each weight of the units, scales included")
    keeps: list[str] = Field(description="units that are kept in BF16")
    error_predicted: float = Field(description="sum of `error_alone` of the units that are packed")
    measured: MeasuredReport | None = Field(default=None, description="null where the choice was not run")


class DrawnReport(_Model):
    """What the pipeline drew."""

    pipeline: str = Field(description="as it was given")
    prompts_sha256: str = Field(description="of the file of prompts")
    prompts: int = Field(description="how many")
    seeds: int = Field(description="of each prompt, from 0")
    steps: int = Field(description="of the scheduler")
    size: int = Field(description="height and width in pixels")
    frames: int | None = Field(description="of a video; null for a model of images")
    scored: int = Field(description="pictures, or recorded calls of the transformer, that each unit was judged by")


class AdviceReport(_Model):
    """What ``mopt advise`` found."""

    schema_: Literal["mopt.advice/1"] = Field(
        default="mopt.advice/1", alias="schema", description="the version of these fields"
    )
    status: str = Field(default="ok", description="how the run ended")
    exit_code: int = Field(default=0, description="docs/exit-codes.md lists them")
    command: str = Field(default="advise", description="the command line's name of it")
    versions: dict[str, str] = Field(default_factory=dict, description="of mopt, Python and torch")
    inputs: dict[str, InputReport] = Field(default_factory=dict, description="the base as it was opened")
    network: dict[str, NetworkReport] = Field(default_factory=dict, description="for a base that is on the Hub")
    preset: dict[str, Any] | None = Field(default=None, description="name, path and sha256 of the one to start from")
    format: str | None = Field(default=None, description="what units are packed in")
    activations: Literal["static", "dynamic"] | None = Field(
        default=None, description="static: by the scales of --calibration; dynamic: by each tensor's own"
    )
    native: Literal[False] = Field(
        default=False, description="no kernel of an engine took part: packed modules are emulated"
    )
    drawn: DrawnReport | None = Field(default=None, description="what units and choices were measured on")
    units: list[UnitReport] = Field(default_factory=list, description="what there is to choose")
    score: Literal["pictures", "forward"] | None = Field(
        default=None, description="whose errors are meant: pictures in 0..1, or outputs of single forwards"
    )
    structural: list[str] = Field(default_factory=list, description="Linears that are no choice")
    least_bytes: int | None = Field(default=None, description="of the output with every unit packed")
    most_bytes: int | None = Field(default=None, description="of the output with every unit kept")
    frontier: list[PointReport] = Field(
        default_factory=list, description="choices that no mixture of others beats, by bytes; each keeps one unit more"
    )
    chosen: PointReport | None = Field(default=None, description="what the preset keeps")
    output: str | None = Field(default=None, description="the preset that was written")
    device: str | None = Field(default=None, description="where it ran")
    peak_rss_bytes: int | None = Field(default=None, description="the most memory that the process held")
    timings_s: dict[str, float] = Field(default_factory=dict, description="seconds of each phase")
    warnings: list[dict[str, str]] = Field(default_factory=list, description="each with code and message")
    error: ErrorReport | None = Field(default=None, description="null where the run did what was asked for")

    def to_json(self) -> str:
        """The report as one line of ASCII JSON; what a terminal could act on is escaped."""
        return one_line(self)
