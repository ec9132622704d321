"""What of an answer is taken for a path, a length or a digest, and what of a range for the range that was asked for."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loopback_hub import LoopbackHub

from modelopt_convert.checkpoint.hub import answers, watch
from modelopt_convert.checkpoint.hub.answers import HubFile, find_commit, list_files
from modelopt_convert.checkpoint.hub.range_source import Outage, RangeSource, _length
from modelopt_convert.run.errors import InputError, RemoteError

SHA1, SHA256 = "a" * 40, "b" * 64


def entry(**changes: Any) -> dict[str, Any]:
    return {"type": "file", "path": "x/y.bin", "size": 3, "oid": SHA1} | changes


def listed(monkeypatch: pytest.MonkeyPatch, *entries: Any) -> dict[str, HubFile]:
    monkeypatch.setattr(answers, "_get", lambda *_: (list(entries), None))
    return list_files("alice/base", SHA1)


NO_PATHS = (
    "", "/x", "x/", "a//b", ".", "..", "a/./b", "a/../b", "../x", "a\\b", "a\0b", "a\nb", "a\x7fb", "a\x85b",
    "a\ud800b", "a\u2028b", "a\u2029b", "x" * 256, "ä" * 128, "a/" * 500 + "b", None, 3, True, [], {},
)  # fmt: skip


@pytest.mark.parametrize("path", NO_PATHS, ids=ascii)
def test_what_is_no_plain_path(path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("file", "directory"):
        with pytest.raises(InputError, match="the list of files, entry 1, path: expected") as caught:
            listed(monkeypatch, entry(path=path, type=kind))
        assert caught.value.code == "hub.answer" and caught.value.message.isprintable()


@pytest.mark.parametrize("path", ["a", ".gitattributes", "a/..b/c..", "ä ß/漢", "x" * 255, "a/" * 499 + "b"])
def test_what_is_a_plain_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(listed(monkeypatch, entry(path=path), {"type": "directory", "path": "d"})) == {path}


@pytest.mark.parametrize(
    "changes",
    [{"size": one} for one in (None, True, -1, 1.0, "3", 1 << 45, 10**300, [])]
    + [{"oid": one} for one in (None, "", "a" * 39, "a" * 41, "A" * 40, "a" * 40 + "\n", "../" + "a" * 40, 3, [])]
    + [{"lfs": one} for one in ("x", [], {"size": 3}, {"oid": SHA256})]
    + [{"lfs": {"oid": oid, "size": size}} for oid, size in ((SHA256, 4), (SHA1, 3), (SHA256, True), ("../x", 3))]
    + [{"xetHash": one} for one in ("", "x", 3, [], SHA256 + "0", "../x")]
    + [{"type": one} for one in (None, "", "link", "filex", 3, [])],
    ids=str,
)  # fmt: skip
def test_what_is_no_size_digest_or_type(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"expected .*, found ") as caught:
        listed(monkeypatch, entry(**changes))
    assert caught.value.code == "hub.answer" and caught.value.hint


def test_what_is_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    large = entry(path="large", lfs={"oid": SHA256, "size": 3, "pointerSize": 120}, xetHash="c" * 64)
    found = listed(monkeypatch, entry(), large)
    assert found == {"x/y.bin": HubFile(3, SHA1, None), "large": HubFile(3, SHA256, "c" * 64)}


def test_paths_that_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = {"type": "directory", "path": "x"}
    for entries in ((entry(), entry()), (folder, folder), (folder, entry(path="x")), (entry(path="x"), entry())):
        with pytest.raises(InputError):
            listed(monkeypatch, *entries)
    monkeypatch.setattr(answers, "_MAX_FILES", 2)
    with pytest.raises(InputError, match="at most 2 paths"):
        listed(monkeypatch, *(entry(path=name) for name in "abc"))


@pytest.mark.parametrize("content", [None, 3, "x", {}, {"a": 1}])
def test_what_is_no_list(content: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_get", lambda *_: (content, None))
    with pytest.raises(InputError, match="expected a list"):
        list_files("alice/base", SHA1)


@pytest.mark.parametrize("sha", [None, "", "main", "a" * 41, "A" * 40, SHA1 + "\n", f"../{SHA1}", 3, [SHA1]])
def test_what_is_no_commit(sha: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_get", lambda *_: ({"sha": sha}, None))
    with pytest.raises(InputError, match="expected 40 hex digits"):
        find_commit("alice/base", None)


@given(st.integers(0, 3), st.integers(1, 4), st.integers(0, 3), st.integers(0, 9), st.sampled_from((100, 100, 10)))
def test_what_is_taken_for_a_range(begin: int, size: int, first: int, last: int, total: int) -> None:
    """Of a file of 100 bytes."""
    length = _length(f"bytes {first}-{last}/{total}", begin, begin + size, 100)
    if total == 100 and first == begin and begin <= last < begin + size:
        assert length == last + 1 - begin
    else:
        assert length is None


@pytest.mark.parametrize(
    "said", ["", "bytes", "bytes */100", f"bytes 0-{'9' * 5000}/100", "bytes 0-٣/100", "bytes 0-3/x"]
)
def test_what_is_no_range(said: str) -> None:
    assert _length(said, 0, 10, 100) is None
    assert _length("bytes 0-3/*", 0, 10, 100) == 4


class Streamed(RangeSource):
    """Says what a test gives it."""

    chunks: Iterator[bytes]

    def _stream(self, begin: int, end: int) -> Iterator[bytes]:
        yield from self.chunks


def source(chunks: Iterator[bytes]) -> RangeSource:
    found = Streamed("alice/base", SHA1, "x", HubFile(100, SHA1, None), Outage())
    found.chunks = chunks
    return found


def test_bytes_too_many(hub: LoopbackHub) -> None:
    with pytest.raises(RemoteError, match="got more bytes") as caught:
        source(iter([b"123", b"456"])).fetch(0, 5, lambda _chunk, _at: None, threading.Event())
    assert caught.value.code == "hub.range"


@pytest.mark.usefixtures("no_pauses")
def test_a_trickle_is_no_progress(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it goes on: bytes that come too slowly do not begin the time anew."""
    for name, value in (("STALL_S", 0.3), ("PATIENCE_S", 1.0), ("LEAST_BYTES", 4)):
        monkeypatch.setattr(watch, name, value)
    monkeypatch.setattr(watch.watched, "__kwdefaults__", watch.watched.__kwdefaults__ | {"least": 1000})
    waits = threading.Event()

    def trickle() -> Iterator[bytes]:
        for _ in range(100):
            waits.wait(0.02)
            yield b"x"

    class Anew(Streamed):
        def _stream(self, begin: int, end: int) -> Iterator[bytes]:
            yield from trickle()

    slow = Anew("alice/base", SHA1, "x", HubFile(400, SHA1, None), Outage())
    came: list[int] = []
    with pytest.raises(watch.StalledError, match="in 0 s"):
        slow.fetch(0, 400, lambda _chunk, at: came.append(at), threading.Event())
    assert len(came) < 150


def test_once_a_repo_is_lost_nobody_waits_again(hub: LoopbackHub) -> None:
    outage = Outage(ConnectionError("gone"))
    with pytest.raises(ConnectionError, match="gone"):
        Streamed("alice/base", SHA1, "x", HubFile(9, SHA1, None), outage).fetch(
            0, 9, lambda _chunk, _at: None, threading.Event()
        )
