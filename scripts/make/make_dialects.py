"""Write docs/dialects.md: small exports of every family, converted into every dialect and back, and what came of it.

python scripts/make/make_dialects.py EXPORTS

EXPORTS is a folder with ``<family>/base``, ``/nvfp4`` and ``/fp8``, which ``scripts/make/make_export.py`` makes.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from modelopt_convert import convert
from modelopt_convert.commands.convert.plan import Inexact
from modelopt_convert.commands.requests import TargetName
from modelopt_convert.dialects.packed import is_quantizer_state
from modelopt_convert.report.convert import ConvertReport
from modelopt_convert.run.errors import InputError

ROOT = Path(__file__).resolve().parent.parent.parent
TARGET = ROOT / "docs" / "dialects.md"
HEAD = ROOT / "scripts" / "make" / "dialects.md"
FAMILIES: Mapping[str, str] = {
    "flux1": "FLUX.1",
    "flux2": "FLUX.2",
    "qwen_image": "Qwen-Image",
    "z_image": "Z-Image",
    "wan": "Wan 2.2 T2V",
    "wan_5b": "Wan 2.2 TI2V 5B",
    "wan_i2v": "Wan 2.2 I2V",
    "wan_i2v_image": "Wan 2.1 I2V",
    "ltx2": "LTX-2",
    "hunyuan_video": "HunyuanVideo",
}
FORMATS = {"nvfp4": "NVFP4", "fp8": "FP8"}
BACK = """## The way back

With the `mopt.json` that lies beside OUT, every conversion above that needs no `--inexact` was converted back to
`modelopt` and gave the very files of the export, input scales and calibration state included.

Files that others made have no such record. So `mopt.json` was removed, and OUT was converted back again with the base's
config. A number is the count of tensors that are not bit for bit those of the export: scales that were rounded or left
out above. State of quantizers (`_amax`) is in no other dialect, and not counted. A dash: what was written is not exact
in the first place."""
QUANTIZED: tuple[TargetName, ...] = ("comfyui", "bfl-diffusers", "torchao", "compressed-tensors")
WAYS: tuple[Inexact, ...] = ("rebase", "bf16")


def rows(exports: Path, family: str, algorithm: str) -> tuple[str, str]:
    """The row of one family in the table of what is written, and in that of the way back without the record."""
    source = exports / family / algorithm
    there, back = [], []
    for to in QUANTIZED:
        with tempfile.TemporaryDirectory() as name:
            words, same = _pair(source, to, Path(name))
        there.append(words)
        back.append(same)
    with tempfile.TemporaryDirectory() as name:
        report = _told(source, Path(name) / "OUT", "bf16", "refuse")
    there.append(f"{report.modules.bf16} decoded")
    return _row(FAMILIES[family], there), _row(FAMILIES[family], back)


def render(exports: Path) -> str:
    """The page's text."""
    parts = [HEAD.read_text(encoding="utf-8").rstrip()]
    backs = []
    for algorithm, title in FORMATS.items():
        found = [rows(exports, family, algorithm) for family in FAMILIES]
        columns = [f"to {one}" for one in (*QUANTIZED, "bf16")]
        parts.append(_table(f"### From ModelOpt's {title}", columns, [there for there, _ in found]))
        columns = [f"from {one}" for one in QUANTIZED]
        backs.append(_table(f"### {title} back to ModelOpt", columns, [back for _, back in found]))
    return "\n\n".join([*parts, BACK, *backs]) + "\n"


def _pair(source: Path, to: TargetName, folder: Path) -> tuple[str, str]:
    try:
        report = _told(source, folder / "OUT", to, "refuse")
    except InputError as error:
        if error.code != "convert.inexact":
            raise
        return _inexact(source, to, folder), "-"
    if report.lossy or not report.restorable:
        raise ValueError(f"{source} to {to}: expected no loss that is not asked for")
    counts = report.modules
    words = ["exact" if not counts.rounded_global else f"{counts.exact} exact, {counts.rounded_global} rounded"]
    words += _input_scales(len(report.dropped), "left out")
    words += _input_scales(sum(one.tensor.endswith(".input_scale") for one in report.changed), "rounded")
    return "; ".join(words), _back(source, to, folder)


def _input_scales(count: int, what: str) -> list[str]:
    return [f"{count} input scale{'s' * (count > 1)} {what}"] if count else []


def _back(source: Path, to: TargetName, folder: Path) -> str:
    """How many tensors are others after the way back without the record; with it, none may be."""
    import torch
    from safetensors.torch import load_file

    # Nothing in such a file says what it is.
    from_: TargetName | None = to if to == "bfl-diffusers" else None
    convert(source=str(folder / "OUT"), output=str(folder / "BACK"), to="modelopt", from_=from_)
    for one in (source / "transformer").iterdir():
        if one.read_bytes() != (folder / "BACK" / one.name).read_bytes():
            raise ValueError(f"{source} to {to}: expected to come back by the record, found another {one.name}")
    (folder / "OUT" / "mopt.json").unlink()
    base = source.parent / "base"
    out, alone = str(folder / "OUT"), str(folder / "ALONE")
    convert(source=out, output=alone, to="modelopt", from_=from_, config=str(base))
    before, after = (
        {
            name: one
            for file in place.glob("*.safetensors")
            for name, one in load_file(file).items()
            if not is_quantizer_state(name)
        }
        for place in (source / "transformer", folder / "ALONE")
    )
    same = [
        name
        for name in before.keys() & after.keys()
        if before[name].dtype == after[name].dtype
        and torch.equal(before[name].reshape(-1).view(torch.uint8), after[name].reshape(-1).view(torch.uint8))
    ]
    odd = len(before.keys() | after.keys()) - len(same)
    return f"{odd} of {len(before)}" if odd else "equal"


def _inexact(source: Path, to: TargetName, folder: Path) -> str:
    """What the target cannot hold, and what each way out costs."""
    ways: dict[Inexact, ConvertReport] = {}
    for how in WAYS:
        try:
            ways[how] = _told(source, folder / how, to, how)
        except InputError as error:
            if error.code != "convert.inexact":
                raise
    first = ways["bf16"]
    lost = sum(len(one.members) for one in first.lossy)
    costs = []
    for how, report in ways.items():
        errors = [one.rel_error for one in report.lossy]
        if not errors or None in errors:
            raise ValueError(f"{source} to {to}, {how}: expected a measured error of each module")
        costs.append(f"`{how}` {max(one for one in errors if one is not None):.2g}")
    exact = first.modules.exact
    groups = len(first.lossy)
    return f"{exact} exact; {lost} not, in {groups} joined: {', '.join(costs)}"


def _told(source: Path, output: Path, to: TargetName, how: Inexact) -> ConvertReport:
    report = convert(source=str(source), output=str(output), to=to, inexact=how).convert
    if report is None or report.proof.compared != report.proof.equal or not report.proof.compared:
        raise ValueError(f"{source} to {to}: expected every tensor to be read back equal")
    return report


def _row(first: str, cells: list[str]) -> str:
    return f"| {' | '.join([first, *cells])} |"


def _table(title: str, columns: list[str], found: list[str]) -> str:
    lines = [_row("family", columns), "|" + "---|" * (len(columns) + 1), *found]
    return "\n".join([title, "", *lines])


if __name__ == "__main__":
    TARGET.write_text(render(Path(sys.argv[1])), encoding="utf-8")
