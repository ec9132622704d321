"""Decide what the output will be, from headers and configs alone. Pure: opens no file, imports no torch.

Every tensor of both inputs gets a fate here, and every output tensor a step with its exact size, so that a dry run, the
free-space check and the report all speak of the same plan.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from modelopt_convert.checkpoint.calibration import StoredCompensation
from modelopt_convert.checkpoint.header import METADATA, TensorInfo, TensorSpec
from modelopt_convert.checkpoint.location import Location
from modelopt_convert.checkpoint.names import module_of, natural_key
from modelopt_convert.dialects.modelopt.dialect import FILE_PATTERN
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.format import Format, Weights
from modelopt_convert.formats.layout import CANONICAL, Layout
from modelopt_convert.preset.preset import KeepRules, Preset

Op = Literal[
    "copy",
    "copy_e4m3",
    "cast_bf16",
    "repack",
    "reorder_scales",
    "swizzle_scales",
    "quantize_fp8",
    "dequantize_fp8",
    "quantize_nvfp4",
    "block_scales",
    "write_scale",
]
Origin = Literal["export", "base"]
Kind = Literal["structural", "quality", "user"]


class Source(Protocol):
    """What the plan needs of an opened checkpoint."""

    @property
    def path(self) -> Location:
        """What was opened, for messages: a folder, or one file."""

    @property
    def folder(self) -> Location:
        """The folder that its files lie in."""

    @property
    def config_place(self) -> str:
        """Where its config is, for messages."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Its config.json."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some tensors of a source."""

    path: Location
    folder: Location
    config_place: str
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    """One output tensor: where its bytes come from and what happens to them.

    Attributes:
        output: Name, dtype and shape to be written.
        origin: Which input is read.
        op: ``copy`` moves bytes untouched, ``copy_e4m3`` too but refuses NaN codes; ``cast_bf16`` rounds F32 or F16 to
            BF16; ``repack`` brings packed codes and ``reorder_scales`` block scales into the canonical layout;
            ``swizzle_scales`` brings scales into the 128x4 order; ``quantize_fp8`` and ``dequantize_fp8`` go between
            a weight and its E4M3 codes; ``quantize_nvfp4`` makes E2M1 codes of a weight, and ``block_scales`` are those
            that come with them; ``write_scale`` writes ``value``.
        value: The scale of the weight, where it does not lie beside it.
        quotient: FP8 of a base: the weight is rounded to BF16, as it is loaded for ModelOpt, and divided in this dtype;
            without it, in the dtype that it is stored in.
        layout: How the input lies, for ``repack`` and ``reorder_scales``.
        weights: How scales and codes are chosen, for ``quantize_nvfp4``.
        importance: How much an error in each input channel weighs, float32 [K], for ``sweep-weighted`` and ``gptq``.
        compensation: Where a calibration has what GPTQ needs, for ``gptq``.
    """

    output: TensorSpec
    origin: Origin
    op: Op
    value: float | None = None
    quotient: Literal["BF16", "F32"] | None = None
    layout: Layout = CANONICAL
    weights: Weights = "max"
    importance: bytes = field(default=b"", repr=False)
    compensation: StoredCompensation | None = None

    def laid(self, stored: tuple[int, ...], layout: Layout) -> "Step":
        """The step that brings codes, or block scales, of this shape and layout into the canonical one."""
        is_weight = self.output.dtype == "U8"
        moved = layout.nibbles == "high" if is_weight else layout.scales == "128x4"
        if not moved and stored == self.output.shape:
            return self
        return replace(self, op="repack" if is_weight else "reorder_scales", layout=layout)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output file, with its header metadata."""

    file: str
    tensors: tuple[TensorSpec, ...]
    metadata: Mapping[str, str] = field(default_factory=lambda: METADATA)


@dataclass(frozen=True, slots=True)
class RuleCount:
    """What one pattern did.

    Attributes:
        kind: ``structural`` or ``quality`` from the preset, ``user`` from ``--keep-bf16``.
        pattern: The glob.
        matched: Modules it matches, quantized or not.
        replaced: Packed modules that it, first of all rules, puts back to BF16.
        num_bytes: Size of all it matches in the output, in bytes.
    """

    kind: Kind
    pattern: str
    matched: int
    replaced: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Keeps:
    """What shall stay in BF16: a preset's sets, and the user's own patterns."""

    preset: Preset | None
    rules: KeepRules | None
    user_patterns: tuple[str, ...]

    def patterns(self) -> Iterator[tuple[Kind, str]]:
        """Every pattern with its kind, in the order in which they are applied."""
        if self.rules is not None:
            yield from (("structural", pattern) for pattern in self.rules.structural)
            yield from (("quality", pattern) for pattern in self.rules.quality)
        yield from (("user", pattern) for pattern in self.user_patterns)


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """Everything that ``build-nvfp4`` or ``convert-fp8`` will do.

    Attributes:
        format: What is written.
        steps: One per output tensor, by name.
        shards: The output files.
        config: The output's config.json.
        modules: Quantized modules of the export, by name; without one, the modules of the base that could be.
        replaced: Those of them that become, or stay, BF16, with the pattern that says so.
        fused: Groups of packed modules that the runtime may fuse.
        shared: Groups of packed modules to be quantized here with one global scale.
        weights: How the scales of what is quantized here are chosen; None where an export has them.
        rules: What each pattern did.
        ledger: For each input, every tensor's fate in a few words.
        dequantized: Quantized modules that become BF16 by way of their scale, since there is no base.
        must_equal: Tensors whose export value must be the base's, up to a dtype cast.
        may_differ: Biases of packed modules, kept from the export, compared with the base for a warning only.
        warnings: What the user should know, as (code, message).
    """

    format: Format
    steps: Mapping[str, Step]
    shards: tuple[ShardPlan, ...]
    config: Mapping[str, Any]
    modules: Mapping[str, PackedModule]
    replaced: Mapping[str, str]
    fused: tuple[tuple[str, ...], ...]
    rules: tuple[RuleCount, ...]
    ledger: Mapping[str, Mapping[str, str]]
    dequantized: tuple[str, ...]
    must_equal: tuple[str, ...]
    may_differ: tuple[str, ...]
    warnings: tuple[tuple[str, str], ...] = field(default=())
    shared: tuple[tuple[str, ...], ...] = field(default=())
    weights: Weights | None = None

    @property
    def total_bytes(self) -> int:
        """Tensor bytes of the output, without headers and small files."""
        return sum(step.output.num_bytes for step in self.steps.values())

    @property
    def packed(self) -> list[str]:
        """Modules that are quantized in the output, in name order."""
        return sorted((name for name in self.modules if name not in self.replaced), key=natural_key)

    def with_layouts(self, layouts: Mapping[str, Layout]) -> "BuildPlan":
        """The plan once the proof has found how packed modules lie.

        Args:
            layouts: By module; a module without one lies as its format always does.
        """
        steps = dict(self.steps)
        fates = dict(self.ledger["export"])
        for module in (self.modules[name] for name in self.packed if name in layouts):
            weight, scale, layout = module.weight, module.scales["weight_scale"], layouts[module.name]
            swapped, swizzled = layout.nibbles == "high", layout.scales == "128x4"
            padded = weight.shape != steps[weight.name].output.shape
            steps[weight.name] = steps[weight.name].laid(weight.shape, layout)
            if swapped or padded:
                done = ["nibbles swapped"] * swapped + ["padding cut"] * padded
                fates[weight.name] = f"kept: {' and '.join(done)}"
            padded = scale.shape != steps[scale.name].output.shape
            steps[scale.name] = steps[scale.name].laid(scale.shape, layout)
            if swizzled or padded:
                fates[scale.name] = "kept: 128x4 to row-major" if swizzled else "kept: padding cut"
        return replace(self, steps=steps, ledger={**self.ledger, "export": fates})

    def with_scales(self, scales: Mapping[str, float]) -> "BuildPlan":
        """The plan once the base was measured.

        Args:
            scales: The tensor scale of every packed module.
        """
        steps = dict(self.steps)
        for module, scale in scales.items():
            for role in ("weight", self.format.tensor_scale):
                steps[f"{module}.{role}"] = replace(steps[f"{module}.{role}"], value=scale)
        return replace(self, steps=steps)

    def index(self) -> dict[str, Any] | None:
        """The index of a sharded output, as diffusers writes it; None for a single file."""
        if len(self.shards) == 1:
            return None
        weight_map = {spec.name: shard.file for shard in self.shards for spec in shard.tensors}
        return {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def split_into_shards(specs: Sequence[TensorSpec], max_shard_size: int) -> tuple[ShardPlan, ...]:
    """Split as huggingface_hub does for diffusers, with diffusers' file names, but never within a module.

    SGLang 0.5.23 looks for a packed weight's block scale in the same file; where it is not, the module counts as
    unquantized (``_build_nvfp4_config_from_safetensors_files``).
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    modules: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        modules.setdefault(module_of(spec.name), []).append(spec)
    split = split_state_dict_into_shards_factory(
        modules,
        get_storage_size=lambda members: sum(spec.num_bytes for spec in members),
        filename_pattern=FILE_PATTERN,
        max_shard_size=max_shard_size,
    )
    return tuple(
        ShardPlan(file, tuple(spec for module in names for spec in modules[module]))
        for file, names in split.filename_to_tensors.items()
    )
