"""L2: decoded values against the base, and a digest of them that can be compared across machines.

A single flipped bit is seen where the codes are reproduced, by the identity probe and by the digests, and nowhere else.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from threading import Event

import torch
import xxhash

from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.packed import PackedModule, is_layout_marker, is_quantizer_state
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.formats.layout import Layout
from modelopt_convert.formats.rows import SAMPLED_ROWS, sample_rows
from modelopt_convert.formats.tensor_bytes import to_bytes
from modelopt_convert.proof.closeness import closeness
from modelopt_convert.proof.judgement import Judgement, format_proof
from modelopt_convert.proof.tensors import common_dtype, load_rows, tensor_scale
from modelopt_convert.proof.unquantized import same_up_to_cast
from modelopt_convert.report.report import QUANTIZED_HERE
from modelopt_convert.report.verify import LevelReport, LevelStatus, ModuleVerify
from modelopt_convert.run.errors import InputError
from modelopt_convert.run.workers import in_order, until
from modelopt_convert.verification.subject import Subject

_NEARLY_ALL = 0.9
_DUE = ("reproduced", QUANTIZED_HERE)  # verdicts at build after which every code must be the base's
_TILE_VALUES = 1 << 21  # of a weight at a time: about a dozen float64 arrays of so many values are made


@dataclass(frozen=True, slots=True)
class Decoded:
    """What the level found.

    Attributes:
        level: Its entry in the report.
        modules: By name; one that cannot be read has its shape alone.
        readings: The layout under which each NVFP4 module fits the base.
    """

    level: LevelReport
    modules: dict[str, ModuleVerify]
    readings: dict[str, Layout]


def decode_level(
    subject: Subject,
    base: CheckpointReader | None,
    *,
    sample: int | None,
    max_error: float,
    expected: Mapping[str, str] | None,
    dequantized: Collection[str],
    workers: int,
    advance: Callable[[int], None],
) -> Decoded:
    """Judge every module that can be read.

    Args:
        subject: The checkpoint.
        base: Its base; without one values are only decoded.
        sample: Rows of each module; None for all.
        max_error: Limit of the relative error where codes are not reproduced.
        expected: Verdicts that were recorded at build, by module; None where nothing is known.
        dequantized: Modules that the record says were dequantized at build.
        workers: Modules judged at a time.
        advance: Called with the number of bytes just read.
    """
    modules = {name: ModuleVerify(shape=[one.rows, one.columns]) for name, one in subject.modules.items()}
    readings: dict[str, Layout] = {}
    common = common_dtype(subject.reader)

    def judged(module: PackedModule, stopped: Event) -> str | Layout | None:
        """What is wrong with it, or the reading under which it fits."""
        found, reading = modules[module.name], None
        try:
            with torch.inference_mode():  # of each thread
                tiles = list(_tiles(module, sample))
                found.digest = _digest(subject, module, tiles[0])
                if base is not None:
                    reading = _judge(subject, base, module, until(stopped, tiles), common, max_error, found, advance)
        except (InputError, ValueError) as error:
            found.worsen("fail")
            return str(error) if module.name in str(error) else f"{module.name}: {error}"
        return reading

    failures: list[str] = []
    due = [module for module in subject.modules.values() if module.fault is None]
    for module, answer in zip(due, in_order(due, judged, workers), strict=True):
        found = modules[module.name]
        if isinstance(answer, str):
            failures.append(answer)
            continue
        if answer is not None:
            readings[module.name] = answer
        if found.status == "fail":
            failures.append(
                f"{module.name}: {found.verdict} (relative error {found.relative_error:.3f}, gain {found.gain:.3f}, "
                f"worst row {found.worst_row:.3f}, worst column {found.worst_column:.3f})"
            )
    if base is not None:
        failures += _not_reproduced(modules, expected)
        failures += unlike_base(subject, base, dequantized, max_error, workers, advance)
    status: LevelStatus = "fail" if failures else "pass"
    reason = "" if base is not None else "without a base values are decoded, not compared"
    if base is None and not failures:
        status = "skipped"
    level = LevelReport(level="L2", title="decode", status=status, reason=reason, failures=failures)
    return Decoded(level, modules, readings)


def _not_reproduced(modules: dict[str, ModuleVerify], expected: Mapping[str, str] | None) -> list[str]:
    """Modules near the base that should be reproduced: by what is known of them, or since nearly all others are.

    Training, another quantizer and ``mtq.compress`` move codes in many modules; a flipped bit, or the scale of a
    sibling, in one.
    """
    reproduced = sum(one.verdict == "reproduced" for one in modules.values())
    failures = []
    for name, one in modules.items():
        due = expected.get(name) in _DUE if expected is not None else reproduced >= _NEARLY_ALL * len(modules)
        if one.verdict == "within limits" and due:
            one.worsen("fail")
            wrong = one.codes - one.codes_equal
            why = "it was reproduced at build" if expected is not None else f"{reproduced} modules are reproduced"
            failures.append(f"{name}: {wrong} of {one.codes} codes are not the base's, while {why}")
    return failures


def unlike_base(
    subject: Subject,
    base: CheckpointReader,
    dequantized: Collection[str],
    max_error: float,
    workers: int,
    advance: Callable[[int], None],
) -> list[str]:
    """Tensors of no packed module that are not those of the base, or that only one of both has, in words.

    Args:
        subject: The checkpoint.
        base: Its base.
        dequantized: Modules that a build dequantized for want of a base. Their weights cannot equal it: by sampled
            rows they must be as near as codes.
        max_error: Limit of the relative error of those.
        workers: Tensors compared at a time.
        advance: Called with the number of bytes just read.
    """
    mine = {name for name in subject.reader.tensors if not is_quantizer_state(name) and not is_layout_marker(name)} - {
        info.name for module in subject.modules.values() for info in module.scales.values()
    }
    failures = [f"{name}: the base has it, the checkpoint has not" for name in sorted(base.tensors.keys() - mine)]
    failures += [f"{name}: the checkpoint has it, the base has not" for name in sorted(mine - base.tensors.keys())]
    coded = {module.weight.name for module in subject.modules.values()}

    def compared(name: str, stopped: Event) -> str | None:
        info = subject.reader.tensors[name]
        if info.shape != base.tensors[name].shape:
            return f"{name}: {list(info.shape)}, the base's is {list(base.tensors[name].shape)}"
        with torch.inference_mode():  # of each thread
            same = same_up_to_cast(subject.reader, base, name, stopped)
            if not same and name.endswith(".weight") and module_of(name) in dequantized:
                same = _is_near(subject.reader, base, name, max_error)
        advance(info.num_bytes)
        # A trained bias of a quantized module survives a build, which warns of it.
        return None if same or module_of(name) in subject.modules else f"{name}: not the base's"

    answers = in_order(sorted((mine & base.tensors.keys()) - coded), compared, workers)
    return failures + [answer for answer in answers if answer is not None]


def _is_near(reader: CheckpointReader, base: CheckpointReader, name: str, max_error: float) -> bool:
    """Whether sampled rows of a weight lie within the limits for dequantized codes."""
    rows = sample_rows(reader.tensors[name].shape[0], SAMPLED_ROWS)
    mine, theirs = (load_rows(one, name, rows).to(torch.float64) for one in (reader, base))
    return closeness(theirs, mine).within(max_error)


def _tiles(module: PackedModule, sample: int | None) -> Iterator[list[int]]:
    if sample is not None:
        yield sample_rows(module.rows, sample)
        return
    height = max(1, _TILE_VALUES // module.columns)
    for top in range(0, module.rows, height):
        yield list(range(top, min(top + height, module.rows)))


def _judge(
    subject: Subject,
    base: CheckpointReader,
    module: PackedModule,
    tiles: Iterable[list[int]],
    common: str,
    max_error: float,
    found: ModuleVerify,
    advance: Callable[[int], None],
) -> Layout | None:
    info = base.tensors.get(module.weight.name)
    shape = (module.rows, module.columns)
    if info is None or info.shape != shape or info.dtype not in HALF_AND_FLOAT:
        what = "none" if info is None else f"{info.dtype} {list(info.shape)}"
        raise ValueError(f"{module.weight.name}: expected {list(shape)} in the base, found {what}")
    rules = format_proof(subject.format.algorithm)
    scale = tensor_scale(subject.reader, module, subject.format.tensor_scale)
    worst: Judgement | None = None
    for rows in tiles:
        one = rules.judge(subject.reader, base, module, common, scale, max_error, rows)
        found.codes += one.codes
        found.codes_equal += one.codes_equal
        if worst is None or (worst.passed, -worst.closeness.relative_error) > (
            one.passed,
            -one.closeness.relative_error,
        ):
            worst = one
        advance(len(rows) * module.columns * 3)
    assert worst is not None
    near = worst.closeness
    found.verdict = worst.verdict
    found.relative_error, found.gain = near.relative_error, near.gain
    found.worst_row, found.worst_column = near.worst_row, near.worst_column
    if near.relative_error > 0:
        found.sqnr_db = round(-20 * math.log10(near.relative_error), 2)
    found.worsen("pass" if worst.passed else "fail")
    return worst.reading


def _digest(subject: Subject, module: PackedModule, rows: list[int]) -> str:
    """Of the decoded rows in float32, without the scale of the tensor: exact, and so the same everywhere."""
    values = subject.operands(module, rows).decode(0, len(rows))
    return xxhash.xxh3_128_hexdigest(to_bytes(values.to(torch.float32)))
