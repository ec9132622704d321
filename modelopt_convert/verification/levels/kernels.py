"""L3: every module through the GEMM of each backend, against the exact product of the same operands."""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.format import Algorithm
from modelopt_convert.report.verify import (
    AgreementReport,
    BackendReport,
    LevelReport,
    LevelStatus,
    ModuleVerify,
    ProbeReport,
)
from modelopt_convert.run.errors import InputError, first_line
from modelopt_convert.verification.gemm.backends import BACKENDS
from modelopt_convert.verification.gemm.backends.base import Backend
from modelopt_convert.verification.gemm.names import ALIASES
from modelopt_convert.verification.gemm.operands import Weight, random_activations
from modelopt_convert.verification.gemm.probes import (
    SWEEP,
    ProbeResult,
    identity_probe,
    poison_probe,
    random_probe,
    sweep_probe,
)
from modelopt_convert.verification.gemm.selftest import SHAPE, self_test
from modelopt_convert.verification.subject import Subject

Probe = Callable[..., ProbeResult]
_AHEAD = 2  # a GPU multiplies a module in less time than one thread takes to read the next


def choose(
    wanted: Sequence[str], preferred: str | None, algorithm: Algorithm, device: torch.device
) -> tuple[list[Backend], list[BackendReport]]:
    """The backends to run, and what became of every one that was asked for.

    Args:
        wanted: ``best``, ``all``, or names; aliases are known.
        preferred: What ``best`` takes if it runs.
        algorithm: The format.
        device: Where to run.
    """
    several = list(wanted) in (["all"], ["best"])
    names = {ALIASES.get(name, name) for name in wanted}
    named = [one for one in BACKENDS if several or one.name in names]
    # Where a name stands for several, those that take the format speak for it.
    taking = {one.name for one in named if algorithm in one.formats}
    candidates = [one for one in named if algorithm in one.formats or one.name not in taking]
    if preferred is None and _is_consumer_blackwell(device):  # where SGLang leaves the choice to flashinfer
        preferred = "flashinfer-auto"
    candidates.sort(key=lambda one: one.name != preferred)
    chosen: list[Backend] = []
    reports: list[BackendReport] = []
    for backend in candidates:
        why = f"does not take {algorithm.upper()}" if algorithm not in backend.formats else backend.unavailable(device)
        if why is not None:
            reports.append(BackendReport(name=backend.name, kind=backend.kind, status="skipped", reason=why))
            continue
        if list(wanted) == ["best"] and chosen:
            continue
        try:
            broken = self_test(backend, algorithm, device)
        except torch.OutOfMemoryError:  # of the GPU, which says nothing about the backend
            raise
        except Exception as error:  # whatever a kernel's library raises
            broken = f"raises on a layer known to be right: {first_line(error)}"
        if broken is not None:
            reports.append(BackendReport(name=backend.name, kind=backend.kind, status="broken", reason=broken))
            continue
        chosen.append(backend)
        reports.append(BackendReport(name=backend.name, kind=backend.kind, status="pass"))
    return chosen, reports


def _is_consumer_blackwell(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 12


def prewarm(
    subject: Subject, backends: Sequence[Backend], device: torch.device, advance: Callable[[int], None]
) -> None:
    """Multiply once for each shape, so that kernels which compile just in time are there before anything is timed.

    What a backend raises here it raises again, and is reported, when it is probed.
    """
    seen: set[tuple[int, int]] = set()
    for module in subject.modules.values():
        if module.fault is None and (module.rows, module.columns) not in seen:
            seen.add((module.rows, module.columns))
            for backend in backends:
                with contextlib.suppress(Exception):
                    weight = subject.operands(module).to(device)
                    activations = random_activations(weight, 1, device)
                    backend.gemm(backend.prepare(weight, poison=False), activations, 1.0, None)
        advance(sum(info.num_bytes for info in module.tensors))


def agreement(modules: Mapping[str, ModuleVerify], reports: Sequence[BackendReport]) -> list[AgreementReport]:
    """All pairs of native backends that ran: each equals the decoded weight bit for bit where both pass.

    So they equal each other there, and their random outputs lie within twice the limit of one another.
    """
    native = sorted({report.name for report in reports if report.kind == "native" and report.modules})
    found = []
    for left, right in itertools.combinations(native, 2):
        both = [one.probes for one in modules.values() if {left, right} <= one.probes.keys()]
        equal = sum(all(probes[name]["identity"].status == "pass" for name in (left, right)) for probes in both)
        found.append(AgreementReport(backends=[left, right], modules=len(both), bitwise_equal=equal))
    return found


@dataclass(slots=True)
class Kernels:
    """What was found of kernel parity so far: where a GPU fails, what was found before stands.

    Attributes:
        level: Its entry in the report.
        modules: What was found of each, by name.
        backends: Those that were asked for.
        agreement: Of the native backends with each other, once all modules are multiplied.
        native: Modules that a native kernel of a GPU multiplied.
        peak_gpu_bytes: None without a GPU.
    """

    level: LevelReport
    modules: Mapping[str, ModuleVerify]
    backends: Sequence[BackendReport] = ()
    agreement: Sequence[AgreementReport] = ()
    native: int = 0
    peak_gpu_bytes: int | None = None

    def multiply(
        self, subject: Subject, backends: Sequence[Backend], device: torch.device, advance: Callable[[int], None]
    ) -> None:
        """Run the probes on every module, the costlier ones once for each shape, and conclude on the level.

        The reference is what others are compared with: where it alone ran, nothing was compared.

        Raises:
            RuntimeError: CUDA's, memory among them.
        """
        level, modules = self.level, self.modules
        # A name may stand for two, of which one runs here.
        by_name = {report.name: report for report in self.backends if report.status == "pass"}
        seen: set[tuple[int, int]] = set()
        for module, stored in _read_ahead(subject):
            name = module.name
            found = modules[name]
            if isinstance(stored, Exception):
                level.failures.append(f"{name}: {stored}")
                found.worsen("fail")
                continue
            weight = stored.to(device)
            probes: list[Probe] = [identity_probe, random_probe]
            if weight.shape not in seen:
                probes += [sweep_probe, poison_probe]
                seen.add(weight.shape)
            for backend in backends:
                report = by_name[backend.name]
                if report.status == "broken":
                    continue
                try:
                    results = [probe(backend, weight, device) for probe in probes]
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # whatever a kernel's library raises
                    report.status, report.reason = "broken", f"raises on {name}: {first_line(error)}"
                    continue
                found.probes[backend.name] = {result.probe: _report(result) for result in results}
                report.modules += 1
                _note(name, results, report, found, level)
            advance(sum(info.num_bytes for info in module.tensors))
        if level.failures:
            level.status = "fail"
        elif any(one.modules and one.status != "broken" for one in by_name.values() if one.kind != "reference"):
            level.status = "warn" if level.warnings else "pass"
            level.reason = _sizes(modules)
        else:
            level.reason = "nothing was compared: no backend but the reference went through all modules"


def _read_ahead(subject: Subject) -> Iterator[tuple[PackedModule, Weight | InputError | ValueError]]:
    """The operands of each module, or why there are none, read while those before it are multiplied."""

    def read(module: PackedModule) -> Weight | InputError | ValueError:
        try:
            return subject.operands(module)
        except (InputError, ValueError) as error:
            return error.with_traceback(None)  # whose frames would hold what was read

    due = iter([module for module in subject.modules.values() if module.fault is None])
    with ThreadPoolExecutor(_AHEAD, thread_name_prefix="reader") as pool:
        reading = deque((module, pool.submit(read, module)) for module in itertools.islice(due, _AHEAD))
        while reading:
            module, future = reading.popleft()
            found = future.result()
            reading.extend((one, pool.submit(read, one)) for one in itertools.islice(due, 1))
            yield module, found


def _sizes(modules: Mapping[str, ModuleVerify]) -> str:
    """Which M the pass of every shape rests on."""
    swept = [probes["sweep"].sizes for one in modules.values() for probes in one.probes.values() if "sweep" in probes]
    sizes = min(swept, key=len, default=[])
    words = f"all rows at M of {', '.join(map(str, sizes))}"
    if rest := [size for size in SWEEP if size not in sizes]:
        layer = " x ".join(map(str, SHAPE))
        words += f"; on a CPU {', '.join(map(str, rest))} only with layers that are small, as the self-test's {layer}"
    return words


def _note(
    name: str, results: list[ProbeResult], report: BackendReport, found: ModuleVerify, level: LevelReport
) -> None:
    for result in results:
        if result.status not in ("warn", "fail"):
            continue
        status: LevelStatus = "fail" if result.status == "fail" else "warn"
        rows = f"; rows {', '.join(map(str, result.rows))}" if result.rows else ""
        words = f"{name}: {report.name}: {result.probe}: {result.detail}{rows}"
        (level.failures if status == "fail" else level.warnings).append(words)
        found.worsen(status)
        if report.status != "fail":
            report.status = "fail" if status == "fail" else "warn"


def disagree(modules: dict[str, ModuleVerify]) -> str | None:
    """A module on which one backend passes and another fails, in words: then the kernels are in question."""
    for name, module in modules.items():
        failed = {
            backend: any(probe.status == "fail" for probe in probes.values())
            for backend, probes in module.probes.items()
        }
        if len(set(failed.values())) > 1:
            bad = ", ".join(backend for backend, one in failed.items() if one)
            good = ", ".join(backend for backend, one in failed.items() if not one)
            return f"{name}: {bad} fails where {good} passes"
    return None


def _report(result: ProbeResult) -> ProbeReport:
    found = ProbeReport(
        status=result.status,
        detail=result.detail,
        rows=list(result.rows),
        columns=list(result.columns),
        sizes=list(result.sizes),
    )
    if result.metrics is not None and result.metrics.finite:
        metrics = result.metrics
        found.calc_diff, found.relative_frobenius = metrics.calc_diff, metrics.relative_frobenius
        found.gain, found.worst_row, found.worst_column = metrics.gain, metrics.worst_row, metrics.worst_column
        found.sqnr_db = metrics.sqnr_db if metrics.sqnr_db != float("inf") else None
    return found
