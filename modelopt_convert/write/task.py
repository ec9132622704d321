"""One output shard as a task: plain data in, its line of the record out. No torch.

Nothing in a task depends on who does it, when, or how often: the bytes are the same.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.formats.finite import NotFinite
from modelopt_convert.plan.plan import ShardPlan, Step
from modelopt_convert.proof.due import Due

if TYPE_CHECKING:
    from modelopt_convert.formats.fp8.codes import Clipped
    from modelopt_convert.proof.judgement import Judgement


class StreamPlan(Protocol):
    """What streaming needs of a plan."""

    @property
    def shards(self) -> tuple[ShardPlan, ...]:
        """The output files."""

    @property
    def steps(self) -> Mapping[str, Step]:
        """One step per output tensor."""


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One file to be written.

    Attributes:
        file: Its name in the stage, with its folder.
        shard: Its tensors and header metadata.
        steps: How each of its tensors is made.
        due: Modules to be compared with the base before their weights are written, by name.
    """

    file: str
    shard: ShardPlan
    steps: Mapping[str, Step]
    due: Mapping[str, Due]

    @property
    def data_bytes(self) -> int:
        """Size of its tensors."""
        return sum(spec.num_bytes for spec in self.shard.tensors)


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What came of a task.

    Attributes:
        num_bytes: Size of the file.
        durable: Whether fsync worked.
        digests: xxh3-128 of each tensor by name.
        clipped: What a scale was too small for, by module; only where there was any.
        judgements: On modules that were due, by name.
        not_finite: NaN and infinity among what was written, by tensor; only where there was any.
        content: xxh3-128 of tensors of the base that were read whole in another process, by name.
    """

    num_bytes: int
    durable: bool
    digests: Mapping[str, str]
    clipped: Mapping[str, "Clipped"]
    judgements: Mapping[str, "Judgement"]
    not_finite: Mapping[str, NotFinite] = field(default_factory=dict)
    content: Mapping[str, str] = field(default_factory=dict)


def shard_tasks(plan: StreamPlan, due: Mapping[str, Due], folder: str) -> Iterator[ShardTask]:
    """A task for each file of a plan.

    Args:
        plan: What will be written.
        due: Modules to be compared while they are written, by name.
        folder: Of the stage, with its slash; empty for the stage itself.
    """
    for shard in plan.shards:
        steps = {spec.name: plan.steps[spec.name] for spec in shard.tensors}
        mine = {name: due[name] for name in dict.fromkeys(map(module_of, steps)) if name in due}
        yield ShardTask(f"{folder}{shard.file}", shard, steps, mine)
