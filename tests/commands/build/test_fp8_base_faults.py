"""FP8 of a base: faults that verify and the closing step find, and the engines that cannot have it."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import ALL, PRESETS
from faults import refusal
from fp8_base_support import CPU, PACKED, WEIGHT, build, quantization
from support import Tensors, edit, load
from verify_support import verify

from modelopt_convert.formats import tensor_bytes as raw


@pytest.fixture(scope="module")
def built(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fp8-base") / "out"
    assert build(exports / "base", out).exit_code == 0
    return out


def at_random(tensors: Tensors, change: Callable[[int], int]) -> None:
    """Change one code at a place that nobody chose."""
    codes = tensors[WEIGHT].view(torch.uint8).flatten()
    place = random.Random(20).choice([at for at in range(len(codes)) if 8 < int(codes[at]) & 0x7F < 0x70])
    codes[place] = change(int(codes[place]))


def off_by_one(tensors: Tensors) -> None:
    at_random(tensors, lambda code: code + 1)


def other_sign(tensors: Tensors) -> None:
    at_random(tensors, lambda code: code ^ 0x80)


def one_input_scale(tensors: Tensors) -> None:
    tensors[f"{PACKED}.input_scale"] = torch.tensor([0.01])


def one_ulp(tensors: Tensors) -> None:
    scale = tensors[f"{WEIGHT}_scale"]
    scale.view(torch.int32).add_(1)


@pytest.mark.parametrize("fault", [off_by_one, other_sign, one_input_scale, one_ulp])
@pytest.mark.parametrize("recorded", [False, True])
def test_verify_finds_a_planted_fault(
    exports: Path, built: Path, tmp_path: Path, fault: Callable[[Tensors], None], recorded: bool
) -> None:
    folder = edit(built, tmp_path / "bad", fault)
    if recorded:
        (folder / "mopt.json").write_bytes((built / "mopt.json").read_bytes())
    outcome = verify(folder, *CPU, *([] if recorded else ["--base", exports / "base"]))
    assert outcome.report is not None
    if fault is one_ulp and not recorded:  # all codes are the base's under a scale that was chosen: told, and no more
        assert outcome.exit_code == 0 and outcome.report["verify"]["modules"][PACKED]["verdict"] == "nearest"
        words = [words for level in outcome.report["verify"]["levels"] for words in level["warnings"]]
        assert any(PACKED in one and "not max calibration's" in one for one in words)
        return
    assert outcome.exit_code == 1
    failures = [words for level in outcome.report["verify"]["levels"] for words in level["failures"]]
    assert any(PACKED in words for words in failures)


def test_a_rounding_tie_that_went_the_other_way_is_found(tmp_path: Path, exports: Path) -> None:
    """Under a scale of 1 the value 1.0625 lies between two codes: ModelOpt rounds to the even one."""

    def tie(tensors: Tensors) -> None:
        weight = tensors[WEIGHT]
        weight.copy_((weight / weight.abs().amax() * 400).bfloat16())
        weight[0, 0], weight[1, 1] = 448.0, 1.0625

    base = edit(exports / "base", tmp_path / "base", tie)
    assert build(base, tmp_path / "out").exit_code == 0
    assert (
        float(load(tmp_path / "out")[WEIGHT][1, 1]) == 1.0 and float(load(tmp_path / "out")[f"{WEIGHT}_scale"]) == 1.0
    )

    def up(tensors: Tensors) -> None:
        tensors[WEIGHT][1, 1] = 1.125

    outcome = verify(edit(tmp_path / "out", tmp_path / "bad", up), *CPU, "--base", base)
    assert outcome.exit_code == 1 and PACKED in outcome.message


def test_codes_that_are_not_the_bases_are_not_published(
    exports: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = raw.bf16_codes

    def wrong(scale: float, quotient: torch.dtype) -> torch.Tensor:
        codes = right(scale, quotient).clone()
        codes[0x3C00:0x3F80] ^= 1
        return codes

    monkeypatch.setattr(raw, "bf16_codes", wrong)
    refusal(lambda: build(exports / "base", room / "out"), room, code="check.verify", exit_code=1)


@pytest.mark.parametrize(
    ("family", "engine", "words"),
    [
        ("flux1", "sglang", ""),
        ("flux1", "tensorrt-llm", ""),
        ("flux1", "vllm-omni", "raises TypeError (Cannot instantiate Fp8Config)"),
        ("flux1", "diffusers", "Unknown quantization type"),
        ("flux1", "comfyui", "drops their scales"),
        ("wan_i2v_image", "sglang", "`ignored_layers`"),
        ("ltx2", "sglang", "no names"),
    ],
)
def test_each_engine_is_asked(families: Path, room: Path, family: str, engine: str, words: str) -> None:
    where, preset = families / family / "base", PRESETS[family][0]
    asked = ("--engine", engine, "-n")
    outcome = build(where, room / "out", *asked, preset=preset)
    if not words:
        assert outcome.exit_code == 0, outcome.stderr
        return
    assert (outcome.exit_code, outcome.error_code) == (3, "engine.known_broken") and words in outcome.message
    hint = outcome.report["error"]["hint"] if outcome.report else ""
    assert "--allow-known-broken" in hint
    assert ("calibrated --export" in hint) == (engine in ("vllm-omni", "diffusers") or family == "wan_i2v_image")
    assert build(where, room / "out", *asked, "--allow-known-broken", preset=preset).exit_code == 0


@pytest.mark.parametrize("family", ["chroma", "ltx2"])
def test_one_engine_has_one_warning(families: Path, tmp_path: Path, family: str) -> None:
    """What SGLang does not load, or casts whole, it does not cast one module of."""
    more = ("-n", "--allow-known-broken")
    outcome = build(families / family / "base", tmp_path / "out", *more, preset=ALL[family][0])
    assert outcome.exit_code == 0 and outcome.report is not None, outcome.stderr
    codes = [one["code"] for one in outcome.report["warnings"] if "sglang" in one["message"].lower()]
    assert codes == ["engine.known_broken"]


def test_an_export_is_still_what_it_was(families: Path, tmp_path: Path) -> None:
    """The dynamic facts are of checkpoints without input scales alone."""
    where = families / "flux2"
    more = ("--export", where / "fp8", "--engine", "vllm-omni")
    assert build(where / "base", tmp_path / "out", *more, preset="flux2-dev").exit_code == 0
    assert quantization(tmp_path / "out")["quant_method"] == "modelopt"
