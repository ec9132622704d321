"""What a checkpoint stands for: the same tensors under diffusers' names, in ModelOpt's roles and layout. No torch.

Builds and proofs know those names and that layout alone. A checkpoint in the model's own names, or in another dialect,
is presented to them: by recipes, so that the files are read as they lie.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.names import inside, module_of, natural_key
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.checkpoint.recipe import recipe_of, renamed
from modelopt_convert.dialects.dialect import Dialect, Headers
from modelopt_convert.dialects.form import Canonical
from modelopt_convert.dialects.others import FP8_UNLABELLED
from modelopt_convert.dialects.packed import SCALE_SHAPES, is_quantizer_state
from modelopt_convert.dialects.renaming import under_diffusers_names, under_native_names
from modelopt_convert.dialects.source import architecture, true_shapes
from modelopt_convert.dialects.table import detect_dialect
from modelopt_convert.dialects.targets import form_of
from modelopt_convert.families.table import Found, beside, recognise
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.formats.format import Format
from modelopt_convert.formats.table import FORMATS, is_modelopts
from modelopt_convert.preset.patterns import ignored
from modelopt_convert.run.errors import InputError

_QUANTIZATION = "quantization_config"
_OWN_LAYOUT = ("modelopt", "bf16")  # forms whose tensors lie as builds and proofs read them anyway


@dataclass(frozen=True, slots=True)
class Presented:
    """A checkpoint as what it stands for.

    Attributes:
        dialect: What it is written in, as ``mopt inspect`` says it.
        found: Family, naming and prefix of its names; None where they are those of diffusers and of no known family.
        evidence: By what dialect and names were recognised, in words.
        tensors: By diffusers' names.
        config: The config.json that goes with them; of its own it has only what says which model it is.
        other_class: The class that its config.json names, where that is not one of diffusers' for this family.
        made_of: What each of its own tensors became, by the tensor's own name.
        left_out: The fate of each of its own tensors that became none.
    """

    dialect: str
    found: Found | None
    evidence: tuple[str, ...]
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    other_class: str | None
    made_of: Mapping[str, tuple[str, ...]]
    left_out: Mapping[str, str]

    def renamed(self) -> dict[str, str]:
        """The names that each own tensor is read under, where they are others than its own."""
        return {own: ", ".join(names) for own, names in sorted(self.made_of.items()) if names != (own,)}

    def own_fates(self, fates: Mapping[str, str]) -> dict[str, str]:
        """The fate of each of the checkpoint's own tensors.

        Args:
            fates: By the names that they are presented under.
        """
        found: dict[str, str] = {}
        for own, names in self.made_of.items():
            told = {name: fates[name] for name in names if name in fates}
            several = len(set(told.values())) > 1
            words = [f"{name}: {fate}" for name, fate in told.items()] if several else sorted(set(told.values()))
            found[own] = "; ".join(words)
        return found | dict(self.left_out)

    def module_name(self, own: str) -> str | None:
        """The module that one of the checkpoint's own modules is; None if it is none, or several."""
        if self.found is None:
            return own
        if not own.startswith(self.found.prefix):
            return None
        names = _fused(self.found, own)
        return names[0] if len(names) == 1 else None

    def words(self) -> str:
        """What was recognised, what it is read as, and what was left out."""
        parts = [f"dialect {self.dialect}"]
        if self.found is not None:
            parts = [f"{self.found.evidence[0]}; dialect {self.dialect}"]
        what: dict[str, int] = {}
        for fate in self.left_out.values():
            if fate.startswith("left out: "):
                what[fate.removeprefix("left out: ")] = what.get(fate.removeprefix("left out: "), 0) + 1
        out = ", ".join(f"{count} ({one})" for one, count in what.items())
        parts.append(f"{len(self.made_of)} tensors are read as {len(self.tensors)} under diffusers' names")
        parts += [f"left out: {out}"] if out else []
        parts += [f"its config.json is of the class {self.other_class}, and is not used"] if self.other_class else []
        return "; ".join(parts)


def stands_for(reader: CheckpointReader, known: Mapping[str, TensorInfo]) -> Presented | None:
    """What a checkpoint stands for; None where that is what it holds: diffusers' names, in ModelOpt's layout or plain.

    Args:
        reader: The checkpoint, opened; scales of a few bytes are read.
        known: The model's tensors under diffusers' names, as far as they are known: shapes tell padding.

    Raises:
        InputError: ``naming.*``, ``family.*`` or ``dialect.*``: a name, shape or marker that is none of the model's.
    """
    found = recognise({name: info.shape for name, info in reader.tensors.items()})
    rest = beside(reader.tensors, found)
    tensors = {name: info for name, info in reader.tensors.items() if name not in rest}
    headers = Headers(tensors, reader.metadata, reader.config, reader.skipped)
    dialect, evidence = detect_dialect(headers)
    form, where = form_of(dialect), str(reader.path)
    is_native = found is not None and (found.spelling != "diffusers" or bool(found.prefix))
    said = reader.config.get(_QUANTIZATION)
    # With ModelOpt's config beside diffusers' names builds find out the layout by the base.
    is_modelopt = not is_native and isinstance(said, dict) and is_modelopts(said)
    # Weights that nothing in the file labels are for builds and proofs to judge, where they or a config can: an engine
    # would not know them either.
    is_unlabelled = dialect is FP8_UNLABELLED and (bool(said) or not is_native)
    is_foreign = form is not None and form.name not in _OWN_LAYOUT and not is_modelopt and not is_unlabelled
    if not is_native and not is_foreign and not rest:
        return None
    if not is_foreign and found is not None and _moves_codes(tensors, found) and form is None:
        raise InputError(
            f"{where}: expected a dialect whose layout is known, found {dialect.name} ({'; '.join(evidence)})",
            code="dialect.unknown_layout",
            path=where,
            hint="modules of this model are cut by rows, so the layout counts; mopt convert --from names the dialect",
        )
    if form is not None and (is_foreign or (found is not None and _moves_codes(tensors, found))):
        rows = true_shapes(tensors, known, found) if found is not None else {}
        described, is_read = form.read(headers, reader.read_of, rows, where), True
    else:
        described, is_read = _plain(headers, found), False
    if found is not None and is_native:
        described = under_diffusers_names(described, found, where)
    quantization = _quantization_of(described, where) if is_read else _said(headers, dialect, found, where)
    made_of = _made_of(tensors, described.tensors.values())
    rest |= {name: described.fates.get(name, "read") for name in tensors if name not in made_of}
    config, other_class = architecture(reader.config, found)
    told = (*evidence, *(found.evidence if found is not None else ()))
    whole = {**config, _QUANTIZATION: quantization} if quantization is not None else config
    return Presented(dialect.name, found, told, described.tensors, whole, other_class, made_of, rest)


def present_under_names_of(base: CheckpointReader, reader: CheckpointReader) -> None:
    """Present a base under the names that a checkpoint has, so that the checkpoint is looked at as it lies.

    Args:
        base: The unquantized base, in any naming.
        reader: The checkpoint.

    Raises:
        InputError: ``naming.*`` or ``family.*``.
    """
    wanted = recognise({name: info.shape for name, info in reader.tensors.items()})
    own = recognise({name: info.shape for name, info in base.tensors.items()})
    if wanted is None or own is None or wanted.family.name != own.family.name:
        return
    if (own.spelling, own.prefix) == (wanted.spelling, wanted.prefix):
        return
    if (presented := stands_for(base, {})) is not None:
        base.present(presented.tensors)
    if wanted.spelling == "diffusers":
        under = {name: f"{wanted.prefix}{name}" for name in base.tensors}
        tensors = {name: renamed(base.tensors[own], name) for own, name in under.items()}
    else:
        family, spelling = wanted.family, wanted.spelling
        known = {name: one for name, one in base.tensors.items() if family.native_tensor(name, spelling) is not None}
        tensors = dict(under_native_names(Canonical(known, {}, {}), family, spelling, wanted.prefix).tensors)
    base.present(tensors)
    base.content = None  # what it digests would be the bytes in an order of this run's own


def _plain(headers: Headers, found: Found | None) -> Canonical:
    """A checkpoint that has to be renamed, and no more, under its own names."""
    state = {name: "left out: quantizer state" for name in headers.tensors if _is_odd_state(name, found)}
    return Canonical({name: one for name, one in headers.tensors.items() if name not in state}, {}, state)


def _said(headers: Headers, dialect: Dialect, found: Found | None, where: str) -> dict[str, Any] | None:
    """What a checkpoint that is renamed says of its quantization, under diffusers' names."""
    quantization = dict(headers.quantization())
    if not quantization and dialect is FP8_UNLABELLED and _is_scaled(headers):
        quantization = _declared(_plain(headers, found), FORMATS["fp8"], headers.fp8())
    if found is not None and quantization.get("ignore") is not None:
        modules = {name: _fused(found, name) for name in map(module_of, headers.tensors)}
        covered = ignored(quantization["ignore"], modules, path=inside(where, "config.json"))
        quantization["ignore"] = sorted({new for name in covered for new in modules[name]}, key=natural_key)
    return quantization or None


def _is_odd_state(name: str, found: Found | None) -> bool:
    """Whether a tensor is calibration state that hangs on no module of the family."""
    if found is None or not is_quantizer_state(name):
        return False
    return found.family.tensor(name.removeprefix(found.prefix)) is None


def _is_scaled(headers: Headers) -> bool:
    """Whether each FP8 weight has one scale, so that it has one meaning whoever wrote it."""
    scales = [headers.tensors.get(f"{name}.weight_scale") for name in headers.fp8()]
    return all(one is not None and one.dtype in HALF_AND_FLOAT and one.shape in SCALE_SHAPES for one in scales)


def _moves_codes(tensors: Mapping[str, TensorInfo], found: Found) -> bool:
    """Whether a quantized module is fused or has its halves swapped: then its layout has to be known."""
    for name, info in tensors.items():
        native = module_of(name).removeprefix(found.prefix)
        is_coded = name.endswith(".weight") and info.dtype not in HALF_AND_FLOAT and found.spelling != "diffusers"
        if is_coded and (len(found.family.fused(native)) > 1 or found.family.swapped(native)):
            return True
    return False


def _fused(found: Found, own: str) -> tuple[str, ...]:
    """What one of the checkpoint's own modules is in diffusers."""
    if not own.startswith(found.prefix):
        return ()
    bare = own.removeprefix(found.prefix)
    return (bare,) if found.spelling == "diffusers" else found.family.fused(bare)


def _quantization_of(described: Canonical, where: str) -> dict[str, Any] | None:
    """What ModelOpt's config.json would say of a description; None if nothing is quantized.

    Raises:
        InputError: ``dialect.formats``: there is no one format that builds and proofs know.
    """
    algorithms = {one.algorithm for one in described.modules.values()}
    if not algorithms:
        return None
    if len(algorithms) > 1 or not algorithms <= FORMATS.keys():
        raise InputError(
            f"{where}: expected modules in one of {', '.join(FORMATS)}, found {', '.join(sorted(algorithms))}",
            code="dialect.formats",
            path=where,
            hint="only these are built and proven; mopt convert writes the others in another dialect, or as BF16",
        )
    return _declared(described, FORMATS[algorithms.pop()], described.modules.keys())


def _declared(described: Canonical, target: Format, quantized: Iterable[str]) -> dict[str, Any]:
    packed = set(quantized)
    linears = [
        module_of(name)
        for name, info in described.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and module_of(name) not in packed
    ]
    calibrated = any(f"{name}.input_scale" in described.tensors for name in packed)
    # Nothing of the layout is said: what is presented lies as every reader takes for granted.
    dynamic = {} if calibrated else {"dynamic_input_scale": True}
    keys = {"quant_method": "modelopt", "quant_algo": target.quant_algo}
    return {**keys, **dynamic, "ignore": sorted(linears, key=natural_key)}


def _made_of(own: Mapping[str, TensorInfo], presented: Iterable[TensorInfo]) -> dict[str, tuple[str, ...]]:
    """What each own tensor became: by the bytes that are taken of it, or else by its name."""
    starts: dict[str, list[tuple[int, str]]] = {}
    for name, info in own.items():
        if info.num_bytes:
            starts.setdefault(info.file, []).append((info.start, name))
    for listed in starts.values():
        listed.sort()
    found: dict[str, list[str]] = {}
    for info in presented:
        taken = {
            starts[one.file][bisect_right(starts[one.file], (one.start, "\uffff")) - 1][1]
            for one in recipe_of(info).extents(0, info.num_bytes)
            if one.num_bytes
        }
        for name in taken or ({info.name} & own.keys()):
            found.setdefault(name, []).append(info.name)
    return {name: tuple(found[name]) for name in own if name in found}
