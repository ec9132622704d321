"""What a verify tells of how far it is: a bar that is full too soon says nothing of the time that is left."""

from pathlib import Path

import modelopt_convert as mopt


class Phases:
    """Progress that remembers: what was to be done, and what was done, by phase."""

    def __init__(self) -> None:
        self.total: dict[str, int] = {}
        self.done: dict[str, int] = {}

    def begin(self, what: str, total_bytes: int) -> None:
        self.total[what], self.done[what] = total_bytes, 0

    def advance(self, num_bytes: int) -> None:
        self.done[list(self.done)[-1]] += num_bytes

    def announce(self, text: str) -> None: ...

    def detail(self, text: str) -> None: ...


def test_with_a_base_every_phase_ends_where_it_said(built: Path, base: Path) -> None:
    told = Phases()
    mopt.verify(built, base=base, workers=1, progress=told)
    assert told.total.keys() == {"read", "decode"} and told.done["decode"] == told.total["decode"]
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in built.glob("*.safetensors"))
    assert told.done["read"] == told.total["read"] - headers


def test_a_phase_that_does_nothing_is_not_begun(exports: Path, base: Path, tmp_path: Path) -> None:
    """The bytes that a build has just written are not read once more."""
    told = Phases()
    mopt.build_nvfp4(
        preset="flux1-dev", export=exports / "nvfp4", base=base, output=tmp_path / "out", workers=1, progress=told
    )
    assert "decode" in told.total and "read" not in told.total
