"""The engines' views, module by module, against what their own loaders were seen to hold: docs/engines.json."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES
from kit import build, recorded
from sglang_names import spellings

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.engines.belief import Belief, mistaken
from modelopt_convert.engines.sglang import believe
from modelopt_convert.inspection.engines import beliefs, linears_of

PARTS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "add_kv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def names_of(entries: Iterable[str]) -> Iterator[str]:
    """The names that entries of the record stand for."""
    for entry in entries:
        head, brace, rest = entry.partition("{")
        numbers, _, tail = rest.partition("}")
        for span in numbers.split(",") if brace else ():
            first, _, last = span.partition("-")
            yield from (f"{head}{number}{tail}" for number in range(int(first), int(last or first) + 1))
        if not brace:
            yield entry


def on_disk(entries: Iterable[str], linears: Iterable[str], class_name: str) -> set[str]:
    """The Linears of a checkpoint that an engine's modules are made of."""
    found: dict[str, set[str]] = {}
    for linear in linears:
        for spelling in {*spellings(linear, class_name), re.sub(r"(to_out)\.0$", r"\1", linear)}:
            found.setdefault(spelling, set()).add(linear)
    disk = set()
    for name in names_of(entries):
        name = re.sub(r"ffn\.net_(0\.proj|2)$", r"ffn.net.\1", name)
        parent, _, leaf = name.rpartition(".")
        parts = [f"{parent}.{part}" for part in PARTS.get(leaf, ())] if name not in found else [name]
        disk |= set(chain.from_iterable(found.get(part, ()) for part in parts))
    return disk


def unequal(reader: CheckpointReader, members: Iterable[str]) -> bool:
    """Whether the parts of a fused module have global scales of their own."""
    return len({reader.read(f"{one}.weight_scale_2") for one in members}) > 1


@pytest.fixture(scope="module", params=[(family, form) for family in FAMILIES for form in ("nvfp4", "fp8")])
def checkpoint(
    request: pytest.FixtureRequest, families: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[CheckpointReader, dict[str, dict[str, Any]], set[str]]]:
    """A checkpoint, the record's rows of it by engine, and its packed modules."""
    family, form = request.param
    rows = {engine: row for (engine, *which), row in recorded().items() if which == [family, form]}
    with CheckpointReader(build(families, family, form, tmp_path_factory.mktemp("built"))) as reader:
        packed = {name.removesuffix(".weight_scale") for name in reader.tensors if name.endswith(".weight_scale")}
        yield reader, rows, packed


Checkpoint = tuple[CheckpointReader, dict[str, dict[str, Any]], set[str]]


def view(reader: CheckpointReader, engine: str) -> Belief:
    found = {one.engine.partition("@")[0]: one for one in beliefs(reader)}
    return found.get(engine) or believe(reader.tensors, reader.metadata, reader.config)


@pytest.mark.parametrize("engine", ["sglang", "vllm-omni"])
def test_the_view_takes_for_packed_what_the_engine_held_packed(checkpoint: Checkpoint, engine: str) -> None:
    reader, rows, _ = checkpoint
    belief, row = view(reader, engine), rows[engine]
    assert belief.engine == f"{engine}@{row['version']}"
    held = on_disk(row.get("takes", ()), linears_of(reader), reader.config["_class_name"])
    assert (row["outcome"] == "fails") != bool(held)
    assert not held or belief.modules == held


def test_vllm_omni_differs_where_the_view_says_so(checkpoint: Checkpoint) -> None:
    reader, rows, packed = checkpoint
    belief, row = view(reader, "vllm-omni"), rows["vllm-omni"]
    wrong = mistaken(belief, packed, [*linears_of(reader), *packed])
    if row["outcome"] == "fails":
        assert wrong and (belief.refuses or not belief.decodes)
        return
    weights = [name.removesuffix(".weight") for name in names_of(row.get("differ", ())) if name.endswith(".weight")]
    differ = on_disk(weights, linears_of(reader), reader.config["_class_name"]) & packed
    maximum = {one for group in belief.fused if not belief.decodes and unequal(reader, group) for one in group}
    assert differ == belief.unset | (packed - belief.modules) | maximum
    assert bool(wrong) == bool(belief.unset | (packed - belief.modules))


def test_sglang_casts_what_the_view_takes_for_packed(checkpoint: Checkpoint) -> None:
    reader, rows, packed = checkpoint
    row = rows["sglang"]
    if row["format"] == "fp8":
        belief = view(reader, "sglang")
        weights = [name.removesuffix(".weight") for name in names_of(row.get("differ", ()))]
        assert on_disk(weights, linears_of(reader), reader.config["_class_name"]) == belief.modules - packed
        assert bool(mistaken(belief, packed, linears_of(reader))) == (row["outcome"] == "wrong")
