"""The digest of a checkpoint's content: of every byte, however the bytes are read; of fewer there is none."""

import random
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import save_file
from support import content_of

from modelopt_convert.checkpoint.reader import CheckpointReader

FILES = ("a.safetensors", "b.safetensors")
SIZES = (0, 1, 7, 300, 4096, 70_001)
Read = Callable[[CheckpointReader, str, random.Random], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files; tensors of no byte, of a few and of many. Never write there."""
    room = tmp_path_factory.mktemp("content")
    generator = torch.Generator().manual_seed(0)
    index = []
    for file in FILES:
        tensors = {
            f"{file[0]}.{size}": torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
            for size in SIZES
        }
        save_file(tensors, room / file, {"format": "pt"})
        index += [f'"{name}": "{file}"' for name in tensors]
    (room / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{", ".join(index)}}}}}')
    (room / "config.json").write_text("{}")
    return room


def whole(reader: CheckpointReader, name: str, _source: random.Random) -> None:
    reader.read(name)


def buffered(reader: CheckpointReader, name: str, source: random.Random) -> None:
    for _ in reader.buffered(name, source.randint(1000, 5000)):
        pass


def chunked(reader: CheckpointReader, name: str, source: random.Random) -> None:
    for _ in reader.chunks(name, source.randint(1000, 5000)):
        pass


def rows_first(reader: CheckpointReader, name: str, source: random.Random) -> None:
    """Some rows, the first among them, as the proof looks; a reading that is given up; and then all of it."""
    size = reader.tensors[name].num_bytes
    width = max(1, size // 50)
    rows = sorted({0, *(source.randrange(max(1, size // width)) for _ in range(5))})
    reader.read_rows(name, rows if size else [], width)
    for number, _ in enumerate(reader.buffered(name, 1500)):
        if number == 3:
            break
    buffered(reader, name, source)


def at_random(reader: CheckpointReader, name: str, source: random.Random) -> None:
    """Pieces that overlap, out of order, until each byte has come in its turn."""
    size = end = reader.tensors[name].num_bytes
    while end:
        begin = source.randrange(size)
        reader.read_range(name, begin, source.randint(0, size - begin))
        begin = source.randint(max(0, size - end - 100), size - end)
        count = source.randint(1, size - begin)
        target = bytearray(count)
        reader.read_into(name, begin, memoryview(target))
        end = min(end, size - begin - count)


@pytest.mark.parametrize("read", [whole, buffered, chunked, rows_first, at_random])
def test_it_is_the_same_however_the_bytes_are_read(read: Read, folder: Path) -> None:
    for seed in range(20):
        source = random.Random(seed)
        with CheckpointReader(folder) as reader:
            reader.digest_content()
            names = source.sample(sorted(reader.tensors), len(reader.tensors))
            for number, name in enumerate(names):
                left = [one for one in names[number:] if reader.tensors[one].num_bytes]
                assert ("content_xxh3_128" in reader.identity()) is not bool(left)
                read(reader, name, source)
            assert reader.identity()["content_xxh3_128"] == content_of(folder), seed


def test_several_threads_may_read_one_tensor(folder: Path) -> None:
    with CheckpointReader(folder) as reader:
        reader.digest_content()
        work = [lambda name=name, seed=seed: at_random(reader, name, random.Random(seed))
                for name in reader.tensors for seed in range(3)]  # fmt: skip
        threads = [Thread(target=one) for one in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert reader.identity()["content_xxh3_128"] == content_of(folder)


def test_where_one_byte_was_not_read_there_is_none(folder: Path) -> None:
    for seed in range(50):
        source = random.Random(seed)
        with CheckpointReader(folder) as reader:
            reader.digest_content()
            names = [name for name, info in reader.tensors.items() if info.num_bytes > 1]
            chosen = source.choice(names)
            for name in reader.tensors:
                if name != chosen:
                    reader.read(name)
            size = reader.tensors[chosen].num_bytes
            hole = source.randrange(size)
            reader.read_range(chosen, 0, hole)
            reader.read_range(chosen, hole + 1, size - hole - 1)
            assert "content_xxh3_128" not in reader.identity(), (seed, chosen, hole)


def test_nothing_is_digested_unless_it_is_asked_for(folder: Path) -> None:
    with CheckpointReader(folder) as reader:
        for name in reader.tensors:
            reader.read(name)
        assert reader.identity().keys() == {"headers_sha256", "origin"}


def content(folder: Path) -> str:
    with CheckpointReader(folder) as reader:
        reader.digest_content()
        for name in reader.tensors:
            reader.read(name)
        return reader.identity()["content_xxh3_128"]


def test_no_byte_can_be_another_and_no_file_have_another_name(folder: Path, tmp_path: Path) -> None:
    """Also of the header, where metadata are."""
    wanted = content(folder)
    for seed in range(60):
        source, other = random.Random(seed), tmp_path / str(seed)
        other.mkdir()
        for path in folder.iterdir():
            (other / path.name).write_bytes(path.read_bytes())
        raw = bytearray((other / FILES[seed % 2]).read_bytes())
        length = 8 + int.from_bytes(raw[:8], "little")
        at = source.randrange(length, len(raw)) if seed % 3 else raw.index(b"pt", 8)
        raw[at] ^= 1 << source.randrange(8) if seed % 3 else 1
        (other / FILES[seed % 2]).write_bytes(raw)
        assert content(other) != wanted, (seed, at)
    one = tmp_path / "alone"
    one.mkdir()
    (one / "config.json").write_text("{}")
    found = set()
    for name in FILES:
        path = one / name
        path.write_bytes((folder / FILES[0]).read_bytes())
        found.add(content(one))
        path.unlink()
    assert len(found) == 2
