"""What the benchmarks rest on: inputs as they claim, peaks as the OS has them, lines, curves and comparisons."""

import json
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import bench_growth
import bench_peers
import full
import numpy as np
import pytest
import torch
from benching import run_python
from growth_plot import Line, Panel, draw
from safetensors.torch import load_file, save_file
from sparse_flux1 import _QUANTIZATION, write_sparse
from support import run_mopt


def test_the_sizes_of_the_series() -> None:
    by_tensors, by_bytes = bench_growth.series(quick=False)
    assert [len(bench_growth.specs(*size)) for size in by_tensors] == [10, 100, 1_000, 10_000]
    totals = [
        [sum(spec.num_bytes for spec in bench_growth.specs(*size)) for size in sizes]
        for sizes in (by_tensors, by_bytes)
    ]
    assert totals[0] == pytest.approx([1e9] * 4, rel=0.01)
    assert totals[1] == pytest.approx([1e9, 2e9, 4e9, 8e9, 16e9, 24e9], rel=0.02)


def test_a_sparse_checkpoint_takes_no_disk_and_is_rewritten(tmp_path: Path) -> None:
    specs = bench_growth.specs(3, 1024)
    write_sparse(tmp_path / "source", specs, {"quantization_config": _QUANTIZATION})
    (file,) = (tmp_path / "source").glob("*.safetensors")
    assert file.stat().st_blocks * 512 < 64_000 < file.stat().st_size
    outcome = run_mopt("swap-nibbles", tmp_path / "source", tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None
    assert outcome.report["counts"]["source"] == {"kept": 12, "rewritten: nibbles swapped": 3}
    assert outcome.report["output"]["bytes"] == sum(spec.num_bytes for spec in specs)


def test_peak_memory_is_that_of_the_process_and_arguments_arrive() -> None:
    run_python("pass", [])  # compiles what a process imports
    small = run_python("pass", [])
    large = run_python("import sys; data = bytearray(200_000_000); print(sys.argv[1:])", ["a", "--b"])
    assert large.printed == "['a', '--b']\n"
    assert 199_000_000 < large.peak_bytes - small.peak_bytes < 210_000_000
    with pytest.raises(SystemExit, match="failed: "):
        run_python("raise SystemExit(3)", [])


def test_the_line_is_the_one_of_least_squares() -> None:
    across, up = [1.0, 2.0, 4.0, 8.0], [1.5, 2.4, 4.7, 8.2]
    slope, start = np.polyfit(across, up, 1)
    worst = max(abs(np.array(up) / (start + slope * np.array(across)) - 1))
    assert bench_growth.fit(across, up) == pytest.approx((start, slope, worst))


def test_the_plot_is_the_same_for_the_same_points_and_has_all_of_them() -> None:
    points = [bench_growth.Point(10**n, 10**9, (n + 0.5, n + 0.25), (5e7, 9e7)) for n in (1, 2, 3, 4)]
    panels = bench_growth.panels(points, points, [1, 4])
    text = draw(panels)
    assert text == draw(bench_growth.panels(points, points, [1, 4]))
    found = ElementTree.fromstring(text)
    assert len(found.findall(".//{*}circle")) == 4 * 2 * len(points)
    labels = {label.text for label in found.iter("{http://www.w3.org/2000/svg}text")}
    assert {
        "seconds",
        "peak MB beyond start-up",
        "tensors (same bytes)",
        "GB (tensors of one size)",
        "1 worker",
        "4 workers",
    } <= labels
    assert "prefers-color-scheme:dark" in text


def test_a_higher_value_is_drawn_higher() -> None:
    found = ElementTree.fromstring(draw([Panel("GB", "s", False, [Line("a", [(1.0, 1.0), (2.0, 2.0), (4.0, 8.0)])])]))
    circles = [(float(one.attrib["cx"]), float(one.attrib["cy"])) for one in found.findall(".//{*}circle")]
    (x1, y1), (x2, y2), (x3, y3) = circles
    assert x1 < x2 < x3 and y1 > y2 > y3
    assert (x3 - x1) / (x2 - x1) == pytest.approx(3, rel=0.01) and (y1 - y3) / (y1 - y2) == pytest.approx(7, rel=0.02)


def test_comparing_counts_tensors_and_bytes(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.arange(100, dtype=torch.uint8), "a.bias": torch.ones(4), "b": torch.ones(2)}
    for name in ("theirs", "ours"):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "x.safetensors")
    same = bench_peers.compare(tmp_path / "theirs", tmp_path / "ours")
    assert "1 of 1 packed" in same and "2 of 2 other" in same and "100.00%" in same and "; 0 tensors" in same
    changed = {name: tensor.clone() for name, tensor in load_file(tmp_path / "ours" / "x.safetensors").items()}
    changed["a.weight"][7] = 200
    changed["c"] = changed.pop("b")
    save_file(changed, tmp_path / "ours" / "x.safetensors")
    other = bench_peers.compare(tmp_path / "theirs", tmp_path / "ours")
    assert "0 of 1 packed" in other and "(99.00%" in other and "1 of 2 other" in other and "; 2 tensors" in other


def test_the_old_fp8_export_is_one_that_mopt_takes(tmp_path: Path) -> None:
    bench_peers.make_inputs(tmp_path, "tiny", "fp8")
    words = bench_peers.builders("fp8", Path("nowhere"))[2].arguments
    given = [word.replace("IN/", f"{tmp_path}/").replace("OUT", str(tmp_path / "out")) for word in words]
    outcome = run_mopt(*[word for word in given if word != "--json"])
    assert outcome.exit_code == 0 and outcome.report is not None
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_algo"] == "FP8"
    kept = {module for module in config["quantization_config"]["ignore"] if module.startswith("single_")}
    assert kept == {"single_transformer_blocks.0.norm.linear", "single_transformer_blocks.0.proj_mlp"}


def test_the_full_size_is_that_of_flux1_dev() -> None:
    found = full.shapes(full.BLOCKS)
    assert 2 * sum(int(np.prod(shape)) for shape in found.values()) == 23_802_816_640
    assert full.shapes((1, 2)).keys() < found.keys() and len(full.shapes((1, 2), full.NARROW)) == len(
        full.shapes((1, 2))
    )


def test_the_proof_holds_on_inputs_of_the_full_size_and_names_fuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full, "POOL", 1 << 20)
    full.pool.cache_clear()
    full.make(tmp_path / "made", (1, 1), full.NARROW)
    full.pool.cache_clear()
    base, export = tmp_path / "made" / "BASE", tmp_path / "made" / "EXPORT"
    words = ("--preset", "flux1-dev", "--base", base, "--export", export, "--verify", "off")
    outcome = run_mopt("build-nvfp4", *words, "--output", tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.report is not None
    assert outcome.report["proof"]["status"] == "pass"
    assert run_mopt("convert", export, tmp_path / "converted", "--to", "comfyui").exit_code == 0


def test_the_table_and_the_plot_have_what_was_measured_and_a_later_call_goes_on() -> None:
    every = full.cases(has_gpu=False)
    swap = next(one for one in every if one.name.startswith("swap"))
    assert [one for one in full.cases(has_gpu=True) if one not in every]
    results = full.Results("a machine", (1, 2), sizes={swap.name: 4_000_000_000}, copies={"OUT": [3.0, 1.0, 2.0]})
    results.starts[swap.name] = full.Result([0.5], [100_000_000], [{}])
    results.commands[swap.name] = {
        count: full.Result([seconds], [100_000_000 + count * 7_000_000], [{"stream": seconds - 1, "plan": 0.01}])
        for count, seconds in ((2, 4.0), (1, 8.0))
    }
    assert full.Results.parse(json.dumps(asdict(results))) == results
    text = full.written_out(results, every)
    assert f"| {swap.name} | 1 | 8.00 | 0.50 | stream 7.0 | 4.00 | 0.50 | 4.00 | 7 |" in text
    assert f"| {swap.name} | 2 | 4.00 | 0.50 | stream 3.0 | 4.00 | 1.00 | 2.00 | 7 |" in text
    (panel,) = full.panels(results, every)
    assert panel.lines[0].points == [(1, 0.5), (2, 1.0)] and panel.lines[1].points == [(1, 2.0), (2, 2.0)]


def test_a_run_that_would_not_end_in_time_is_left_out(tmp_path: Path) -> None:
    swap = next(one for one in full.cases(has_gpu=False) if one.name.startswith("swap"))
    results = full.Results("a machine", (1, 2), {swap.name: {4: full.Result([30.0], [0], [{}])}})
    results.starts[swap.name] = full.Result([0.5], [0], [{}])
    bench = full.Bench(tmp_path)
    end = full.time.monotonic() + 100
    assert list(full.measure(results, bench, bench, [swap], [4, 1], 1, end)) == [
        f"{swap.name}, 1 workers: no time left"
    ]
