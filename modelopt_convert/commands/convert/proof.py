"""Two proofs: SOURCE is its base, quantized; what was written is SOURCE. No torch before weights are read."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from threading import Event

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.commands.command import Warned
from modelopt_convert.commands.requests import ConvertRequest
from modelopt_convert.commands.rewrite.proof import Refusal, Rewritten, prove_rewritten, refuse_unproven
from modelopt_convert.dialects.awq import is_transformed
from modelopt_convert.dialects.comfyui_form import UNSCALED
from modelopt_convert.dialects.comfyui_markers import SILENT
from modelopt_convert.dialects.form import SCALES, Canonical, ReadBytes, value_of
from modelopt_convert.dialects.source import Source
from modelopt_convert.families.blocks import lacking
from modelopt_convert.formats.table import FORMATS, declares_dynamic_inputs
from modelopt_convert.run.errors import CheckFailedError, Faults, InputError
from modelopt_convert.run.text import few
from modelopt_convert.run.workers import in_order, until

_NAN = {"F8_E4M3": b"\x7f\xff", "U8": b"\xff"}  # the bytes of a block scale that is no number
_REFUSAL = Refusal(
    "lie in another layout than the dialect's",
    "`mopt inspect SOURCE --base BASE` says how; swap-nibbles or unswizzle-scales puts a ModelOpt file right",
    "it is converted unproven",
)
_SHOWN = 10
_ALIKE = 0.9  # of two names
_PIECE = 1 << 20  # bytes of both sides are in a core's cache when they are compared


@dataclass(slots=True)
class Compared:
    """What the comparison found.

    Attributes:
        tensors: Tensors compared.
        equal: Those among them that are equal.
        num_bytes: Their bytes.
        failures: What differs, in words.
        nan_scales: Block scales among which is a NaN.
    """

    tensors: int = 0
    equal: int = 0
    num_bytes: int = 0
    failures: list[str] = field(default_factory=list)
    nan_scales: list[str] = field(default_factory=list)


def compare(
    source: CheckpointReader, wanted: Canonical, output: CheckpointReader, found: Canonical, workers: int
) -> Compared:
    """Compare two descriptions by all bytes.

    Args:
        source: The opened source.
        wanted: What the plan announced that a reader of the output finds.
        output: What was written, opened.
        found: Its description, by the reader of its own dialect.
        workers: Tensors that are compared at a time.
    """
    done = Compared()
    for name in sorted(wanted.tensors.keys() ^ found.tensors.keys()):
        done.failures.append(f"tensor {name!r}: {'not written' if name in wanted.tensors else 'invented'}")

    def differs(name: str, stopped: Event) -> str | None:
        return _difference(source, wanted.tensors[name], output, found.tensors[name], stopped, done.nan_scales)

    both = sorted(wanted.tensors.keys() & found.tensors.keys())
    for name, fault in zip(both, in_order(both, differs, workers), strict=True):
        done.tensors += 1
        done.num_bytes += found.tensors[name].num_bytes
        if fault is None:
            done.equal += 1
        else:
            done.failures.append(f"tensor {name!r}: {fault}")
    if wanted.modules != found.modules:
        odd = sorted(
            name
            for name in wanted.modules.keys() | found.modules.keys()
            if wanted.modules.get(name) != found.modules.get(name)
        )
        done.failures.append(f"module {odd[0]!r}: {wanted.modules.get(odd[0])} became {found.modules.get(odd[0])}")
    if not done.tensors and not done.failures:
        done.failures.append("nothing was written that could be compared")
    return done


def _difference(
    source: CheckpointReader,
    left: TensorInfo,
    output: CheckpointReader,
    right: TensorInfo,
    stopped: Event,
    nan_scales: list[str],
) -> str | None:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return f"{left.dtype} {list(left.shape)} became {right.dtype} {list(right.shape)}"
    ours, theirs = bytearray(), bytearray()
    nan = _NAN.get(right.dtype, b"") if right.name.endswith(".weight_scale") else b""
    has_nan = False
    for begin in until(stopped, range(0, left.num_bytes, _PIECE)):
        count = min(_PIECE, left.num_bytes - begin)
        if len(ours) != count:  # else the buffers serve again
            ours, theirs = bytearray(count), bytearray(count)
        source.read_of_into(left, begin, memoryview(ours))
        output.read_of_into(right, begin, memoryview(theirs))
        if ours != theirs:
            return f"differs within bytes {begin} to {begin + count}"
        has_nan = has_nan or any(one in theirs for one in nan)
    if has_nan:
        nan_scales.append(right.name)
    return None


def check_whole(described: Canonical, base: CheckpointReader, where: str, told: Collection[str]) -> None:
    """Require that SOURCE and base have the same tensors, beside what quantization adds.

    Args:
        described: Of SOURCE, under diffusers' names.
        base: The base, under the same.
        where: SOURCE, for messages.
        told: Modules of which something else is wrong: nothing is said of these.

    Raises:
        InputError: ``export.missing_tensor`` or ``base.missing_tensor``.
    """
    names = _unquantized_names(described)
    faults = Faults()
    missing = sorted(name for name in base.tensors.keys() - names if module_of(name) not in told)
    extra = sorted(names - base.tensors.keys())
    renamed = _renamed(missing, extra)
    if renamed:
        pairs = ", ".join(f"{theirs!r} in place of {own!r}" for own, theirs in list(renamed.items())[:_SHOWN])
        fault = InputError(
            f"{where}: expected the tensor names of the base, found {len(renamed)} others: {pairs} (base: {base.path})",
            code="export.missing_tensor",
            path=where,
            hint="give these tensors the names of the base, or get the checkpoint again",
        )
        faults.add("", fault.at([*renamed, *renamed.values()]))
    if missing := [name for name in missing if name not in renamed]:
        fault = InputError(
            f"{where}: expected every tensor of the base, found {len(missing)} missing (base: {base.path})",
            code="export.missing_tensor",
            path=where,
            hint="the checkpoint is incomplete, or was made from another base: get it again, or give that base",
        )
        faults.add("", fault.at(missing))
    if extra := [name for name in extra if name not in renamed.values()]:
        fault = InputError(
            f"{base.path}: expected every tensor of {where}, found {len(extra)} missing",
            code="base.missing_tensor",
            path=str(base.path),
            hint="give the base that the checkpoint was made from, whole",
        )
        faults.add("", fault.at(extra))
    faults.refuse()


def _renamed(missing: Sequence[str], extra: Sequence[str]) -> dict[str, str]:
    """Which of the names that the base does not have stand for names of the base: few, and each like one alone."""
    from difflib import get_close_matches  # only where names differ

    if not missing or len(missing) != len(extra) or len(missing) > _SHOWN:
        return {}
    found = {name: get_close_matches(name, extra, n=1, cutoff=_ALIKE) for name in missing}
    pairs = {name: one[0] for name, one in found.items() if one}
    return pairs if len(set(pairs.values())) == len(missing) else {}


def check_blocks(source: Source, where: str) -> None:
    """Require that no block, and no tensor of one, is missing, as far as config and the other blocks tell.

    Raises:
        InputError: ``export.missing_tensor``.
    """
    found = lacking(source.found.family, _unquantized_names(source.described), source.described.config)
    if found is not None:
        raise InputError(
            f"{where}: expected all blocks of {source.found.family.title}, found {found}",
            code="export.missing_tensor",
            path=where,
            hint="the checkpoint is incomplete: get it again, whole",
        )


def _unquantized_names(described: Canonical) -> set[str]:
    """The tensors that the model has without quantization too."""
    return {
        name
        for name, info in described.tensors.items()
        if not (
            (module_of(name) in described.modules and info.name.rpartition(".")[2] in SCALES)
            or is_transformed({name.rpartition(".")[2]: info})
        )
    }


def unusable_scales(described: Canonical, read: ReadBytes) -> list[Warned]:
    """A warning of scales of one number that are zero or negative; values that are not finite are found in writing."""
    found = [
        info.name
        for info in described.tensors.values()
        if info.dtype == "F32" and not info.shape and info.name.rpartition(".")[2] in SCALES
        if math.isfinite(value := value_of(info, read)) and value <= 0
    ]
    if not found:
        return []
    words = f"{len(found)} scales are zero or negative ({found[0]!r} first): engines compute with them as they are"
    return [("scale.unusable", words)]


def unscaled(described: Canonical) -> list[Warned]:
    """A warning of FP8 weights that have no scale."""
    found = [name for name, fate in described.fates.items() if fate == UNSCALED]
    if not found:
        return []
    words = f"{len(found)} FP8 weights have no scale ({found[0]!r} first): the codes are taken for the values"
    return [("convert.unscaled", words)]


def silent_markers(described: Canonical) -> list[Warned]:
    """A warning of ComfyUI's markers that name no format."""
    found = {name: fate for name, fate in described.fates.items() if fate.startswith(SILENT)}
    if not found:
        return []
    name, fate = min(found.items())
    words = (
        f"{len(found)} markers of quantized modules name no format ({name!r} first: {fate.removeprefix('left out: ')})"
    )
    return [("dialect.no_format", f"{words}; ComfyUI has one layout of each format, and --base proves it")]


def uncalibrated(described: Canonical, expected: Canonical) -> list[Warned]:
    """A warning of modules without an input scale, in formats that may have one; not where SOURCE says so."""
    if declares_dynamic_inputs({"quantization_config": described.quantization}):
        return []
    due = [
        name
        for name, one in described.modules.items()
        if one.algorithm in FORMATS and not (one.algorithm == "fp8" and described.tensors[f"{name}.weight_scale"].shape)
    ]
    # A record may give back what the file at hand has no place for.
    known = described.tensors.keys() | expected.tensors.keys()
    lacking = [name for name in due if f"{name}.input_scale" not in known]
    if not lacking:
        return []
    never = ", never calibrated" if described.quantization.get("quant_method") == "modelopt" else ""
    words = f"{len(lacking)} of {len(due)} modules of SOURCE have no input_scale{never} ({few(lacking)})"
    return [("convert.dynamic_inputs", f"{words}: nothing in the file scales their inputs, engines do it as they come")]


def no_proof(described: Canonical) -> str | None:
    """Why a description cannot be proven against a base; None if it can."""
    algorithms = {one.algorithm for one in described.modules.values()}
    if not algorithms:
        return "not proven: nothing is quantized"
    if len(algorithms) > 1:
        return f"not proven: several formats ({', '.join(sorted(algorithms))})"
    if not algorithms <= FORMATS.keys():
        return f"not proven: there is no proof of {min(algorithms)}"
    by_row = [name for name in described.modules if _has_rows(described.tensors.get(f"{name}.weight_scale"))]
    if by_row and algorithms == {"fp8"}:
        return f"not proven: there is no proof of one scale a row ({by_row[0]} first)"
    return None


def _has_rows(info: TensorInfo | None) -> bool:
    return info is not None and bool(info.shape)


def prove_source(
    reader: CheckpointReader,
    described: Canonical,
    base: CheckpointReader,
    request: ConvertRequest,
    told: Collection[str],
) -> Rewritten:
    """Prove every byte of every quantized module of SOURCE, and every other tensor, against the base.

    Args:
        reader: The source; it presents what it did before once this returns.
        described: Its description.
        base: The base.
        request: What is asked for.
        told: Modules and tensors of which something else is wrong: nothing is said of these.

    Raises:
        CheckFailedError: ``check.proof``.
    """
    from modelopt_convert.proof.judgement import format_proof

    tensors, config = reader.tensors, reader.config
    (algorithm,) = {one.algorithm for one in described.modules.values()}
    target = FORMATS[algorithm]  # one of them, or no proof would be asked for
    keys: dict[str, object] = {"quant_method": "modelopt", "quant_algo": target.quant_algo}
    given = {name for name in described.tensors if name.endswith(".input_scale")}
    is_whole = len(given) == len(described.modules)
    # The base tells no input scale: modules that have one are proven like those that have none.
    keys |= {} if is_whole else {"dynamic_input_scale": True}
    shown = {name: one for name, one in described.tensors.items() if is_whole or name not in given}
    try:
        reader.present(shown)
        reader.config = {**described.config, "quantization_config": {**keys, **target.declared}}
        found = prove_rewritten(reader, base, request)
    finally:
        reader.present(tensors)
        reader.config = config
    found = found.but_for(told)
    _refuse_rounded(described, found, str(reader.path), accept_near=request.accept_near)
    refuse_unproven(found, str(reader.path), _REFUSAL, accept_near=request.accept_near)
    return replace(found, report=found.report.model_copy(update={"method": format_proof(target.algorithm).method}))


def _refuse_rounded(described: Canonical, found: Rewritten, where: str, *, accept_near: bool) -> None:
    """Say it in one line where codes do not fit the base because the scales that they were made under are rounded.

    Raises:
        CheckFailedError: ``check.proof``.
    """
    rounded = [
        name
        for name, info in described.keep.items()
        if info.dtype in ("BF16", "F16") and name.endswith((".weight_scale", ".scale_weight", ".weight_scale_2"))
    ]
    wrong = [*found.wrong, *([] if accept_near else found.near)]
    modules = {one.partition(": ")[0] for one in wrong}
    if not rounded or not wrong or found.misdeclared or not modules <= described.modules.keys():
        return
    dtype = described.keep[rounded[0]].dtype
    fault = CheckFailedError(
        f"{where}: {len(rounded)} scales are rounded to {dtype} ({rounded[0]!r} first), so that {len(modules)} of "
        f"{len(described.modules)} modules no longer decode to what quantizing the base gives",
        code="check.proof",
        path=where,
        hint="get the file with its scales in F32. Without --base it is converted unproven. Nothing was published",
    )
    raise fault.at(sorted(modules))
