"""What a conversion did, as a part of its report. No torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)


class ConvertedModules(_Model):
    """How many quantized modules of SOURCE met each fate; a module is counted once."""

    exact: int = Field(default=0, description="codes, block scales and scales have the same bits")
    rounded_global: int = Field(default=0, description="the target stores another number, which gives back a near one")
    bf16: int = Field(default=0, description="written in BF16")
    rebased: int = Field(default=0, description="their scales were brought to one, and rounded again")
    requantized: int = Field(default=0, description="quantized again, from the base or from what they decode to")


class LossyModule(_Model):
    """A module whose weight is not the one of SOURCE."""

    module: str = Field(description="in the target's naming")
    members: list[str] = Field(description="its quantized modules in diffusers' naming")
    how: Literal["bf16", "rebased", "requantized"] = Field(description="what became of it")
    why: str = Field(description="the reason, in words")
    rel_error: float | None = Field(
        description="Frobenius norm of the change by that of the weight as SOURCE decodes; null: not known yet"
    )
    at_most: bool = Field(description="whether that is a proven bound, and was not measured")


class ChangedTensor(_Model):
    """A tensor that the target has no place for, or another value of."""

    tensor: str = Field(description="in diffusers' naming")
    why: str = Field(description="the reason, in words")


class Comparison(_Model):
    """What was read back and compared with SOURCE, all bytes of every tensor."""

    compared: int = Field(default=0, description="tensors that were compared")
    equal: int = Field(default=0, description="tensors that were equal, or changed as announced")
    bytes: int = Field(default=0, description="bytes of these tensors")


class ConvertReport(_Model):
    """What a conversion did."""

    schema_: Literal["mopt.convert/1"] = Field(
        default="mopt.convert/1", alias="schema", description="the version of these fields"
    )
    from_: str = Field(alias="from", description="the dialect of SOURCE")
    to: str = Field(description="the dialect that was written")
    family: str = Field(description="whose key map was used, or the class where none is known")
    naming: str = Field(description="the names of SOURCE: diffusers, comfyui, original or nunchaku")
    prefix: str = Field(description="in front of each of its names")
    evidence: list[str] = Field(description="what gave dialect and family away")
    modules: ConvertedModules = Field(description="what became of the quantized modules, in numbers")
    lossy: list[LossyModule] = Field(description="modules whose weights are not those of SOURCE")
    dropped: list[ChangedTensor] = Field(description="the target has no place for these")
    changed: list[ChangedTensor] = Field(description="scales that are written with another value")
    proof: Comparison = Field(description="what was read back")
    restored: list[str] = Field(description="tensors taken from the record of SOURCE, which the file alone cannot give")
    restorable: bool = Field(description="whether converting OUTPUT back gives every tensor of SOURCE")
    not_restorable: list[str] = Field(description="tensors of SOURCE that converting back does not give")
    proven: bool = Field(description="whether SOURCE was proven against a base by all bytes, and OUTPUT is equal to it")
    verifiable: bool = Field(default=True, description="whether mopt verify reads the format of OUTPUT")
    words: str = Field(description="proven, or why not")
