"""What ``mopt calibrate`` did, as it is reported. No torch."""

from pydantic import BaseModel, ConfigDict, Field


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CalibrationReport(_Model):
    """A calibration that was made, or that input scales were taken from."""

    path: str = Field(description="CALIB, as it was given")
    digest: str | None = Field(description="xxh3-128 of calibration.json; null while runs are missing")
    headroom: float = Field(description="by which each amax is multiplied before a scale is made of it")
    prompts: int = Field(description="how many")
    runs: int = Field(description="how many: prompts times seeds")
    runs_done: int = Field(description="of these finished, by this command or before")
    runs_here: int = Field(default=0, description="of these run by this command")
    kept_in: str | None = Field(default=None, description="the folder with the finished runs; null once all are merged")
    modules: int = Field(default=0, description="Linears that ran")
    never_ran: list[str] = Field(default_factory=list, description="Linears that did not")
    half_ratio: float | None = Field(
        default=None,
        description="mean over modules of the amax of one half of the runs over that of all; far below 1, take more",
    )
