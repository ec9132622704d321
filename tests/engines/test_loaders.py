"""SGLang's own loader holds what the checkpoint says, and the comparison sees where it does not.

All engines and families: `make engines`.
"""

import math
import shutil
from pathlib import Path

import pytest
import torch
from comparison import LOSS, compare, decoded
from families import PRESETS
from faults import swizzle
from kit import build, key, load, main, recorded
from root import ROOT
from safetensors.torch import load_file, save_file
from set_up import ENGINES, missing
from support import edit_json

from modelopt_convert import convert_fp8
from modelopt_convert.formats.nvfp4.codes import dequantize_nvfp4

SGLANG = ROOT / ".venv" / "engines" / "sglang" / "bin" / "python"
SHARE = ("flux1", "qwen_image", "wan")


@pytest.mark.skipif(not SGLANG.exists(), reason="`make test` sets SGLang up; here it is not")
def test_sglang_loads_right(families: Path, tmp_path: Path) -> None:
    built = [build(families, family, algorithm, tmp_path) for family in SHARE for algorithm in ("nvfp4", "fp8")]
    # Without `ignore` SGLang takes every Linear for FP8: what is kept in BF16 is cast.
    forgotten = tmp_path / "forgotten-fp8"
    shutil.copytree(built[1], forgotten)
    edit_json(forgotten / "config.json", lambda config: config["quantization_config"].update({"ignore": []}))
    of_base = fp8_of_bases(families, tmp_path)
    found = load("sglang", SGLANG, [*built, *of_base, forgotten])
    rows, planted = found[: len(built)], found[-1]
    before = recorded()
    assert rows == [before[key(row)] for row in rows] and {row["outcome"] for row in rows} == {"right"}
    assert planted["outcome"] == "wrong" and planted["off"] > 0
    flux1, wan, image, unlisted = found[len(built) : -1]
    assert flux1["outcome"] == wan["outcome"] == "right"
    # What is held packed is what is packed: no weight was decoded.
    for one in (flux1, wan):
        known = before["sglang", one["family"], "fp8"]
        assert (one["takes"], one["packed"]) == (known["takes"], known["packed"])
    assert image["outcome"] == "wrong" and "attn2.to_q" in image["first"] and round(image["figure"], 2) == 0.03
    assert unlisted["outcome"] == "wrong" and unlisted["off"] > 0


def fp8_of_bases(families: Path, room: Path) -> list[Path]:
    """FP8 without input scales: right, right, wrong as ``limits.toml`` says, and wrong without `ignored_layers`."""
    made: list[Path] = []
    (room / "of-base").mkdir()
    for family in ("flux1", "wan", "wan_i2v_image"):
        base = families / family / "base"
        made.append(room / "of-base" / f"{family}-fp8")
        convert_fp8(preset=PRESETS[family][0], base=base, output=made[-1], allow_known_broken=True)
    made.append(room / "of-base" / "unlisted-fp8")
    shutil.copytree(made[1], made[-1])
    edit_json(made[-1] / "config.json", lambda config: config["quantization_config"].update({"ignored_layers": []}))
    return made


def outcome(held: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[str, int]:
    found = compare(held, wanted, 1)
    return found["outcome"], found["off"]


def test_outcomes_of_a_comparison() -> None:
    packed, kept = torch.randn(8, 16), torch.randn(8, 16).bfloat16()
    wanted = {"packed": packed, "kept": kept}
    assert outcome(dict(wanted), wanted) == ("right", 0)
    assert outcome(wanted | {"packed": packed * (1 + 1e-8)}, wanted) == ("right", 0)
    assert outcome(wanted | {"packed": packed * 1.03}, wanted) == ("loss", 1)
    assert outcome(wanted | {"packed": packed * (1 + LOSS * 1.01)}, wanted) == ("wrong", 1)
    # What is kept is held as it lies, or wrong: by however little.
    assert outcome(wanted | {"kept": kept * 1.01}, wanted) == ("wrong", 1)
    for other in (torch.full((8, 16), math.nan), torch.zeros(16, 8), torch.zeros(8, 16)):
        assert outcome(wanted | {"packed": other}, wanted) == ("wrong", 1)
        assert outcome(wanted | {"kept": other.bfloat16()}, wanted) == ("wrong", 1)
    assert outcome({"kept": kept}, wanted) == ("wrong", 1)
    worst = compare({"packed": packed * 1.03, "kept": kept + 1}, wanted, 1)
    assert worst["first"] == "kept" and worst["figure"] > 0.1


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
def test_a_checkpoint_is_decoded_by_definition(families: Path, tmp_path: Path, algorithm: str) -> None:
    """By a code that shares nothing with mopt's, and within the error of the format of the base."""
    from safetensors.torch import load_file

    checkpoint = build(families, "flux1", algorithm, tmp_path)
    tensors = {name: one for file in checkpoint.glob("*.safetensors") for name, one in load_file(file).items()}
    base = {}
    for file in (families / "flux1" / "base" / "transformer").glob("*.safetensors"):
        base |= load_file(file)
    found = decoded(checkpoint)
    assert found.keys() == base.keys()
    for name, one in found.items():
        if tensors[name].dtype == torch.uint8:
            module = name.removesuffix(".weight")
            scales = tensors[f"{module}.weight_scale"], tensors[f"{module}.weight_scale_2"]
            assert torch.allclose(one, dequantize_nvfp4(tensors[name], *scales), rtol=1e-6, atol=0)
        error = float((one.float() - base[name].float()).norm() / base[name].float().norm())
        assert error == 0 if one.dtype == torch.bfloat16 else 0 < error < 0.12, name


def test_an_engine_that_is_no_package_needs_a_checkout_of_its_release(
    families: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MOPT_COMFYUI", raising=False)
    assert missing("sglang") is None and "MOPT_COMFYUI" in str(missing("comfyui"))
    monkeypatch.setenv("MOPT_TEST_EXPORTS", str(families.parent))
    monkeypatch.setattr("sys.argv", ["kit.py", "--engine", "comfyui", "--family", "qwen_image"])
    assert main() == 0
    assert "comfyui is not run, its rows stay as they are" in capsys.readouterr().out
    monkeypatch.setenv("MOPT_COMFYUI", str(tmp_path))
    with pytest.raises(SystemExit, match="found none"):
        missing("comfyui")
    for version, right in (("0.1.0", False), (ENGINES["comfyui"]["version"], True)):
        (tmp_path / "comfyui_version.py").write_text(f'# generated\n__version__ = "{version}"\n')
        if right:
            assert missing("comfyui") is None
        else:
            with pytest.raises(SystemExit, match=f"found {version}"):
                missing("comfyui")


@pytest.mark.skipif(not SGLANG.exists(), reason="`make test` sets SGLang up; here it is not")
def test_sglang_fails_on_padded_scales_and_on_fp8_that_nothing_declares(families: Path, tmp_path: Path) -> None:
    """As ``engines/sglang.py`` says it: by shape where ComfyUI pads scales, and where q, k and v are one."""
    sources = []
    for form in ("nvfp4", "fp8"):
        source = tmp_path / f"bare-{form}"
        shutil.copytree(build(families, "qwen_image", form, tmp_path), source)
        edit_json(source / "config.json", lambda config: config.pop("quantization_config"))
        sources.append(source)
    [weights] = sources[0].glob("*.safetensors")
    tensors = load_file(weights)
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        tensors[name] = swizzle(tensors[name])
    save_file(tensors, weights, {"format": "pt"})
    padded, bare = load("sglang", SGLANG, sources)
    assert padded["outcome"] == "fails" and padded["why"].startswith("AssertionError: Failed to shard/load parameter")
    assert bare["outcome"] == "fails" and bare["why"].startswith("RuntimeError")
