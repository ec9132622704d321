"""The record of a checkpoint, ``mopt.json``: schema ``mopt.manifest/1``, keys only added. No torch.

``docs/schemas`` is made from these models. A record has the keys of its command: where a key is not always there, its
description says where it is.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$", description="xxh3-128, in hex")]


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class ToolRecord(_Open):
    """What wrote the checkpoint."""

    name: Literal["mopt"]
    version: str


class PresetRecord(_Open):
    """The preset of a build."""

    name: str
    sha256: str = Field(description="of its text and of the texts that it extends")
    chosen_by: Literal["config.json"] | None = Field(
        default=None, description="where neither the user nor the base's repo named the model: siblings may fit as well"
    )


class SourceRecord(_Open):
    """What identifies an input."""

    headers_sha256: str = Field(description="of the header of every shard, with its name")
    content_xxh3_128: Digest | None = Field(
        default=None, description="of a base all of whose bytes were read: of its headers and all of its tensors"
    )
    origin: str | None = Field(
        default=None,
        description="how repo and commit are known: `hub`; `cache`, which is the Hub's; `download`, made by "
        "`hf download --local-dir`; `folder`: nothing tells them",
    )
    repo: str | None = Field(default=None, description="of an input on the Hub or in its cache")
    commit: str | None = Field(default=None, description="of an input on the Hub, in its cache, or downloaded")
    checked: str | None = Field(
        default=None, description="of a download: the files whose bytes are those of the commit, by their etag"
    )


class RuleRecord(_Open):
    """What one pattern matched and replaced."""

    kind: str
    pattern: str
    matched: int
    replaced: int
    bytes: int


class ModuleRecord(_Open):
    """The proof of one packed module; counts that are zero are left out."""

    verdict: str
    compared: Literal["all", "sampled rows"] | None = None
    codes: int
    codes_equal: int
    codes_tied: int = Field(default=0, description="the other neighbour of a value midway between two codes")
    zero_signs: int = Field(default=0, description="zeros of the other sign")
    scales: int = Field(default=0, description="block scales compared with those of max calibration")
    scales_equal: int = 0
    scales_tied: int = 0
    scales_idle: int = Field(default=0, description="other scales over codes that are all zero")
    blocks_above: int = Field(default=0, description="blocks with a larger error than under max calibration")
    relative_error: float | None = Field(default=None, description="of sampled rows, rounded to four digits")
    rule: str | None = Field(default=None, description="how the codes are made of the base, where that is known")


class ProofRecord(_Open):
    """The proof of what was written, or of the export that it was made from."""

    method: str
    status: Literal["pass", "fail", "not proven", "quantized here"]
    words: str = Field(description="`proven`, or why not")
    max_error: float = Field(description="the limit of the relative error that was used")
    counts: dict[str, int] = Field(description="modules by verdict")
    fused_scales_differ: list[str] = Field(description="fused groups whose members have scales of their own")
    unlike_base: list[str] = Field(description="biases and unquantized tensors that are not the base's; accepted so")
    modules: dict[str, ModuleRecord]


class DigestsRecord(_Open):
    """What ``mopt verify`` compares the bytes with."""

    algorithm: Literal["xxh3-128"]
    tensors: dict[str, Digest]
    files: dict[str, Digest] = Field(description="the small files beside the record")
    headers: Digest | None = Field(
        default=None, description="of names, dtypes, shapes and header metadata; where there are shards"
    )
    shards: list[str] = Field(
        default_factory=list, description="the names of the weight files; of a record by an older mopt not there"
    )


class Record(_Open):
    """Everything that a checkpoint says of itself; a pipeline folder has a record above those of its transformers."""

    schema_: Literal["mopt.manifest/1"] = Field(alias="schema")
    tool: ToolRecord
    command: str
    digests: DigestsRecord
    preset: PresetRecord | None = Field(default=None, description="of builds; null for `--preset none`")
    base_repo: str | None = Field(default=None, description="of builds: as observed; null where nothing tells it")
    base_claimed: str | None = Field(default=None, description="of builds with `--base-model`: what the author says")
    sources: dict[str, SourceRecord] = Field(default_factory=dict, description="of a transformer: its inputs by role")
    rules: list[RuleRecord] = Field(default_factory=list, description="of the transformer of a build")
    converted: dict[str, Any] | None = Field(
        default=None, description="of `convert`: names, files, header metadata, config and small tensors of the source"
    )
    counts: dict[str, dict[str, int]] = Field(
        default_factory=dict, description="of a transformer: for each input, how many tensors met each fate"
    )
    proof: ProofRecord | None = Field(default=None, description="of a built transformer, and of a proven rewrite")
    dequantized: list[str] = Field(
        default_factory=list, description="of a built transformer: modules kept in BF16 by way of their scale"
    )
    calibration: Literal["none"] | dict[str, Any] | None = Field(
        default=None,
        description="where mopt quantized the base itself: none, or what `mopt calibrate` said of the input scales",
    )
    components: list[str] = Field(default_factory=list, description="of a pipeline: its transformers")
    parts: dict[str, Digest] = Field(default_factory=dict, description="of a pipeline: the record of each")
