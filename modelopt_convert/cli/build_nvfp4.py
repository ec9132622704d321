"""``mopt build-nvfp4``."""

from pathlib import Path
from typing import Annotated

import typer

from modelopt_convert.cli import _options as options
from modelopt_convert.cli._build import Telling, run_build


def build_nvfp4(
    preset: options.PresetOption = None,
    export: Annotated[
        str | None,
        typer.Option("--export", metavar="EXPORT", help="ModelOpt NVFP4 export; without it the base is quantized."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="BASE",
            help="The unquantized base: transformer or pipeline; default the preset's on the Hub.",
        ),
    ] = None,
    component: options.ComponentOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="OUT", help="Where to write; default ./<preset>-nvfp4.")
    ] = None,
    keep_bf16: options.KeepOption = None,
    max_shard_size: options.ShardSizeOption = "5GB",
    max_error: options.MaxErrorOption = 0.15,
    overwrite: options.OverwriteOption = False,
    allow_known_broken: options.KnownBrokenOption = False,
    verify: options.VerifyOption = options.Closing.AUTO,
    push_to: options.PushToOption = None,
    dry_run: options.DryRunOption = False,
    download: options.DownloadOption = False,
    workers: options.WorkersOption = None,
    executor: options.ExecutorOption = options.Executor.THREADS,
    device: options.DeviceOption = options.Device.CPU,
    json: options.JsonOption = False,
    report_json: options.ReportOption = None,
    quiet: options.QuietOption = False,
    verbose: options.VerboseOption = False,
    no_color: options.NoColorOption = False,
) -> None:
    """Build a mixed BF16+NVFP4 transformer repo from a ModelOpt export and its base, or from the base alone.

    \b
    Examples:
      mopt build-nvfp4 --preset flux1-dev
      mopt build-nvfp4 --preset flux1-dev --export out/hf --base FLUX.1-dev
      mopt build-nvfp4 --export out/hf --base FLUX.1-dev --keep-bf16 'transformer_blocks.[:2].**' --dry-run

    Every packed weight of an export is proven against the base before anything is written. Without --export the base's
    own weights are quantized, uncalibrated, but for those that the preset keeps. Without --base it is the preset's,
    on the Hub. Of a pipeline with two transformers each one that was quantized is built, into OUT/transformer and
    OUT/transformer_2. Exit codes: see mopt --help.
    """
    run_build(
        "nvfp4",
        "build-nvfp4",
        export=export,
        base=base,
        checkpoint=None,
        component=component,
        output=output,
        preset=preset,
        keep_bf16=keep_bf16,
        max_shard_size=max_shard_size,
        max_error=max_error,
        overwrite=overwrite,
        allow_known_broken=allow_known_broken,
        verify=verify.value,
        push_to=push_to,
        dry_run=dry_run,
        download=download,
        workers=workers,
        executor=executor.value,
        device=device.value,
        telling=Telling(json, report_json, quiet, verbose, no_color),
    )
