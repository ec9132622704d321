"""L2 without a base: a digest of some decoded rows, which can be compared across machines. No torch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from threading import Event

import xxhash

from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.layout import Layout
from modelopt_convert.formats.rows import SAMPLED_ROWS, sample_rows
from modelopt_convert.report.verify import LevelReport, LevelStatus, ModuleVerify
from modelopt_convert.run.errors import InputError
from modelopt_convert.run.workers import in_order, small_calls
from modelopt_convert.verification.levels.container import stored_format
from modelopt_convert.verification.options import VerifyOptions
from modelopt_convert.verification.subject import Subject


@dataclass(frozen=True, slots=True)
class Decoded:
    """What the level found.

    Attributes:
        level: Its entry in the report.
        modules: By name; one that cannot be read has its shape alone.
        readings: The layout under which each NVFP4 module fits the base.
        proof: Whether the checkpoint is proven by its bytes, in words; empty without a base.
    """

    level: LevelReport
    modules: dict[str, ModuleVerify]
    readings: dict[str, Layout]
    proof: str


def decode_alone(subject: Subject, options: VerifyOptions, told_of: Collection[str]) -> Decoded:
    """Decode some rows of every module that can be read, and compare nothing.

    Args:
        subject: The checkpoint.
        options: How many rows, on how many threads.
        told_of: Modules of which L0 says why they cannot be right: the level fails, and does not say it again.
    """
    modules = {name: ModuleVerify(shape=[one.rows, one.columns]) for name, one in subject.modules.items()}
    failures = digest_modules(subject, modules, options)
    told = [words for name, words in failures.items() if name not in told_of]
    status: LevelStatus = "fail" if failures else "skipped"
    reason = "without a base values are decoded, not compared"
    level = LevelReport(level="L2", title="decode", status=status, reason=reason, failures=told)
    return Decoded(level, modules, {}, "")


def digest_modules(subject: Subject, modules: Mapping[str, ModuleVerify], options: VerifyOptions) -> dict[str, str]:
    """Note the digest of some decoded rows of each module; what is wrong with modules that cannot be decoded.

    The digest is of the rows in float32, without the scale of the tensor: exact, and so the same everywhere.
    """
    rules = stored_format(subject.format.algorithm)

    def digested(module: PackedModule, _stopped: Event) -> str | None:
        found, rows = modules[module.name], sample_rows(module.rows, options.sample or SAMPLED_ROWS)
        try:
            with small_calls():
                found.digest = xxhash.xxh3_128_hexdigest(rules.decoded(subject, module, rows).data)
        except (InputError, ValueError) as error:
            found.worsen("fail")
            return str(error) if module.name in str(error) else f"{module.name}: {error}"
        return None

    due = [module for module in subject.modules.values() if module.has_weight]
    answers = zip(due, in_order(due, digested, options.workers), strict=True)
    return {module.name: words for module, words in answers if words is not None}
