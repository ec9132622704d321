"""A storage is one class and its prefix: whatever commands do with an input goes through them."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import run_mopt, tree

from modelopt_convert.checkpoint import location
from modelopt_convert.checkpoint.local_file import LocalFile
from modelopt_convert.checkpoint.location import is_far, local_path, parse_location
from modelopt_convert.checkpoint.pipeline import resolve_component
from modelopt_convert.run.errors import InputError

PREFIX = "shelf://"


class ShelfFile(LocalFile):
    """A file that is not on disk, for all that is known of it; it counts what is read."""

    def read_into(self, offset: int, target: memoryview) -> None:
        self.fetched += len(target)
        self.requests += 1
        super().read_into(offset, target)

    def read(self, offset: int, num_bytes: int) -> bytes:
        self.fetched += num_bytes
        self.requests += 1
        return super().read(offset, num_bytes)

    def fileno(self) -> None:  # type: ignore[override]
        return None

    def unfetched(self, ranges: object) -> int:
        return sum(end - begin for begin, end in ranges)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ShelfPath:
    """A place in a storage that mopt does not know."""

    place: Path

    def __truediv__(self, name: str) -> "ShelfPath":
        return ShelfPath(self.place / name)

    def __str__(self) -> str:
        return f"{PREFIX}{self.place.name}"

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def parent(self) -> "ShelfPath":
        return ShelfPath(self.place.parent)

    def is_file(self) -> bool:
        return self.place.is_file()

    def is_dir(self) -> bool:
        return self.place.is_dir()

    def names(self) -> list[str]:
        return sorted(path.name for path in self.place.iterdir())

    def open(self) -> ShelfFile:
        return ShelfFile(self.place.parent, self.place.name, where=str(self))

    def fetch(self) -> Path:
        return self.place

    def identity(self) -> dict[str, str]:
        return {"origin": "shelf", "repo": "the shelf", "commit": "the third board"}

    def download_command(self) -> str:
        return "take it down"

    def absence(self) -> str | None:
        return "the light is off"


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(text: str, *, download: bool) -> ShelfPath:
        assert not download
        return ShelfPath(Path(text.removeprefix(PREFIX)))

    monkeypatch.setattr(location, "_STORAGES", {**location._STORAGES, PREFIX: parse})


@pytest.mark.usefixtures("shelf")
def test_a_storage_needs_a_class_and_a_prefix(nvfp4: Path, base: Path, built_nvfp4: Path, tmp_path: Path) -> None:
    words = ["--preset", "flux1-dev", "--export", f"{PREFIX}{nvfp4}", "--base", f"{PREFIX}{base}"]
    outcome = run_mopt("build-nvfp4", *words, "--output", tmp_path / "out")
    assert outcome.exit_code == 0, outcome.stderr
    far, near = tree(tmp_path / "out"), tree(built_nvfp4)
    assert far.keys() == near.keys() and {name for name in near if near[name] != far[name]} <= {
        "mopt.json",
        "README.md",
    }
    source = json.loads((tmp_path / "out" / "mopt.json").read_text())["sources"]["base"]
    assert {key: source[key] for key in ("origin", "repo", "commit")} == ShelfPath(base).identity()
    assert outcome.report is not None
    spent = outcome.report["network"]["base"]
    assert (spent["repo"], spent["commit"]) == ("the shelf", "the third board") and spent["fetched_bytes"] > 0
    for command in (["inspect"], ["verify", "--device", "cpu"]):
        assert run_mopt(*command, f"{PREFIX}{tmp_path / 'out'}").exit_code == 0


@pytest.mark.usefixtures("shelf")
def test_refusals_ask_the_storage(base: Path, tmp_path: Path) -> None:
    words = ["build-nvfp4", "--preset", "flux1-dev", "--base", f"{PREFIX}{base}", "--output"]
    assert "take it down" in run_mopt(*words, tmp_path / "out", "--executor", "ray").stderr
    assert "the light is off" in run_mopt("inspect", f"{PREFIX}{tmp_path}").stderr
    assert run_mopt(*words, f"{PREFIX}{tmp_path}").exit_code == 2


@pytest.mark.parametrize(
    ("place", "far"),
    [("hf://a/b", True), (Path("hf://a/b"), True), ("hf/a", False), ("hf:a/b", False), ("", False), ("/hf://a", False)],
)
def test_a_prefix_names_a_storage(place: str | Path, far: bool) -> None:
    assert is_far(place) == far


def test_a_place_without_a_prefix_is_on_disk() -> None:
    assert parse_location("some/where") == Path("some/where") == local_path(Path("some/where"))
    assert local_path(parse_location("hf://some/where")) is None


@pytest.mark.parametrize(
    ("address", "what", "hint"),
    [
        ("https://civitai.com/models/1?modelVersionId=2", "a web address", "download"),
        ("file:///data/flux", "a file: address", "/data/flux"),
        ("C:\\models\\flux", "a Windows path", "/mnt/c"),
        ("s3://bucket/flux", "an address (s3:)", "on disk"),
    ],
)
def test_what_is_no_path_is_named_and_shown_as_written(address: str, what: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_component(parse_location(address), what="source")
    assert address in caught.value.message and what in caught.value.message and hint in caught.value.hint
