"""Options that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, overload

import typer

from modelopt_convert.run.errors import InputError

if TYPE_CHECKING:
    from modelopt_convert.checkpoint.location import Location


class TransformerName(StrEnum):
    """The transformers that a pipeline may hold; Typer knows choices as enums."""

    TRANSFORMER = "transformer"
    TRANSFORMER_2 = "transformer_2"


class Device(StrEnum):
    """Where to compute."""

    CUDA = "cuda"
    CPU = "cpu"


class Closing(StrEnum):
    """How a build ends."""

    AUTO = "auto"
    CPU = "cpu"
    OFF = "off"


class Executor(StrEnum):
    """Where shards are written."""

    THREADS = "threads"
    RAY = "ray"


@overload
def location(text: str, name: str, *, download: bool) -> "Location": ...
@overload
def location(text: str | None, name: str, *, download: bool) -> "Location | None": ...
def location(text: str | None, name: str, *, download: bool) -> "Location | None":
    """What an option or argument names, on disk or ``hf://``.

    Raises:
        BadParameter: It is written ``hf://`` and names no repo.
    """
    from modelopt_convert.checkpoint.location import parse_location

    if text is None:
        return None
    try:
        return parse_location(text, download=download)
    except InputError as error:
        raise typer.BadParameter(f"{error.message}; {error.hint}", param_hint=name) from error


PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME|FILE",
        help="What stays in BF16; chosen by config.json if left out; 'none' for nothing.",
    ),
]
KeepOption = Annotated[
    list[str] | None,
    typer.Option("--keep-bf16", metavar="PATTERN", help="Keep these modules in BF16 too; may be given several times."),
]
ComponentOption = Annotated[
    list[TransformerName] | None,
    typer.Option(
        "--component",
        help="Of a pipeline's transformers, this one alone; may be given for both.",
    ),
]
KnownBrokenOption = Annotated[
    bool, typer.Option("--allow-known-broken", help="Build also what an engine is known not to load right.")
]
VerifyOption = Annotated[
    Closing,
    typer.Option("--verify", help="The closing step: with the GPU if there is one, on the CPU alone, or none."),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing checkpoint; the old one stands until the new is whole.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", "-n", help="Open, plan, refuse, print; write nothing.")]
ShardSizeOption = Annotated[
    str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest output file, such as 5GB or 500MB.")
]
MaxErrorOption = Annotated[
    float,
    typer.Option(
        "--max-error",
        min=0.0,
        help="Largest relative error of a module whose codes are not reproduced from the base.",
    ),
]
DownloadOption = Annotated[
    bool, typer.Option("--download", help="Fetch files of the Hub whole, into its cache, and not only what is needed.")
]
PushToOption = Annotated[
    str | None,
    typer.Option("--push-to", metavar="REPO_ID", help="Publish OUT there too, as `mopt push` does; rights come first."),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, max=64, help="Tensors worked on at a time; default: one a core, up to four."),
]
ExecutorOption = Annotated[
    Executor,
    typer.Option("--executor", help="Write shards on threads here, or as tasks of the Ray cluster that runs already."),
]
DeviceOption = Annotated[
    Device, typer.Option("--device", help="Where the base is quantized if there is no --export; the same bytes.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON report on stdout, whatever the outcome.")]
ReportOption = Annotated[
    Path | None,
    typer.Option("--report-json", metavar="PATH", help="Write the JSON report there, whatever the outcome."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stdout, no progress; errors on stderr.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="One line per tensor on stderr.")]
NoColorOption = Annotated[bool, typer.Option("--no-color", help="No colors.")]
