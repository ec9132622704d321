"""Describe a checkpoint, whatever dialect and naming it is in, under diffusers' names. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.dialects.form import Canonical, Form
from modelopt_convert.dialects.nunchaku_form import FORM as NUNCHAKU
from modelopt_convert.dialects.renaming import under_diffusers_names
from modelopt_convert.dialects.scales import check_described
from modelopt_convert.dialects.table import detect_dialect
from modelopt_convert.dialects.targets import FORMS, form_of
from modelopt_convert.families.family import Family
from modelopt_convert.families.table import FAMILIES, Found, beside, candidates
from modelopt_convert.run.errors import Faults, InputError


@dataclass(frozen=True, slots=True)
class Source:
    """What was made out of a checkpoint.

    Attributes:
        dialect: Its name, as ``mopt inspect`` says it.
        evidence: By what the dialect and the names were recognised, in words.
        form: Of the dialect.
        found: Family, naming and prefix of the names.
        described: Under diffusers' names.
        other_class: The class that config.json names, where that is not one of diffusers' for this family.
    """

    dialect: str
    evidence: tuple[str, ...]
    form: Form
    found: Found
    described: Canonical
    other_class: str | None = None


def describe(
    reader: CheckpointReader,
    wanted: str | None,
    known: Mapping[str, TensorInfo],
    whole: Mapping[str, TensorInfo] | None = None,
) -> Source:
    """Make out what a checkpoint is.

    Args:
        reader: The checkpoint, opened.
        wanted: The dialect, if the user named it.
        known: The model's tensors under diffusers' names, as far as they are known, by a base or a description: shapes
            tell padding.
        whole: All tensors of the checkpoint, where it presents some: the model is recognised by these.

    Raises:
        InputError: ``convert.dialect``, ``naming.*`` or ``dialect.*``.
    """
    where = str(reader.path)
    several = candidates({name: info.shape for name, info in (whole or reader.tensors).items()})
    # A text encoder may be in a dialect of its own, and with faults of its own.
    rest = beside(reader.tensors, several[0] if len(several) == 1 else None)
    tensors = {name: info for name, info in reader.tensors.items() if name not in rest}
    headers = Headers(tensors, reader.metadata, reader.config, reader.skipped, is_named=wanted is not None)
    dialect, evidence = detect_dialect(headers)
    form = FORMS[wanted] if wanted is not None else form_of(dialect)
    if form is None:
        raise InputError(
            f"{where}: expected a dialect that mopt converts, found {dialect.name} ({'; '.join(evidence)})",
            code="convert.dialect",
            path=where,
            hint=f"--from names one of {', '.join(FORMS)}, if it is one of them",
        )
    # The names of nunchaku are no spelling of a family: its form gives diffusers'.
    own = form.read(headers, reader.read_of, {}, where) if form is NUNCHAKU else None
    if own is not None:
        several = candidates({name: info.shape for name, info in own.tensors.items()})
    if len(several) > 1:
        first, second = (f"{one.family.title} under {one.prefix!r}" for one in several[:2])
        raise InputError(
            f"{where}: expected one transformer, found {first} and {second}",
            code="naming.several",
            path=where,
            hint="put each into a file of its own first: a conversion is of one transformer",
        )
    found = several[0] if several else _by_class(reader)
    if found is None:
        raise InputError(
            f"{where}: the names and shapes of its {len(reader.tensors)} tensors are those of no whole model that mopt "
            f"knows ({next(iter(reader.tensors), 'no tensor')!r} for one)",
            code="naming.unknown_model",
            path=where,
            hint="give the model whole, with any LoRA merged; a diffusers model of another class keeps its names",
        )
    if own is not None:
        found = found._replace(evidence=[f"modules of {found.family.title} in nunchaku's names"])
    described = own or form.read(headers, reader.read_of, true_shapes(tensors, known, found), where)
    if found.spelling != "diffusers" or found.prefix:
        described = under_diffusers_names(described, found, where)
    check_described(described, where)
    # By the checkpoint's own names: what a form renamed has its fate from the form.
    fates = {name: rest.get(name) or described.fates.get(name, f"read as {name}") for name in reader.tensors}
    config, other_class = architecture(described.config, found)
    described = replace(described, fates=fates, config=config)
    return Source(dialect.name, (*evidence, *found.evidence), form, found, described, other_class)


def describe_sound(
    reader: CheckpointReader, wanted: str | None, known: Mapping[str, TensorInfo], faults: Faults
) -> Source:
    """As ``describe``; of a checkpoint that is refused for some of its modules, make out the others.

    Args:
        reader: The checkpoint, opened; it presents the modules that are made out.
        wanted: As in ``describe``.
        known: As in ``describe``.
        faults: Gets what the modules are refused for.

    Raises:
        InputError: As ``describe``, where what is refused is more than some modules.
    """
    whole = reader.tensors
    while True:  # each time with fewer modules
        try:
            found = describe(reader, wanted, known, whole)
        except InputError as error:
            names, modules = {name for name, _ in error.parts}, {module_of(name) for name in reader.tensors}
            if not names or not all(name in modules or name in reader.tensors for name in names):
                faults.refuse()
                raise
            broken = {module_of(name) if name in reader.tensors else name for name in names}
            reader.present({name: one for name, one in reader.tensors.items() if module_of(name) not in broken})
            faults.add("", error)
            continue
        if found.found.spelling != "diffusers" or found.found.prefix:
            faults.refuse()  # their names are not those of the base, which would seem to lack them
        return found


def architecture(config: Mapping[str, Any], found: Found | None) -> tuple[dict[str, Any], str | None]:
    """A config without what it says of quantization, if it is of diffusers' class; else nothing, and its class."""
    rest = {key: value for key, value in config.items() if key != "quantization_config"}
    said = rest.get("_class_name")
    if found is None or said in found.family.class_names:
        return rest, None
    return {}, said if isinstance(said, str) else None


def _by_class(reader: CheckpointReader) -> Found | None:
    """A model of diffusers that no key map is known of: its config.json says the class, and its names stay."""
    name = reader.config.get("_class_name")
    # Of a class whose names are known, names that are not recognised are those of something else, or of a part.
    if not isinstance(name, str) or not name or any(name in one.class_names for one in FAMILIES):
        return None
    return Found(Family(name, name, (name,), (), ()), "diffusers", "", [f"config.json: class {name}, no key map"])


def true_shapes(
    tensors: Mapping[str, TensorInfo], known: Mapping[str, TensorInfo], found: Found
) -> dict[str, tuple[int, int]]:
    """[N, K] by the checkpoint's own module names, as far as they are known."""
    shapes: dict[str, tuple[int, int]] = {}
    for name in tensors:
        module = module_of(name)
        native = module.removeprefix(found.prefix)
        members = found.family.fused(native) if found.spelling != "diffusers" else (native,)
        parts = [known[f"{one}.weight"] for one in members or () if f"{one}.weight" in known]
        if parts and len(parts) == len(members or ()) and {len(part.shape) for part in parts} == {2}:
            columns = parts[0].shape[1] * (2 if parts[0].dtype == "U8" else 1)
            shapes[module] = (sum(part.shape[0] for part in parts), columns)
    return shapes
