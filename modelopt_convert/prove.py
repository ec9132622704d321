"""Read what the proof needs from export and base, and judge every module; the only reader of scale values.

Three passes, cheapest cause first: scales that no kernel could use, unquantized tensors that are not the base's, and
then the packed weights themselves.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modelopt_convert.checkpoint import CheckpointReader
from modelopt_convert.dialects.modelopt import BLOCK_SIZE, Nvfp4Module, is_quantizer_state
from modelopt_convert.dtypes import DTYPE_BITS, HALF_AND_FLOAT
from modelopt_convert.errors import InputError
from modelopt_convert.layout import telling_rows
from modelopt_convert.patterns import module_of
from modelopt_convert.plan import CHUNK_BYTES, SAMPLED_ROWS, BuildPlan
from modelopt_convert.proof import Judgement, judge, sample_rows
from modelopt_convert.transforms.raw import cast_paths, equal_after, from_bytes
from modelopt_convert.transforms.scales import scale_readings

METHOD = "base rows quantized again with the export's scales; modelopt NVFP4QTensor arithmetic"
# Half of the smallest positive E4M3 value, 2^-9: scales up to here round to zero (ties go to the even code).
_UNDERFLOW = 2.0**-10
_SHOWN = 10
# Beside the spread rows, those in which the two orders of the scales differ most.
TELLING_ROWS = 4


@dataclass(slots=True)
class Proof:
    """What was proven of an export against its base.

    Attributes:
        modules: The judgement on every packed module, by name.
        unproven: Modules about to be replaced whose scales are unusable, with the reason.
        fused_differ: Fused groups whose global scales differ, with the largest ratio; runtimes rebase them.
        biases_differ: Packed modules whose bias is not the base's.
    """

    modules: dict[str, Judgement] = field(default_factory=dict)
    unproven: dict[str, str] = field(default_factory=dict)
    fused_differ: dict[str, float] = field(default_factory=dict)
    biases_differ: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every module that could be judged is what the base says it should be."""
        return not self.failing()

    def failing(self) -> list[str]:
        """Modules that are not."""
        return [name for name, one in self.modules.items() if not one.passed]

    def swapped(self) -> set[str]:
        """Modules whose high nibble holds the even column."""
        return {name for name, one in self.modules.items() if one.reading.nibbles == "high"}

    def swizzled(self) -> set[str]:
        """Modules whose scales lie in the 128x4 order."""
        return {name for name, one in self.modules.items() if one.reading.scales == "128x4"}


def prove(
    export: CheckpointReader,
    base: CheckpointReader,
    plan: BuildPlan,
    *,
    max_error: float,
    advance: Callable[[int], None],
) -> Proof:
    """Run all three passes.

    Args:
        export: The opened export.
        base: The opened base.
        plan: What will be built from them.
        max_error: Limit of the relative error where codes are not reproduced.
        advance: Called with the number of bytes just read.

    Returns:
        The proof; it may have failed for a reason that cannot be named (``Proof.passed``).

    Raises:
        InputError: A cause that can be named: unusable scales, another base, another layout.
    """
    proof = Proof()
    with torch.inference_mode():
        scales = _check_scales(export, base, plan, proof, advance)
        _note_fused(plan, scales, proof)
        _check_unquantized(export, base, plan, proof, advance)
        common = _common_dtype(export)
        for module in plan.modules.values():
            if module.name in proof.unproven:
                continue
            proof.modules[module.name] = _judge_module(export, base, module, common, scales, max_error)
            advance((SAMPLED_ROWS + 2) * module.columns * 3)
    _name_the_cause(export, proof)
    return proof


def proof_bytes(plan: BuildPlan) -> int:
    """Bytes that ``prove`` will report as read, for the progress bar."""
    scales = sum(module.rows * module.columns // BLOCK_SIZE for module in plan.modules.values())
    rows = sum((SAMPLED_ROWS + 2) * module.columns * 3 for module in plan.modules.values())
    names = (*plan.must_equal, *plan.may_differ)
    return scales + rows + sum(plan.steps[name].output.num_bytes for name in names)


def _check_scales(
    export: CheckpointReader,
    base: CheckpointReader,
    plan: BuildPlan,
    proof: Proof,
    advance: Callable[[int], None],
) -> dict[str, float]:
    """Global scales by module, after all scales were looked at; modules to be replaced are excused."""
    found: dict[str, float] = {}
    for module in plan.modules.values():
        try:
            if module.fault is not None:
                raise module.fault
            found[module.name] = _usable_scales(export, base, module)
        except InputError as error:
            if module.name not in plan.replaced:
                raise
            proof.unproven[module.name] = error.message
        advance(module.rows * module.columns // BLOCK_SIZE)
    return found


def _usable_scales(export: CheckpointReader, base: CheckpointReader, module: Nvfp4Module) -> float:
    """The global scale, after all scales of the module were looked at.

    A float: many small tensors held between large ones keep the allocator from giving memory back.
    """
    hint = f"the module was all zero or never calibrated; export again, or --keep-bf16 '{module.name}'"

    def refuse(role: str, expected: str, found: str) -> InputError:
        info = module.scales[role]
        where = str(export.path / info.file)
        return InputError(
            f"{where}: tensor {info.name!r}: expected {expected}, found {found}",
            code="export.unusable_scale",
            path=where,
            hint=hint,
        )

    for role in ("weight_scale_2", "input_scale"):
        value = float(_load(export, module.scales[role].name))
        if not 0.0 < value < float("inf"):
            raise refuse(role, "a finite positive scale", str(value))
    raw = _load(export, module.scales["weight_scale"].name).view(torch.uint8)
    broken = int(((raw & 0x7F) == 0x7F).count_nonzero())
    if broken:
        raise refuse("weight_scale", "finite scales", f"{broken} NaN of {raw.numel()}")
    negative = int((raw > 0x80).count_nonzero())
    if negative:
        raise refuse("weight_scale", "positive scales", f"{negative} negative of {raw.numel()}")
    global_scale = _load(export, module.scales["weight_scale_2"].name)
    if bool(((raw & 0x7F) == 0).any()):
        # In padding zeros are right; where they are is known for each reading. One reading must explain them all.
        counts = [
            _unexplained_zeros(base, module, (reading.view(torch.uint8) & 0x7F) == 0, global_scale)
            for reading in _scale_readings(export, module).values()
        ]
        if min(counts):
            raise refuse("weight_scale", "non-zero scales", f"{min(counts)} zero that no underflow explains")
    return float(global_scale)


def _unexplained_zeros(base: CheckpointReader, module: Nvfp4Module, zero: Tensor, global_scale: Tensor) -> int:
    """Zero block scales over base blocks that are too large to have underflowed (ModelOpt up to 0.44 had no clamp)."""
    count = 0
    for row in zero.any(dim=1).nonzero().flatten().tolist():
        block_amax = _load_row(base, module, row).to(torch.float32).abs().view(-1, BLOCK_SIZE).amax(dim=1)
        count += int((zero[row] & (block_amax / (6.0 * global_scale) > _UNDERFLOW)).sum())
    return count


def _note_fused(plan: BuildPlan, scales: dict[str, float], proof: Proof) -> None:
    for group in plan.fused:
        values = [scales[name] for name in group if name in scales]
        if len(set(values)) > 1:
            proof.fused_differ[", ".join(group)] = max(values) / min(values)


def _check_unquantized(
    export: CheckpointReader,
    base: CheckpointReader,
    plan: BuildPlan,
    proof: Proof,
    advance: Callable[[int], None],
) -> None:
    differing: list[str] = []
    for name in plan.must_equal:
        if not _same_up_to_cast(export, base, name):
            differing.append(name)
        advance(plan.steps[name].output.num_bytes)
    for name in plan.may_differ:
        if not _same_up_to_cast(export, base, name):
            proof.biases_differ.append(module_of(name))
        advance(plan.steps[name].output.num_bytes)
    if differing:
        names = ", ".join(differing[:_SHOWN])
        where = str(export.path / export.tensors[differing[0]].file)
        raise InputError(
            f"{where}: {len(differing)} unquantized tensors differ from the base by more than a dtype cast: {names}",
            code="export.other_base",
            path=where,
            hint="the export was made from another base (a merged LoRA, another revision) or changed by AWQ or "
            "SVDQuant; give that base, or export again",
        )


def _same_up_to_cast(export: CheckpointReader, base: CheckpointReader, name: str) -> bool:
    source, target = base.tensors[name].dtype, export.tensors[name].dtype
    if source == target:
        pairs = zip(export.chunks(name, CHUNK_BYTES), base.chunks(name, CHUNK_BYTES), strict=True)
        if all(left == right for left, right in pairs):
            return True
    if not {source, target} <= HALF_AND_FLOAT:
        return False
    paths = cast_paths(source, target)
    source_bytes, target_bytes = DTYPE_BITS[source] // 8, DTYPE_BITS[target] // 8
    num_elements = CHUNK_BYTES // 4
    left_chunks = base.chunks(name, num_elements * source_bytes)
    for left, right in zip(left_chunks, export.chunks(name, num_elements * target_bytes), strict=True):
        values, wanted = from_bytes(left, source, (-1,)), from_bytes(right, target, (-1,))
        paths = [path for path in paths if equal_after(values, path, wanted)]
        if not paths:
            return False
    return True


def _judge_module(
    export: CheckpointReader,
    base: CheckpointReader,
    module: Nvfp4Module,
    common_dtype: str,
    scales: dict[str, float],
    max_error: float,
) -> Judgement:
    readings = _scale_readings(export, module)
    rows = sorted({*sample_rows(module.rows, SAMPLED_ROWS), *telling_rows(readings, TELLING_ROWS)})
    half, stored = module.columns // 2, module.weight.shape[1]
    packed = b"".join(export.read_range(module.weight.name, row * stored, half) for row in rows)
    base_rows = torch.stack([_load_row(base, module, row) for row in rows])
    if not bool(base_rows.to(torch.float32).isfinite().all()):
        info = base.tensors[module.weight.name]
        raise InputError(
            f"{base.path / info.file}: tensor {info.name!r}: expected finite weights, found NaN or infinity",
            code="base.not_finite",
            path=str(base.path / info.file),
            hint="the base is damaged; download it again",
        )
    # ModelOpt divides the weight in the dtype the model was loaded in: that of the bias, or what most tensors have.
    loaded = module.bias.dtype if module.bias is not None else common_dtype
    dtypes = dict.fromkeys((loaded, base.tensors[module.weight.name].dtype, "BF16"))
    return judge(
        [_cast(base_rows, dtype) for dtype in dtypes if dtype in HALF_AND_FLOAT],
        from_bytes(packed, "U8", (len(rows), half)),
        readings,
        rows,
        torch.tensor(scales[module.name], dtype=torch.float32),
        max_error=max_error,
    )


def _scale_readings(export: CheckpointReader, module: Nvfp4Module) -> dict[str, Tensor]:
    info = module.scales["weight_scale"]
    readings = scale_readings(_load(export, info.name), module.rows, module.columns // BLOCK_SIZE)
    if not readings:
        raise InputError(
            f"{export.path / info.file}: tensor {info.name!r}: expected zeros in the padding, found scales",
            code="export.padding",
            path=str(export.path / info.file),
            hint="the scales are not those of this weight; export again",
        )
    return readings


def _cast(rows: Tensor, dtype: str) -> Tensor:
    return rows.to({"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype])


def _load(reader: CheckpointReader, name: str) -> Tensor:
    info = reader.tensors[name]
    return from_bytes(reader.read(name), info.dtype, info.shape)


def _load_row(base: CheckpointReader, module: Nvfp4Module, row: int) -> Tensor:
    info = base.tensors[module.weight.name]
    row_bytes = module.columns * DTYPE_BITS[info.dtype] // 8
    return from_bytes(base.read_range(info.name, row * row_bytes, row_bytes), info.dtype, (module.columns,))


def _common_dtype(export: CheckpointReader) -> str:
    """The dtype in which the exporter held most of the model: that of most unquantized tensors."""
    counts = Counter(
        info.dtype
        for name, info in export.tensors.items()
        if name.rpartition(".")[2] in ("weight", "bias")
        and info.dtype in HALF_AND_FLOAT
        and not is_quantizer_state(name)
    )
    return max(counts, key=lambda dtype: (counts[dtype], dtype), default="BF16")


def _name_the_cause(export: CheckpointReader, proof: Proof) -> None:
    """Turn a failure whose cause is plain into an error that says it."""
    reciprocal = [name for name, one in proof.modules.items() if one.passed and one.reading.global_scale == "divide"]
    if reciprocal:
        raise InputError(
            f"{export.path}: {len(reciprocal)} of {len(proof.modules)} modules have a reciprocal weight_scale_2 "
            f"({reciprocal[0]} first)",
            code="export.layout",
            path=str(export.path),
            hint="that is compressed-tensors' convention under ModelOpt's names; export again with ModelOpt",
        )
    unclear = [name for name, one in proof.modules.items() if one.verdict == "undetermined"]
    if unclear:
        raise InputError(
            f"{export.path}: {len(unclear)} of {len(proof.modules)} modules fit the base in several layouts "
            f"({unclear[0]} first), the nearest being: {proof.modules[unclear[0]].reading.in_words()}",
            code="export.layout",
            path=str(export.path),
            hint="what cannot be proven is not converted; export again without post-processing",
        )
    unrelated = [name for name, one in proof.modules.items() if one.verdict == "unrelated"]
    if 2 * len(unrelated) > len(proof.modules):
        raise InputError(
            f"{export.path}: {len(unrelated)} of {len(proof.modules)} packed weights have nothing in common with the "
            f"base ({unrelated[0]} first)",
            code="export.other_base",
            path=str(export.path),
            hint="give the base that the export was made from",
        )
