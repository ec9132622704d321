"""Open what the user named: each transformer with its base and its ``.pt``, under diffusers' names.

Everything that is said about an input's files, and not yet about the model, is settled here.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from modelopt_convert.checkpoint.components import Component
from modelopt_convert.checkpoint.location import Location, is_dir
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.commands.accounting import note_input, timed, traffic_noted
from modelopt_convert.dialects import ltx2
from modelopt_convert.dialects.calibration import Amax
from modelopt_convert.plan.plan import Origin
from modelopt_convert.preset.patterns import ignored
from modelopt_convert.report.report import Report
from modelopt_convert.run.errors import InputError


@dataclass(slots=True)
class Opened:
    """One transformer's inputs.

    Attributes:
        component: Which it is.
        prefix: Of its names in the report and of its folder in OUT: ``transformer/`` where several are built, else
            empty.
        export: The opened export, or None where the base itself is quantized.
        base: The opened base, or None.
        original: For an export in another naming: the export's own name of each tensor, by the new one.
        left_out: Tensors of the export that are not part of the transformer, with their fate.
        calibration: Amax values of a ``--checkpoint``, by module and role.
        amax_names: Their names in the file, by those of the scales they make.
    """

    component: Component
    prefix: str
    export: CheckpointReader | None
    base: CheckpointReader | None
    original: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    calibration: dict[str, dict[str, Amax]] = field(default_factory=dict)
    amax_names: dict[str, str] = field(default_factory=dict)

    @property
    def readers(self) -> dict[Origin, CheckpointReader]:
        """The opened checkpoints by role."""
        found: dict[Origin, CheckpointReader | None] = {"export": self.export, "base": self.base}
        return {role: reader for role, reader in found.items() if reader is not None}

    @property
    def model(self) -> CheckpointReader:
        """What says which model it is: the export, or the base where there is none."""
        return next(iter(self.readers.values()))


def open_all(
    components: list[Component], checkpoint: Location | None, stack: ExitStack, report: Report
) -> list[Opened]:
    """Open every component's inputs; ``stack`` closes them.

    Raises:
        InputError: An input that cannot be opened, or an X0Model without a base.
    """
    if checkpoint is not None and len(components) > 1 and not is_dir(checkpoint):
        raise InputError(
            f"{checkpoint}: expected a folder with a .pt for each of {len(components)} transformers, found one file",
            code="pickle.missing",
            path=str(checkpoint),
            hint="give the folder, or convert one transformer with --component",
        )
    return [_open(one, f"{one.name}/" if len(components) > 1 else "", checkpoint, stack, report) for one in components]


def _open(component: Component, prefix: str, checkpoint: Location | None, stack: ExitStack, report: Report) -> Opened:
    with timed(report, "open"):
        export = stack.enter_context(CheckpointReader(component.export)) if component.export is not None else None
        base = stack.enter_context(CheckpointReader(component.base)) if component.base is not None else None
    opened = Opened(component, prefix, export, base)
    for role, reader in opened.readers.items():
        note_input(report, f"{prefix}{role}", reader)
        stack.enter_context(traffic_noted(report, f"{prefix}{role}", reader))
    name_of: Callable[[str], str | None] = str
    if export is not None and export.config.get("_class_name") == ltx2.CLASS_NAME:
        _name_as_diffusers(opened, export, report)
        name_of = ltx2.diffusers_name
    if checkpoint is not None:
        from modelopt_convert.dialects.modelopt.amax_file import read_amax, resolve_checkpoint

        path = resolve_checkpoint(checkpoint, component.name or "transformer")
        with timed(report, "open"):
            opened.calibration, opened.amax_names = read_amax(path, name_of)
    return opened


def _name_as_diffusers(opened: Opened, export: CheckpointReader, report: Report) -> None:
    """Go on with an X0Model under diffusers' names, and with the config of the base: it has none of its own."""
    base = opened.base
    where = str(export.path / "config.json")
    if base is None:
        raise InputError(
            f"{where}: expected the config of a diffusers transformer, found that of an X0Model",
            code="export.no_config",
            path=where,
            hint="give --base: the transformer of the diffusers pipeline, whose config.json is taken",
        )
    names, opened.left_out = ltx2.diffusers_names(export.tensors, path=str(export.path))
    export.select(names)
    opened.original = {new: old for old, new in names.items()}
    report.inputs[f"{opened.prefix}export"].renamed = dict(sorted(names.items()))
    quantization = export.config.get("quantization_config")
    if isinstance(quantization, dict):
        quantization = quantization | {"ignore": _ignored(quantization.get("ignore"), names, where)}
    export.config = {**base.config, "quantization_config": quantization}
    report.warn(
        "export.renamed",
        f"an X0Model: {len(names)} tensors go by diffusers' names now, {len(opened.left_out)} are left out",
    )


def _ignored(entries: object, names: Mapping[str, str], where: str) -> list[str]:
    """The modules that an export's ``ignore`` covers under its own names, under the new ones."""
    modules = {module_of(old): module_of(new) for old, new in names.items()}
    return sorted(modules[old] for old in ignored(entries, modules, path=where))
