"""Checkpoints of nunchaku's engine, read as the weights that it computes with. Nothing is written for it. No torch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.names import inside
from modelopt_convert.checkpoint.recipe import made, recipe_of, renamed, rows_of
from modelopt_convert.dialects.awq import Part
from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.dialects.form import Canonical, Naming, Quantized, ReadBytes, Written, grouped, wrong
from modelopt_convert.dialects.nunchaku import W4A4, W4A16, Bias, BiasInTurns, SideBySide
from modelopt_convert.dialects.nunchaku_tiles import GROUP, RANK, TILE
from modelopt_convert.families.nunchaku import MODELS, Linear, Nunchaku, nunchaku_of
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.run.errors import InputError

_AGAIN = "get the file again from its publisher"
_HALF = ("BF16", "F16")
# Files from before the engine's Python modules have other words for the same tensors.
_ROLES = {
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
    "lora_down": "proj_down",
    "lora_up": "proj_up",
}
_W4A4 = ("qweight", "wscales", "smooth_factor")
_W4A16 = ("qweight", "wscales", "wzeros")
_MAY = {"bias", "smooth_factor_orig", "proj_down", "proj_up", "wtscale", "wcscales"}


@dataclass(frozen=True, slots=True)
class Undone(Quantized):
    """A module of nunchaku: its ``weight`` is F32 [N, K], the values that the engine multiplies by.

    Attributes:
        smooth: What inputs are divided by before the 4-bit product, in the engine's order, for each stretch of columns;
            none of AWQ's.
        original: What they were divided by when the weights were quantized, likewise. The quotient by ``smooth`` has
            become a part of the module before, as that of the rows of v where an attention's output is smoothed.
        after: ``smooth`` and ``original`` of the module that takes the rows of this one as its columns, if there is
            one.
    """

    smooth: tuple[TensorInfo, ...] = ()
    original: tuple[TensorInfo, ...] = ()
    after: tuple[TensorInfo, TensorInfo] | None = None


@dataclass(frozen=True, slots=True)
class _Whole:
    """A quantized module of the file, by the engine's name."""

    linear: Linear
    weight: W4A4 | W4A16
    roles: Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class _NunchakuForm:
    name: str = "nunchaku"
    naming: Naming = "diffusers"

    def read(
        self, headers: Headers, read: ReadBytes, true_shapes: Mapping[str, tuple[int, int]], where: str
    ) -> Canonical:
        """Describe a checkpoint under diffusers' names, which it does not have; the rest is as ``Form`` says."""
        groups = grouped(headers.tensors.values())
        model = nunchaku_of(groups)
        if model is None:
            known = ", ".join(one.family.title for one in MODELS)
            raise InputError(
                f"{where}: expected a checkpoint of nunchaku of {known}, found other modules "
                f"({next(iter(headers.ending('.qweight')), 'none')!r} for one)",
                code="naming.unknown_model",
                path=where,
                hint="of nunchaku mopt converts these models alone",
            )
        tensors: dict[str, TensorInfo] = {}
        fates: dict[str, str] = {}
        wholes: dict[str, dict[int, _Whole]] = {}
        for module, roles in groups.items():
            linear = model.linear(module)
            if linear is None or (linear.plain and "qweight" not in roles):
                for info in roles.values():
                    for one in _plain(info, module, linear, model, where):
                        _add(tensors, one, info, where)
                    fates[info.name] = f"read as {', '.join(_names(info, module, linear, model))}"
                continue
            whole = _Whole(linear, *_checked(module, roles, linear, model, where))
            fates |= _fates(whole)
            for member in linear.members:
                wholes.setdefault(member, {})[linear.columns] = whole
        _check_alike([one for parts in wholes.values() for one in parts.values()], headers, where)
        modules: dict[str, Undone] = {}
        for member, parts in wholes.items():
            quantized, found = _member(member, parts, where)
            modules[member] = quantized
            for one in found:
                _add(tensors, one, next(iter(parts.values())).roles["qweight"], where)
        return Canonical(tensors, _with_after(modules, model), fates, _config(headers, model))

    def write(self, described: Canonical, read: ReadBytes) -> Written:
        raise InputError(
            "nothing is written for nunchaku",
            code="convert.no_place",
            hint="its own tools make its files",
        )


FORM = _NunchakuForm()


def _check_alike(wholes: Collection[_Whole], headers: Headers, where: str) -> None:
    """Refuse a module that lacks what others of its kind have: the engine would take it for 1 or for nothing.

    Raises:
        InputError: ``dialect.unscaled``, or ``dialect.contradiction``: the header says another kind of weight.
    """
    packed = [(one.roles, one.weight.is_nvfp4) for one in wholes if isinstance(one.weight, W4A4)]
    for role in ("wtscale", "wcscales", "proj_down"):
        alike = [roles for roles, is_nvfp4 in packed if is_nvfp4 or role == "proj_down"]
        lacking = list(dict.fromkeys(roles["qweight"].name for roles in alike if role not in roles))
        if lacking and any(role in roles for roles in alike):
            raise InputError(
                f"{where}: expected {role} beside each 4-bit weight, as others have, found none",
                code="dialect.unscaled",
                path=where,
                hint=f"the file is damaged: {_AGAIN}",
            ).at(lacking)
    weight = headers.quantization().get("weight")
    said = str(weight.get("dtype", "")) if isinstance(weight, dict) else ""
    for roles, is_nvfp4 in packed:
        if said.startswith("int4" if is_nvfp4 else "fp4"):
            expected = f"the scales of {said}, as the header says"
            raise wrong(where, roles["wscales"], expected, code="dialect.contradiction", hint=_AGAIN)


def _config(headers: Headers, model: Nunchaku) -> dict[str, object]:
    """config.json with the class of diffusers that the engine's is made of."""
    config = {key: value for key, value in headers.config.items() if key != "quantization_config"}
    if config.get("_class_name") in model.class_names:
        config["_class_name"] = model.family.class_names[0]
    return config


def _names(info: TensorInfo, module: str, linear: Linear | None, model: Nunchaku) -> list[str]:
    """The names in diffusers of a tensor that is not quantized."""
    role = info.name.rpartition(".")[2]
    if not module:
        return [info.name]
    return [f"{one}.{role}" for one in (linear.members if linear is not None else (model.plain(module),))]


def _plain(info: TensorInfo, module: str, linear: Linear | None, model: Nunchaku, where: str) -> list[TensorInfo]:
    """A tensor that is not quantized, under diffusers' names.

    Raises:
        InputError: ``naming.unknown``, or ``dialect.shape``: the rows cannot be those of several modules.
    """
    names = _names(info, module, linear, model)
    if any(model.family.native_tensor(one, "diffusers") is None for one in names):
        raise InputError(
            f"{inside(where, info.file)}: tensor {info.name!r}: nunchaku has no tensor of this name in "
            f"{model.family.title}",
            code="naming.unknown",
            path=inside(where, info.file),
            hint="get the file again from its publisher; a LoRA stays beside it, and is not converted",
        )
    if len(names) == 1:
        return [renamed(info, names[0])]
    if not info.shape or info.shape[0] % len(names):
        raise wrong(where, info, f"rows of {len(names)} modules", code="dialect.shape", hint=_AGAIN)
    rows = info.shape[0] // len(names)
    return [rows_of(info, one, which * rows, rows) for which, one in enumerate(names)]


def _checked(
    module: str, stored: Mapping[str, TensorInfo], linear: Linear, model: Nunchaku, where: str
) -> tuple[W4A4 | W4A16, dict[str, TensorInfo]]:
    """The weight of a quantized module, and its tensors by the words of the engine's Python modules.

    Raises:
        InputError: ``dialect.role`` or ``dialect.shape``.
    """
    roles: dict[str, TensorInfo] = {}
    for role, info in stored.items():
        if _ROLES.get(role, role) in roles:
            raise wrong(where, info, "it once", code="dialect.role", hint=_AGAIN)
        roles[_ROLES.get(role, role)] = info
    needed = _W4A16 if linear.parts else _W4A4
    allowed = {*needed, "bias"} if linear.parts else {*needed, *_MAY}
    odd = next((info for role, info in roles.items() if role not in allowed), None)
    missing = next((role for role in (*needed, *["bias"] * model.biased) if role not in roles), None)
    if odd is None and not model.biased:
        odd = roles.get("bias")
    if odd is not None or missing is not None:
        kind = "AWQ W4A16" if linear.parts else "SVDQuant W4A4"
        shown = odd or next(iter(roles.values()))
        expected = f"{', '.join(needed)} of {kind}, as nunchaku has of this module"
        expected += f"; {missing} is missing" if missing is not None else ", and not this beside"
        raise wrong(where, shown, expected, code="dialect.role", hint=_AGAIN)
    return (_w4a16 if linear.parts else _w4a4)(roles, linear, where), roles


def _w4a4(roles: Mapping[str, TensorInfo], linear: Linear, where: str) -> W4A4:
    weight, scales = roles["qweight"], roles["wscales"]
    rows, half = weight.shape if len(weight.shape) == 2 else (0, 0)
    columns = half * 2
    if weight.dtype != "I8" or not rows or not columns or rows % TILE or columns % TILE:
        expected = f"I8 [N, K/2], N and K multiples of {TILE}"
        raise wrong(where, weight, expected, code="dialect.shape", hint=_AGAIN)
    if rows % len(linear.members):
        raise wrong(where, weight, f"rows of {len(linear.members)} modules", code="dialect.shape", hint=_AGAIN)
    is_nvfp4 = scales.dtype == "F8_E4M3"
    group = BLOCK_SIZE if is_nvfp4 else GROUP
    if not is_nvfp4:
        _check(scales, (columns // group, rows), where)
    elif scales.shape != (columns // group, rows):
        raise wrong(where, scales, f"{[columns // group, rows]}", code="dialect.shape", hint=_AGAIN)
    for role in ("smooth_factor", "smooth_factor_orig"):
        if role in roles:
            _check(roles[role], (columns,), where)
    for role in ("bias", "wcscales"):
        if role in roles:
            _check(roles[role], (rows,), where)
    factor, by_row = roles.get("wtscale"), roles.get("wcscales")
    beside = factor or by_row
    if beside is not None and not is_nvfp4:
        raise wrong(where, beside, "it beside NVFP4 alone, and wscales is INT4's", code="dialect.role", hint=_AGAIN)
    if factor is not None and (factor.dtype not in (*_HALF, "F32") or factor.shape not in ((), (1,))):
        raise wrong(where, factor, "one number in F32, BF16 or F16", code="dialect.shape", hint=_AGAIN)
    return W4A4(
        rows,
        columns,
        recipe_of(weight),
        _part(scales),
        _part(roles["smooth_factor"]),
        _part(factor) if factor is not None else None,
        _part(by_row) if by_row is not None else None,
        _low_rank(roles, rows, columns, where),
    )


def _low_rank(roles: Mapping[str, TensorInfo], rows: int, columns: int, where: str) -> tuple[Part, Part] | None:
    down, up = roles.get("proj_down"), roles.get("proj_up")
    if down is None or up is None:
        if (one := down or up) is not None:
            raise wrong(where, one, "both low-rank parts or none", code="dialect.role", hint=_AGAIN)
        return None
    if down.shape == (columns, 0) and up.shape == (rows, 0):
        return None
    rank = down.shape[1] if len(down.shape) == 2 else 0
    if not rank or rank % RANK:
        raise wrong(where, down, f"[{columns}, R], R a multiple of {RANK}", code="dialect.shape", hint=_AGAIN)
    _check(down, (columns, rank), where)
    _check(up, (rows, rank), where)
    return _part(down), _part(up)


def _w4a16(roles: Mapping[str, TensorInfo], linear: Linear, where: str) -> W4A16:
    weight = roles["qweight"]
    fours, half = weight.shape if len(weight.shape) == 2 else (0, 0)
    rows, columns = fours * 4, half * 2
    if weight.dtype != "I32" or not rows or not columns or rows % linear.parts or columns % GROUP:
        expected = f"I32 [N/4, K/2], N a multiple of {linear.parts} and K of {GROUP}"
        raise wrong(where, weight, expected, code="dialect.shape", hint=_AGAIN)
    for role in ("wscales", "wzeros"):
        _check(roles[role], (columns // GROUP, rows), where)
    if "bias" in roles:
        _check(roles["bias"], (rows,), where)
    return W4A16(rows, columns, linear.parts, recipe_of(weight), _part(roles["wscales"]), _part(roles["wzeros"]))


def _check(info: TensorInfo, shape: tuple[int, ...], where: str) -> None:
    if info.dtype not in _HALF or info.shape != shape:
        raise wrong(where, info, f"{list(shape)} in BF16 or F16", code="dialect.shape", hint=_AGAIN)


def _part(info: TensorInfo) -> Part:
    return Part(recipe_of(info), info.dtype)


def _fates(whole: _Whole) -> dict[str, str]:
    """What becomes of the tensors of a quantized module."""
    weights = ", ".join(f"{one}.weight" for one in whole.linear.members)
    fates = {info.name: f"decoded into {weights}" for info in whole.roles.values()}
    biases = f"read as {', '.join(f'{one}.bias' for one in whole.linear.members)}"
    if isinstance(whole.weight, W4A16):
        biases += ", without the 1 that was added to the scales"
    elif whole.linear.shifted and not whole.weight.is_nvfp4:
        biases += ", without the shift of the inputs"
    told = {"bias": biases, "smooth_factor_orig": "left out: nunchaku does not look at it"}
    return fates | {whole.roles[role].name: words for role, words in told.items() if role in whole.roles}


def _member(member: str, parts: Mapping[int, _Whole], where: str) -> tuple[Undone, list[TensorInfo]]:
    """A module of diffusers: its description, its weight, and its bias if it has one.

    Raises:
        InputError: ``naming.partial``, or ``dialect.shape``: the modules whose columns it joins do not fit together.
    """
    wholes = [parts[number] for number in sorted(parts)]
    linear, first = wholes[0].linear, wholes[0].roles["qweight"]
    if len(wholes) != linear.stretches:
        raise InputError(
            f"{inside(where, first.file)}: {member!r} is made of {linear.stretches} modules of nunchaku, "
            f"found {first.name!r} alone",
            code="naming.partial",
            path=inside(where, first.file),
            hint="the checkpoint is not whole",
        )
    weights, rows = [one.weight for one in wholes], wholes[0].weight.rows
    side = [one for one in weights if isinstance(one, W4A4)]
    for one in wholes[1:]:
        if one.weight.rows != rows:
            expected = f"{rows} rows, as {first.name!r} has"
            raise wrong(where, one.roles["qweight"], expected, code="dialect.shape", hint=_AGAIN)
    columns = sum(one.columns for one in weights)
    recipe = weights[0] if len(weights) == 1 else SideBySide(rows, tuple(side))
    found = [made(f"{member}.weight", "F32", (rows, columns), recipe, first.file)]
    biases = [one.roles["bias"] for one in wholes if "bias" in one.roles]
    if biases:
        _check_dtype(biases, where)
        found.append(made(f"{member}.bias", biases[0].dtype, (rows,), _bias(wholes, rows), first.file))
    each = rows // len(linear.members)
    if each != rows:
        begin = linear.members.index(member) * each
        found = [rows_of(one, one.name, begin, each) for one in found]
    packed = [one.roles for one in wholes if "smooth_factor" in one.roles]
    smooth = tuple(roles["smooth_factor"] for roles in packed)
    original = tuple(roles.get("smooth_factor_orig", roles["smooth_factor"]) for roles in packed)
    return Undone("nunchaku", each, columns, smooth, original), found


def _with_after(modules: Mapping[str, Undone], model: Nunchaku) -> dict[str, Undone]:
    """The modules, each with the smoothing of the one that takes its rows."""
    found: dict[str, Undone] = {}
    for name, one in modules.items():
        after = modules.get(model.smoothed_by(name) or "")
        pair = (after.smooth[0], after.original[0]) if after is not None and after.smooth else None
        found[name] = replace(one, after=pair)
    return found


def _bias(wholes: list[_Whole], rows: int) -> Bias | BiasInTurns:
    parts: list[tuple[Part, W4A4 | None]] = []
    for one in wholes:
        part = _part(one.roles["bias"])
        if isinstance(one.weight, W4A16):
            return BiasInTurns(part, rows, one.weight.parts)
        parts.append((part, one.weight if one.linear.shifted and not one.weight.is_nvfp4 else None))
    return Bias(tuple(parts), rows)


def _check_dtype(biases: list[TensorInfo], where: str) -> None:
    odd = next((one for one in biases if one.dtype != biases[0].dtype), None)
    if odd is not None:
        raise wrong(where, odd, f"{biases[0].dtype}, as of {biases[0].name!r}", code="dialect.shape", hint=_AGAIN)


def _add(tensors: dict[str, TensorInfo], made_of: TensorInfo, info: TensorInfo, where: str) -> None:
    """Place a tensor under its name.

    Raises:
        InputError: ``naming.twice``.
    """
    if made_of.name in tensors:
        raise InputError(
            f"{inside(where, info.file)}: tensor {info.name!r} and another are both {made_of.name!r} in "
            "diffusers' naming",
            code="naming.twice",
            path=inside(where, info.file),
            hint="two checkpoints are mixed in one file; get it again from its publisher",
        )
    tensors[made_of.name] = made_of
