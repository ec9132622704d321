"""What is kept of tensors that are written."""

from pathlib import Path

import pytest
from support import build

from modelopt_convert.write import stream
from modelopt_convert.write.pieces import Made


def test_block_scales_are_not_kept_once_they_are_written(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a whole model are hundreds of megabytes."""
    made: list[Made] = []

    class Watched(stream._Writing):
        def __call__(self, name: str, stopped: stream.Event) -> Made:
            made.append(super().__call__(name, stopped))
            return made[-1]

    monkeypatch.setattr(stream, "_Writing", Watched)
    assert build(None, exports / "base", tmp_path / "out").exit_code == 0
    assert made and not any(one.block_scales for one in made)
