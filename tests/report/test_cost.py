"""Peak memory and throughput, in the report and in what people read."""

import re
from pathlib import Path
from typing import Any

import pytest
from support import build, load, run_mopt

from modelopt_convert.cli._output import Output, show_cost
from modelopt_convert.report.report import OutputReport, Report

LINE = re.compile(r"^peak memory [0-9.]+ [MG]B, written at [0-9]+\.[0-9] [MG]B/s$", re.MULTILINE)


def assert_consistent(report: dict[str, Any] | None, out: Path) -> None:
    assert report is not None
    written = sum(tensor.numel() * tensor.element_size() for tensor in load(out).values())
    assert report["throughput_bytes_per_s"] == round(written / report["timings_s"]["stream"]) > 0
    assert report["peak_rss_bytes"] > written


def test_builds_and_rewrites_say_how_fast_they_wrote(exports: Path, tmp_path: Path) -> None:
    base, nvfp4, fp8 = (exports / name for name in ("base", "nvfp4", "fp8"))
    built = build(nvfp4, base, tmp_path / "built")
    assert_consistent(built.report, tmp_path / "built")
    words = ("convert-fp8", "--preset", "flux1-dev", "--export", fp8, "--base", base, "--output", tmp_path / "fp8")
    assert_consistent(run_mopt(*words).report, tmp_path / "fp8")
    swapped = run_mopt("swap-nibbles", nvfp4, tmp_path / "swapped")
    assert_consistent(swapped.report, tmp_path / "swapped")


def test_what_wrote_nothing_has_no_throughput(exports: Path, tmp_path: Path) -> None:
    nvfp4 = exports / "nvfp4"
    planned = run_mopt("swap-nibbles", nvfp4, tmp_path / "out", "--dry-run").report
    assert planned is not None and planned["throughput_bytes_per_s"] is None and planned["peak_rss_bytes"] is None
    told = run_mopt("swap-nibbles", nvfp4, tmp_path / "out", "--dry-run", json_report=False)
    assert told.exit_code == 0 and "peak memory" not in told.stdout
    verified = run_mopt("verify", nvfp4, "--base", exports / "base").report
    assert verified is not None and verified["throughput_bytes_per_s"] is None and verified["peak_rss_bytes"] > 0


def test_people_are_told_too(exports: Path, tmp_path: Path) -> None:
    base, nvfp4 = exports / "base", exports / "nvfp4"
    words = ("--preset", "flux1-dev", "--export", nvfp4, "--base", base, "--output", tmp_path / "built")
    assert LINE.search(run_mopt("build-nvfp4", *words, json_report=False).stdout)
    assert LINE.search(run_mopt("swap-nibbles", nvfp4, tmp_path / "swapped", json_report=False).stdout)
    assert "\npeak memory " in run_mopt("verify", nvfp4, "--base", base, json_report=False).stdout


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (None, "peak memory 1.50 GB\n"),
        (2_340_000_000, "peak memory 1.50 GB, written at 2.3 GB/s\n"),
        (950_000_000, "peak memory 1.50 GB, written at 950.0 MB/s\n"),
    ],
)
def test_the_line(capsys: pytest.CaptureFixture[str], rate: int | None, words: str) -> None:
    report = Report(
        command="x", output=OutputReport(path=""), peak_rss_bytes=1_500_000_000, throughput_bytes_per_s=rate
    )
    show_cost(Output(), report)
    assert capsys.readouterr().out == words
