"""Open what the user named: each transformer with its base and its ``.pt``, under diffusers' names.

Everything that is said about an input's files, and not yet about the model, is settled here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modelopt_convert.checkpoint.config import BASE, EXPORT, no_config
from modelopt_convert.checkpoint.location import Location, fault_of_folder
from modelopt_convert.checkpoint.pipeline import Component
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.commands.command import Clock, Inputs, Warned, without_quantization
from modelopt_convert.commands.requests import BuildRequest
from modelopt_convert.dialects.calibration import Amax
from modelopt_convert.dialects.presented import Presented
from modelopt_convert.plan.plan import BuildPlan, Origin
from modelopt_convert.plan.prediction import proof_readings, step_readings, whole_readings
from modelopt_convert.preset.preset import load_preset, preset_names
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
        presented: What an input stands for, by role, where its names or its dialect are others than ours.
        calibration: Amax values of a ``--checkpoint``, by module and role.
        amax_names: Their names in the file, by those of the scales they make.
    """

    component: Component
    prefix: str
    export: CheckpointReader | None
    base: CheckpointReader | None
    presented: dict[str, Presented] = field(default_factory=dict)
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
    warned: list[Warned] = []
    for role in ("base", "export"):  # the base's shapes tell what is padding
        if role in readers:
            known = opened.base.tensors if opened.base is not None and role == "export" else {}
            warned += inputs.present(f"{prefix}{role}", known)
            if (presented := inputs.presented.get(f"{prefix}{role}")) is not None:
                opened.presented[role] = presented
    warned += _take_config(opened, paths)
    name_of: Callable[[str], str | None] = str
    if "export" in opened.presented:
        name_of = opened.presented["export"].module_name
    if checkpoint is not None:
        from modelopt_convert.dialects.modelopt.amax_file import read_amax, resolve_checkpoint

        path = resolve_checkpoint(checkpoint, component.name or "transformer")
        opened.calibration, opened.amax_names = read_amax(path, name_of)
    return opened, warned


def _take_config(opened: Opened, paths: Mapping[str, Location | None]) -> Iterator[Warned]:
    """Require a config of each input; one of two that has none goes by the other's."""
    has_config = {role: reader.config_from is not None for role, reader in opened.readers.items()}
    for role, reader in opened.readers.items():
        if has_config[role]:
            continue
        path, presented = paths[role] or reader.path, opened.presented.get(role)
        other = opened.base if role == "export" else opened.export
        if other is None or other.config_from is None or (role == "export" and presented is None):
            raise no_config(role, path, presented.other_class if presented is not None else None)
        quantization = {key: value for key, value in reader.config.items() if key == "quantization_config"}
        reader.config = without_quantization(other.config) | quantization
        reader.config_from = EXPORT if role == "base" else BASE
        whose = "export's" if role == "base" else "base's"
        message = f"{role} {path} has no config: the {whose} is taken, so the two are not compared"
        yield f"{role}.no_config", message


def base_repo(parts: Sequence[Opened]) -> str | None:
    """The repo that the bases of all transformers were observed to be of; None where that is not known, or several."""
    repos = {part.base.identity().get("repo") if part.base is not None else None for part in parts}
    return repos.pop() if len(repos) == 1 else None


def refuse_other_claim(parts: Sequence[Opened], claimed: str | None) -> None:
    """Refuse a claim that the base is of another repo than it was observed to be of, or its config.json says.

    Raises:
        InputError: ``base.claimed_otherwise``.
    """
    if claimed is None:
        return
    for model in (part.model for part in parts):
        for preset in (load_preset(name).preset for name in preset_names()):
            found = preset.contradiction(model.config) if claimed in preset.repos else None
            if found is not None:
                raise InputError(
                    f"{model.path}: --base-model says {claimed}, whose config.json has {found[1]} under {found[0]!r}; "
                    f"found {model.config[found[0]]!r}",
                    code="base.claimed_otherwise",
                    path=str(model.path),
                    hint="leave --base-model out, or name the repo of this model",
                )
    for base in (part.base for part in parts if part.base is not None):
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
