"""What every command notes around its work: times, memory, inputs, how the output came into place. No torch."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelopt_convert.checkpoint.hub.hub_path import HubPath
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.report.report import InputReport, NetworkReport, Report
from modelopt_convert.stage.directory import Published, StagingDir


def note_input(report: Report, name: str, reader: CheckpointReader) -> None:
    """Put an opened input into the report."""
    report.inputs[name] = InputReport(
        path=str(reader.path),
        identity=reader.identity(),
        tensors=len(reader.tensors),
        bytes=reader.num_bytes,
        files=list(reader.files),
        skipped_files=list(reader.skipped),
    )
    if isinstance(reader.path, HubPath):
        repo = reader.path.repo
        report.network[name] = NetworkReport(repo=repo.repo_id, commit=repo.commit, of_bytes=reader.num_bytes)


@contextmanager
def traffic_noted(report: Report, name: str, reader: CheckpointReader) -> Iterator[None]:
    """Put what came over the network into the report, however the work ends."""
    try:
        yield
    finally:
        if name in report.network:
            noted = report.network[name]
            noted.fetched_bytes, noted.requests = reader.traffic()


def publish(stage: StagingDir, report: Report) -> None:
    """Publish, and put into the report how; also when a signal that was held acts right after the swap."""
    try:
        stage.publish()
    finally:
        if stage.published is not None:
            _note_published(report, stage.published)


def _note_published(report: Report, published: Published) -> None:
    report.output.published = True
    report.output.method = published.method
    report.output.durable = published.durable
    for text in published.warnings:
        report.warn("output.old_not_removed", text)


def peak_rss_bytes() -> int | None:
    """The process's own peak; ``ru_maxrss`` would begin with that of whoever started it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def note_cost(report: Report) -> None:
    """Put peak memory and throughput into the report, at the end of the work."""
    report.peak_rss_bytes = peak_rss_bytes()
    seconds = report.timings_s.get("stream")
    if seconds:  # a zero is less than half a millisecond, and says nothing
        report.throughput_bytes_per_s = round(report.output.bytes / seconds)


@contextmanager
def timed(report: Report, what: str) -> Iterator[None]:
    """Add the time that a phase takes to the report."""
    begin = time.monotonic()
    try:
        yield
    finally:
        report.timings_s[what] = round(report.timings_s.get(what, 0.0) + time.monotonic() - begin, 3)
