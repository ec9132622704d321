"""Damage anywhere in one module is refused, by the build and by verify, whatever the record says.

Through the API alone. One place of every kind of damage in every run; with MOPT_TEST_LONG, 24 of each.
"""

import functools
import itertools
import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from families import WITHOUT_PRESET, allowed
from faults import QUANTIZATION_CONFIG, SHARD, entries, write_transformer
from planted import FAULTS, Fault, Planted, overwrite, plant, raw_bytes
from producers import fp8_bf16, max_calibration
from root import LONG
from support import Tensors, config_of, load
from weights import weight

import modelopt_convert
from modelopt_convert import CheckFailedError

SEEDS = range(24 if LONG else 1)
COMMANDS: dict[str, Callable[..., Any]] = {
    "nvfp4": modelopt_convert.build_nvfp4,
    "fp8": modelopt_convert.convert_fp8,
}
# Names of FLUX.1; rows that are no multiple of a tile among them.
SHAPES = {
    "transformer_blocks.0.ff.net.0.proj": (1024, 256),
    "transformer_blocks.0.ff.net.2": (512, 512),
    "single_transformer_blocks.0.proj_out": (1000, 320),
}
CASES = [(algorithm, fault, seed) for algorithm, faults in FAULTS.items() for fault in faults for seed in SEEDS]
every_fault = pytest.mark.parametrize(("algorithm", "fault", "seed"), CASES)


@dataclass(frozen=True)
class Pair:
    """An export, its base, and what is built from them."""

    algorithm: str
    export: Path
    base: Path
    tensors: Tensors
    weights: Tensors
    more: dict[str, Any]

    def build(self, export: Path, output: Path) -> Any:
        return COMMANDS[self.algorithm](export=export, base=self.base, output=output, preset="none", **self.more)

    def plant(self, name: str, seed: int) -> tuple[str, Planted]:
        """A fault in a module that it fits, and the module."""
        fault, source = FAULTS[self.algorithm][name], random.Random(f"{name} {seed}")
        fitting = [module for module in self.weights if fault.fits(self.weights[module])]
        module = source.choice(fitting)
        return module, plant(fault, self.tensors, module, self.weights[module], seed, self._other(fault, module))

    def _other(self, fault: Fault, module: str) -> str | None:
        """A module whose scale differs by little."""
        role = "weight_scale_2" if self.algorithm == "nvfp4" else "weight_scale"
        mine = float(self.tensors[f"{module}.{role}"])
        distances = {
            other: abs(float(self.tensors[f"{other}.{role}"]) / mine - 1) for other in self.weights if other != module
        }
        near = {other: distance for other, distance in distances.items() if distance > 1e-3}
        return min(near, key=near.__getitem__) if fault.takes_another else None


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """By algorithm, modules that ModelOpt's max calibration would make so."""
    weights = {module: weight("outlier_channels", *shape, seed) for seed, (module, shape) in enumerate(SHAPES.items())}
    plain: Tensors = {"norm.weight": torch.ones(8, dtype=torch.bfloat16)}
    folder = tmp_path_factory.mktemp("planted")
    base = {f"{module}.weight": one for module, one in weights.items()} | plain
    write_transformer(folder / "base", base, {"_class_name": "SmallTransformer"})
    found = {}
    for algorithm in FAULTS:
        tensors = dict(plain)
        for module, one in weights.items():
            made = max_calibration(one) if algorithm == "nvfp4" else fp8_bf16(one)
            roles = ("weight", "weight_scale", "weight_scale_2")
            tensors |= {f"{module}.{role}": tensor for role, tensor in zip(roles, made, strict=False)}
            tensors[f"{module}.input_scale"] = torch.tensor(0.01 * (1 + len(module)))
        config = {
            "_class_name": "SmallTransformer",
            "quantization_config": QUANTIZATION_CONFIG | {"quant_algo": algorithm.upper()},
        }
        export = write_transformer(folder / algorithm, tensors, config)
        found[algorithm] = Pair(algorithm, export, folder / "base", tensors, weights, {})
    return found


@pytest.fixture(scope="module")
def built(pairs: dict[str, Pair], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What is built from each undamaged pair."""
    folder = tmp_path_factory.mktemp("built")
    for algorithm, pair in pairs.items():
        report = pair.build(pair.export, folder / algorithm)
        assert report.exit_code == 0
    return {algorithm: folder / algorithm for algorithm in pairs}


def names_place(message: str, fault: Fault, planted: Planted) -> bool:
    """Whether a message says where the damage begins."""
    _, row, column = planted.first
    if row is None:
        return True
    places = [column, column * 16] if planted.first.role == "weight_scale" else [column]  # a block, or its first column
    words = rf"\brow {row}\b"
    if fault.at_one_place:
        words += rf"\D+({'|'.join(map(str, places))})\b"
    return re.search(words, message) is not None


def is_refused(run: Callable[[], Any], modules: set[str]) -> str:
    """Require exit 1 with a message that names one of the damaged modules."""
    with pytest.raises(CheckFailedError) as caught:
        run()
    assert caught.value.exit_code == 1 and caught.value.report.exit_code == 1
    assert any(module in caught.value.message for module in modules), caught.value.message
    return caught.value.message


def damaged_export(pair: Pair, planted: Planted, target: Path) -> Path:
    return write_transformer(target, pair.tensors | planted.changes, config_of(pair.export))


@pytest.mark.parametrize("algorithm", FAULTS)
def test_without_damage_it_is_built_and_proven(algorithm: str, pairs: dict[str, Pair], built: dict[str, Path]) -> None:
    """And what is built is what was planted in: faults of the export are faults of the output."""
    report = modelopt_convert.verify(built[algorithm], base=pairs[algorithm].base)
    assert report.exit_code == 0
    out = load(built[algorithm])
    for name, tensor in pairs[algorithm].tensors.items():
        assert raw_bytes(out[name]) == raw_bytes(tensor), name


@every_fault
def test_the_damage_begins_where_it_says(algorithm: str, fault: str, seed: int, pairs: dict[str, Pair]) -> None:
    """Before that place every byte is what it was but for signs of zeros, and all of it is drawn by the seed."""
    pair = pairs[algorithm]
    module, planted = pair.plant(fault, seed)
    role, row, column = planted.first
    before, after = pair.tensors[f"{module}.{role}"], planted.changes[f"{module}.{role}"]
    assert (before.dtype, before.shape) == (after.dtype, after.shape) and raw_bytes(before) != raw_bytes(after)
    if row is None or column is None:
        assert before.ndim == 0
    else:
        left, right = before.view(torch.uint8), after.view(torch.uint8)
        differ = (left ^ right).flatten()
        place = row * left.shape[1] + (column // 2 if before.dtype == torch.uint8 else column)
        values = 0xFF if role == "weight_scale" else 0x77 if before.dtype == torch.uint8 else 0x7F
        assert int(differ[place]) and not bool((differ[:place] & values).any())
        assert FAULTS[algorithm][fault].at_one_place == (int(differ.count_nonzero()) == 1)
    again = pair.plant(fault, seed)[1]
    assert all(raw_bytes(again.changes[name]) == raw_bytes(tensor) for name, tensor in planted.changes.items())


@pytest.mark.parametrize("algorithm", FAULTS)
def test_damage_is_planted_everywhere(algorithm: str, pairs: dict[str, Pair]) -> None:
    places = set()
    for seed in range(60):
        module, planted = pairs[algorithm].plant("one bit of the codes", seed)
        assert planted.first.row is not None and planted.first.column is not None
        rows, columns = SHAPES[module]
        places.add((module, planted.first.row * 2 // rows, planted.first.column * 2 // columns))
    assert len(places) == 4 * len(SHAPES)


@every_fault
def test_a_build_refuses_damage(
    algorithm: str, fault: str, seed: int, pairs: dict[str, Pair], tmp_path: Path, room: Path
) -> None:
    pair = pairs[algorithm]
    module, planted = pair.plant(fault, seed)
    export = damaged_export(pair, planted, tmp_path / "export")
    modules = {name.rpartition(".")[0] for name in planted.changes}
    assert module in modules
    message = is_refused(partial(pair.build, export, room / "out"), modules)
    assert entries(room) == {}
    assert names_place(message, FAULTS[algorithm][fault], planted), (planted.first, message)


@every_fault
@pytest.mark.parametrize("record", ["none", "of the undamaged", "forged"])
def test_verify_refuses_damage_whatever_the_record_says(
    algorithm: str,
    fault: str,
    seed: int,
    record: str,
    pairs: dict[str, Pair],
    built: dict[str, Path],
    tmp_path: Path,
) -> None:
    """Without one, with the old one, and with one whose digests are those of the damaged bytes."""
    pair = pairs[algorithm]
    _, planted = pair.plant(fault, seed)
    out = Path(shutil.copytree(built[algorithm], tmp_path / "out"))
    overwrite(out / SHARD, planted.changes)
    manifest = out / "mopt.json"
    if record == "none":
        manifest.unlink()
    elif record == "forged":
        manifest.write_text(forged(manifest.read_text(), pair, planted))
    modules = {name.rpartition(".")[0] for name in planted.changes}
    is_refused(partial(modelopt_convert.verify, out, base=pair.base), modules)


def forged(text: str, pair: Pair, planted: Planted) -> str:
    """The record with other digests; the rest claims what it claimed."""
    for name, tensor in planted.changes.items():
        old, new = (xxhash.xxh3_128_hexdigest(raw_bytes(one)) for one in (pair.tensors[name], tensor))
        assert json.loads(text)["digests"]["tensors"][name] == old
        text = text.replace(f'"{name}": "{old}"', f'"{name}": "{new}"')
        assert json.loads(text)["digests"]["tensors"][name] == new
    return text


def family_cases() -> list[tuple[str, str, str, int]]:
    """Every kind of damage in every family at three places; or, in every run, one kind in each."""
    found = []
    for family, algorithm in itertools.product(WITHOUT_PRESET, FAULTS):
        kinds, seeds = [*FAULTS[algorithm]], range(3)
        if len(SEEDS) == 1:
            kinds, seeds = [random.Random(f"{family} {algorithm}").choice(kinds)], range(1)
        found += [(family, algorithm, fault, seed) for fault in kinds for seed in seeds]
    return found


@pytest.fixture(scope="module")
def grown(families: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Pair]:
    """A family's real export and its base, with two modules so large that every fault can be planted."""

    @functools.cache
    def made(family: str, algorithm: str) -> Pair:
        folder = tmp_path_factory.mktemp(f"{family}-{algorithm}")
        source, original = (families / family / name / "transformer" for name in (algorithm, "base"))
        tensors, base = load(source), load(original)
        packed = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
        large = [name for name in packed if re.search(r"\.ff|\.mlp", name)][-2:]
        for seed, (module, rows_columns) in enumerate(zip(large, SHAPES.values(), strict=False)):
            one = weight("outlier_channels", *rows_columns, seed)
            base[f"{module}.weight"] = one.to(base[f"{module}.weight"].dtype)
            made = max_calibration(one) if algorithm == "nvfp4" else fp8_bf16(one)
            roles = ("weight", "weight_scale", "weight_scale_2")
            tensors |= {f"{module}.{role}": tensor for role, tensor in zip(roles, made, strict=False)}
            if f"{module}.bias" in tensors:
                tensors[f"{module}.bias"] = base[f"{module}.bias"] = torch.zeros(len(one), dtype=torch.bfloat16)
        write_transformer(folder / "base", base, config_of(original))
        export = write_transformer(folder / "export", tensors, config_of(source))
        weights = {module: base[f"{module}.weight"].bfloat16() for module in packed}
        more = {"allow_known_broken": bool(allowed(family, algorithm))}
        pair = Pair(algorithm, export, folder / "base", tensors, weights, more)
        assert pair.build(export, folder / "out").exit_code == 0
        return pair

    return made


@pytest.mark.parametrize(("family", "algorithm", "fault", "seed"), family_cases())
def test_every_family_is_guarded(
    family: str,
    algorithm: str,
    fault: str,
    seed: int,
    grown: Callable[[str, str], Pair],
    tmp_path: Path,
    room: Path,
) -> None:
    """By the build, and by verify without a record."""
    pair = grown(family, algorithm)
    module, planted = pair.plant(fault, seed)
    modules = {name.rpartition(".")[0] for name in planted.changes}
    message = is_refused(partial(pair.build, damaged_export(pair, planted, tmp_path / "export"), room / "out"), modules)
    assert entries(room) == {} and module in modules
    assert names_place(message, FAULTS[algorithm][fault], planted), (planted.first, message)
    out = Path(shutil.copytree(pair.base.parent / "out", tmp_path / "out"))
    overwrite(out / SHARD, planted.changes)
    (out / "mopt.json").unlink()
    message = is_refused(partial(modelopt_convert.verify, out, base=pair.base), modules)
    assert names_place(message, FAULTS[algorithm][fault], planted), (planted.first, message)
