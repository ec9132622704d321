"""``mopt convert-fp8``."""

from pathlib import Path
from typing import Annotated

import typer

from modelopt_convert.cli import _options as options
from modelopt_convert.cli._build import Telling, run_build


def convert_fp8(
    preset: options.PresetOption = None,
    export: Annotated[
        str | None,
        typer.Option("--export", metavar="EXPORT", help="ModelOpt FP8 export: its transformer or pipeline folder."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="BASE", help="The unquantized base; without it nothing is proven."),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            metavar="FILE.pt",
            help="ModelOpt's saved quantizer state, or its folder; exports before ModelOpt 0.42 need it.",
        ),
    ] = None,
    component: options.ComponentOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="OUT", help="Where to write; default ./<preset>-fp8.")
    ] = None,
    keep_bf16: options.KeepOption = None,
    max_shard_size: options.ShardSizeOption = "5GB",
    max_error: options.MaxErrorOption = 0.1,
    overwrite: options.OverwriteOption = False,
    allow_known_broken: options.KnownBrokenOption = False,
    verify: options.VerifyOption = options.Closing.AUTO,
    push_to: options.PushToOption = None,
    dry_run: options.DryRunOption = False,
    download: options.DownloadOption = False,
    workers: options.WorkersOption = None,
    executor: options.ExecutorOption = options.Executor.THREADS,
    json: options.JsonOption = False,
    report_json: options.ReportOption = None,
    quiet: options.QuietOption = False,
    verbose: options.VerboseOption = False,
    no_color: options.NoColorOption = False,
) -> None:
    """Convert a ModelOpt FP8 export into an FP8 transformer repo, sensitive modules in BF16.

    \b
    Examples:
      mopt convert-fp8 --preset flux1-dev --export out/hf --base FLUX.1-dev
      mopt convert-fp8 --export old/hf --checkpoint old/ckpt/backbone.pt --base FLUX.1-dev

    With --base every weight is proven before anything is written, and modules kept in BF16 are the base's. Without it
    they are dequantized, and the result is published as not proven. Of a pipeline with two transformers each one that
    was quantized is converted, into OUT/transformer and OUT/transformer_2. Exit codes: see mopt --help.
    """
    if export is None:
        raise typer.BadParameter("is required: the folder of a ModelOpt FP8 export", param_hint="--export")
    run_build(
        "fp8",
        "convert-fp8",
        export=export,
        base=base,
        checkpoint=checkpoint,
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
        telling=Telling(json, report_json, quiet, verbose, no_color),
    )
