"""From what was found to how the run ends: several transformers as one, and the exit code. No torch."""

import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence

from modelopt_convert.report.verify import LevelReport, Verdict, VerifyReport
from modelopt_convert.report.words import ALL_NEAREST, NEAR_WORDS, PROOFS
from modelopt_convert.run.errors import BackendError, CheckFailedError, InconclusiveError
from modelopt_convert.verification.gemm.names import ALIASES
from modelopt_convert.verification.options import VerifyOptions

_KERNEL = "the kernel is in question, not the checkpoint; try another --backend, or report it to the makers of this one"
# What misdeclared() of levels/layout.py says of a module.
_SWAPPED = re.compile(r"the even column is in the \w+ nibble, declared \w+")
_BELIEVED = re.compile(r" would read the (scales|\w+ nibble) as ")
_UNREADABLE = re.compile(r"scales \[[\d, ]+\] cannot be read as \w+")
_UNCALIBRATED = re.compile(r": (no|FP8 without) input_scale")  # what lint says of a module
_ORDERED = re.compile(r"the scales are (linear|128x4), declared \w+")

Place = tuple[str, CheckFailedError]
SEVERITY: tuple[Verdict, ...] = ("prewarmed", "pass", "inconclusive", "backend broken", "backends disagree", "fail")


def combine(found: dict[str, VerifyReport], checkpoint: str) -> VerifyReport:
    """Several transformers as one: names under their prefixes, the worst verdict, the weakest proof."""
    if list(found) == [""]:
        return found[""]
    prefix = max(found, key=lambda name: SEVERITY.index(found[name].verdict))
    first = found[prefix]
    levels: list[LevelReport] = []
    for name, one in found.items():
        for level in one.levels:
            named = {
                "title": f"{name}: {level.title}",
                "failures": [f"{name}{words}" for words in level.failures],
                "warnings": [f"{name}{words}" for words in level.warnings],
            }
            levels.append(level.model_copy(update=named))
    return first.model_copy(
        update={
            "checkpoint": checkpoint,
            "proof": max((one.proof for one in found.values()), key=PROOFS.index),
            "statement": "; ".join(f"{name}: {one.statement}" for name, one in found.items()),
            "levels": levels,
            "backends": [backend for one in found.values() for backend in one.backends],
            "modules": {f"{name}{module}": one for name, each in found.items() for module, one in each.modules.items()},
            "native_executed": "; ".join(f"{name}: {one.native_executed}" for name, one in found.items()),
        }
    )


def conclude(found: VerifyReport, options: VerifyOptions, base: str | None = None) -> None:
    """End with the code of the verdict.

    Args:
        found: What was found of one transformer.
        options: What was asked for.
        base: What it was compared with.

    Raises:
        CheckFailedError: ``check.verify``.
        BackendError: ``verify.backend``.
        InconclusiveError: ``verify.inconclusive`` or ``verify.required``.
    """
    where = found.checkpoint
    if found.verdict == "fail":
        raise CheckFailedError(
            f"{where}: {found.statement}",
            code="check.verify",
            path=where,
            hint=_rewrite(found, base) or _remedied(found),
        )
    if found.verdict in ("backend broken", "backends disagree"):
        raise BackendError(
            f"{where}: {found.verdict}: {found.statement}",
            code="verify.backend",
            path=where,
            hint=_KERNEL,
        )
    if found.verdict == "inconclusive":
        raise InconclusiveError(
            f"{where}: {found.statement}",
            code="verify.inconclusive",
            path=where,
            hint="give --base to prove it",
        )
    _require_named(found, options)
    kernels = [level for level in found.levels if level.level == "L3"]
    on_gpu = found.device is not None and found.device.capability is not None
    # A name may stand for two, of which one ran.
    native = {one.name for one in found.backends if one.kind == "native" and one.modules and on_gpu}
    ran = bool(kernels and found.modules) and all(level.status != "skipped" for level in kernels)
    all_native = all(native & one.probes.keys() for one in found.modules.values())
    if (options.require == "gpu" and not (ran and on_gpu)) or (
        options.require == "native" and not (ran and all_native)
    ):
        raise InconclusiveError(
            f"{where}: --require {options.require}: native kernels executed: {found.native_executed} modules",
            code="verify.required",
            path=where,
            hint="run it where the GPU and the kernels are",
        )


def failures_of(found: Mapping[str, VerifyReport], places: Mapping[str, Collection[str]]) -> Iterator[Place]:
    """What failed in several transformers, each failure with the module or tensor that it is about.

    Args:
        found: By prefix.
        places: Modules and tensors of each transformer, without their prefix.
    """
    for prefix, one in found.items():
        for words in (words for level in one.levels if level.status == "fail" for words in level.failures):
            name, where = words.partition(": ")[0], f"{one.checkpoint}: {prefix}{words}"
            failure = CheckFailedError(where, code="check.verify", path=one.checkpoint, hint=_remedied(one))
            yield f"{prefix}{name}" if name in places[prefix] else "", failure


def is_uncalibrated(levels: Sequence[LevelReport]) -> bool:
    """Whether nothing failed but that modules have no input scale, which says nothing of their weights."""
    failures = [words for level in levels if level.status == "fail" for words in level.failures]
    return bool(failures) and all(_UNCALIBRATED.search(words) for words in failures)


def _remedied(found: VerifyReport) -> str:
    """What to do about a checkpoint that failed for more than its layout."""
    uncalibrated = {words.partition(": ")[0] for words in found.level("L0").failures if _UNCALIBRATED.search(words)}
    if found.modules and uncalibrated == found.modules.keys():
        return "never calibrated: calibrate with real prompts and export again"
    near = [one for one in found.modules.values() if one.verdict == "near"]
    if found.proof == NEAR_WORDS and near and all(one.rule == ALL_NEAREST for one in near):
        return (
            "all codes are nearest, so scales were chosen by weighted errors: --calibration CALIB proves them where "
            "the build was given one; --accept-near passes what is not proven"
        )
    if found.proof == NEAR_WORDS:
        return (
            "the report names every module; the CALIB that it was built with, as --calibration, proves a build with "
            "--weights gptq; build or export it again, or --accept-near to pass what is not proven"
        )
    return "the report names every module; build or export it again"


def _rewrite(found: VerifyReport, base: str | None) -> str | None:
    """The command that mends a checkpoint of which nothing but the layout is wrong."""
    failed = {level.level for level in found.levels if level.status == "fail"}
    proven = failed == {"L1"}
    command = _remedy(found.level("L1"), found.modules) if proven or _follows(found, failed) else None
    if command is None or base is None:
        return None
    source = shlex.quote(found.checkpoint)
    output = shlex.quote(f"{found.checkpoint.removesuffix('.safetensors')}-right")
    against = f" --base {shlex.quote(base)}"
    what = "the values are the base's, and lie" if proven else "the scales lie"
    return f"{what} in another order: mopt {command} {source} {output}{against}"


def _follows(found: VerifyReport, failed: Collection[str]) -> bool:
    """Whether other levels than L1 fail for no other reason: engines and the decoder would read what is declared."""
    if "L1" not in failed or not {*failed} <= {"L0", "L1", "L2"}:
        return False
    modules = {failure.partition(": ")[0] for failure in found.level("L1").failures}
    return all(_BELIEVED.search(failure) for failure in found.level("L0").failures) and all(
        _UNREADABLE.fullmatch(words) and name in modules
        for name, _, words in (failure.partition(": ") for failure in found.level("L2").failures)
    )


def _remedy(level: LevelReport, modules: Collection[str]) -> str | None:
    """The command that brings a checkpoint into the layout that is declared; None where a rewrite does not do it.

    A rewrite is of all modules: where some of them lie as declared, it would move these out of place.

    Args:
        level: L1.
        modules: All that were compared.
    """
    names, faults = [], set[str]()
    for failure in level.failures:
        name, _, words = failure.partition(": ")
        names.append(name)
        faults.add(words)
    if len(faults) != 1 or sorted(names) != sorted(modules):
        return None
    words = faults.pop()
    if _SWAPPED.fullmatch(words):
        return "swap-nibbles"
    found = _ORDERED.fullmatch(words)
    return None if found is None else "unswizzle-scales" if found[1] == "128x4" else "unswizzle-scales --reverse"


def _require_named(found: VerifyReport, options: VerifyOptions) -> None:
    """A backend that was named must have run."""
    if options.backends in (("best",), ("all",)):
        return
    for name in (ALIASES.get(one, one) for one in options.backends):
        reports = [one for one in found.backends if one.name == name]
        if any(one.modules and one.status != "broken" for one in reports):
            continue
        broken = next((one for one in reports if one.status == "broken"), None)
        if broken is not None:
            raise BackendError(
                f"{name} {broken.reason}",
                code="verify.backend",
                hint=_KERNEL,
            )
        why = next((one.reason for one in reports), found.level("L3").reason)
        raise InconclusiveError(
            f"--backend {name} did not run: {why}",
            code="verify.required",
            hint="name one that runs here, or leave --backend out",
        )


def conclude_backends(found: VerifyReport, options: VerifyOptions) -> None:
    """End a self-test, or a run that built kernels, with the code of its verdict.

    Raises:
        InconclusiveError: ``verify.required``: a backend that was named did not run. ``verify.inconclusive``: none but
            the reference did.
        BackendError: ``verify.backend``: one is broken.
    """
    for name in options.backends if options.backends not in (("best",), ("all",)) else ():
        mine = [one for one in found.backends if one.name == ALIASES.get(name, name)]
        if all(one.status == "skipped" for one in mine):
            raise InconclusiveError(
                f"--backend {name} did not run: {mine[0].reason if mine else 'unknown'}",
                code="verify.required",
                hint="name one that runs here, or leave --backend out",
            )
    if found.verdict == "backend broken":
        raise BackendError(
            f"{found.verdict}: {found.statement}",
            code="verify.backend",
            hint="report it to the makers of the backend; --backend names another",
        )
    if found.verdict == "inconclusive":
        raise InconclusiveError(
            found.statement,
            code="verify.inconclusive",
            hint="run it where a backend runs that can be compared with the reference",
        )
