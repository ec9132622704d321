"""Describe a checkpoint, whatever dialect and naming it is in, under diffusers' names. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.dialects.form import Canonical, Form
from modelopt_convert.dialects.forms import FORMS, form_of
from modelopt_convert.dialects.naming import under_diffusers_names
from modelopt_convert.dialects.scales import check_described
from modelopt_convert.dialects.table import detect_dialect
from modelopt_convert.families.family import Family
from modelopt_convert.families.table import Found, recognise
from modelopt_convert.run.errors import InputError

_HINTS = {"nunchaku": "nunchaku alone reads its tiles, smoothing and low-rank parts; get the model in another form"}


@dataclass(frozen=True, slots=True)
class Source:
    """What was made out of a checkpoint.

    Attributes:
        dialect: Its name, as ``mopt inspect`` says it.
        evidence: What gave the dialect and the names away, in words.
        form: Of the dialect.
        found: Family, naming and prefix of the names.
        described: Under diffusers' names.
    """

    dialect: str
    evidence: tuple[str, ...]
    form: Form
    found: Found
    described: Canonical


def describe(reader: CheckpointReader, wanted: str | None, known: Mapping[str, TensorInfo]) -> Source:
    """Make out what a checkpoint is.

    Args:
        reader: The checkpoint, opened.
        wanted: The dialect, if the user named it.
        known: The model's tensors under diffusers' names, as far as they are known, by a base or a description: shapes
            tell padding.

    Raises:
        InputError: ``convert.dialect``, ``naming.*`` or ``dialect.*``.
    """
    where = str(reader.path)
    headers = Headers(reader.tensors, reader.metadata, reader.config, reader.skipped)
    dialect, evidence = detect_dialect(headers)
    form = FORMS[wanted] if wanted is not None else form_of(dialect)
    if form is None:
        raise InputError(
            f"{where}: expected a dialect that mopt converts, found {dialect.name} ({'; '.join(evidence)})",
            code="convert.dialect",
            path=where,
            hint=_HINTS.get(dialect.name, f"--from names one of {', '.join(FORMS)}, if it is one of them"),
        )
    found = recognise({name: info.shape for name, info in reader.tensors.items()}) or _by_class(reader)
    if found is None:
        raise InputError(
            f"{where}: the names and shapes of its tensors are those of no model that mopt knows",
            code="naming.unknown_model",
            path=where,
            hint="`mopt presets` lists them; a diffusers model with its config.json keeps its names",
        )
    described = form.read(headers, reader.read_of, true_shapes(reader.tensors, known, found), where)
    if found.spelling != "diffusers" or found.prefix:
        described = under_diffusers_names(described, found, where)
    check_described(described, where)
    # By the checkpoint's own names: what a form renamed has its fate from the form.
    fates = {name: described.fates.get(name, f"read as {name}") for name in reader.tensors}
    described = replace(described, fates=fates)
    return Source(dialect.name, (*evidence, *found.evidence), form, found, described)


def _by_class(reader: CheckpointReader) -> Found | None:
    """A model of diffusers that no key map is known of: its config.json says the class, and its names stay."""
    name = reader.config.get("_class_name")
    if not isinstance(name, str) or not name:
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
