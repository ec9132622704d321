"""What several tests of mopt verify need."""

from pathlib import Path
from typing import Any

from support import Outcome, run_mopt

SHARD = "diffusion_pytorch_model.safetensors"
PACKED = "single_transformer_blocks.0.proj_out"


def verify(checkpoint: Path, *more: str | Path) -> Outcome:
    return run_mopt("verify", checkpoint, *more)


def found(outcome: Outcome) -> dict[str, Any]:
    """What the report says of the checkpoint."""
    assert outcome.report is not None, outcome.stderr
    return outcome.report["verify"]


def statuses(outcome: Outcome) -> dict[str, str]:
    return {level["level"]: level["status"] for level in found(outcome)["levels"]}
