"""The report of ``mopt compare``: schema ``mopt.fidelity/1``, fields only added. No torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from modelopt_convert.report.report import ErrorReport, InputReport, NetworkReport, one_line
from modelopt_convert.report.verify import DeviceReport


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)


class EmulationReport(_Model):
    """How quantized modules were run."""

    format: str = Field(description="of the modules")
    rule: str = Field(description="what is quantized, such as W4A4, static input scales")
    activations: Literal["static", "dynamic", "weight-only"] = Field(description="the flag that asks for it")
    native: Literal[False] = Field(default=False, description="no kernel of an engine took part")
    accumulate: str = Field(default="float32", description="in which the GEMM adds")
    reciprocals: str = Field(
        default="rounded", description="an engine's kernel takes approximate ones: ties may differ"
    )
    weights: Literal["decoded per call", "kept decoded"] = Field(description="what the memory had room for")
    compiled: bool = Field(description="whether NVFP4 layers ran by kernels of Triton; bits are those of plain torch")


class OracleReport(_Model):
    """One check of the self-test, which passed: a run in which one fails ends with exit code 7."""

    name: str = Field(description="what was checked")
    against: str = Field(description="against what, and how many values")


class DrawingReport(_Model):
    """What ran."""

    kind: Literal["pictures", "captured inputs", "random inputs"] = Field(
        description="a pipeline with prompts, or the transformer alone"
    )
    pipeline: str | None = Field(default=None, description="as it was given")
    identity: dict[str, str] | None = Field(
        default=None, description="of a folder digests of its index and of what runs beside the base; else the commit"
    )
    prompts_sha256: str | None = Field(default=None, description="of the file of prompts")
    prompts: int = Field(default=0, description="how many, equal ones once")
    seeds: int = Field(default=0, description="of each prompt, from 0")
    steps: int | None = Field(default=None, description="of the scheduler")
    size: int | None = Field(default=None, description="height and width in pixels")
    frames: int | None = Field(default=None, description="of a video; null for a pipeline of images")
    max_sequence_length: int | None = Field(
        default=None, description="tokens that prompts are padded to: the pipeline's number, or its tokenizer's limit"
    )
    pairs: int = Field(default=0, description="how many different runs were compared with the base's")


class ModuleFidelity(_Model):
    """One quantized module, on the base's own activations in the first run."""

    calls: int = Field(description="how often it ran there")
    input_sqnr_db: float | None = Field(description="of its quantized activations; null where they are not quantized")
    weight_sqnr_db: float | None = Field(description="of its weight against the base's; null for equal")
    output_sqnr_db: float | None = Field(description="of what it returns; null for equal")
    clipped: float = Field(description="share of activations that are larger than the input scale can hold")
    zero_blocks: float | None = Field(
        description="share of blocks of activations that became all zero; null for a format without blocks"
    )


class StepFidelity(_Model):
    """Latents after one step, the mean over all pairs."""

    cosine: float = Field(description="of all elements")
    rmse: float = Field(description="of all elements")


class ImageFidelity(_Model):
    """One pair: the last latents, or outputs, and the pictures."""

    prompt: str | None = Field(description="null for inputs")
    seed: int = Field(description="of the noise, or the number of the input")
    cosine: float = Field(description="of the last latents, or the output")
    rmse: float = Field(description="of the last latents, or the output")
    sqnr_db: float | None = Field(description="of the last latents, or the output; null for equal")
    psnr: float | None = Field(
        default=None, description="of the pictures, in decibels; null without, and for equal ones"
    )
    ssim: float | None = Field(default=None, description="Wang et al. 2004, Gaussian window of 11; null without")
    lpips: float | None = Field(default=None, description="AlexNet; null without the package lpips")


class AggregateFidelity(_Model):
    """A figure over all pairs."""

    mean: float | None = Field(description="null where it is infinite: some pictures are equal")
    std: float | None = Field(description="of the sample; null of fewer than two finite figures")
    lower95: float | None = Field(description="the mean is above it, with 95% confidence (Student's t, one-sided)")
    upper95: float | None = Field(description="the mean is below it, likewise")
    n: int = Field(description="how many pairs")


class RequiredReport(_Model):
    """One condition of ``--require``."""

    condition: str = Field(description="as it was given")
    bound: float | None = Field(description="what was held against it: lower95, or upper95 of what shall be small")
    met: bool = Field(description="whether it holds")


class CheckpointFidelity(_Model):
    """One checkpoint against the base."""

    path: str = Field(description="as it was given")
    emulation: EmulationReport = Field(description="how its modules were run")
    unquantized: int = Field(description="tensors beside its modules, all of them its own")
    modules: dict[str, ModuleFidelity] = Field(description="each quantized module")
    blocks: dict[str, float] = Field(description="cosine of each block's output in its first call, from equal noise")
    steps: list[StepFidelity] = Field(description="after each step; one for a transformer alone")
    images: list[ImageFidelity] = Field(description="each pair")
    aggregate: dict[str, AggregateFidelity] = Field(description="each figure of `images` over all pairs")
    required: list[RequiredReport] = Field(description="each condition of --require")


class FidelityReport(_Model):
    """What ``mopt compare`` found."""

    schema_: Literal["mopt.fidelity/1"] = Field(
        default="mopt.fidelity/1", alias="schema", description="the version of these fields"
    )
    status: str = Field(default="ok", description="how the run ended")
    exit_code: int = Field(default=0, description="docs/exit-codes.md lists them")
    command: str = Field(default="compare", description="the command line's name of it")
    versions: dict[str, str] = Field(default_factory=dict, description="of mopt, Python, torch and diffusers")
    inputs: dict[str, InputReport] = Field(default_factory=dict, description="base and checkpoints as they were opened")
    network: dict[str, NetworkReport] = Field(default_factory=dict, description="for each input that is on the Hub")
    env: DeviceReport | None = Field(default=None, description="where it ran")
    oracles: list[OracleReport] = Field(default_factory=list, description="what the self-test checked")
    drawing: DrawingReport | None = Field(default=None, description="what ran")
    checkpoints: list[CheckpointFidelity] = Field(default_factory=list, description="in the order given")
    peak_gpu_bytes: int | None = Field(default=None, description="the most memory that was taken of the GPU")
    peak_rss_bytes: int | None = Field(default=None, description="the most memory that the process held")
    timings_s: dict[str, float] = Field(default_factory=dict, description="seconds of each phase")
    warnings: list[dict[str, str]] = Field(default_factory=list, description="each with code and message")
    error: ErrorReport | None = Field(default=None, description="null where the run did what was asked for")

    def to_json(self) -> str:
        """The report as one line of ASCII JSON; what a terminal could act on is escaped."""
        return one_line(self)
