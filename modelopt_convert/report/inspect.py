"""The report of ``mopt inspect``: schema ``mopt.inspect/1``, fields only added. No torch."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from modelopt_convert.formats.layout import Basis
from modelopt_convert.report.report import ErrorReport, one_line


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)


class DialectReport(_Model):
    """The dialect and the evidence for it."""

    name: str = Field(default="unknown", description="which tool's conventions the file follows")
    evidence: list[str] = Field(default_factory=list, description="why")


class LayoutReport(_Model):
    """The answer for all packed modules together.

    ``modules_contradicting`` counts modules whose proven layout is not the declared one or, where nothing is declared,
    not the one that the engine would believe.
    """

    nibble_order: str = Field(
        default="none", description="low or high: the nibble of a byte that holds the even column"
    )
    scale_layout: str = Field(default="none", description="linear (row by row) or 128x4")
    global_scale: str = Field(default="none", description="multiply, or divide by a reciprocal scale")
    basis: Basis = Field(default="none", description="how both orders are known")
    modules_proven: int = Field(default=0, description="modules whose layout the base proves")
    modules_undetermined: int = Field(default=0, description="modules of which it is not known")
    modules_contradicting: int = Field(default=0, description="see above")


class ModuleLayout(_Model):
    """One quantized module; ``basis`` is the weaker of the two that follow."""

    algorithm: str = Field(description="its format")
    shape: list[int] = Field(description="[N, K] of the decoded weight")
    nibble_order: str = Field(description="as in LayoutReport")
    scale_layout: str = Field(description="as in LayoutReport")
    global_scale: str = Field(description="as in LayoutReport")
    basis: Basis = Field(description="how both orders are known")
    nibble_basis: Basis = Field(description="how the order of nibbles is known")
    scale_basis: Basis = Field(description="how the order of scales is known")
    relative_error: float | None = Field(description="of sampled rows against the base; null without a base")


class LintReport(_Model):
    """A fault found."""

    code: str = Field(description="docs/errors.md lists them")
    message: str = Field(description="what is wrong")
    module: str | None = Field(description="null where it is of the whole checkpoint")


class TotalsReport(_Model):
    """Sizes."""

    tensors: int = Field(default=0, description="how many there are")
    bytes: int = Field(default=0, description="of all of them")
    by_dtype: dict[str, dict[str, int]] = Field(default_factory=dict, description="tensors and bytes of each dtype")


class EngineReport(_Model):
    """What a serving engine believes, and where that is wrong."""

    name: str = Field(description="the engine and its version")
    believes: dict[str, Any] = Field(description="what it takes the checkpoint for")
    because: list[str] = Field(description="which names and keys make it believe so")
    misreads: list[str] = Field(description="what it would read wrong")


class EngineVerdict(_Model):
    """What one version of an engine makes of the file; with ``inspect --engines``.

    ``right``: it takes every module for what it is. ``assumes``: it does, if the layout that it assumes is the file's,
    which nothing proves here, or if ``depends`` holds. ``loss``: packed weights are off or not kept packed.
    ``misreads``: other values than the file's are used. ``refuses``: it does not load. ``unknown``: not looked at.
    ``modules`` has those that are taken for something else than they are, by what for; ``source`` and ``shown`` say
    what each fact rests on.
    """

    engine: str = Field(description="its name")
    version: str = Field(description="of the engine that the fact is about")
    verdict: Literal["right", "assumes", "loss", "misreads", "refuses", "unknown"] = Field(description="in a word")
    how: str = Field(description="what the engine does with the file")
    assumes: dict[str, str] = Field(default_factory=dict, description="the layout that it takes for granted")
    depends: str = Field(default="", description="what the verdict depends on beside the file")
    notes: list[str] = Field(default_factory=list, description="what a user should know besides")
    modules: dict[str, list[str]] = Field(
        default_factory=dict, description="modules taken for something else than they are, by what for"
    )
    figure: float | None = Field(default=None, description="largest relative error that the engine adds, if measured")
    source: list[str] = Field(default_factory=list, description="the engine's own files that say so")
    shown: Literal["run", "read", "inferred"] = Field(
        default="read", description="whether the engine's code was run or read, or the fact was inferred"
    )


class ComponentReport(_Model):
    """One transformer; ``engine`` is SGLang's view of an NVFP4 checkpoint, ``engines`` are all."""

    dialect: DialectReport = Field(description="which tool's conventions the file follows")
    layout: LayoutReport = Field(description="of all packed modules together")
    modules: dict[str, ModuleLayout] = Field(description="each quantized module")
    lint: list[LintReport] = Field(description="faults that were found")
    totals: TotalsReport = Field(description="sizes")
    engine: EngineReport | None = Field(description="SGLang's view of an NVFP4 checkpoint")
    config_from: str | None = Field(
        default=None, description="where its config is from: config.json, --config, header, or beside the file"
    )
    engines: list[EngineReport] = Field(default_factory=list, description="the views of all engines")
    verdicts: list[EngineVerdict] = Field(
        default_factory=list, description="what each engine makes of the file, with --engines"
    )


class InspectReport(_Model):
    """All components; the fields at the top are the first one's."""

    schema_: Literal["mopt.inspect/1"] = Field(
        default="mopt.inspect/1", alias="schema", description="the version of these fields"
    )
    status: str = Field(default="ok", description="how the run ended")
    exit_code: int = Field(default=0, description="docs/exit-codes.md lists them")
    dialect: DialectReport = Field(
        default_factory=DialectReport, description="which tool's conventions the file follows"
    )
    layout: LayoutReport = Field(default_factory=LayoutReport, description="of all packed modules together")
    components: dict[str, ComponentReport] = Field(default_factory=dict, description="each transformer, by its folder")
    modules: dict[str, ModuleLayout] = Field(default_factory=dict, description="each quantized module")
    lint: list[LintReport] = Field(default_factory=list, description="faults that were found")
    totals: TotalsReport = Field(default_factory=TotalsReport, description="sizes")
    engine: EngineReport | None = Field(default=None, description="SGLang's view of an NVFP4 checkpoint")
    engines: list[EngineReport] = Field(default_factory=list, description="the views of all engines")
    verdicts: list[EngineVerdict] = Field(
        default_factory=list, description="what each engine makes of the file, with --engines"
    )
    warnings: list[dict[str, str]] = Field(default_factory=list, description="each with code and message")
    error: ErrorReport | None = Field(default=None, description="null where the source could be read")

    def to_json(self) -> str:
        """One line of ASCII JSON."""
        return one_line(self)
