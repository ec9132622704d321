"""What the tests of push share: running it, and changing a checkpoint."""

import json
import shutil
import struct
from pathlib import Path

from loopback_hub import LoopbackHub
from support import Outcome, run_mopt

REPO = "alice/flux"


def push(checkpoint: Path, repo_id: str = REPO, *more: str) -> Outcome:
    """Run ``mopt push``."""
    return run_mopt("push", checkpoint, repo_id, *more)


def copy_of(folder: Path, target: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(folder, target))


def unrecorded(folder: Path, target: Path) -> Path:
    """A copy as another tool might have written it: without card and record."""
    copied = copy_of(folder, target)
    for name in ("mopt.json", "README.md"):
        (copied / name).unlink()
    return copied


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a checkpoint."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def published(hub: LoopbackHub, repo_id: str = REPO, revision: str = "main") -> dict[str, bytes]:
    """Every file of a repo but the one that the Hub makes itself."""
    return {path: data for path, data in hub.tree(repo_id, revision).items() if path != ".gitattributes"}


def touched_nothing(hub: LoopbackHub) -> bool:
    """Whether nothing was created, sent or committed."""
    asked = [one for one in hub.log if one.method in ("POST", "PUT", "DELETE") and "validate-yaml" not in one.path]
    return asked == []


def lfs_bytes(hub: LoopbackHub) -> int:
    """Bytes of LFS objects that were received."""
    return sum(one.num_in for one in hub.requests("/_lfs/", "PUT"))


def flip_bias(folder: Path, shard: int = 0) -> str:
    """Change the last bit of one bias, which is right as far as structure goes; the shard's name."""
    for path in sorted(folder.glob("*.safetensors"))[shard:]:
        raw = bytearray(path.read_bytes())
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        for name, one in header.items():
            if name.endswith(".bias") and one["dtype"] == "BF16":
                raw[8 + length + one["data_offsets"][0]] ^= 1
                path.write_bytes(raw)
                return path.name
    raise AssertionError("no bias")


def shards_of(folder: Path) -> list[Path]:
    """Its shards, sorted."""
    return sorted(folder.glob("*.safetensors"))
