"""What commands that draw pictures can be asked for: ``calibrate``, ``advise`` and ``compare``. No torch, no pydantic.

See ``requests.py``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from modelopt_convert.checkpoint.location import Location, is_far, is_file
from modelopt_convert.commands.flags import (
    Config,
    Download,
    Flag,
    Folder,
    Frames,
    Offload,
    Offloaded,
    Pipeline,
    Place,
    Prompts,
    Request,
    Seeds,
    Size,
    Steps,
    UnquantizedBase,
    Variant,
    none_of,
)
from modelopt_convert.commands.requests import Device, size_bytes
from modelopt_convert.fidelity.thresholds import Threshold, has_lpips, parse_thresholds
from modelopt_convert.formats.format import Algorithm
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.run.text import shown

if TYPE_CHECKING:
    from modelopt_convert.report.advice import AdviceReport  # noqa: F401 - named in strings below
    from modelopt_convert.report.fidelity import FidelityReport  # noqa: F401
    from modelopt_convert.report.report import Report  # noqa: F401

Activations = Literal["static", "dynamic", "weight-only"]
_SHARE = re.compile(r"([0-9]{1,6})/([0-9]{1,6})", re.ASCII)


def _check_size(request: Request[Any], size: int | None) -> None:
    """Refuse pictures that pipelines would make smaller without a word: one place of latents has 16 x 16 pixels."""
    if size is not None and size % 16:
        request.refuse("size", f"{size} is no multiple of 16; give {size // 16 * 16} or {size // 16 * 16 + 16}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateRequest(Request["Report"]):
    """Run a pipeline on prompts, and keep what goes into each Linear of its transformer, for input scales."""

    command: ClassVar[str] = "calibrate"
    inputs: ClassVar[tuple[str, ...]] = ("base", "prompts", "config")
    base: UnquantizedBase = field(kw_only=False)
    pipeline: Pipeline
    prompts: Prompts
    output: Annotated[Folder, Flag("The folder to write.", metavar="CALIB")]
    variant: Variant = None
    config: Config = None
    steps: Steps = 8
    size: Size = 512
    frames: Frames = 17
    seeds: Seeds = 1
    gptq: Annotated[
        bool,
        Flag("Keep what `--weights gptq` needs, too: all prompts run once more, and CALIB is about as large as BASE."),
    ] = False
    headroom: Annotated[
        float, Flag("By which the largest input is multiplied before a scale is made of it.", minimum=1.0, maximum=64.0)
    ] = 2.0
    device: Annotated[Device | None, Flag("Default: the GPU if there is one.")] = None
    offload: Offloaded = "none"
    share: Annotated[
        str | None,
        Flag("Run this share alone, such as 2/8; without it what is missing is run and merged.", metavar="I/N"),
    ] = None
    overwrite: Annotated[bool, Flag("Replace a CALIB that mopt wrote; the old one stands until the new is whole.")] = (
        False
    )

    def check(self) -> None:
        """Refuse what cannot be meant together."""
        for name in ("prompts", "output"):
            if is_far(getattr(self, name)):
                self.refuse(name, "is on disk")
        if self.offload != "none" and self.device == "cpu":
            self.refuse("offload", "is for a GPU")
        _check_size(self, self.size)
        if not 1 <= self.part[0] <= self.part[1]:
            self.refuse("share", f"{shown(self.share)} is not a share such as 2/8, the second of eight")

    @property
    def part(self) -> tuple[int, int]:
        """Which of how many shares, from 1."""
        found = _SHARE.fullmatch(self.share or "1/1")
        return (int(found[1]), int(found[2])) if found else (0, 0)

    def reads(self) -> list[Path]:
        """The pipeline, too, if it is a folder."""
        path = Path(self.pipeline)
        return [*Request.reads(self), *([path] if not is_far(path) and path.is_dir() else [])]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdviseRequest(Request["AdviceReport"]):
    """Find which modules to keep in BF16 for the least error of a model's output, and write a preset of it."""

    command: ClassVar[str] = "advise"
    inputs: ClassVar[tuple[str, ...]] = ("base", "calibration", "prompts", "config")
    base: UnquantizedBase = field(kw_only=False)
    pipeline: Pipeline
    prompts: Prompts
    output: Annotated[Folder, Flag("The preset to write, for --preset of a build.", metavar="FILE.toml")]
    budget: Annotated[str | None, Flag("Most bytes of the transformer's tensors, such as 9GB.", metavar="SIZE")] = None
    effective_bits: Annotated[
        float | None,
        Flag("Most bits for each weight that could be packed, scales included.", minimum=1.0, maximum=16.0),
    ] = None
    psnr: Annotated[
        float | None,
        Flag(
            "Fewest bytes whose pictures have this PSNR against the base's, in dB, by the lower 95% bound.",
            minimum=0.0,
        ),
    ] = None
    preset: Annotated[
        str | Path | None,
        Flag("What is no choice: its structural set; chosen by config.json if left out.", metavar="NAME|FILE"),
    ] = None
    format: Annotated[Algorithm, Flag("What modules are packed in.")] = "nvfp4"
    calibration: Annotated[
        Folder | None,
        Flag("What `mopt calibrate` wrote of BASE; without it inputs are scaled as they come.", metavar="CALIB"),
    ] = None
    variant: Variant = None
    config: Config = None
    score: Annotated[
        Literal["pictures", "forward"],
        Flag("What a unit is judged by: its error in pictures, or in single forwards of the transformer."),
    ] = "pictures"
    scored: Annotated[
        int | None,
        Flag("Pictures, or forwards, that each unit is judged by; default 8, or 16.", minimum=1, maximum=1000),
    ] = None
    points: Annotated[
        int, Flag("Points of the frontier that are drawn beside the chosen one.", minimum=0, maximum=100)
    ] = 3
    steps: Steps = 8
    size: Size = 512
    frames: Frames = 17
    seeds: Seeds = 1
    device: Annotated[Device | None, Flag("Default: the GPU if there is one.")] = None
    offload: Offloaded = "none"
    svg: Annotated[Folder | None, Flag("Write a plot of the frontier, too.", metavar="FILE.svg")] = None
    report: Annotated[
        Folder | None,
        Flag("Write the report as an HTML page, too.", metavar="FILE.html", after="report_json"),
    ] = None

    def check(self) -> None:
        """Refuse what cannot be meant together."""
        goals = [name for name in ("budget", "effective_bits", "psnr") if getattr(self, name) is not None]
        if len(goals) != 1:
            self.refuse(
                goals[1] if goals else "budget", "one of --budget, --effective-bits and --psnr says what is wanted"
            )
        for name in ("prompts", "output", "calibration", "svg", "report"):
            if getattr(self, name) is not None and is_far(getattr(self, name)):
                self.refuse(name, "is on disk")
        if self.offload != "none" and self.device == "cpu":
            self.refuse("offload", "is for a GPU")
        _check_size(self, self.size)
        if self.format not in FORMATS:
            self.refuse("format", none_of(self.format, [*FORMATS]))
        if not str(self.output).endswith(".toml"):
            self.refuse("output", f"is a FILE.toml, found {shown(str(self.output))}: --preset knows a file by that")
        if self.preset == "none":
            self.refuse("preset", "none says nothing of what an engine cannot load")
        _ = self.budget_bytes

    @property
    def budget_bytes(self) -> int | None:
        """The budget in bytes, if there is one."""
        return size_bytes(self, "budget", self.budget) if self.budget is not None else None

    @property
    def preset_file(self) -> Path | None:
        """The file that the preset is read from, if one of that name is there."""
        path = Path(self.preset or "")
        return path if is_file(path) else None

    def reads(self) -> list[Path]:
        """The pipeline, too, if it is a folder."""
        path = Path(self.pipeline)
        return [*Request.reads(self), *([path] if not is_far(path) and path.is_dir() else [])]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareRequest(Request["FidelityReport"]):
    """Compare what a checkpoint draws with what its base draws, its quantized modules emulated on any device."""

    command: ClassVar[str] = "compare"
    inputs: ClassVar[tuple[str, ...]] = ("checkpoint", "base", "config")
    checkpoint: Annotated[
        Place, Flag("A transformer folder, the pipeline folder that holds it, or one file.", metavar="OUT")
    ] = field(kw_only=False)
    others: Annotated[
        Sequence[Place], Flag("Further checkpoints of the same base, beside the first.", metavar="OUT2")
    ] = field(default=(), kw_only=False)
    base: Annotated[Place, Flag("The unquantized base.", metavar="BASE")]
    variant: Variant = None
    config: Config = None
    pipeline: Annotated[
        str | None,
        Flag("A diffusers pipeline with all beside the transformer: a folder, or ORGANIZATION/NAME.", metavar="REF"),
    ] = None
    prompts: Annotated[Folder | None, Flag("A text file with one prompt a line.", metavar="FILE")] = None
    captured: Annotated[
        Folder | None,
        Flag(
            "Instead of a pipeline: safetensors with what the transformer's forward() gets, as [N.]ARGUMENT.",
            metavar="FILE",
            name="--inputs",
        ),
    ] = None
    seeds: Annotated[int, Flag("Pictures of each prompt; or random inputs.", minimum=1, maximum=1000)] = 4
    steps: Annotated[int | None, Flag("Of the scheduler; default 8.", minimum=1, maximum=1000)] = None
    size: Annotated[
        int | None, Flag("Height and width in pixels, a multiple of 16; default 512.", minimum=16, maximum=8192)
    ] = None
    frames: Annotated[int | None, Flag("Of a video; default 1.", minimum=1, maximum=1000)] = None
    device: Annotated[Device | None, Flag("Default: the GPU if there is one.")] = None
    offload: Annotated[
        Offload, Flag("What leaves the GPU between calls: nothing, whole components, or layer after layer.")
    ] = "none"
    rule: Annotated[
        Activations | None,
        Flag("How activations are quantized; default: as config.json declares it. weight-only is W4A16."),
    ] = None
    require: Annotated[
        str | None,
        Flag(
            "Exit 1 unless these bounds hold with 95% confidence, 6 below 8 pairs.", metavar="'cosine>=0.99,psnr>=26'"
        ),
    ] = None
    download: Download = False
    report: Annotated[
        Folder | None,
        Flag("Write the report as an HTML page with the pictures, too.", metavar="FILE.html", after="report_json"),
    ] = None

    def check(self) -> None:
        """Refuse what cannot be meant."""
        _ = self.checkpoints
        if (self.pipeline is None) != (self.prompts is None):
            self.refuse("prompts" if self.prompts is None else "pipeline", "--pipeline and --prompts go together")
        if self.pipeline is not None and self.captured is not None:
            self.refuse("captured", "is for a transformer alone; leave --pipeline and --prompts out")
        if self.offload != "none" and self.pipeline is None:
            self.refuse("offload", "is for a pipeline; give --pipeline and --prompts")
        if self.offload != "none" and self.device == "cpu":
            self.refuse("offload", "is for a GPU")
        for name in ("steps", "frames") if self.pipeline is None else ():
            if getattr(self, name) is not None:
                self.refuse(name, "is for a pipeline; give --pipeline and --prompts")
        if self.size is not None and self.captured is not None:
            self.refuse("size", "is of pictures or random inputs; --inputs have their own")
        _check_size(self, self.size)
        try:
            thresholds = self.thresholds
        except ValueError as error:
            self.refuse("require", str(error))
        drawn = [one.metric for one in thresholds if one.metric in ("psnr", "ssim", "lpips")]
        if drawn and self.pipeline is None:
            self.refuse("require", f"{drawn[0]} is of pictures; give --pipeline and --prompts")
        if "lpips" in drawn and not has_lpips():
            self.refuse("require", "lpips needs the package lpips, which is not installed: pip install lpips")

    @property
    def checkpoints(self) -> dict[str, Location]:
        """Where each checkpoint lies, by its name, in the order in which they were given."""
        found = {str(self.checkpoint): self.located("checkpoint", self.checkpoint)}
        return found | {str(one): self.located("others", one) for one in self.others}

    def reads(self) -> list[Path]:
        """All checkpoints, too."""
        return [*Request.reads(self), *(Path(one) for one in self.others if not is_far(one))]

    def on_disk(self) -> list[Path]:
        """All checkpoints, too."""
        return [*Request.on_disk(self), *(Path(one) for one in self.others if not is_far(one))]

    @property
    def thresholds(self) -> tuple[Threshold, ...]:
        """What is required.

        Raises:
            ValueError: It is not understood.
        """
        return parse_thresholds(self.require) if self.require is not None else ()
