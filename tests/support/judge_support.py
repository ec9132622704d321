"""One packed weight in two small checkpoints on disk, and the judgement on it."""

from collections.abc import Mapping
from pathlib import Path
from threading import Event

import torch
from faults import QUANTIZATION_CONFIG, write_transformer
from producers import Packed, PackedFp8
from torch import Tensor

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.packed import Evidence, find_packed
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.formats.tensor_bytes import TORCH_DTYPES
from modelopt_convert.proof.due import Due
from modelopt_convert.proof.export import judge_module
from modelopt_convert.proof.judgement import Judgement, format_proof, with_shared_scales

MAX_ERROR = 0.15
NAME = "lin"
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def judged(
    folder: Path,
    base: Tensor,
    made: Packed | PackedFp8,
    *,
    casts: tuple[str, ...] = (),
    max_error: float = MAX_ERROR,
    rows: list[int] | None = None,
) -> Judgement:
    """The judgement on one module by itself, before its scale is compared with other modules'.

    Args:
        folder: Gets both checkpoints, beside those of earlier calls.
        base: [N, K].
        made: What is compared with it.
        casts: What the exporter may have quantized from; the base's dtype unless given.
        max_error: Of a weight that is near.
        rows: The rows to compare; all unless given.
    """
    number = len(list(folder.iterdir())) if folder.exists() else 0
    return judged_as_stored(folder / f"{number}", base, made, casts, max_error=max_error, rows=rows, checks=False)


def judged_as_stored(
    folder: Path,
    base: Tensor,
    made: Packed | PackedFp8,
    casts: tuple[str, ...] = (),
    *,
    max_error: float = MAX_ERROR,
    rows: list[int] | None = None,
    checks: bool = True,
) -> Judgement:
    """The same of bytes in any layout, with all scales looked at first, as a build does.

    Args:
        folder: A new one.
        base: [N, K].
        made: As it is stored; the scales may be in any shape.
        casts: As those of ``judged``.
        max_error: Likewise.
        rows: Likewise.
        checks: Whether scales are looked at.

    Raises:
        InputError: A scale that cannot be used, or one that no reading explains.
    """
    algorithm = "nvfp4" if isinstance(made, Packed) else "fp8"
    roles = ("weight", "weight_scale", "weight_scale_2")
    stored = {f"{NAME}.{role}": tensor.contiguous() for role, tensor in zip(roles, made, strict=False)}
    stored[f"{NAME}.input_scale"] = torch.tensor(0.01)
    config = {"_class_name": "Small", "quantization_config": QUANTIZATION_CONFIG | {"quant_algo": algorithm.upper()}}
    export = write_transformer(folder / "export", stored, config)
    other = write_transformer(folder / "base", {f"{NAME}.weight": base.contiguous()}, {"_class_name": "Small"})
    with CheckpointReader(export) as mine, CheckpointReader(other) as theirs:
        shapes = Evidence(true_shapes={f"{NAME}.weight": tuple(base.shape)})
        module = find_packed(mine.tensors, FORMATS[algorithm], shapes, path=str(export)).or_raise()[NAME]
        scale = format_proof(algorithm).scale(mine, theirs, module, {}) if checks else float(made[-1])
        due = Due(algorithm, module, casts or (_NAMES[base.dtype],), scale, max_error)
        return judge_module(mine, theirs, due, Event(), rows)


def together(algorithm: str, modules: Mapping[str, Judgement]) -> dict[str, str]:
    """The verdicts once the scales of all modules are known."""
    return {name: one.verdict for name, one in with_shared_scales(format_proof(algorithm), modules).items()}
