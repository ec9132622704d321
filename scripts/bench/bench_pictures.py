"""What calibrate, compare and advise cost at FLUX.1-dev's full size, on a whole pipeline of random weights.

    python scripts/bench/bench_pictures.py FOLDER [--only WORD ...] [--prompts 8] [--card 24] [--output JSON]

FOLDER/pipeline is made once: the transformer and the VAE of FLUX.1-dev's sizes, and text encoders of one layer whose
outputs have the widths of CLIP-L and T5-XXL. Then each command runs as its own process, and its seconds, the phases of
its report, and its peak memory of the GPU are kept. ``--card`` is a card of so many GB for the commands that offload:
torch gets no more than that, and sees no more. Pictures of random weights mean nothing; times and bytes are those of
the real model. Needs diffusers and transformers.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
TINY_PIPELINE = ROOT / "tests" / "data" / "tiny_flux1"
HEADERS = ROOT / "tests" / "preset" / "headers" / "flux1-dev.json"
TINY = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
# Runs a command of mopt, and says on the last line of stderr what the GPU held at most. A limit is torch's own; what
# mopt asks the card for is answered as a card of that size would.
PROGRAM = """
import sys, torch
limit = float(sys.argv.pop(1)) * 1e9
if torch.cuda.is_available() and limit:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total)
    torch.cuda.mem_get_info = lambda *_: (int(limit - torch.cuda.memory_reserved()), int(limit))
from modelopt_convert.cli import main
try:
    main()
finally:
    if torch.cuda.is_available():
        print(f"peak {torch.cuda.max_memory_allocated()} {torch.cuda.max_memory_reserved()}", file=sys.stderr)
"""


def make_pipeline(folder: Path, device: str, *, tiny: bool) -> None:
    """A FLUX.1-dev of random weights, and the small parts of the pipeline that the tests draw with."""
    import torch
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    config = {key: value for key, value in json.loads(HEADERS.read_text())["config"].items() if key[0] != "_"}
    config |= TINY if tiny else {}
    width = config["joint_attention_dim"]
    clip = json.loads((TINY_PIPELINE / "text_encoder" / "config.json").read_text())
    clip |= {"hidden_size": config["pooled_projection_dim"], "num_hidden_layers": 1, "num_attention_heads": 12}
    clip |= {"projection_dim": config["pooled_projection_dim"]}
    t5 = json.loads((TINY_PIPELINE / "text_encoder_2" / "config.json").read_text())
    t5 |= {"d_model": width, "d_ff": 256, "num_layers": 1, "num_decoder_layers": 1}
    blocks = (32, 64, 64, 64) if tiny else (128, 256, 512, 512)
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        models: dict[str, Any] = {
            "transformer": FluxTransformer2DModel(**config),  # type: ignore[no-untyped-call]
            "text_encoder": CLIPTextModel(CLIPTextConfig(**clip)),
            "text_encoder_2": T5EncoderModel(T5Config(**t5)),
            "vae": AutoencoderKL(  # type: ignore[no-untyped-call]
                block_out_channels=blocks,
                down_block_types=("DownEncoderBlock2D",) * len(blocks),
                up_block_types=("UpDecoderBlock2D",) * len(blocks),
                latent_channels=16,
                layers_per_block=2,
                scaling_factor=0.3611,
                shift_factor=0.1159,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
        }
    for parameter in models["transformer"].parameters():
        parameter.data.normal_(0, 0.02)
    for name, model in models.items():
        model.save_pretrained(folder / name)
    for name in ("scheduler", "tokenizer", "tokenizer_2"):
        shutil.copytree(TINY_PIPELINE / name, folder / name)
    shutil.copyfile(TINY_PIPELINE / "model_index.json", folder / "model_index.json")


def commands(folder: Path, device: str, count: int, *, tiny: bool) -> dict[str, tuple[bool, list[str]]]:
    """Of each name, whether it runs on a card of less memory, and its arguments."""
    pipeline, prompts = folder / "pipeline", folder / "prompts.txt"
    prompts.write_text("".join(f"a picture of number {number}\n" for number in range(count)))
    base, out, calib = str(pipeline / "transformer"), str(folder / "nvfp4"), str(folder / "calib")
    size = ["--size", "64" if tiny else "512", "--device", device]
    drawn = ["--pipeline", str(pipeline), "--prompts", str(prompts), *size]
    build = ["build-nvfp4", "--preset", "flux1-dev", "--base", base, "--overwrite", "--device", device]
    compare = ["compare", out, "--base", base, *drawn, "--steps", "8", "--seeds", "1"]
    calibrate = ["calibrate", base, *drawn, "--steps", "8", "--overwrite"]
    gptq = [*calibrate, "--gptq", "--output", f"{calib}3"]
    advise = ["advise", base, *drawn, "--steps", "8", "--effective-bits", "5.5"]
    advise += ["--score", "forward", "--output", str(folder / "mine.toml")]
    return {
        f"calibrate {count} prompts x 8 steps": (False, [*calibrate, "--output", calib]),
        "build with the calibration": (False, [*build, "--calibration", calib, "--output", out]),
        "for GPTQ: calibrate": (False, gptq),
        "by GPTQ: build": (False, [*build, "--calibration", f"{calib}3", "--weights", "gptq", "--output", f"{out}2"]),
        f"compare {count} pairs x 8 steps": (False, compare),
        "compare, offloaded by components": (True, [*compare, "--offload", "model"]),
        "compare, offloaded by layers": (True, [*compare, "--offload", "sequential"]),
        "calibrate, offloaded by layers": (True, [*calibrate, "--output", f"{calib}2", "--offload", "sequential"]),
        "advise of all units, by forwards": (False, advise),
    }


def measured(arguments: list[str], limit_gb: float) -> dict[str, Any]:
    """One command as a process of its own."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(limit_gb), *arguments, "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
    )
    found: dict[str, Any] = {"command": " ".join(arguments), "seconds": time.perf_counter() - begin}
    found["exit_code"] = done.returncode
    peak = [line.split() for line in done.stderr.splitlines() if line.startswith("peak ")]
    if peak:
        found |= {"peak_allocated_gb": int(peak[-1][1]) / 1e9, "peak_reserved_gb": int(peak[-1][2]) / 1e9}
    report = json.loads(done.stdout) if done.stdout.startswith("{") else {}
    if done.returncode:
        found["error"] = report.get("error") or done.stderr[-600:]
    return found | ({"timings_s": report["timings_s"]} if "timings_s" in report else {})


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="the commands whose names have one of them"
    )
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--card", type=float, default=24.0, metavar="GB")
    parser.add_argument("--tiny", action="store_true", help="two blocks of width 256, to try the script")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    pipeline = options.folder / "pipeline"
    if not pipeline.exists():
        make_pipeline(pipeline, options.device, tiny=options.tiny)
    found = {}
    for name, (small, command) in commands(options.folder, options.device, options.prompts, tiny=options.tiny).items():
        if any(word in name for word in options.only):
            found[name] = measured(command, options.card if small else 0)
            print(json.dumps({name: found[name]}, indent=2), flush=True)
            if options.output is not None:
                options.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
