"""mopt against SGLang's own builders on the same FLUX.1-shaped checkpoints: speed, peak memory, and the bytes.

    python scripts/bench/bench_peers.py --sglang FOLDER [--only nvfp4|fp8] [--quick] [--dir FOLDER] [--output FILE]

FOLDER is what PYTHONPATH needs for ``import sglang``: site-packages, or ``python`` in a checkout. Interleaved runs,
medians, files in the page cache, a sync included; what each takes for a FLUX.1 of 1 MB is measured too and taken off.
Peak memory is VmHWM of the process, given whole and beyond that of the small run. Outputs are compared once. The FP8
export holds BF16 weights, with the amax in a ``backbone.pt`` beside it, as
ModelOpt made them before 0.42: what SGLang's FP8 builder reads.
"""

import argparse
import hashlib
import json
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import make
from benching import MOPT, RUNS, Measured, machine, num_bytes, run_python, warm

TOOLS = Path("sglang/multimodal_gen/tools")
FILE = "diffusion_pytorch_model.safetensors"
FP8_CONFIG = {
    "quant_method": "modelopt",
    "quant_algo": "FP8",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}, "targets": ["Linear"]}},
    "producer": {"name": "modelopt", "version": "0.41.0"},
    "ignore": ["context_embedder", "norm_out*", "proj_out", "time_text_embed*", "x_embedder"],
}
# What mopt's preset keeps in BF16 beside SGLang's own, as SGLang's documentation has it: the same work for both.
PROJ_MLP = r"^single_transformer_blocks\.\d+\.proj_mlp$"
NOTES = {
    "nvfp4": "",
    "fp8": "mopt casts as ModelOpt does, which rounds the quotient to BF16 first; SGLang's builder does not.",
}


@dataclass(frozen=True)
class Builder:
    """One line of the table.

    Attributes:
        name: In words.
        code: Python to run.
        arguments: Its arguments; IN is replaced by the folder of the inputs, OUT by one that does not exist.
        paths: Where Python looks for modules too.
    """

    name: str
    code: str
    arguments: tuple[str, ...]
    paths: tuple[Path, ...] = ()

    def run(self, inputs: Path, out: Path) -> Measured:
        """Build once."""
        words = [word.replace("IN/", f"{inputs}/").replace("OUT", str(out)) for word in self.arguments]
        return run_python(self.code, words, *self.paths)


def builders(algorithm: str, sglang: Path) -> list[Builder]:
    """SGLang's, then mopt as it comes, and without what SGLang's does not do."""
    ours: tuple[str, ...] = ("build-nvfp4", "--export", "IN/export")
    theirs: tuple[str, ...] = ("--modelopt-hf-dir", "IN/export", "--pattern-preset", "flux1-nvfp4")
    if algorithm == "fp8":
        ours = ("convert-fp8", "--export", "IN/fp8", "--checkpoint", "IN/backbone.pt")
        theirs = ("--modelopt-hf-dir", "IN/fp8", "--modelopt-backbone-ckpt", "IN/backbone.pt")
        theirs += ("--keep-bf16-pattern", PROJ_MLP)
    tool = sglang / TOOLS / f"build_modelopt_{algorithm}_transformer.py"
    code = f"import runpy; runpy.run_path({str(tool)!r}, run_name='__main__')"
    own = (*ours, "--preset", "flux1-dev", "--base", "IN/base", "--output", "OUT", "--json", "--verify")
    return [
        Builder(
            f"SGLang's `{tool.name}`",
            code,
            (*theirs, "--base-transformer-dir", "IN/base", "--output-dir", "OUT"),
            (sglang,),
        ),
        Builder(f"`mopt {ours[0]}`", MOPT, (*own, "cpu")),
        Builder("the same, `--verify off`", MOPT, (*own, "off")),
        Builder("the same, `--verify off --workers 1`", MOPT, (*own, "off", "--workers", "1")),
    ]


def make_inputs(folder: Path, size: str, algorithm: str) -> None:
    """Write the base, and the export that both builders read."""
    make(folder, size, ("base", "export") if algorithm == "nvfp4" else ("base",))
    if algorithm == "fp8":
        _make_fp8(folder)


def _make_fp8(folder: Path) -> None:
    """The base's weights once more as an export, and in a ``.pt`` with the amax of every Linear."""
    import torch
    from safetensors.torch import load_file

    (folder / "fp8").mkdir()
    shutil.copyfile(folder / "base" / FILE, folder / "fp8" / FILE)
    config = json.loads((folder / "base" / "config.json").read_text())
    (folder / "fp8" / "config.json").write_text(json.dumps(config | {"quantization_config": FP8_CONFIG}))
    state = load_file(folder / "base" / FILE)
    for name, tensor in list(state.items()):
        if tensor.ndim == 2:
            module = name.removesuffix(".weight")
            state[f"{module}.weight_quantizer._amax"] = tensor.abs().max()
            state[f"{module}.input_quantizer._amax"] = torch.tensor(4.0, dtype=torch.bfloat16)
    torch.save({"modelopt_state": {}, "model_state_dict": state}, folder / "backbone.pt")


def compare(theirs: Path, ours: Path) -> str:
    """In words, how far two outputs hold the same tensors."""
    import torch

    wanted, found = _tensors(theirs), _tensors(ours)
    packed = {name for name, tensor in wanted.items() if tensor.dtype in (torch.uint8, torch.float8_e4m3fn)}
    words = []
    for kind, names in (("packed", packed), ("other", wanted.keys() - packed)):
        same, equal, total = 0, 0, 0
        for name in names & found.keys():
            one, other = (tensors[name].flatten().view(torch.uint8) for tensors in (wanted, found))
            total += one.numel()
            equal += int((one == other).sum()) if one.shape == other.shape else 0
            same += torch.equal(one, other)
        share = equal * 10000 // max(total, 1) / 100  # rounded down, so that 100% means all
        words.append(f"{same} of {len(names)} {kind} tensors are the same byte for byte ({share:.2f}% of their bytes)")
    return f"Of the two outputs {', '.join(words)}; {len(found.keys() ^ wanted.keys())} tensors are in one alone."


def _tensors(folder: Path) -> dict[str, Any]:
    """All of a checkpoint, mapped."""
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def measure(folder: Path, algorithm: str, lines: list[Builder], tell: Callable[[str], None]) -> list[str]:
    """The table of one algorithm, and how the outputs compare."""
    seconds: list[list[float]] = [[] for _ in lines]
    peaks: list[list[int]] = [[] for _ in lines]
    beyond: list[list[int]] = [[] for _ in lines]
    out, kept = folder / "out", folder / "kept"
    compared = ""
    for _ in range(RUNS):
        for number, builder in enumerate(lines):
            start = builder.run(folder / "tiny", out)
            shutil.rmtree(out)
            warm(folder)
            done = builder.run(folder, out)
            seconds[number].append(done.seconds - start.seconds)
            peaks[number].append(done.peak_bytes)
            beyond[number].append(done.peak_bytes - start.peak_bytes)
            tell(f"{builder.name}: {seconds[number][-1]:.2f} s, {done.peak_bytes / 1e6:.0f} MB")
            size = num_bytes(out)
            if number == 0 and not compared:
                out.rename(kept)
            elif kept.exists():
                compared = compare(kept, out)
                shutil.rmtree(kept)
            shutil.rmtree(out, ignore_errors=True)
    table = [
        "| builder | GB | seconds | GB/s | against SGLang's | peak MB | of SGLang's | beyond start-up | of SGLang's |"
    ]
    table.append("|---|---|---|---|---|---|---|---|---|")
    first = (statistics.median(seconds[0]), statistics.median(peaks[0]), statistics.median(beyond[0]))
    for builder, times, whole, more in zip(lines, seconds, peaks, beyond, strict=True):
        time, peak, own = statistics.median(times), statistics.median(whole), statistics.median(more)
        table.append(
            f"| {builder.name} | {size / 1e9:.2f} | {time:.2f} | {size / 1e9 / time:.2f} | {first[0] / time:.1f}x "
            f"| {peak / 1e6:.0f} | {peak / first[1]:.2f} | {own / 1e6:.0f} | {own / first[2]:.2f} |"
        )
    return [*table, "", compared, NOTES[algorithm]]


def version(sglang: Path) -> str:
    """SGLang's version as far as it is known, and the digests of its scripts."""
    file = sglang / "sglang" / "_version.py"
    known = re.findall(
        r"^__(?:version|commit_id)__ = \w+ = '([^']+)'", file.read_text() if file.is_file() else "", re.M
    )
    paths = [sglang / TOOLS / f"build_modelopt_{name}_transformer.py" for name in ("nvfp4", "fp8")]
    digests = [f"`{path.name}` (sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]})" for path in paths]
    return f"SGLang {' '.join(known) or 'of unknown version'}: {', '.join(digests)}"


def main() -> None:
    """Print the tables, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sglang", type=Path, required=True, metavar="FOLDER", help="what PYTHONPATH needs for sglang")
    parser.add_argument("--only", choices=["nvfp4", "fp8"], help="one of the two builders")
    parser.add_argument(
        "--quick", action="store_true", help="a base of 200 MB rather than 4 GB: a try, whose times are mostly noise"
    )
    parser.add_argument("--dir", type=Path, help="where to make them; default: the system's temporary folder")
    parser.add_argument("--output", type=Path, help="write the tables there too")
    arguments = parser.parse_args()
    sglang = arguments.sglang.resolve()
    lines: list[str] = []
    for algorithm in [arguments.only] if arguments.only else ["nvfp4", "fp8"]:
        folder = Path(tempfile.mkdtemp(prefix="mopt-peers-", dir=arguments.dir))
        try:
            make_inputs(folder, "quick" if arguments.quick else "full", algorithm)
            make_inputs(folder / "tiny", "tiny", algorithm)
            lines += measure(
                folder, algorithm, builders(algorithm, sglang), lambda line: print(line, file=sys.stderr, flush=True)
            )
        finally:
            shutil.rmtree(folder)
        lines.append("")
    text = "\n".join([*lines, f"{version(sglang)}. {machine()}, {RUNS} runs each.", ""])
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
