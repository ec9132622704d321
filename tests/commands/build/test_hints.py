"""Hints that once led astray, word for word: what, where, found, wanted, and the next command."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faults import told
from support import Tensors, copy, edit, load, packed_in, run_mopt

from modelopt_convert.checkpoint.hub.hub_path import hub_address
from modelopt_convert.formats.rows import SAMPLED_ROWS, sample_rows
from modelopt_convert.plan.inputs import check_merged
from modelopt_convert.preset.preset import preset_names
from modelopt_convert.run.errors import InputError
from modelopt_convert.run.text import few, nearest

WHICH = "give the transformer itself, or the pipeline that holds transformer/; on the Hub, hf://ORGANIZATION/NAME"
FLUX = "hf://black-forest-labs/FLUX.1-dev"
KEPT = ("--preset", "none", "--output")


def said(*arguments: str | Path, exit_code: int = 3) -> tuple[str, str, str]:
    """Code, message and hint of a refusal, as the report and the terminal have them."""
    outcome = run_mopt(*arguments)
    assert outcome.exit_code == exit_code and outcome.report is not None, outcome.stderr
    error = outcome.report["error"]
    assert outcome.stderr.splitlines()[-len(told(error)) :] == told(error)
    return error["code"], error["message"], error["hint"]


def uncalibrated(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith(".input_scale")]:
        del tensors[name]


@pytest.mark.parametrize("command", ["build-nvfp4", "convert-fp8"])
def test_an_export_that_was_never_calibrated(command: str, exports: Path, base: Path, tmp_path: Path) -> None:
    source = exports / command.partition("-")[2]
    export = edit(source, tmp_path / "export", uncalibrated)
    code, message, hint = said(command, "--export", export, "--base", base, *KEPT, tmp_path / "out")
    names = [name.removesuffix(".input_scale") for name in load(source / "transformer") if "input_scale" in name]
    assert code == "export.missing_input_scale" and len(names) > 3
    head, _, listed = message.rpartition(": ")
    assert head == f"{export}: {len(names)} of {len(names)} modules have no input_scale"
    assert listed.endswith(f" and {len(names) - 3} more")
    assert set(listed.removesuffix(f" and {len(names) - 3} more").split(", ")) <= set(names)
    assert hint == "never calibrated: leave out --export, or calibrate with real prompts and export again"


def test_some_modules_without_a_scale_are_counted(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    gone = packed_in(load(nvfp4 / "transformer"))[:2]

    def change(tensors: Tensors) -> None:
        for name in gone:
            del tensors[f"{name}.weight_scale_2"]

    export = edit(nvfp4, tmp_path / "export", change)
    code, message, hint = said("build-nvfp4", "--export", export, "--base", base, *KEPT, tmp_path / "out")
    total = len(packed_in(load(nvfp4 / "transformer")))
    assert code == "export.missing_weight_scale_2"
    assert message == f"{export}: 2 of {total} modules have no weight_scale_2: {gone[0]}, {gone[1]}"
    assert hint.startswith("the export is incomplete; export again")


@pytest.mark.parametrize("command", ["build-nvfp4", "convert-fp8"])
def test_export_and_base_exchanged(command: str, exports: Path, base: Path, tmp_path: Path) -> None:
    export = exports / command.partition("-")[2]
    swapped = ("--export", base, "--base", export)
    assert said(command, *swapped, "--output", tmp_path / "out") == (
        "export.exchanged",
        f"{base}/transformer: --export is not quantized and --base is: they look exchanged",
        f"give --export {export}/transformer --base {base}/transformer",
    )


@pytest.mark.parametrize(
    ("command", "algorithm", "other", "flags"),
    [
        ("build-nvfp4", "fp8", "convert-fp8", "--format fp4 --quant-algo max"),
        ("convert-fp8", "nvfp4", "build-nvfp4", "--format fp8 --quant-algo max"),
    ],
)
def test_an_export_of_the_other_format(
    command: str, algorithm: str, other: str, flags: str, exports: Path, base: Path, tmp_path: Path
) -> None:
    export = copy(exports / algorithm, tmp_path / "my export")
    wanted = {"fp8": "FP8", "nvfp4": "NVFP4"}
    (mine,) = wanted.keys() - {algorithm}
    code, message, hint = said(command, "--export", export, "--base", base, "--output", tmp_path / "out")
    assert code == "export.quant_algo"
    assert message == (
        f"{export}/config.json: quant_algo: expected {wanted[mine]!r}, found {wanted[algorithm]!r} "
        f"(it is an {wanted[algorithm]} export, not {wanted[mine]})"
    )
    run = f"mopt {other} --export '{export}' --base {base}/transformer --output {tmp_path / 'out'}"
    assert hint == f"run `{run}`, or export again with ModelOpt's {flags}"
    words = [word.strip("'") for word in run.replace("my export", "my+export").split()[1:]]
    done = run_mopt(*[word.replace("my+export", "my export") for word in words], "-n")
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize("preset", [(), ("--preset", "flux1-dev")], ids=["chosen", "named"])
def test_a_language_model(preset: tuple[str, ...], nvfp4: Path, base: Path, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        del config["_class_name"]
        config["architectures"] = ["LlamaForCausalLM"]

    export = edit(nvfp4, tmp_path / "export", change_config=change)
    where = f"{export}/config.json" if preset else f"{export}: config.json"  # every refusal names its file, once
    arguments = (*preset, "--export", export, "--base", edit(base, tmp_path / "base", change_config=change))
    assert said("build-nvfp4", *arguments, "--output", tmp_path / "out") == (
        "preset.not_diffusion",
        f"{where}: expected a diffusion transformer of diffusers, found LlamaForCausalLM: not a diffusion transformer",
        "mopt is for diffusion transformers; give a language model or a VAE to its engine as it is",
    )


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("black-forest-labs/FLUX.1-dev", FLUX),
        ("black-forest-labs/FLUX.1-dev/", FLUX),
        ("https://huggingface.co/black-forest-labs/FLUX.1-dev", FLUX),
        ("https:/huggingface.co/black-forest-labs/FLUX.1-dev", FLUX),
        ("huggingface.co/black-forest-labs/FLUX.1-dev/tree/main", FLUX),
        ("https://hf.co/black-forest-labs/FLUX.1-dev/tree/abc123/transformer", f"{FLUX}@abc123/transformer"),
        ("https://huggingface.co/black-forest-labs/FLUX.1-dev/tree/main/transformer/", f"{FLUX}/transformer"),
        ("https://hf.co/black-forest-labs/FLUX.1-dev/resolve/main/a.safetensors", f"{FLUX}/a.safetensors"),
        ("FLUX.1-dev", None),
        ("/models/flux", None),
        ("./models/flux", None),
        ("../flux", None),
        ("a/b/c", None),
        ("https://example.com/a/b", None),
    ],
)
def test_a_repo_written_otherwise(written: str, address: str | None) -> None:
    assert hub_address(written) == address


@pytest.mark.parametrize("flag", ["--export", "--base"])
@pytest.mark.parametrize(
    "place", ["black-forest-labs/FLUX.1-dev", "https://huggingface.co/black-forest-labs/FLUX.1-dev"]
)
def test_a_repo_in_place_of_a_folder(flag: str, place: str, nvfp4: Path, base: Path, tmp_path: Path) -> None:
    given: dict[str, str | Path] = {"--export": nvfp4, "--base": base} | {flag: place}
    arguments = [word for pair in given.items() for word in pair]
    assert said("build-nvfp4", *arguments, *KEPT, tmp_path / "out") == (
        "input.missing",
        f"{flag[2:]} {place}: no such folder",
        f"give a folder that exists, or {FLUX} if the repo on the Hub is meant",
    )
    gone = tmp_path / "gone"
    assert said("inspect", gone)[2] == WHICH


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("flux1_dev", "flux1-dev"),
        ("Flux1-Dev", "flux1-dev"),
        ("qwen-imag", "qwen-image"),
        ("wan-t2v", "wan2.1-t2v-1.3b or wan2.1-t2v-14b or wan2.2-t2v-a14b"),
    ],
)
def test_the_nearest_preset(word: str, meant: str, nvfp4: Path, base: Path, tmp_path: Path) -> None:
    arguments = ("--preset", word, "--export", nvfp4, "--base", base, "--output", tmp_path / "out")
    assert said("build-nvfp4", *arguments) == (
        "preset.unknown",
        f"preset {word!r}: is not one that comes with mopt",
        f"did you mean {meant}? `mopt presets` lists all; a path to a TOML of your own must have a / or end in .toml",
    )


def test_nothing_is_near_to_what_is_far() -> None:
    assert nearest("zzz", preset_names()) is None and nearest("", preset_names()) is None
    assert few(["a", "b", "c"]) == "a, b, c" and few(["a", "b", "c", "d"]) == "a, b, c and 1 more"


def test_an_export_that_failed_half_way_was_not_saved(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """Its weights are packed; ModelOpt leaks state of quantizers into what it exports."""
    state = "transformer_blocks.0.attn.q_bmm_quantizer._amax"
    forget = {"change_config": lambda config: config.pop("quantization_config")}
    export = edit(nvfp4, tmp_path / "export", lambda tensors: tensors.update({state: torch.ones(1)}), **forget)
    code, _, _ = said("build-nvfp4", "--export", export, "--base", base, "--output", tmp_path / "out")
    assert code == "export.not_quantized"


@pytest.mark.parametrize("form", ["diffusers", "state"])
def test_a_model_that_was_saved_and_not_exported(form: str, nvfp4: Path, base: Path, tmp_path: Path) -> None:
    """diffusers' own config of it, or no config and the state of ModelOpt's quantizers among the weights."""

    def change(config: dict[str, Any]) -> None:
        config["quantization_config"] = {"quant_method": "modelopt", "quant_type": "NVFP4", "modelopt_config": {}}
        if form == "state":
            del config["quantization_config"]

    def keep_state(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("scale") or name.endswith("scale_2")]:
            del tensors[name]
        tensors[state] = torch.ones(1)

    state = "proj_out.weight_quantizer._amax"
    export = edit(nvfp4, tmp_path / "export", keep_state, change)
    found = state if form == "state" else "quant_type without quant_algo"
    assert said("build-nvfp4", "--export", export, "--base", base, "--output", tmp_path / "out") == (
        "export.saved",
        f"{export}/config.json: expected what export_hf_checkpoint writes, found what save_pretrained writes "
        f"({found}): saved, not exported",
        "call modelopt.torch.export.export_hf_checkpoint(pipe, export_dir=FOLDER) on the quantized pipeline",
    )


@pytest.mark.parametrize("role", ["export", "base", "base alone"])
def test_a_lora_that_is_not_merged(role: str, nvfp4: Path, base: Path, tmp_path: Path) -> None:
    name = "transformer_blocks.0.attn.to_q.lora_A.default.weight"

    def change(tensors: Tensors) -> None:
        tensors[name] = torch.ones(4, 4)
        tensors[name.replace("lora_A", "lora_B")] = torch.ones(4, 4)

    folders = {"export": nvfp4 / "transformer", "base": base / "transformer"}
    what = role.split()[0]
    folders[what] = edit(folders[what], tmp_path / "edited", change)
    export = () if role == "base alone" else ("--export", folders["export"])
    code, message, hint = said("build-nvfp4", *export, "--base", folders["base"], "--output", tmp_path / "out")
    assert (code, message) == (
        f"{what}.lora",
        f"{tmp_path}/edited: expected the weights of a model, found 2 tensors of a LoRA that is not merged "
        f"(PEFT's names, {name!r} first)",
    )
    end = {"export": "quantize and export again", "base": "save the model with save_pretrained"}
    assert hint == f"merge it with pipe.fuse_lora() and pipe.unload_lora_weights(), then {end[what]}"


def test_verify_inspect_and_rewrites_name_an_unmerged_lora_too(
    nvfp4: Path, base: Path, built_nvfp4: Path, tmp_path: Path
) -> None:
    name = "transformer_blocks.0.attn.to_q.lora_A.default.weight"

    def change(tensors: Tensors) -> None:
        tensors[name] = torch.ones(4, 4)

    adapted = {"base": edit(base / "transformer", tmp_path / "base", change)}
    adapted["export"] = edit(nvfp4 / "transformer", tmp_path / "export", change)
    for what, checkpoint, against in (("base", built_nvfp4, adapted["base"]), ("export", adapted["export"], base)):
        words = f"{adapted[what]}: expected the weights of a model, found 1 tensors of a LoRA that is not merged"
        for command in (
            ("verify", checkpoint, "--base", against),
            ("swap-nibbles", checkpoint, tmp_path / "out", "--base", against),
        ):
            code, message, _ = said(*command)
            assert code == f"{what}.lora" and message.startswith(words)
        looked = run_mopt("inspect", checkpoint, "--base", against)
        assert looked.exit_code == 0 and looked.report is not None
        (fault,) = (one for one in looked.report["lint"] if one["code"] == f"{what}.lora")
        assert fault["message"].startswith(words) and fault["message"].endswith("nothing was compared with the base")


def test_verify_inspect_and_rewrites_name_exchanged_inputs_too(
    base: Path, built_nvfp4: Path, nvfp4: Path, tmp_path: Path
) -> None:
    words = f"{base}/transformer: the checkpoint is not quantized and --base is: they look exchanged"
    hint = f"give {built_nvfp4} --base {base}/transformer"
    for command in (("verify", base), ("swap-nibbles", base, tmp_path / "out")):
        assert said(*command, "--base", built_nvfp4) == ("export.exchanged", words, hint)
        assert said(command[0], nvfp4, *command[2:], "--base", built_nvfp4)[0] == "base.quantized"
    looked = run_mopt("inspect", base, "--base", built_nvfp4)
    assert looked.exit_code == 0 and looked.report is not None
    told = {one["code"]: one["message"] for one in looked.report["lint"]}
    assert told == {"export.exchanged": f"{words}; {hint}; nothing was compared with the base"}


def test_a_folder_that_holds_folders_names_those_that_can_be_meant(nvfp4: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    for name, source in (("one", nvfp4), ("two", nvfp4 / "transformer")):
        copy(source, tmp_path / "all" / name)
    (tmp_path / "all" / "logs").mkdir()
    code, _, hint = said("build-nvfp4", "--export", tmp_path / "all", "--base", base, *KEPT, tmp_path / "out")
    assert (code, hint) == ("input.missing", f"did you mean {tmp_path}/all/one, {tmp_path}/all/two?")


def test_what_is_the_beginning_of_several_presets_names_them(base: Path, tmp_path: Path) -> None:
    hint = said("build-nvfp4", "--preset", "wan2.2", "--base", base, "--output", tmp_path / "out")[2]
    assert hint.startswith("did you mean wan2.2-i2v-a14b or wan2.2-t2v-a14b or wan2.2-ti2v-5b? ")


def test_a_refusal_to_open_anything_says_nothing_of_what_would_be_quantized(tmp_path: Path) -> None:
    outcome = run_mopt(
        "build-nvfp4", "--preset", "flux1-dev", "--base", tmp_path / "gone", "--output", tmp_path / "out"
    )
    assert outcome.error_code == "input.missing" and outcome.report is not None and outcome.report["warnings"] == []


def cut_first_rows(tensors: Tensors, names: list[str]) -> None:
    for name in names:
        tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"][1:].clone()


def test_of_one_fault_in_many_modules_the_count_and_the_first_names_are_told(
    nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    """In headers, in values, and of two kinds at once: one line each time, with every module counted."""
    packed = [name for name in packed_in(load(nvfp4 / "transformer")) if ".attn." in name]

    def cut(tensors: Tensors) -> None:
        cut_first_rows(tensors, packed[:5])
        del tensors[f"{packed[5]}.weight_scale_2"]

    def spoil(tensors: Tensors) -> None:
        for name in packed[:4]:
            tensors[f"{name}.weight_scale_2"].fill_(float("nan"))

    export = edit(nvfp4, tmp_path / "cut", cut)
    code, message, _ = said("build-nvfp4", "--export", export, "--base", base, "--output", tmp_path / "out")
    assert code == "export.shape" and ".weight_scale'" in message, message
    head, _, listed = message.partition("; 5 have this fault: ")
    named, _, other = listed.partition(" and 2 more; ")
    assert set(named.split(", ")) < set(packed[:5]) and named.split(", ")[0] in head
    assert other == f"export.missing_weight_scale_2 besides, 1: {packed[5]}"
    export = edit(nvfp4, tmp_path / "spoilt", spoil)
    code, message, _ = said("build-nvfp4", "--export", export, "--base", base, "--output", tmp_path / "out")
    assert code == "export.unusable_scale" and "; 4 have this fault: " in message and message.endswith(" and 1 more")


@pytest.mark.parametrize("seed", range(4))
def test_a_fault_in_a_sampled_row_of_a_module_that_is_replaced_has_its_row(
    seed: int, nvfp4: Path, base: Path, tmp_path: Path
) -> None:
    """What a few rows of it show is compared whole, though the base replaces it; a figure alone would not say where."""
    module = "transformer_blocks.1.ff.net.2"
    weight = load(base / "transformer")[f"{module}.weight"]
    rows = sample_rows(len(weight), SAMPLED_ROWS)
    row = random.Random(seed).choice(rows)

    def change(tensors: Tensors) -> None:
        tensors[f"{module}.weight"][row, :4] ^= 0x01  # the next code

    export = edit(nvfp4, tmp_path / "export", change)
    code, message, _ = said(
        "build-nvfp4",
        "--preset",
        "flux1-dev",
        "--export",
        export,
        "--base",
        base,
        "--output",
        tmp_path / "out",
        exit_code=1,
    )
    assert code == "check.proof" and f"{module} (row {row}, column " in message
    assert f"; {weight.numel() - 4} of {weight.numel()} codes equal; " in message


@pytest.mark.parametrize("name", ["base_model.model.a.weight", "a.base_layer.weight", "a.lora_down.weight"])
def test_all_names_of_adapters_are_known(name: str) -> None:
    def named(*names: str) -> Any:
        return SimpleNamespace(path=Path("x"), tensors=dict.fromkeys(names))

    with pytest.raises(InputError, match="found 1 tensors of a LoRA"):
        check_merged(named(name), "base")
    check_merged(named("a.lora.weight", "color_a.weight", "a.svdquant_lora_a", "a.base_layers.weight"), "base")


def test_shards_without_an_index(exports: Path, base: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    copy(exports / "nvfp4", export)
    index = "diffusion_pytorch_model.safetensors.index.json"
    (export / index).unlink(missing_ok=True)
    (shard, *more) = export.glob("*.safetensors")
    for number, path in enumerate((shard, *more)):
        path.rename(export / f"diffusion_pytorch_model-0000{number + 1}-of-00002.safetensors")
    if not more:
        (export / "diffusion_pytorch_model-00002-of-00002.safetensors").write_bytes(b"")
    count = max(2, 1 + len(more))
    assert said("build-nvfp4", "--export", export, "--base", base, "--output", tmp_path / "out") == (
        "index.missing",
        f"{export}: expected {index} beside {count} shards, found none: the index is missing",
        f"fetch {index} from where the shards are from, or export again",
    )


def test_a_fault_of_many_modules_is_one_line(nvfp4: Path, tmp_path: Path) -> None:
    export = edit(nvfp4, tmp_path / "export", uncalibrated)
    outcome = run_mopt("inspect", export, json_report=False)
    report = json.loads(run_mopt("inspect", export).stdout)
    names = [fault["module"] for fault in report["lint"] if fault["code"] == "input_scale.missing"]
    assert len(names) == len(packed_in(load(nvfp4 / "transformer"))) > 3
    first = f"{', '.join(names[:3])} and {len(names) - 3} more"
    line = f"lint: {len(names)} modules: no input_scale; SGLang takes 1.0: {first}"
    lines = [one for one in outcome.stdout.splitlines() if one.startswith("lint: ")]
    assert f"{line} [input_scale.missing]" in lines
    codes = [one.rpartition("[")[2] for one in lines if " modules: " in one]
    assert len(codes) == len(set(codes))


def test_one_fault_is_told_with_its_module(nvfp4: Path, tmp_path: Path) -> None:
    (name, *_) = packed_in(load(nvfp4 / "transformer"))
    export = edit(nvfp4, tmp_path / "export", lambda tensors: tensors.pop(f"{name}.input_scale"))
    outcome = run_mopt("inspect", export, json_report=False)
    assert f"lint: {name}: no input_scale; SGLang takes 1.0 [input_scale.missing]" in outcome.stdout.splitlines()
