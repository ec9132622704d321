"""Builds end with verify: what is wrong is thrown away, what the GPU cannot say costs nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import build, run_mopt
from verify_support import PACKED, statuses


@pytest.mark.parametrize("how", ["auto", "cpu", "off"])
@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
def test_builds_end_with_it(how: str, algorithm: str, exports: Path, base: Path, tmp_path: Path) -> None:
    command = {"nvfp4": "build-nvfp4", "fp8": "convert-fp8"}[algorithm]
    where = ("--export", exports / algorithm, "--base", base, "--output", tmp_path / "out")
    outcome = run_mopt(command, "--preset", "flux1-dev", *where, "--verify", how)
    assert outcome.exit_code == 0 and outcome.report is not None
    checks = {check["name"]: check for check in outcome.report["checks"]}
    if how == "off":
        assert outcome.report["verify"] is None and "verify" not in checks
    else:
        assert checks["verify"]["status"] == "pass" and statuses(outcome)["L2"] == "pass"
        assert how == "auto" or checks["verify"]["gpu_parity"] == "not run"


def test_a_build_that_wrote_something_else_is_thrown_away(
    exports: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory or a disk that changes a byte on the way: here the writer does."""
    from modelopt_convert.stage.shard_writer import ShardWriter

    write = ShardWriter.write

    def damaged(self: ShardWriter, name: str, chunks: Any, extent: object) -> None:
        pieces = [bytearray(piece) for piece in chunks]
        if name == f"{PACKED}.weight":
            pieces[0][0] ^= 0x08
        write(self, name, pieces)

    monkeypatch.setattr(ShardWriter, "write", damaged)
    outcome = build(exports / "nvfp4", base, tmp_path / "out")
    assert outcome.exit_code == 1 and outcome.error_code == "check.verify" and PACKED in outcome.message
    assert list(tmp_path.iterdir()) == []


def test_a_broken_gpu_does_not_cost_the_build(
    exports: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelopt_convert.verification import subject, transformer

    real = transformer.verify_opened

    def out_of_memory(*arguments: Any, **more: Any) -> Any:
        if arguments[3].type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*arguments, **more)

    monkeypatch.setattr(subject, "device_of", lambda wanted: torch.device(wanted or "cuda"))
    monkeypatch.setattr(transformer, "verify_opened", out_of_memory)
    outcome = build(exports / "nvfp4", base, tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None
    warnings = {warning["code"]: warning["message"] for warning in outcome.report["warnings"]}
    assert "not run" in warnings["verify.gpu_parity"] and "out of memory" in warnings["verify.gpu_parity"]
    assert outcome.report["checks"][-1]["gpu_parity"] == "not run"
