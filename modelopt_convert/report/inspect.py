"""The report of ``mopt inspect``: schema ``mopt.inspect/1``, fields only added. No torch."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from modelopt_convert.formats.layout import Basis
from modelopt_convert.report.report import ErrorReport, one_line


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)


class DialectReport(_Model):
    """The dialect and the evidence for it."""

    name: str = "unknown"
    evidence: list[str] = Field(default_factory=list)


class LayoutReport(_Model):
    """The answer for all packed modules together.

    ``modules_contradicting`` counts modules whose proven layout is not the declared one or, where nothing is declared,
    not the one that the engine would believe.
    """

    nibble_order: str = "none"
    scale_layout: str = "none"
    global_scale: str = "none"
    basis: Basis = "none"
    modules_proven: int = 0
    modules_undetermined: int = 0
    modules_contradicting: int = 0


class ModuleLayout(_Model):
    """One quantized module; ``basis`` is the weaker of the two that follow."""

    algorithm: str
    shape: list[int]
    nibble_order: str
    scale_layout: str
    global_scale: str
    basis: Basis
    nibble_basis: Basis
    scale_basis: Basis
    relative_error: float | None


class LintReport(_Model):
    """A fault found."""

    code: str
    message: str
    module: str | None


class TotalsReport(_Model):
    """Sizes."""

    tensors: int = 0
    bytes: int = 0
    by_dtype: dict[str, dict[str, int]] = Field(default_factory=dict)


class EngineReport(_Model):
    """What a serving engine believes, and where that is wrong."""

    name: str
    believes: dict[str, Any]
    because: list[str]
    misreads: list[str]


class ComponentReport(_Model):
    """One transformer; ``engine`` is SGLang's view of an NVFP4 checkpoint, ``engines`` are all."""

    dialect: DialectReport
    layout: LayoutReport
    modules: dict[str, ModuleLayout]
    lint: list[LintReport]
    totals: TotalsReport
    engine: EngineReport | None
    config_from: str | None = Field(
        default=None, description="where its config is from: config.json, --config, header, or beside the file"
    )
    engines: list[EngineReport] = Field(default_factory=list)


class InspectReport(_Model):
    """All components; the fields at the top are the first one's."""

    schema_: Literal["mopt.inspect/1"] = Field(default="mopt.inspect/1", alias="schema")
    status: str = "ok"
    exit_code: int = 0
    dialect: DialectReport = Field(default_factory=DialectReport)
    layout: LayoutReport = Field(default_factory=LayoutReport)
    components: dict[str, ComponentReport] = Field(default_factory=dict)
    modules: dict[str, ModuleLayout] = Field(default_factory=dict)
    lint: list[LintReport] = Field(default_factory=list)
    totals: TotalsReport = Field(default_factory=TotalsReport)
    engine: EngineReport | None = None
    engines: list[EngineReport] = Field(default_factory=list)
    warnings: list[dict[str, str]] = Field(default_factory=list)
    error: ErrorReport | None = None

    def to_json(self) -> str:
        """One line of ASCII JSON."""
        return one_line(self)
