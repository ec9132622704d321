"""Open what the user named: each transformer with its base and its ``.pt``, under diffusers' names.

Everything that is said about an input's files, and not yet about the model, is settled here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modelopt_convert.checkpoint.config import EXPORT, no_config
from modelopt_convert.checkpoint.location import Location, fault_of_folder
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.pipeline import Component
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.commands.command import Clock, Inputs, Warned, without_quantization
from modelopt_convert.commands.requests import BuildRequest
from modelopt_convert.dialects.calibration import Amax
from modelopt_convert.families import ltx2
from modelopt_convert.plan.plan import BuildPlan, Origin
from modelopt_convert.plan.prediction import proof_readings, step_readings, whole_readings
from modelopt_convert.preset.patterns import ignored
from modelopt_convert.run.errors import InputError


@dataclass(slots=True)
class Opened:
    """One transformer's inputs.

    Attributes:
        component: Which it is.
        prefix: Of its names in the report and of its folder in OUT: ``transformer/`` where several are built, or a
            whole pipeline; else empty.
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
    components: Sequence[Component], folders: Sequence[str], checkpoint: Location | None, inputs: Inputs, clock: Clock
) -> Iterator[tuple[Opened, list[Warned]]]:
    """Open every component's inputs, one after the other.

    Args:
        components: Which.
        folders: The folder of each in OUT; empty where OUT itself is the transformer.
        checkpoint: ``--checkpoint``.
        inputs: Keeps them open.
        clock: Takes the time.

    Raises:
        InputError: An input that cannot be opened, or an X0Model without a base.
    """
    if checkpoint is not None and len(components) > 1 and fault_of_folder(checkpoint) is not None:
        raise InputError(
            f"{checkpoint}: expected a folder with a .pt for each of {len(components)} transformers, found one file",
            code="pickle.missing",
            path=str(checkpoint),
            hint="give the folder, or convert one transformer with --component",
        )
    for one, folder in zip(components, folders, strict=True):
        with clock.timed("open"):
            opened = _open(one, f"{folder}/" if folder else "", checkpoint, inputs)
        yield opened


def _open(
    component: Component, prefix: str, checkpoint: Location | None, inputs: Inputs
) -> tuple[Opened, list[Warned]]:
    paths = {"export": component.export, "base": component.base}
    readers = {
        role: inputs.open(f"{prefix}{role}", path, is_base=role == "base")
        for role, path in paths.items()
        if path is not None
    }
    opened = Opened(component, prefix, readers.get("export"), readers.get("base"))
    warned = [*_take_config(opened, paths)]
    name_of: Callable[[str], str | None] = str
    if opened.export is not None and opened.export.config.get("_class_name") == ltx2.CLASS_NAME:
        warned += _name_as_diffusers(opened, opened.export, inputs)
        name_of = ltx2.diffusers_name
    if checkpoint is not None:
        from modelopt_convert.dialects.modelopt.amax_file import read_amax, resolve_checkpoint

        path = resolve_checkpoint(checkpoint, component.name or "transformer")
        opened.calibration, opened.amax_names = read_amax(path, name_of)
    return opened, warned


def _take_config(opened: Opened, paths: Mapping[str, Location | None]) -> Iterator[Warned]:
    """Require a config of each input; a base that has none goes by the export's."""
    for role, reader in opened.readers.items():
        path = paths[role] or reader.path
        if reader.config:
            continue
        if reader is not opened.base or opened.export is None:
            raise no_config(role, path)
        config = opened.export.config
        if config.get("_class_name") == ltx2.CLASS_NAME:  # says nothing of the transformer
            raise no_config(role, path)
        reader.config, reader.config_from = without_quantization(config), EXPORT
        yield "base.no_config", f"base {path} has no config: the export's is taken, so the two are not compared"


def _name_as_diffusers(opened: Opened, export: CheckpointReader, inputs: Inputs) -> list[Warned]:
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
    inputs.renamed[f"{opened.prefix}export"] = dict(sorted(names.items()))
    quantization = export.config.get("quantization_config")
    if isinstance(quantization, dict):
        quantization = quantization | {"ignore": _ignored(quantization.get("ignore"), names, where)}
    export.config = {**base.config, "quantization_config": quantization}
    message = f"an X0Model: {len(names)} tensors go by diffusers' names now, {len(opened.left_out)} are left out"
    return [("export.renamed", message)]


def base_repo(parts: Sequence[Opened]) -> str | None:
    """The repo that the bases of all transformers were observed to be of; None where that is not known, or several."""
    repos = {part.base.identity().get("repo") if part.base is not None else None for part in parts}
    return repos.pop() if len(repos) == 1 else None


def refuse_other_claim(parts: Sequence[Opened], claimed: str | None) -> None:
    """Refuse a claim that the base is of another repo than it was observed to be of.

    Raises:
        InputError: ``base.claimed_otherwise``.
    """
    for base in (part.base for part in parts if part.base is not None and claimed is not None):
        repo = base.identity().get("repo")
        if repo is not None and repo != claimed:
            raise InputError(
                f"{base.path}: --base-model says {claimed}, the base is of {repo}",
                code="base.claimed_otherwise",
                path=str(base.path),
                hint="leave --base-model out",
            )


def to_fetch(opened: Opened, plan: BuildPlan, request: BuildRequest) -> dict[str, int]:
    """Bytes that are still to be fetched of one transformer's inputs, by their names in the report.

    Args:
        opened: The inputs.
        plan: What will be built from them.
        request: Says how much is compared, and whether files are fetched whole.
    """
    found: dict[str, int] = {}
    for role, reader in opened.readers.items():
        if not isinstance(reader.path, Path):
            everything = [(name, 0, info.num_bytes) for name, info in reader.tensors.items()]
            needed = [
                *proof_readings(plan, role, reader.tensors),
                *step_readings(plan.steps, role, reader.tensors),
                *(whole_readings(plan, role, reader.tensors) if request.proof == "all" else ()),
            ]
            found[f"{opened.prefix}{role}"] = reader.unfetched(everything if request.download else needed)
    return found


def _ignored(entries: object, names: Mapping[str, str], where: str) -> list[str]:
    """The modules that an export's ``ignore`` covers under its own names, under the new ones."""
    modules = {module_of(old): module_of(new) for old, new in names.items()}
    return sorted(modules[old] for old in ignored(entries, modules, path=where))
