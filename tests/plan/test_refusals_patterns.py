"""Presets and patterns that do not fit the model: never a pattern that silently does nothing."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sglang_runtime
import vllm_runtime
from faults import PACKED, QUANTIZATION_CONFIG, entries, refused, small_pair
from root import ROOT
from support import Tensors, build, config_of, edit, load, run_mopt


def mine(folder: Path, *changes: tuple[str, str]) -> Path:
    """A preset of the user's own: flux1-dev's text with replacements."""
    text = (ROOT / "presets" / "flux1-dev.toml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "mine.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [
        ("single_transformer_blocks.*.proj_mpl", "single_transformer_blocks.0.proj_mlp"),
        ("transformer_blocks.*.attn.to_ot.*", "transformer_blocks.0.attn.to_out.0"),
        ("x_embeder", "x_embedder"),
        ("transformer_blocks.5.ff.net.2", "transformer_blocks.0.ff.net.2"),
        ("transformer_blocks.*.ff.net.2.weight", "transformer_blocks.0.ff.net.2"),
    ],
)
def test_a_typo_is_refused_with_the_nearest_names(
    typo: str, nearest: str, nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    """Other builders exit 0, replace nothing, and list the typo in `ignore`."""
    outcome = refused(nvfp4, base, tmp_path, "--keep-bf16", typo, code="preset.no_match", names=(repr(typo),))
    assert outcome.report is not None
    hint = outcome.report["error"]["hint"]
    names = hint.removeprefix("the nearest names are ").split(", ")
    modules = {name.rpartition(".")[0] for name in load(base / "transformer")}
    assert len(names) == 3 and set(names) <= modules and nearest in names


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"single_transformer_blocks.*.proj_mlp"', '"single_transformer_blocks.*.proj_mpl"'),
        ('"norm_out.linear"', '"norm_out.linaer"'),
    ],
)
def test_a_typo_in_a_preset_is_refused(old: str, new: str, nvfp4: Path, base: Path, tmp_path: Path) -> None:
    preset = mine(tmp_path, (old, new))
    refused(nvfp4, base, tmp_path, code="preset.no_match", names=(new.strip('"'),), hint="nearest", preset=str(preset))


def test_a_keep_fp32_pattern_that_matches_nothing_is_refused(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    preset = mine(tmp_path, ("keep_fp32 = []", 'keep_fp32 = ["**.scale_shift_table"]'))
    refused(nvfp4, base, tmp_path, code="preset.no_match", names=("scale_shift_table",), preset=str(preset))


@pytest.mark.parametrize(
    ("pattern", "code"),
    [
        ("transformer_blocks.[01].norm1.linear", "preset.pattern"),
        ("transformer_blocks.[0-1].**", "preset.pattern"),
        ("transformer_blocks.[^0].**", "preset.pattern"),
        ("transformer_blocks.[", "preset.pattern"),
        ("]", "preset.pattern"),
        ("[", "preset.pattern"),
        ("transformer_blocks.[1:2:3].**", "preset.pattern"),
        ("", "preset.pattern"),
        (".", "preset.pattern"),
        ("x_embedder.", "preset.pattern"),
        ("transformer_blocks..attn", "preset.pattern"),
        ("transformer_blocks**", "preset.pattern"),
        ("***", "preset.pattern"),
        ("transformer_blocks.(0|1).norm1.linear", "preset.no_match"),
        ("transformer_blocks.(", "preset.no_match"),
        ("x_embedder$", "preset.no_match"),
        ("^x_embedder", "preset.no_match"),
        ("x.embedder", "preset.no_match"),
        ("x_embedde?", "preset.no_match"),
        ("x_embedder+", "preset.no_match"),
        ("{x,proj}_embedder", "preset.no_match"),
        ("x_embedder|proj_out", "preset.no_match"),
        ("transformer_blocks.\\d.norm1.linear", "preset.no_match"),
        ("(?i)X_EMBEDDER", "preset.no_match"),
        ("X_EMBEDDER", "preset.no_match"),
        ("*", None),  # the modules at the top: no dot is crossed
        ("*proj_out", None),
    ],
)
def test_metacharacters_are_refused_or_literal(
    pattern: str, code: str | None, nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    if code is not None:
        refused(nvfp4, base, tmp_path, "--keep-bf16", pattern, code=code, names=(repr(pattern),))
        return
    outcome = build(nvfp4, base, tmp_path / "out", "--keep-bf16", pattern, "--dry-run")
    assert outcome.exit_code == 0 and outcome.report is not None
    rule = outcome.report["rules"][-1]
    assert (rule["pattern"], rule["kind"], rule["replaced"]) == (pattern, "user", 0)


def test_a_star_does_not_cross_dots(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """Read as .* it would match single_transformer_blocks too."""
    outcome = build(nvfp4, base, tmp_path / "out", "--keep-bf16", "*.0.proj_out", "--dry-run")
    assert outcome.exit_code == 0 and outcome.report is not None
    assert outcome.report["rules"][-1]["matched"] == 1
    refused(nvfp4, base, tmp_path, "--keep-bf16", "*.proj_out", code="preset.no_match", names=("*.proj_out",))


def set_both(folder: Path, nvfp4: Path, base: Path, **changes: Any) -> tuple[Path, Path]:
    """Export and base of another model, as far as config.json tells."""

    def change(config: dict[str, Any]) -> None:
        config.update(changes)

    return (
        edit(nvfp4, folder / "export", change_config=change),
        edit(base, folder / "base", change_config=change),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": "QwenImageTransformer2DModel"},
        {"_class_name": "Flux2Transformer2DModel"},
        {"guidance_embeds": False},  # FLUX.1 [schnell]
    ],
)
def test_the_preset_of_another_model_is_refused(
    changes: dict[str, Any], nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    export, other = set_both(tmp_path, nvfp4, base, **changes)
    ((key, found),) = changes.items()
    names = (f"{export}/config.json", key, repr(found), "flux1-dev")
    refused(export, other, tmp_path, code="preset.wrong_model", names=names, hint="--preset")


def test_a_model_that_no_preset_fits_is_refused_when_none_is_named(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    export, other = set_both(tmp_path, nvfp4, base, _class_name="SanaTransformer2DModel")
    names = ("SanaTransformer2DModel",)
    refused(export, other, tmp_path, code="preset.none_fits", names=names, hint="flux1-dev", preset=None)


@pytest.mark.parametrize("name", ["flux1", "FLUX1-DEV", "./absent.toml", "absent.toml", "."])
def test_an_unknown_preset_is_refused(name: str, nvfp4: Path, base: Path, tmp_path: Path) -> None:
    refused(nvfp4, base, tmp_path, code="preset.unknown", names=(repr(name),), hint="flux1-dev", preset=name)
    assert run_mopt("presets", name, json_report=False).exit_code == 3


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        (("schema = 1", "schema = 2"), "preset.field", "schema"),
        (('name = "flux1-dev"', "name = 7"), "preset.field", "name"),
        (('load_flag = "--transformer-path"', 'load_flags = "--transformer-path"'), "preset.field", "load_flag"),
        (('title = "FLUX.1 [dev]"', 'title = "FLUX.1'), "preset.toml", "not TOML"),
        (('"x_embedder"', '"x_embedder["'), "preset.pattern", "x_embedder["),
    ],
)
def test_a_malformed_preset_is_refused(
    changes: tuple[str, str], code: str, named: str, nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    preset = mine(tmp_path, changes)
    refused(nvfp4, base, tmp_path, code=code, names=(named,), preset=str(preset))


QKV = tuple(f"transformer_blocks.1.attn.{leaf}" for leaf in ("to_q", "to_k", "to_v"))
ADDED = tuple(f"transformer_blocks.1.attn.add_{leaf}_proj" for leaf in "qkv")


@pytest.mark.parametrize(
    ("patterns", "group"),
    [
        ([QKV[0]], QKV),
        ([QKV[0], QKV[2]], QKV),
        (["transformer_blocks.*.attn.to_k"], tuple(name.replace("1", "0") for name in QKV)),
        ([ADDED[1]], ADDED),
        ([*QKV, ADDED[2]], ADDED),
        (["single_transformer_blocks.[-1:].attn.to_v"], tuple(f"single_{name}" for name in QKV)),
    ],
)
def test_a_fused_group_kept_in_part_is_refused(
    patterns: list[str], group: tuple[str, ...], nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    """Runtimes load q, k and v as one weight, which is packed or not."""
    flags = [word for pattern in patterns for word in ("--keep-bf16", pattern)]
    parent = group[0].rpartition(".")[0].replace(".0.", ".[0:2].")  # a star keeps a part of both blocks' groups
    refused(nvfp4, base, tmp_path, *flags, code="preset.fused_group", names=(", ".join(group),), hint=parent)


def test_a_fused_group_kept_whole_passes(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    flags = [word for name in (*QKV, *ADDED) for word in ("--keep-bf16", name)]
    outcome = build(nvfp4, base, tmp_path / "out", *flags)
    assert outcome.exit_code == 0 and outcome.report is not None
    ignore = config_of(tmp_path / "out")["quantization_config"]["ignore"]
    # What vLLM would find within single_transformer_blocks too has a star; it fits the fused name as well.
    assert {f"{name}*" for name in QKV} | set(ADDED) <= set(ignore)
    for excluded in (sglang_runtime.is_excluded, vllm_runtime.is_excluded):
        assert all(excluded(name, ignore) for name in (*QKV, *ADDED, f"{QKV[0]}kv"))
        assert not excluded(f"single_{QKV[0]}", ignore)


def test_a_fused_group_that_the_export_packed_in_part_is_refused(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    weights = load(base / "transformer")

    def unpack(tensors: Tensors) -> None:
        for role in ("weight_scale", "weight_scale_2", "input_scale"):
            del tensors[f"{QKV[1]}.{role}"]
        tensors[f"{QKV[1]}.weight"] = weights[f"{QKV[1]}.weight"]

    export = edit(nvfp4, tmp_path / "export", unpack)
    refused(export, base, tmp_path, code="preset.fused_group", names=(", ".join(QKV), f"{QKV[1]} in BF16"))


@pytest.mark.parametrize("flags", [["--keep-bf16", "**"], ["--keep-bf16", "*transformer_blocks.**"]])
def test_a_build_that_leaves_nothing_quantized_is_refused(
    flags: list[str], nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    names = (str(nvfp4), "all 40 packed modules")
    refused(nvfp4, base, tmp_path, *flags, code="preset.nothing_left", names=names, hint="the base as it is")


def test_keeping_every_module_of_a_model_without_a_preset_is_refused(tmp_path: Path) -> None:
    export, base = small_pair(tmp_path / "made", {"lin": (32, 64)})
    assert config_of(export)["quantization_config"] == QUANTIZATION_CONFIG
    flags = ("--keep-bf16", "lin")
    refused(export, base, tmp_path, *flags, code="preset.nothing_left", names=("all 1 packed",), preset="none")


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_refusals_of_the_plan_come_before_anything_is_written(
    more: tuple[str, ...], nvfp4: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a stage is made: no call that changes the disk is reached."""
    from modelopt_convert.stage import fsops

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a refused plan touched the disk")

    changing: list[Callable[..., Any]] = [fsops.make_dir, fsops.create_file, fsops.rename, fsops.remove_tree]
    for function in changing:
        monkeypatch.setattr(fsops, function.__name__, forbidden)
    refused(nvfp4, base, tmp_path, "--keep-bf16", "typo", *more, code="preset.no_match")
    assert entries(tmp_path) == {}


def test_the_hint_of_a_fused_group_leads_to_a_build(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    outcome = refused(nvfp4, base, tmp_path, "--keep-bf16", QKV[0], code="preset.fused_group")
    assert outcome.report is not None
    words = shlex.split(outcome.report["error"]["hint"].partition(": ")[2])
    assert words[::2] == ["--keep-bf16"] * 3 and set(words[1::2]) == set(QKV)
    outcome = build(nvfp4, base, tmp_path / "out", *words)
    assert outcome.exit_code == 0
    assert PACKED not in config_of(tmp_path / "out")["quantization_config"]["ignore"]
