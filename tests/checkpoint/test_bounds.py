"""Inputs of any size in bounded memory: each is used or refused, and none ends in a bug, a signal or the OOM killer.

Every run has 8 GB of address space, of which torch takes half. Seconds and peaks are noted, not asserted.
"""

from pathlib import Path

import pytest
from faults import QUANTIZATION_CONFIG, SHARD
from figures import note
from limited import Ended, run_limited, sparse_checkpoint
from root import LONG

from modelopt_convert.checkpoint.header import MAX_HEADER_BYTES, TensorSpec

TENSORS = 1_000_000 if LONG else 100_000
PEAK_MB = 4000
CLASS: dict[str, object] = {"_class_name": "AnyTransformer2DModel"}
QUANTIZED = CLASS | {"quantization_config": QUANTIZATION_CONFIG}


def bounded(what: str, *arguments: str | Path, codes: set[int], **limits: tuple[int, int]) -> Ended:
    """Run it, note what it took, and require one of these exit codes."""
    ended = run_limited(*arguments, **limits)  # type: ignore[arg-type]
    print(what, arguments[0], ended.error_code, ended.figures)
    note(5, bound=what, command=str(arguments[0]), code=ended.error_code or "", **ended.figures)
    assert ended.exit_code in codes, ended.stderr[-2000:] + ended.stdout[-2000:]
    assert 0 < ended.peak_mb < PEAK_MB
    return ended


# (what, the header's beginning, what fills it, its end, the code)
JUNK = [
    ("33 million empty lists", b'{"a":[', b"[],", b"[]]}", "header.too_large"),
    ("50 million numbers", b'{"a":[', b"0,", b"0]}", "header.too_large"),
    ("14 million objects", b'{"a":[', b'{"a":1},', b"0]}", "header.too_large"),
    ("NUL bytes", b"{", b"\0", b"}", "header.json"),
    ("one string", b'{"a":"', b"x", b'"}', "header.entry"),
    ("one number", b'{"a":', b"9", b"}", "header.json"),
]


@pytest.mark.parametrize(("what", "head", "filling", "tail", "code"), JUNK, ids=[row[0] for row in JUNK])
def test_a_header_of_100_mb(what: str, head: bytes, filling: bytes, tail: bytes, code: str, tmp_path: Path) -> None:
    count = (MAX_HEADER_BYTES - len(head) - len(tail)) // len(filling)
    header = (head + filling * count + tail).ljust(MAX_HEADER_BYTES)
    path = tmp_path / SHARD
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    ended = bounded(f"100 MB header: {what}", "inspect", path, codes={3})
    assert ended.error_code == code
    assert len(ended.message) < 1000


def test_a_claimed_header_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / SHARD
    path.write_bytes(MAX_HEADER_BYTES.to_bytes(8, "little") + b"{}")
    assert bounded("100 MB header: claimed", "inspect", path, codes={3}).error_code == "header.truncated"


def many(count: int, *, packed: bool) -> list[TensorSpec]:
    """So many tensors of BF16 or, in place of one of them, a packed module."""
    specs = [TensorSpec(f"blocks.{number}.norm.weight", "BF16", (1,)) for number in range(count)]
    return [*specs, *(module(32, 32) if packed else [TensorSpec("lin.weight", "BF16", (32, 32))])]


def module(rows: int, columns: int) -> list[TensorSpec]:
    """A packed module."""
    return [
        TensorSpec("lin.weight", "U8", (rows, columns // 2)),
        TensorSpec("lin.weight_scale", "F8_E4M3", (rows, columns // 16)),
        TensorSpec("lin.weight_scale_2", "F32", ()),
        TensorSpec("lin.input_scale", "F32", ()),
    ]


def test_many_tensors(tmp_path: Path) -> None:
    export = sparse_checkpoint(tmp_path / "export", {SHARD: many(TENSORS, packed=True)}, QUANTIZED)
    base = sparse_checkpoint(tmp_path / "base", {SHARD: many(TENSORS, packed=False)}, CLASS)
    what = f"{TENSORS} tensors"
    bounded(what, "inspect", export, codes={0})
    bounded(what, "verify", export, codes={1, 6})  # scales of zero
    building = ("build-nvfp4", "--preset", "none", "--export", export, "--base", base, "--output", tmp_path / "out")
    bounded(what, *building, "--dry-run", codes={0})


def test_an_index_of_many_entries(tmp_path: Path) -> None:
    specs = many(100_000, packed=False)
    shards = {f"model-{part}.safetensors": specs[part::4] for part in range(4)}
    folder = sparse_checkpoint(tmp_path / "checkpoint", shards, CLASS)
    bounded("index of 100,000 entries", "inspect", folder, codes={0})
    (folder / "model-3.safetensors").unlink()
    assert (
        bounded("index of 100,000 entries, one file gone", "inspect", folder, codes={3}).error_code == "input.missing"
    )


def test_an_index_of_many_files(tmp_path: Path) -> None:
    """Under a habitual limit of 1,024 open files they are opened all the same; under a real one the hint is right."""
    names = [f"model-{part:05d}.safetensors" for part in range(1500)]
    shards = {name: [TensorSpec(f"{name}.weight", "BF16", (1,))] for name in names}
    folder = sparse_checkpoint(tmp_path / "checkpoint", shards, CLASS)
    bounded("index of 1,500 files", "inspect", folder, codes={0}, files=(1024, 4096))
    ended = bounded("index of 1,500 files, 1,024 allowed", "inspect", folder, codes={3}, files=(1024, 1024))
    assert ended.error_code == "input.too_many_files"
    assert "ulimit -n" in ended.message and "download" not in ended.message


HUGE_ROWS, HUGE_COLUMNS = 1 << 18, 1 << 19
# (what, tensors of an export of 100 GB and more, those of its base)
HUGE = {
    "a huge plain tensor": (
        [*module(32, 32), TensorSpec("table.weight", "BF16", (50_000, 1_000_000))],
        [TensorSpec("lin.weight", "BF16", (32, 32)), TensorSpec("table.weight", "BF16", (50_000, 1_000_000))],
    ),
    "huge scales": (
        module(HUGE_ROWS, 3 * HUGE_COLUMNS),
        [TensorSpec("lin.weight", "BF16", (HUGE_ROWS, 3 * HUGE_COLUMNS))],
    ),
    "8 billion rows": (
        [*module(1 << 33, 32), TensorSpec("lin.bias", "BF16", (1 << 33,))],
        [TensorSpec("lin.weight", "BF16", (1 << 33, 32)), TensorSpec("lin.bias", "BF16", (1 << 33,))],
    ),
    "rows of 50 GB": (
        [*module(2, 1 << 36), TensorSpec("lin.bias", "BF16", (2,))],
        [TensorSpec("lin.weight", "BF16", (2, 1 << 36)), TensorSpec("lin.bias", "BF16", (2,))],
    ),
}


@pytest.mark.parametrize("what", HUGE)
def test_a_sparse_shard_of_100_gb(what: str, tmp_path: Path) -> None:
    export = sparse_checkpoint(tmp_path / "export", {SHARD: HUGE[what][0]}, QUANTIZED)
    base = sparse_checkpoint(tmp_path / "base", {SHARD: HUGE[what][1]}, CLASS)
    assert (export / SHARD).stat().st_size > 60e9 and (base / SHARD).stat().st_size > 100e9
    said = {
        ended.error_code
        for ended in (
            bounded(what, "inspect", export, codes={0, 3}),
            bounded(what, "inspect", export, "--base", base, "--all", codes={0, 3}),
            bounded(what, "verify", export, codes={1, 3}),  # without the base, or 100 GB of zeros would be compared
        )
    }
    assert said <= {None, "input.too_large", "check.verify"}, said
    assert ("input.too_large" in said) is (what != "a huge plain tensor")
    output = tmp_path / "out"
    building = ("build-nvfp4", "--preset", "none", "--export", export, "--base", base, "--output", output)
    bounded(what, *building, "--dry-run", codes={0, 3, 5})
    assert not output.exists()
