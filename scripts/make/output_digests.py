"""Digests of all that mopt writes, to see that a change of the code changes no byte of it.

    python output_digests.py OUT.json --fixtures DIR [--exports DIR] [--makers DIR ...]
    python output_digests.py --compare BEFORE.json AFTER.json [--ignore-rewrite-records]

Runs every command that writes a checkpoint on small real exports, refusals too, each in a process and folder of its
own. What is tested is the package that Python finds, so that PYTHONPATH chooses the tree. The fixtures are made once,
by the modules in --makers, with ModelOpt; only what was made from the same ones can be compared.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
MOPT = [sys.executable, "-c", "from modelopt_convert.cli import main; main()"]
PACKED = "single_transformer_blocks.0.proj_out"  # stays packed under the preset of FLUX.1
PRESETS = {
    "flux1": "flux1-dev",
    "flux2": "flux2-dev",
    "wan": "wan2.2-t2v-a14b",
    "wan_5b": "wan2.2-ti2v-5b",
    "qwen_image": "qwen-image",
    "hunyuan_video": "hunyuanvideo",
    "ltx2": "ltx2",
}
ORDERS = ("swap", "swizzle", "swizzle-swap", "row-swizzle", "row_col-swizzle", "swizzle-swap-mark")  # see reorder()
# One case for each of what the bars part, after the words that they share. "@" is the folder of the fixtures and "%"
# that of --exports; "occupied" is a checkpoint that is there before.
BUILD, CONVERT, WAN = "build-nvfp4 --preset flux1-dev", "convert-fp8 --preset flux1-dev", "--preset wan2.2-t2v-a14b"
FLUX1, FLUX1_FP8 = "--export @flux1/nvfp4 --base @flux1/base", "--export @flux1/fp8 --base @flux1/base"
CASES = f"""
{BUILD} {FLUX1} | | --output out --dry-run | --output occupied | --output occupied --overwrite
{BUILD} {FLUX1} --output out | --max-shard-size 700KB --workers 3 | --max-shard-size 50kB --workers 1 --verify off
{BUILD} {FLUX1} --output out | --keep-bf16 single_transformer_blocks.1.proj_out --keep-bf16 transformer_blocks.[:1].**
{BUILD} {FLUX1} --output out --keep-bf16 | transformer_blocks.0.attn.to_q | transformer_blocks.7.** | **
{BUILD} {FLUX1} --output out | --max-shard-size 5parsecs | --no-such-option | --component transformer_2
build-nvfp4 {FLUX1} --output out | | --preset @mine.toml | --preset no-such | --preset flux2-dev
build-nvfp4 {FLUX1} --output out --preset | flux1-kontext-dev | none | none --keep-bf16 transformer_blocks.[:1].**
{BUILD} --output out --base @flux1/base | --max-shard-size 700KB | --keep-bf16 transformer_blocks.*.attn.to_out.0
{BUILD} --output out --base | @wide32 | @wide16 | @flux1/nvfp4 | @flux1/base --preset none | @bad/nan | @bad/nowhere
{BUILD} --output out --export @flux1/nvfp4 --base | @bad/nan | @bad/shape | @bad/random | @wan/base
{BUILD} --output out --base @flux1/base --export | @mixed | @sharded_swizzled | @flux1/base | @bad/nowhere
build-nvfp4 --output out --preset flux2-dev --export @flux2/nvfp4 --base @flux2/base
build-nvfp4 --output out {WAN} --base @pipeline/base | | --component transformer_2
build-nvfp4 --output out {WAN} --export @pipeline/nvfp4 --base @pipeline/base | | --component transformer_2
convert-fp8 --output out {WAN} --export @pipeline/fp8 | --base @pipeline/base | --max-shard-size 2MB
{CONVERT} {FLUX1_FP8} | | --output out --dry-run | --output occupied --overwrite | --output out --max-shard-size 700KB
{CONVERT} {FLUX1_FP8} --output out | --keep-bf16 transformer_blocks.[:1].** | --checkpoint @mine.toml
convert-fp8 --output out --preset none --export @flux1/fp8 | | --base @flux1/base | --base @bad/random
{CONVERT} --output out --export @old/flux1 --base @flux1/base | | --checkpoint @flux1/fp8/ckpt --max-shard-size 900kB
{CONVERT} --output out --export @old/flux1 --checkpoint @flux1/fp8/ckpt/transformer.pt | | --base @flux1/base
convert-fp8 --output out --export @x0/plain | | --base @flux1/base | --base @ltx2/base --max-shard-size 700KB
convert-fp8 --output out --preset ltx2 --base @ltx2/base --export | @x0/plain | @x0/merged
convert-fp8 --output out --preset ltx2 --base @ltx2/base --export @x0/old | | --checkpoint @x0/transformer.pt
swap-nibbles | @flux1/base out | @flux1/nvfp4 out | @flux1/nvfp4_sharded out --workers 3 | @flux1/nvfp4 out --dry-run
swap-nibbles @flux1/nvfp4 | occupied | occupied --overwrite | out --base @flux1/base | out --base @bad/random
unswizzle-scales @flux1/nvfp4 out | | --reverse | --base @flux1/base | --reverse --base @flux1/base
unswizzle-scales --base @flux1/base | @mixed out | @sharded_swizzled out | @flux1/nvfp4_sharded out --reverse
"""
BAD_EXPORTS = ("algorithm", "codes", "no_scale", "nan_scale", "transformed", "missing", "truncated", "json", "no_shard")


def main() -> None:
    """Record, or compare two records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT.json", help="where to write the digests")
    parser.add_argument("--fixtures", type=Path, help="made if it is not there")
    parser.add_argument("--exports", type=Path, help="more exports: base/flux1 and one folder each")
    parser.add_argument("--makers", type=Path, nargs="+", default=[ROOT / "scripts/make", ROOT / "tests/support"])
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    parser.add_argument("--ignore-rewrite-records", action="store_true", help="not the mopt.json of rewrites")
    options = parser.parse_args()
    if options.compare:
        before, after = (json.loads(path.read_text()) for path in options.compare)
        sys.exit(compare(before, after, options.ignore_rewrite_records))
    if not (options.out and options.fixtures):
        parser.error("OUT.json and --fixtures are needed")
    fixtures, exports = options.fixtures.resolve(), options.exports and options.exports.resolve()
    if not fixtures.exists():
        sys.path[:0] = [str(path.resolve(strict=True)) for path in options.makers]
        partial = fixtures.with_name(f"{fixtures.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        make_fixtures(partial)
        partial.rename(fixtures)
    subprocess.run([*MOPT[:2], "import modelopt_convert as m; print('testing', m.__file__)"], check=True)
    names = list(dict.fromkeys(" ".join(words.split()) for words in cases(fixtures, exports)))
    with ThreadPoolExecutor(options.jobs) as pool:
        found = dict(zip(names, pool.map(lambda words: run(words, fixtures, exports), names), strict=True))
    options.out.write_text(json.dumps({"fixtures": tree(fixtures), "cases": found}, indent=1, sort_keys=True) + "\n")
    print(f"{len(found)} cases, {sum(case['exit_code'] == 0 for case in found.values())} of them exited with 0")


def cases(fixtures: Path, exports: Path | None) -> Iterator[str]:
    """Command lines."""
    for line in CASES.strip().splitlines():
        head, *tails = line.split("|")
        yield from (head + tail for tail in tails or [""])
    for family, preset in PRESETS.items():
        more = f"--preset {preset} --output out --allow-known-broken"
        for command, kind in (("build-nvfp4", "nvfp4"), ("convert-fp8", "fp8")):
            yield f"{command} --export @{family}/{kind} --base @{family}/base {more}"
        yield f"build-nvfp4 --base @{family}/base {more}"
        yield f"convert-fp8 --export @{family}/fp8 {more}"
    for path in sorted((fixtures / "flux1").glob("*_*")):
        yield f"{CONVERT if 'fp8_' in path.name else BUILD} --export @flux1/{path.name} --base @flux1/base --output out"
    for family in ("flux1", "hunyuan_video"):
        for order in ORDERS:
            yield f"build-nvfp4 --preset none --export @{order}/{family} --base @{family}/base --output out"
            for command in ("swap-nibbles", "unswizzle-scales"):
                yield from (f"{command} @{order}/{family} out {base}" for base in ("", f"--base @{family}/base"))
    for name in BAD_EXPORTS:
        yield from (f"{BUILD} --export @bad/{name} --base @flux1/base --output out", f"swap-nibbles @bad/{name} out")
    for folder in sorted([*(fixtures / "dialects").iterdir(), fixtures / "comfy"]):
        source = next(iter(folder.glob("model.safetensors")), folder).relative_to(fixtures)
        yield from (f"swap-nibbles @{source} out", f"unswizzle-scales @{source} out")
    for path in sorted(exports.glob("*_*")) if exports else []:
        for command in (BUILD, CONVERT):
            yield f"{command} --export %{path.name} --base %base/flux1 --output out"
        for command in ("swap-nibbles", "unswizzle-scales"):
            yield f"{command} %{path.name} out --base %base/flux1"


def run(words: str, fixtures: Path, exports: Path | None) -> dict[str, Any]:
    """Run mopt in an empty folder; how it ended, and all that is in the folder then."""
    with tempfile.TemporaryDirectory() as name:
        room = Path(name).resolve()
        if " occupied" in words:
            shutil.copytree(fixtures / "flux1" / "nvfp4" / "transformer", room / "occupied")
        places = {"@": f"{fixtures}/", "%": f"{exports}/"}
        command = [places.get(word[0], word[0]) + word[1:] for word in words.split()]
        rewrites = command[0] in ("swap-nibbles", "unswizzle-scales")
        more = ["--json"] if rewrites or "--verify" in command else ["--json", "--verify", "cpu"]
        environment = {"PYTHONHASHSEED": "0"} | os.environ | {"HF_HUB_OFFLINE": "1"}
        ended = subprocess.run([*MOPT, *command, *more], cwd=room, env=environment, capture_output=True, text=True)
        found: dict[str, Any] = {"exit_code": ended.returncode, "files": tree(room)}
        if ended.stdout.startswith("{"):
            report = json.loads(ended.stdout)
            found["warnings"] = [warning["code"] for warning in report["warnings"]]
            found["error"] = report["error"] and report["error"]["code"]
            message = report["error"]["message"] if report["error"] else ""
            for path, sign in ((room, "ROOM"), (fixtures, "FIXTURES"), (exports, "EXPORTS")):
                message = message.replace(str(path), sign)
            found["message"] = message
        if rewrites:
            records = [path for path in found["files"] if Path(path).name == "mopt.json"]
            found["rewrite_records"] = {path: found["files"].pop(path) for path in records}
    print(f"{found['exit_code']:3} {found.get('error') or ''} {words}", flush=True)
    return found


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def compare(before: dict[str, Any], after: dict[str, Any], ignore_records: bool) -> int:
    """Print what differs; 1 if anything does."""
    left, right = ({"FIXTURES": {"files": one["fixtures"]}} | one["cases"] for one in (before, after))
    lines = [f"{'missing' if name in left else 'new'}: {name}" for name in sorted(left.keys() ^ right.keys())]
    for name in sorted(left.keys() & right.keys()):
        for key in sorted(left[name].keys() | right[name].keys()):
            a: Any = left[name].get(key)
            b: Any = right[name].get(key)
            if a == b or (ignore_records and key == "rewrite_records"):
                continue
            if isinstance(a, dict) and isinstance(b, dict):
                a, b = sorted(a.items() - b.items()), sorted(b.items() - a.items())
            lines.append(f"{name}\n  {key}: {a!r}\n  now: {b!r}")
    print("\n".join([*lines, f"{len(lines)} differences; {len(before['cases'])} and {len(after['cases'])} cases"]))
    return 1 if lines else 0


def make_fixtures(room: Path) -> None:
    """Real exports of every family, and what else is made of them."""
    import torch
    from dialect_files import MAKERS
    from fp8_support import checkpoint_of, ltx_name, old_export, save_checkpoint, state_dict, x0_export
    from make_export import VARIANTS, make_all, make_family
    from safetensors.torch import load_file, save_file
    from support import copy, edit, load
    from tiny_models import FAMILIES

    make_family(FAMILIES["flux1"], VARIANTS, room / "flux1")
    make_all(room, [family for family in PRESETS if family != "flux1"], ["nvfp4", "fp8"])
    export, base, ltx2 = room / "flux1" / "nvfp4", room / "flux1" / "base", room / "ltx2" / "fp8"
    shown = subprocess.run([*MOPT, "presets", "flux1-dev"], check=True, capture_output=True, text=True).stdout
    (room / "mine.toml").write_text(shown.replace('name = "flux1-dev"', 'name = "mine"'))

    for order in ORDERS:
        for family in ("flux1", "hunyuan_video"):
            edit(room / family / "nvfp4", room / order / family, lambda t, order=order: reorder(t, order))
    edit(export, room / "mixed", lambda t: reorder(t, "swizzle", leave=PACKED))
    # ModelOpt post-processes shard by shard: where a weight and its scale lie apart, the scale stays as it was.
    for shard in sorted(copy(room / "flux1" / "nvfp4_sharded", room / "sharded_swizzled").glob("*.safetensors")):
        tensors = load_file(shard)
        whole = {name: t for name, t in tensors.items() if name.removesuffix("_scale") in tensors}
        reorder(whole, "swizzle")
        save_file({name: t.contiguous() for name, t in (tensors | whole).items()}, shard, {"format": "pt"})
    reorder(tensors := load(room / "flux2" / "nvfp4" / "transformer"), "swizzle-swap-mark")
    (room / "comfy").mkdir()
    save_file({name: t.contiguous() for name, t in tensors.items()}, room / "comfy" / "model.safetensors", {"a": "b"})

    def doubled(tensors: dict[str, Any]) -> None:
        """As if the weights were twice as large, so that the second transformer is not the first."""
        for name, tensor in tensors.items():
            if tensor.dtype in (torch.float32, torch.bfloat16) and not name.endswith("input_scale"):
                tensors[name] = tensor * 2

    for kind in ("base", "nvfp4", "fp8"):
        copy(room / "wan" / kind, room / "pipeline" / kind / "transformer")
        edit(room / "wan" / kind, room / "pipeline" / kind / "transformer_2", doubled)
    wide = {name: tensor.float() * 1.003 for name, tensor in load(base / "transformer").items()}
    edit(base, room / "wide32", lambda t: t.update(wide))
    edit(base, room / "wide16", lambda t: t.update({name: tensor.half() for name, tensor in wide.items()}))

    old_export(room / "flux1" / "fp8", room / "old" / "flux1" / "transformer")
    x0_export(ltx2, room / "x0" / "plain")
    x0_export(ltx2, room / "x0" / "merged", merged=True)
    x0_export(old_export(ltx2, room / "old" / "ltx2" / "transformer").parent, room / "x0" / "old")
    state = {f"velocity_model.{ltx_name(name)}": tensor for name, tensor in state_dict(checkpoint_of(ltx2)).items()}
    save_checkpoint(room / "x0" / "transformer.pt", state)
    for _, maker in MAKERS:
        maker(room / "dialects" / maker.__name__)

    def put(role: str, value: Callable[[Any], Any]) -> Callable[[dict[str, Any]], object]:
        return lambda tensors: tensors.update({f"{PACKED}.{role}": value(tensors.get(f"{PACKED}.{role}"))})

    bad, random = room / "bad", torch.Generator().manual_seed(1)
    noise = {name: torch.randn(t.shape, generator=random).to(t.dtype) for name, t in wide.items() if t.ndim == 2}
    edit(base, bad / "random", lambda t: t.update({name: one.bfloat16() for name, one in noise.items()}))
    edit(base, bad / "nan", put("weight", lambda t: t.index_fill(0, torch.tensor(3), float("nan"))))
    edit(base, bad / "shape", put("weight", lambda t: t[:, :-16]))
    edit(export, bad / "algorithm", None, lambda c: c["quantization_config"].update(quant_algo="W4A8_NVFP4_FP8"))
    edit(export, bad / "codes", put("weight", lambda t: t.roll(1, 0)))
    edit(export, bad / "no_scale", lambda t: t.pop(f"{PACKED}.input_scale"))
    edit(export, bad / "nan_scale", put("weight_scale_2", lambda t: t * float("nan")))
    edit(export, bad / "transformed", put("pre_quant_scale", lambda _: torch.ones(4)))
    edit(export, bad / "missing", lambda t: t.pop(f"{PACKED}.bias"))
    os.truncate(next(copy(export, bad / "truncated").glob("*.safetensors")), 1_000_000)
    (copy(export, bad / "json") / "config.json").write_text('{"_class_name": ')
    sorted(copy(room / "flux1" / "nvfp4_sharded", bad / "no_shard").glob("*.safetensors"))[1].unlink()


def reorder(tensors: dict[str, Any], order: str, leave: str = " ") -> None:
    """Pad and swizzle with ModelOpt's own functions, swap the codes of each byte, add the markers of ComfyUI."""
    import torch
    from modelopt.torch.export.diffusers_utils import pad_nvfp4_weights, swizzle_nvfp4_scales

    left = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{leave}.")}
    for padding in {"row", "row_col"} & {*order.split("-")}:
        tensors.update(pad_nvfp4_weights(dict(tensors), padding))
    if "swizzle" in order:
        tensors.update(swizzle_nvfp4_scales(dict(tensors)))
    for name in [name for name, tensor in tensors.items() if tensor.dtype == torch.uint8]:
        if "swap" in order:
            tensors[name] = (tensors[name] >> 4) | ((tensors[name] & 0x0F) << 4)
        if "mark" in order:
            marker = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
            tensors[f"{name.removesuffix('.weight')}.comfy_quant"] = marker
    tensors.update(left)


if __name__ == "__main__":
    main()
