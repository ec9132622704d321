"""What each engine believes, in the report and in what people read."""

import shutil
from pathlib import Path
from typing import Any

from support import edit_json, run_mopt

SGLANG, VLLM = "sglang@0.5.23", "vllm-omni@0.30.0"


def views(source: Path) -> dict[str, Any]:
    report = run_mopt("inspect", source).report
    assert report is not None and report["engines"] == report["components"]["."]["engines"]
    return {one["name"]: one for one in report["engines"]}


def test_both_views_of_nvfp4(built_nvfp4: Path) -> None:
    """FLUX.1, whose double blocks vLLM-omni does not quantize: 16 of 24 packed modules."""
    found = views(built_nvfp4)
    assert list(found) == [SGLANG, VLLM]
    report = run_mopt("inspect", built_nvfp4).report
    assert report is not None and report["engine"] == found[SGLANG] and found[SGLANG]["misreads"] == []
    believes = found[VLLM]["believes"]
    assert (believes["nibble_order"], believes["scale_layout"], believes["group_size"]) == ("low", "linear", 16)
    assert (believes["packed_modules"], believes["fused_modules"], believes["unset_scales"]) == (8, 2, 0)
    [fault] = found[VLLM]["misreads"]
    assert fault.startswith(f"{VLLM} would take 16 packed modules for unquantized (transformer_blocks.0.attn.")
    assert report["lint"] == []  # the one that mopt builds for by default has none


def test_both_views_of_fp8(built_fp8: Path) -> None:
    found = views(built_fp8)
    assert list(found) == [SGLANG, VLLM]
    assert found[SGLANG]["believes"]["packed_modules"] == 24 and found[SGLANG]["misreads"] == []
    [fault] = found[VLLM]["misreads"]
    assert fault.startswith(f"{VLLM} would decode 16 packed modules to BF16 (")
    text = run_mopt("inspect", built_fp8, json_report=False).stdout
    assert f"{VLLM} believes: 8 packed modules\n" in text and "  it would decode 16 packed modules to BF16 (" in text
    assert f"{SGLANG} believes: 24 packed modules\n" in text


def test_an_ignore_that_forgets_is_seen_by_both(built_fp8: Path, tmp_path: Path) -> None:
    shutil.copytree(built_fp8, tmp_path / "out")
    edit_json(tmp_path / "out" / "config.json", lambda config: config["quantization_config"].update({"ignore": []}))
    found = views(tmp_path / "out")
    assert any("in BF16 for packed" in words for words in found[SGLANG]["misreads"])
    # Of the Linears that vLLM-omni quantizes one in each of two single blocks is kept: proj_mlp.
    assert any("take 2 modules in BF16 for packed" in words for words in found[VLLM]["misreads"])


def test_swapped_nibbles_are_read_wrong_by_the_one_that_knows_no_key(built_nvfp4: Path, tmp_path: Path) -> None:
    assert run_mopt("swap-nibbles", built_nvfp4, tmp_path / "out").exit_code == 0
    found = views(tmp_path / "out")
    assert found[SGLANG]["misreads"] == []
    assert f"{VLLM} would read the low nibble as the even column, it is the high" in found[VLLM]["misreads"]
