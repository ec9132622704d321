"""What mopt can be asked for: every flag once, with its name, type, default and help. No torch, no pydantic.

The keywords of the public functions and the options of the command line are read off these fields. The help of a
command lists them in the order in which dataclasses take them: those of the base classes first, from right to left.
"""

import os
import re
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from modelopt_convert.checkpoint.companions import places_read
from modelopt_convert.checkpoint.location import is_far, is_file, parse_location
from modelopt_convert.commands.flags import (
    Config,
    Download,
    Flag,
    Folder,
    Place,
    Request,
    Result,
    Variant,
    Workers,
    none_of,
)
from modelopt_convert.engines import sglang
from modelopt_convert.engines.limits import DEFAULT, EngineName
from modelopt_convert.formats.format import Algorithm, Weights
from modelopt_convert.formats.fp8.format import FORMAT as FP8
from modelopt_convert.formats.nvfp4.format import FORMAT as NVFP4
from modelopt_convert.run.errors import InputError, UsageError
from modelopt_convert.run.text import nearest, runnable, shown
from modelopt_convert.run.workers import default_workers
from modelopt_convert.verification.gemm.names import ALIASES, NAMES, SGLANG_VARIABLE

if TYPE_CHECKING:
    from modelopt_convert.report.advice import AdviceReport  # noqa: F401 - named in strings below
    from modelopt_convert.report.fidelity import FidelityReport  # noqa: F401
    from modelopt_convert.report.inspect import InspectReport  # noqa: F401
    from modelopt_convert.report.report import PublishedReport, Report, VerifiedReport  # noqa: F401

TargetName = Literal["comfyui", "modelopt", "bfl-diffusers", "torchao", "compressed-tensors", "bf16"]
TransformerName = Literal["transformer", "transformer_2"]
Device = Literal["cuda", "cpu"]
_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
# ASCII: else a Kelvin sign is a K, and a dotless i an i.
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT])(i?)B", re.IGNORECASE | re.ASCII)
_ROWS = range(1, 10**7)


def size_bytes(request: "Request[Any]", name: str, size: str) -> int:
    """Bytes of a size such as 5GB, given in a field.

    Raises:
        UsageError: It is no size.
    """
    found = _SIZE.fullmatch(size)
    number, unit, binary = found.groups() if found else ("inf", "K", "")
    count = float(number) * (1024 if binary else 1000) ** (1 + "KMGT".index(unit.upper()))
    if count > sys.float_info.max:
        request.refuse(name, f"{shown(size)} is not a size such as 5GB or 500MB")
    return int(count)


def preset_values() -> list[str]:
    """What ``--preset`` takes besides files."""
    from modelopt_convert.preset.preset import preset_names

    return [*preset_names(), "none"]


MaxError = Annotated[
    float, Flag("Largest relative error of a module whose codes are not reproduced from the base.", minimum=0.0)
]


@dataclass(frozen=True, kw_only=True)
class _Writing(Request["Report"]):
    """How a checkpoint is written."""

    __slots__ = ()
    dry_run: Annotated[bool, Flag("Open, plan, refuse what cannot be done, print; write nothing.", short="-n")] = False
    download: Download = False
    workers: Workers = None
    executor: Annotated[
        Literal["threads", "ray"],
        Flag("Write shards on threads here, or as tasks of a Ray cluster that runs already."),
    ] = "threads"

    @property
    def worker_count(self) -> int:
        """Tensors that are worked on at a time."""
        return self.workers or default_workers()


@dataclass(frozen=True, kw_only=True)
class _Replacing(Request["Report"]):
    """What is accepted of the input, and what may be replaced."""

    __slots__ = ()
    max_error: MaxError = NVFP4.max_error
    accept_near: Annotated[
        bool, Flag("Write also where modules are near the base and not the base's; nothing is called proven then.")
    ] = False
    overwrite: Annotated[
        bool, Flag("Replace a checkpoint that mopt wrote; the old one stands until the new is whole.")
    ] = False
    overwrite_foreign: Annotated[
        bool, Flag("Replace also what mopt did not write, with all that OUT holds; the report names it.")
    ] = False

    @property
    def consent(self) -> dict[str, bool]:
        """What may be replaced, as the rules of OUT take it."""
        return {"overwrite": self.overwrite, "overwrite_foreign": self.overwrite_foreign}


@dataclass(frozen=True, kw_only=True)
class _Serving(Request[Result]):
    """Whom a checkpoint is for."""

    __slots__ = ()
    engine: Annotated[
        EngineName, Flag("The engine that shall load it; what that engine is known to load wrong is refused.")
    ] = DEFAULT
    allow_known_broken: Annotated[bool, Flag("Go on although the engine is known not to load it right.")] = False


@dataclass(frozen=True, kw_only=True)
class _Releasing(_Serving["Report"]):
    """How a build ends."""

    __slots__ = ()
    verify: Annotated[
        Literal["auto", "cpu", "off"],
        Flag("The closing step: with the GPU if there is one, on the CPU alone, or none."),
    ] = "auto"
    push_to: Annotated[
        str | None,
        Flag("Publish OUT there too, as `mopt push` does; the right to write is checked first.", metavar="REPO_ID"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class _Choosing(Request["Report"]):
    """What is built, from what, and where to."""

    __slots__ = ()
    preset: Annotated[
        str | Path | None,
        Flag(
            "What stays in BF16; chosen by config.json if left out; 'none' for nothing.",
            metavar="NAME|FILE",
            values=preset_values,
        ),
    ] = None
    export: Annotated[
        Place | None,
        Flag("ModelOpt NVFP4 export, or one .safetensors file; without it the base is quantized.", metavar="EXPORT"),
    ] = None
    base: Annotated[
        Place | None,
        Flag("The unquantized base: transformer, pipeline or file; default the preset's on the Hub.", metavar="BASE"),
    ] = None
    calibration: Annotated[
        Folder | None,
        Flag("What `mopt calibrate` wrote of BASE: input scales are written, as an export has them.", metavar="CALIB"),
    ] = None
    variant: Variant = None
    config: Config = None
    base_model: Annotated[
        str | None,
        Flag(
            "The repo that BASE comes from, where nothing at BASE says so; the card and the record give it as a claim.",
            metavar="REPO",
            after="config",
        ),
    ] = None
    component: Annotated[
        Sequence[TransformerName], Flag("Of a pipeline's transformers, this one alone; may be given for both.")
    ] = ()
    output: Annotated[Folder | None, Flag("Where to write; default ./<preset>-nvfp4.", metavar="OUT")] = None
    pipeline_output: Annotated[
        bool, Flag("Write a whole pipeline, with the base's other components, for an engine's --model-path.")
    ] = False
    to: Annotated[TargetName, Flag("The dialect to write: the checkpoint is built, proven, and converted.")] = (
        "modelopt"
    )
    inexact: Annotated[
        Literal["refuse", "bf16"], Flag("What becomes of modules that the target of --to cannot hold exactly.")
    ] = "refuse"
    keep_bf16: Annotated[
        Sequence[str], Flag("Keep these modules in BF16 too; may be given several times.", metavar="PATTERN")
    ] = ()
    proof: Annotated[
        Literal["all", "sampled"],
        Flag("Compare every byte of what is written with the base, or sampled rows, which prove nothing."),
    ] = "all"
    max_shard_size: Annotated[str, Flag("Largest output file, such as 5GB or 500MB.", metavar="SIZE")] = "5GB"


@dataclass(frozen=True, kw_only=True)
class BuildRequest(_Writing, _Releasing, _Replacing, _Choosing):
    """What ``build-nvfp4`` and ``convert-fp8`` have in common."""

    __slots__ = ()
    inputs: ClassVar[tuple[str, ...]] = ("export", "base", "config", "calibration")
    algorithm: ClassVar[Algorithm]

    def check(self) -> None:
        """Refuse what cannot be meant together."""
        if self.base is None and self.needs_base and self.preset in (None, "none"):
            self.refuse("base", "is required, unless a preset is named that names the base")
        if self.preset == "none" and self.output is None:
            self.refuse("output", "is required with --preset none")
        if self.output is not None and is_far(self.output):
            self.refuse("output", "is a folder on disk; --push-to REPO_ID publishes it")
        if self.calibration is not None and self.export is not None:
            self.refuse("calibration", "is for --base alone: an export has input scales of its own")
        if self.calibration is not None and is_far(self.calibration):
            self.refuse("calibration", "is a folder on disk")
        if self.base_model is not None and not _REPO.fullmatch(self.base_model):
            self.refuse("base_model", "is a repo on the Hub: ORGANIZATION/NAME")
        if self.shard_bytes <= 0:
            self.refuse("max_shard_size", "must be more than nothing")
        if self.to != "modelopt" and (self.pipeline_output or self.push_to is not None):
            other = "--pipeline-output" if self.pipeline_output else "--push-to"
            self.refuse("to", f"{self.to} is for the transformer alone, on disk; leave {other} out")
        if self.to == "modelopt" and self.inexact != "refuse":
            self.refuse("inexact", "is for --to another dialect")

    @property
    def needs_base(self) -> bool:
        """Whether nothing can be built without the base."""
        return self.export is None

    @property
    def shard_bytes(self) -> int:
        """Largest output file, in bytes of tensors."""
        return size_bytes(self, "max_shard_size", self.max_shard_size)

    @property
    def preset_file(self) -> Path | None:
        """The file that the preset is read from, if one of that name is there."""
        path = Path(self.preset or "")
        return path if is_file(path) else None

    def on_disk(self) -> list[Path]:
        """The pipeline, too, of which a base is a part and all else is copied."""
        found = super().on_disk()
        if self.pipeline_output and self.base is not None:
            with suppress(InputError, OSError):  # the command itself says what is wrong with the base
                found += places_read(parse_location(str(self.base)))
        return found

    @property
    def components(self) -> tuple[str, ...]:
        """Which transformers of a pipeline; none for every one that the export quantized."""
        return tuple(dict.fromkeys(self.component))

    @property
    def fetches_whole(self) -> bool:
        """Not where nothing is written either."""
        return self.download and not self.dry_run


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildNvfp4Request(BuildRequest):
    """Build a mixed BF16+NVFP4 transformer repo from a ModelOpt export and its base, or from the base alone."""

    command: ClassVar[str] = "build-nvfp4"
    algorithm: ClassVar[Algorithm] = "nvfp4"
    device: Annotated[
        Device, Flag("Where the base is quantized, to be written or compared; both give the same bytes.")
    ] = "cpu"
    weights: Annotated[
        Weights,
        Flag(
            "Without --export, each block's scale: by its largest value, or the best of ten by squared error, which "
            "--calibration may weigh; gptq: and each code with a view to those before it."
        ),
    ] = "max"

    @property
    def needs_base(self) -> bool:
        """Modules that stay in BF16 are the base's: an export has them quantized."""
        return True

    def check(self) -> None:
        """Refuse what cannot be meant together."""
        if self.device == "cuda" and self.executor == "ray":
            self.refuse("device", "cuda is for --executor threads")
        if self.weights != "max" and self.export is not None:
            self.refuse("weights", f"{self.weights} is for a base alone: an export has its scales; leave --export out")
        if self.weights in ("sweep-weighted", "gptq") and self.calibration is None:
            words = "that `mopt calibrate` writes" + (" with --gptq" if self.weights == "gptq" else "")
            self.refuse("weights", f"{self.weights} needs --calibration CALIB, the folder {words}")
        BuildRequest.check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertFp8Request(BuildRequest):
    """Convert a ModelOpt FP8 export, or the base alone, into an FP8 transformer repo, sensitive modules in BF16."""

    command: ClassVar[str] = "convert-fp8"
    algorithm: ClassVar[Algorithm] = "fp8"
    inputs: ClassVar[tuple[str, ...]] = ("export", "base", "config", "calibration", "checkpoint")
    export: Annotated[
        Place | None,
        Flag("ModelOpt FP8 export, or one .safetensors file; without it the base is quantized.", metavar="EXPORT"),
    ] = None
    base: Annotated[
        Place | None,
        Flag(
            "The unquantized base; without it an export is not proven, and without an export it is the preset's on the "
            "Hub.",
            metavar="BASE",
        ),
    ] = None
    checkpoint: Annotated[
        Place | None,
        Flag(
            "ModelOpt's saved quantizer state, or its folder; exports before ModelOpt 0.42 need it.",
            metavar="FILE.pt",
            after="base",
        ),
    ] = None
    output: Annotated[Folder | None, Flag("Where to write; default ./<preset>-fp8.", metavar="OUT")] = None
    max_error: MaxError = FP8.max_error

    def check(self) -> None:
        """Refuse what cannot be meant together."""
        if self.export is None and self.checkpoint is not None:
            self.refuse("checkpoint", "is for --export: without one the base is quantized, by its own values")
        if self.pipeline_output and self.base is None and not self.needs_base:
            self.refuse("pipeline_output", "needs --base, whose other components are copied")
        BuildRequest.check(self)


@dataclass(frozen=True, kw_only=True)
class _Source(Request["Report"]):
    """What is rewritten, against what, and where to."""

    __slots__ = ()
    source: Annotated[
        Place, Flag("A transformer folder, or one .safetensors file; it is not changed.", metavar="SOURCE")
    ] = field(kw_only=False)
    output: Annotated[Folder, Flag("The folder to write.", metavar="OUTPUT")] = field(kw_only=False)
    base: Annotated[
        Place | None,
        Flag("The unquantized base: only what needs the rewrite is rewritten, and it is proven.", metavar="BASE"),
    ] = None
    variant: Variant = None
    force_names: Annotated[bool, Flag("Rewrite although loaders guess the old layout from the tensor names.")] = False


@dataclass(frozen=True, kw_only=True)
class RewriteRequest(_Writing, _Replacing, _Source, ABC):
    """What ``swap-nibbles`` and ``unswizzle-scales`` have in common."""

    __slots__ = ()
    inputs: ClassVar[tuple[str, ...]] = ("source", "base")

    @property
    @abstractmethod
    def kind(self) -> Literal["swap", "unswizzle", "swizzle"]:
        """Which rewrite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapNibblesRequest(RewriteRequest):
    """Exchange the two codes in every byte of the packed weights."""

    command: ClassVar[str] = "swap-nibbles"

    @property
    def kind(self) -> Literal["swap"]:
        """Which rewrite."""
        return "swap"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnswizzleScalesRequest(RewriteRequest):
    """Bring block scales from the 128x4 (swizzled) order into row-major order, or back."""

    command: ClassVar[str] = "unswizzle-scales"
    reverse: Annotated[bool, Flag("From row-major to the 128x4 order.", after="base")] = False

    @property
    def kind(self) -> Literal["unswizzle", "swizzle"]:
        """Which rewrite."""
        return "swizzle" if self.reverse else "unswizzle"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertRequest(_Replacing):
    """Convert a checkpoint from one dialect into another, and read the result back."""

    command: ClassVar[str] = "convert"
    inputs: ClassVar[tuple[str, ...]] = ("source", "base", "config")
    source: Annotated[
        Place,
        Flag(
            "A quantized transformer: its folder, its pipeline's, or one .safetensors file; it is not changed.",
            metavar="SOURCE",
        ),
    ] = field(kw_only=False)
    output: Annotated[Folder, Flag("The folder to write.", metavar="OUTPUT")] = field(kw_only=False)
    to: Annotated[TargetName, Flag("The dialect to write.")]
    from_: Annotated[
        TargetName | None, Flag("The dialect of SOURCE, where names and markers do not tell.", name="--from")
    ] = None
    base: Annotated[Place | None, Flag("The unquantized base: SOURCE is proven against it.", metavar="BASE")] = None
    variant: Variant = None
    config: Config = None
    inexact: Annotated[
        Literal["refuse", "bf16", "rebase", "requantize"],
        Flag("What becomes of modules that the target cannot hold exactly."),
    ] = "refuse"
    dry_run: Annotated[bool, Flag("Open, plan, refuse, print; write nothing.", short="-n")] = False
    download: Download = False
    workers: Workers = None
    max_shard_size: Annotated[str, Flag("Largest output file, such as 5GB or 500MB.", metavar="SIZE")] = "5GB"

    def check(self) -> None:
        """Refuse what cannot be meant together."""
        if is_far(self.output):
            self.refuse("output", "is a folder on disk")
        if self.shard_bytes <= 0:
            self.refuse("max_shard_size", "must be more than nothing")

    @property
    def worker_count(self) -> int:
        """Tensors that are worked on at a time."""
        return self.workers or default_workers()

    @property
    def shard_bytes(self) -> int:
        """Largest output file, in bytes of tensors."""
        return size_bytes(self, "max_shard_size", self.max_shard_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyRequest(Request["VerifiedReport"]):
    """Verify a checkpoint: container, layout, decoded values and kernels, each level on its own."""

    command: ClassVar[str] = "verify"
    inputs: ClassVar[tuple[str, ...]] = ("checkpoint", "base", "config", "calibration")
    checkpoint: Annotated[
        Place | None,
        Flag("A transformer folder, the pipeline folder that holds it, or one file.", metavar="CHECKPOINT"),
    ] = field(default=None, kw_only=False)
    base: Annotated[Place | None, Flag("The unquantized base, to prove the weights again.", metavar="BASE")] = None
    calibration: Annotated[
        Folder | None,
        Flag("What a build with --weights sweep-weighted or gptq was given, to prove what it chose.", metavar="CALIB"),
    ] = None
    variant: Variant = None
    config: Config = None
    backend: Annotated[
        str,
        Flag(
            "Which GEMMs (matrix products) to compare; SGLang's names are known. One that is named must run.",
            metavar="best|all|NAME[,NAME]",
            values=lambda: ("best", "all", *NAMES),
        ),
    ] = "best"
    device: Annotated[Device | None, Flag("Default: the GPU if there is one.")] = None
    sample: Annotated[str | int, Flag("Rows of each module that are compared with the base.", metavar="N|all")] = "all"
    accept_near: Annotated[
        bool, Flag("Pass also where modules are near the base and not the base's; nothing is called proven then.")
    ] = False
    require: Annotated[
        Literal["native", "gpu"] | None, Flag("Exit 6 unless kernels of this kind ran on every module.")
    ] = None
    max_error: Annotated[
        float | None, Flag("Largest relative error of a module whose codes are not reproduced.", minimum=0.0)
    ] = None
    self_test: Annotated[bool, Flag("Test the backends alone, without a checkpoint.")] = False
    prewarm: Annotated[bool, Flag("Build kernels, for CHECKPOINT's shapes if one is given, and stop.")] = False
    workers: Workers = None
    download: Download = False
    report: Annotated[
        Folder | None,
        Flag("Write the report as an HTML page, too.", metavar="FILE.html", after="report_json"),
    ] = None

    def check(self) -> None:
        """Refuse what cannot be meant."""
        _check_names(self.backends, self.spelled("backend"))
        if self.preferred is not None:
            _check_names((self.preferred,), SGLANG_VARIABLE)
        rows = self.sample
        if isinstance(rows, str) and rows.isascii() and rows.isdecimal() and len(rows) <= len(str(_ROWS[-1])):
            rows = int(rows)
        if rows != "all" and rows not in _ROWS:
            self.refuse("sample", f"must be a number of rows from {_ROWS[0]} to {_ROWS[-1]}, or all")
        if self.checkpoint is None and not (self.self_test or self.prewarm):
            self.refuse("checkpoint", "is required, but for --self-test and --prewarm")
        if self.checkpoint is not None and self.self_test:
            self.refuse("checkpoint", "is not looked at by --self-test")
        if self.calibration is not None and self.base is None:
            self.refuse("calibration", "is for a comparison with --base")
        if self.calibration is not None and is_far(self.calibration):
            self.refuse("calibration", "is a folder on disk")
        if self.require is not None and (self.self_test or self.prewarm):
            self.refuse("require", "is about the kernel level, which --self-test and --prewarm do not run")

    @property
    def backends(self) -> tuple[str, ...]:
        """``best``, ``all``, or names."""
        return tuple(dict.fromkeys(part.strip() for part in _lower(self.backend).split(",")))

    @property
    def rows(self) -> int | None:
        """Rows of each module that are compared with the base; None for all."""
        return None if self.sample == "all" else int(self.sample)

    @property
    def preferred(self) -> str | None:
        """The backend that ``best`` takes if it runs: the one that SGLang is told to take."""
        name = _lower(os.environ.get(SGLANG_VARIABLE, "").strip())
        return ALIASES.get(name, name) or None

    @property
    def worker_count(self) -> int:
        """Modules that are decoded at a time."""
        return self.workers or default_workers()


def _lower(words: str) -> str:
    """Of letters beyond ASCII some would become letters of it, as a Kelvin sign does: such words stay what they are."""
    return words.lower() if words.isascii() else words


def _check_names(names: tuple[str, ...], flag: str) -> None:
    """An unknown name is a usage error: falling back to another kernel would prove nothing."""
    if names in (("best",), ("all",)):
        return
    unknown = [name for name in names if name not in NAMES and name not in ALIASES]
    if unknown:
        raise UsageError(flag, none_of(unknown[0], ("best", "all", *NAMES)))


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectRequest(Request["InspectReport"]):
    """Say what a checkpoint is, how it is laid out and how that is known, and what is wrong with it."""

    command: ClassVar[str] = "inspect"
    inputs: ClassVar[tuple[str, ...]] = ("source", "base", "config")
    source: Annotated[
        Place, Flag("A transformer folder, a pipeline folder, or one .safetensors file.", metavar="SOURCE")
    ] = field(kw_only=False)
    base: Annotated[Place | None, Flag("The unquantized base, to prove the layout.", metavar="BASE")] = None
    variant: Variant = None
    config: Config = None
    all_scales: Annotated[bool, Flag("Look at the scales of every module, not of a few.", name="--all")] = False
    engine: Annotated[
        str,
        Flag(
            "Whose view of the checkpoint to show: sglang.", metavar="NAME", values=lambda: ("sglang", sglang.VERSION)
        ),
    ] = "sglang"
    engines: Annotated[
        bool, Flag("Say of each engine whether it reads the checkpoint right, misreads or refuses it.")
    ] = False
    max_error: MaxError = NVFP4.max_error
    download: Download = False

    def check(self) -> None:
        """Refuse engines that are not known."""
        name, _, version = sglang.VERSION.partition("@")
        if self.engine not in (name, sglang.VERSION):
            begun = len(self.engine) > 1 and name.startswith(self.engine.lower())
            near = name if begun else nearest(self.engine, (name, sglang.VERSION))
            self.refuse("engine", f"known is {name} ({version}){f'; did you mean {near}?' if near else ''}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PushRequest(_Serving["PublishedReport"]):
    """Publish a checkpoint on the Hugging Face Hub: verified first, in one commit, only what is missing there."""

    command: ClassVar[str] = "push"
    inputs: ClassVar[tuple[str, ...]] = ("checkpoint",)
    checkpoint: Annotated[
        Folder, Flag("A transformer folder, or the folder that a build wrote.", metavar="CHECKPOINT")
    ] = field(kw_only=False)
    repo_id: Annotated[str, Flag("ORGANIZATION/NAME; created if there is none.", metavar="REPO_ID")] = field(
        kw_only=False
    )
    create_pr: Annotated[bool, Flag("Open a pull request instead of committing to main.")] = False
    private: Annotated[bool, Flag("Create the repo as a private one; refuse a public one.")] = False
    revision: Annotated[str | None, Flag("Commit there; made from main if there is none.", metavar="BRANCH")] = None
    message: Annotated[str | None, Flag("The commit's message.", metavar="TEXT")] = None
    dry_run: Annotated[
        bool, Flag("Verify, compare with what is there, say what would be published; write nothing there.", short="-n")
    ] = False

    def check(self) -> None:
        """Refuse what cannot be meant."""
        if self.create_pr and self.revision is not None:
            self.refuse("create_pr", "a pull request goes to main; leave one of the two out")
        if is_far(self.checkpoint):
            self.refuse(
                "checkpoint", runnable("is a folder on disk; `hf download REPO_ID --local-dir FOLDER` makes one")
            )
        if self.message is not None and not self.message.strip():
            self.refuse("message", "must not be empty")

    def command_line(self) -> str:
        """The command line that asks the same."""
        words = ["mopt", self.command, str(self.checkpoint), self.repo_id]
        words += ["--create-pr"] * self.create_pr + ["--private"] * self.private
        words += ["--revision", self.revision] if self.revision is not None else []
        words += ["--message", self.message] if self.message is not None else []
        words += ["--engine", self.engine] if self.engine != DEFAULT else []
        words += ["--allow-known-broken"] * self.allow_known_broken
        return shlex.join(words)

    @property
    def again(self) -> str:
        """How to try again, for hints."""
        return f"run `{self.command_line()}{' --dry-run' if self.dry_run else ''}`"

    @property
    def resumed(self) -> str:
        """How to try again once something may have been sent."""
        return f"{self.again}; what was sent is not sent again"
