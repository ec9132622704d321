"""What mopt writes for other engines than those of ModelOpt's form, made for their own loaders, and its record.

``convert``: of an export as ModelOpt wrote it, with the base. ``build``: of the same in one run with a preset. Groups
of which a target can hold no one scale are the base's in BF16, since this is exact.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from comparison import BASE, EXPORT
from families import PRESETS
from set_up import ENGINES

from modelopt_convert import build_nvfp4, convert, convert_fp8

Row = dict[str, Any]
Key = tuple[str, str, str, str, str]
BUILDS = {"nvfp4": build_nvfp4, "fp8": convert_fp8}
# By engine and target, how it is made. `--to bfl-diffusers` has a test with FLUX.2 of its own.
TARGETS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "comfyui": {"comfyui": ("convert", "build")},
    "diffusers": {"torchao": ("convert", "build"), "bf16": ("convert",)},
}
LOADERS = {"comfyui": "converted_in_comfyui.py", "diffusers": "converted_in_diffusers.py"}
FAMILIES = (*PRESETS, "z_image")
HEAD = """
## What is written for other engines

`convert` is what `mopt convert --to` makes of ModelOpt's export, `build` what `mopt build-nvfp4 --to` and `mopt
convert-fp8 --to` make of it with the preset. Groups that the target joins under unequal scales are written by
`--inexact bf16`. What an engine holds packed is decoded by the engine's own classes, and compared with the export; all
else is compared with the base, bit for bit. Behind each outcome stands how many modules are packed. The rows are in
`converted.json`.

"""


def rows() -> list[Key]:
    """What tells apart all that is made: engine, target, how it is made, family and format."""
    return [
        (engine, target, made, family, algorithm)
        for engine, targets in TARGETS.items()
        for target, ways in targets.items()
        for made in ways
        for family in FAMILIES
        for algorithm in BUILDS
        if made == "convert" or family in PRESETS
    ]


def make(exports: Path, key: Key, out: Path) -> Path:
    """One conversion, with what it was made from beside its files."""
    _, target, made, family, algorithm = key
    where, output = exports / family, out / target / made / f"{family}-{algorithm}"
    output.parent.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {"base": where / "base", "output": output, "to": target, "inexact": "bf16"}
    if made == "convert":
        convert(source=where / algorithm, **given)
    else:
        BUILDS[algorithm](export=where / algorithm, preset=PRESETS[family][0], allow_known_broken=True, **given)
    for name, source in ((EXPORT, algorithm), (BASE, "base")):
        (output / name).symlink_to((where / source / "transformer").resolve())
    return output


def key_of(row: Mapping[str, Any]) -> Key:
    """What tells rows of the record apart."""
    return row["engine"], row["to"], row["made"], row["family"], row["format"]


def section(found: Iterable[Row]) -> str:
    """The part of the page that is about conversions."""
    by_key = {key_of(row): row for row in found}
    columns = list(dict.fromkeys(key[:3] for key in rows()))
    titles = [f"{engine} {ENGINES[engine]['version']}, {made} --to {target}" for engine, target, made in columns]
    lines = [f"| family | format | {' | '.join(titles)} |", "|---|---|" + "---|" * len(columns)]
    for family in FAMILIES:
        for algorithm in BUILDS:
            cells = [by_key.get((*column, family, algorithm)) for column in columns]
            words = " | ".join(f"{one['outcome']}, {one['packed']}" if one else "-" for one in cells)
            lines.append(f"| {family} | {algorithm.upper()} | {words} |")
    right = sum(row["outcome"] == "right" for row in by_key.values())
    return HEAD + "\n".join([*lines, "", f"{right} of {len(by_key)} are right.", ""])
