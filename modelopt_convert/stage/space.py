"""How much room files take on disk, to the byte. No torch."""

from collections.abc import Iterable

from modelopt_convert.checkpoint.header import build_header
from modelopt_convert.plan.plan import ShardPlan

DIGEST = "0" * 32  # in place of a digest, which is as long
_BLOCK = 4096  # file systems give out whole blocks


def disk_bytes(file_sizes: Iterable[int], folders: int = 1) -> int:
    """What files of these sizes, and the folders they lie in, take of a disk."""
    return sum(-(-size // _BLOCK) * _BLOCK for size in file_sizes) + folders * _BLOCK


def shard_sizes(shards: Iterable[ShardPlan]) -> list[int]:
    """The size of each file, header included."""
    return [build_header(shard.tensors, shard.metadata)[2] for shard in shards]
