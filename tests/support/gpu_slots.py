"""A slot of the GPU that works as late as it may."""

from collections.abc import Callable

from torch import Tensor

from modelopt_convert.write.gpu import Slot


class Late(Slot):
    """Does nothing before it is waited for: what was read over in the meantime, or taken too early, is wrong."""

    log: list[tuple[str, int]]
    _work: Callable[[Tensor, Slot], None]

    def launch(self, work: Callable[[Tensor, Slot], None], num_bytes: int) -> None:
        self._work, self.num_bytes = work, num_bytes
        self.log.append(("launch", id(self)))
        for room in (self.codes, self.scales, self.largest):
            room.numpy().fill(0xA5)

    def wait(self) -> None:
        self.log.append(("wait", id(self)))
        super().launch(self._work, self.num_bytes)
