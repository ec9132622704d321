"""Where a folder on disk comes from is read off what the Hub's client left there, and not assumed."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from loopback_hub import LoopbackHub

from modelopt_convert.checkpoint.hub import provenance
from modelopt_convert.checkpoint.reader import CheckpointReader

REPO = "some/model"
CONFIG = "config.json"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
METADATA = ".cache/huggingface/download"


@pytest.fixture
def downloaded(hub: LoopbackHub, base: Path, tmp_path: Path) -> Path:
    """A pipeline that ``hf download --local-dir`` fetched."""
    hub.seed(REPO, base)
    snapshot_download(REPO, local_dir=tmp_path / "local")
    return tmp_path / "local"


def origin(folder: Path) -> dict[str, str]:
    with CheckpointReader(folder) as reader:
        found = reader.identity()
    assert found.pop("headers_sha256")
    return found


def test_a_snapshot_in_a_cache_says_repo_and_commit(hub: LoopbackHub, base: Path, tmp_path: Path) -> None:
    hub.seed(REPO, base)
    snapshot = Path(snapshot_download(REPO))
    told = {"origin": "cache", "repo": REPO, "commit": hub.head(REPO)}
    assert origin(snapshot / "transformer") == told
    (tmp_path / "link").symlink_to(snapshot)
    assert origin(tmp_path / "link" / "transformer") == told


def test_a_repo_without_an_organization(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models--gpt2" / "snapshots" / ("a" * 40)
    shutil.copytree(base / "transformer", folder)
    assert origin(folder) == {"origin": "cache", "repo": "gpt2", "commit": "a" * 40}
    folder.rename(folder.with_name("main"))
    assert origin(folder.with_name("main")) == {"origin": "folder"}


def test_a_download_says_its_commit_and_what_was_checked(hub: LoopbackHub, downloaded: Path) -> None:
    told = {"origin": "download", "commit": hub.head(REPO), "checked": f"{CONFIG}, {INDEX}"}
    assert origin(downloaded / "transformer") == told
    # The same files as a repo of their own, with a config.json in LFS.
    moved = downloaded.with_name("moved")
    (downloaded / "transformer").rename(moved)
    (downloaded / METADATA / "transformer").rename(downloaded / METADATA / "elsewhere")
    assert origin(moved) == {"origin": "folder"}
    (moved / METADATA).parent.mkdir(parents=True)
    (downloaded / METADATA / "elsewhere").rename(moved / METADATA)
    say_sha256(moved / METADATA, hashlib.sha256((moved / CONFIG).read_bytes()).hexdigest())
    assert origin(moved) == told


def change_config(folder: Path, metadata: Path) -> None:
    """The words are another, the time is not."""
    path = folder / CONFIG
    time = path.stat().st_mtime_ns
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": "mine"}))
    os.utime(path, ns=(time, time))


def touch_shard(folder: Path, metadata: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    later = shard.stat().st_mtime + 10
    os.utime(shard, (later, later))


def forget_shard(folder: Path, metadata: Path) -> None:
    next(metadata.glob("*.safetensors.metadata")).unlink()


def of_another_commit(folder: Path, metadata: Path) -> None:
    path = next(metadata.glob("*.safetensors.metadata"))
    path.write_text(f"{'0' * 40}\n{path.read_text().split(chr(10), 1)[1]}")


def no_commit(folder: Path, metadata: Path) -> None:
    for path in metadata.glob("*.metadata"):
        path.write_text(f"main\n{path.read_text().split(chr(10), 1)[1]}")


def garbage(folder: Path, metadata: Path) -> None:
    next(metadata.glob("config.json.metadata")).write_bytes(b"\xff" * 5000)


def endless(folder: Path, metadata: Path) -> None:
    """A link to a file that is plain to the system and never ends."""
    path = next(metadata.glob("config.json.metadata"))
    path.unlink()
    path.symlink_to("/proc/kmsg")


def a_pipe(folder: Path, metadata: Path) -> None:
    """Nobody writes to it: whoever opens it waits for ever."""
    path = next(metadata.glob("config.json.metadata"))
    path.unlink()
    os.mkfifo(path)


def no_time(folder: Path, metadata: Path) -> None:
    for path in metadata.glob("*.metadata"):
        path.write_text("\n".join([*path.read_text().split()[:2], "nan"]))


def say_sha256(metadata: Path, digest: str = "0" * 64) -> None:
    path = metadata / f"{CONFIG}.metadata"
    commit, _, time = path.read_text().split()
    path.write_text(f"{commit}\n{digest}\n{time}\n")


def sha256_of_other_bytes(folder: Path, metadata: Path) -> None:
    say_sha256(metadata)


FAULTS = [
    change_config,
    touch_shard,
    forget_shard,
    of_another_commit,
    no_commit,
    no_time,
    garbage,
    a_pipe,
    endless,
    sha256_of_other_bytes,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_download_that_is_not_whole_and_unchanged_says_nothing(downloaded: Path, fault: object) -> None:
    folder = downloaded / "transformer"
    fault(folder, downloaded / METADATA / "transformer")  # type: ignore[operator]
    assert origin(folder) == {"origin": "folder"}


def test_a_single_file_is_known_by_the_config_beside_it(downloaded: Path) -> None:
    file = next((downloaded / "transformer").glob("*.safetensors"))
    assert origin(file)["checked"] == "config.json"
    (downloaded / "transformer" / "config.json").unlink()
    assert origin(file) == {"origin": "folder"}


def test_a_local_folder_is_one(base: Path) -> None:
    assert origin(base / "transformer") == {"origin": "folder"}


def test_where_nobody_may_look_nothing_is_known(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder above, another user's ``.cache`` is closed."""
    is_dir = Path.is_dir

    def closed(path: Path) -> bool:
        if ".cache" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", closed)
    assert origin(base / "transformer") == {"origin": "folder"}


def test_a_path_as_long_as_paths_may_be(tmp_path: Path) -> None:
    folder = tmp_path
    while (rest := 4080 - len(str(folder))) > 1:
        folder /= "x" * min(rest - 1, 200)
        folder.mkdir()
    assert provenance.trace(folder, {}, []) == {"origin": "folder"}
