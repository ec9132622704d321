"""mopt verify on checkpoints that mopt built: levels, the record that travels, exit codes."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import swapped
from safetensors.torch import save_file
from support import config_of, copy, edit, edit_json, load, packed_in, run_mopt
from verify_support import PACKED, SHARD, found, statuses, verify

from modelopt_convert.verification.gemm.names import NAMES


@pytest.fixture
def built(built_nvfp4: Path, built_fp8: Path) -> dict[str, Path]:
    """A build of each format, by algorithm. Never write there."""
    return {"nvfp4": built_nvfp4, "fp8": built_fp8}


@pytest.fixture(scope="session")
def few(make_build: Callable[..., Path]) -> dict[str, Path]:
    """The same with four packed modules, for what runs kernels. Never write there."""
    kept = ("--keep-bf16", "transformer_blocks.**", "--keep-bf16", "single_transformer_blocks.1.**")
    return {
        algorithm: make_build(f"few-{algorithm}", command, algorithm, *kept)
        for algorithm, command in (("nvfp4", "build-nvfp4"), ("fp8", "convert-fp8"))
    }


def resave(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / SHARD, {"format": "pt"})


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
def test_the_record_travels_and_is_a_claim(algorithm: str, built: dict[str, Path], tmp_path: Path) -> None:
    """Neither base nor GPU, as in CI: the bytes are those recorded; what the record says of them is quoted."""
    outcome = verify(copy(built[algorithm], tmp_path / "downloaded"))
    assert outcome.exit_code == 0, outcome.stderr
    report = found(outcome)
    assert (report["verdict"], report["proof"]) == ("pass", "unchanged")
    claimed = "its record claims (the author is not verified): proven at build against a local folder (content "
    assert report["statement"].startswith(f"every byte is as mopt.json says, cpu only; {claimed}")
    layout = {"nvfp4": "pass", "fp8": "skipped"}[algorithm]
    assert statuses(outcome) == {"record": "pass", "L0": "pass", "L1": layout, "L2": "skipped", "L3": "skipped"}
    assert all(level["reason"] for level in report["levels"] if level["status"] == "skipped")
    assert report["native_executed"] == "0 of 24"


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
@pytest.mark.parametrize("sample", ["3", "16", "all"])
def test_the_base_proves_again(algorithm: str, sample: str, built: dict[str, Path], base: Path) -> None:
    outcome = verify(built[algorithm], "--base", base, "--sample", sample)
    assert outcome.exit_code == 0 and statuses(outcome)["L2"] == "pass"
    words = "proven" if sample == "all" else "not proven: sampled"
    assert found(outcome)["proof"] == words and found(outcome)["statement"] == f"{words}, cpu only"
    modules = found(outcome)["modules"]
    assert {one["verdict"] for one in modules.values()} == {"reproduced"}
    assert {one["compared"] for one in modules.values()} == {"all" if sample == "all" else "sampled rows"}
    for name, one in modules.items():
        rows, columns = one["shape"]
        assert one["codes"] == one["codes_equal"] > 0 and one["digest"], name
        assert one["scales"] == one["scales_equal"] == (one["codes"] // 16 if algorithm == "nvfp4" else 0)
        assert one["sqnr_db"] > 15
        if sample == "all":
            assert one["codes"] == rows * columns


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
def test_all_rows_are_compared_unless_told_otherwise(algorithm: str, built: dict[str, Path], base: Path) -> None:
    outcome = verify(built[algorithm], "--base", base)
    assert outcome.exit_code == 0 and found(outcome)["proof"] == "proven"
    assert all(one["codes"] == one["shape"][0] * one["shape"][1] for one in found(outcome)["modules"].values())


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
def test_the_record_never_speaks_for_bytes_that_are_not_the_bases(
    algorithm: str, built: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    """A record whose digests fit, and which calls the module reproduced, excuses nothing."""
    import xxhash

    folder, name = copy(built[algorithm], tmp_path / "changed"), f"{PACKED}.weight"
    data = bytearray((folder / SHARD).read_bytes())
    length = int.from_bytes(data[:8], "little")
    start, end = (8 + length + at for at in json.loads(data[8 : 8 + length])[name]["data_offsets"])
    data[start + 5] ^= 0x10
    (folder / SHARD).write_bytes(data)
    digest = xxhash.xxh3_128_hexdigest(data[start:end])
    edit_json(folder / "mopt.json", lambda record: record["digests"]["tensors"].__setitem__(name, digest))
    alone = verify(folder)
    assert alone.exit_code == 0 and found(alone)["proof"] == "unchanged"
    outcome = verify(folder, "--base", base)
    assert outcome.exit_code == 1 and found(outcome)["proof"] == "mismatch" and PACKED in outcome.message
    one = found(outcome)["modules"][PACKED]
    assert one["verdict"] == "mismatch" and one["first"].startswith("row ") and "expected" in one["first"]


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
def test_people_read_first_what_is_proven(algorithm: str, built: dict[str, Path], base: Path, tmp_path: Path) -> None:
    for words, more in (("unchanged", ()), ("proven", ("--base", base)), ("not proven: sampled", ("--sample", "4"))):
        arguments = (*more, "--base", base) if words.endswith("sampled") else more
        told = run_mopt("verify", built[algorithm], *arguments, json_report=False)
        assert told.exit_code == 0 and told.stdout.startswith(f"{words}\n"), told.stdout
    folder = copy(built[algorithm], tmp_path / "bare")
    (folder / "mopt.json").unlink()
    told = run_mopt("verify", folder, json_report=False)
    assert told.exit_code == 6 and told.stdout.startswith("not proven: no base\n"), told.stdout
    tensors = load(folder)
    tensors[f"{PACKED}.weight"].view(torch.uint8)[0, 0] ^= 1
    resave(folder, tensors)
    told = run_mopt("verify", folder, "--base", base, json_report=False)
    assert told.exit_code == 1 and told.stdout.startswith("mismatch\n"), told.stdout


def test_details_are_told_on_demand(built: dict[str, Path], base: Path, nvfp4: Path, tmp_path: Path) -> None:
    """The answer is the same; what was not run is told either way; each fault by itself with ``-v`` alone."""
    told, more = (
        run_mopt("verify", built["nvfp4"], "--base", base, *flags, json_report=False).stdout for flags in ((), ("-v",))
    )
    assert told.splitlines()[:2] == more.splitlines()[:2] and len(more) > len(told)
    assert "levels: record pass, L0 pass, L1 pass, L2 pass, L3 skipped\n" in told
    assert "not run: L3 kernel parity: " in told and "\nL3 kernel parity" not in told and "\nL3 kernel parity" in more
    tensors = load(folder := copy(built["nvfp4"], tmp_path / "changed"))
    names = packed_in(tensors)
    for name in names:
        tensors[f"{name}.weight"].view(torch.uint8)[0, 0] ^= 1
    resave(folder, tensors)
    told, more = (
        run_mopt("verify", folder, "--base", base, *flags, json_report=False).stdout for flags in ((), ("-v",))
    )
    assert len(names) > 3
    assert [line for line in told.splitlines() if line.startswith("fail: L2: ") and str(len(names)) in line]
    assert all(name in more for name in names) and not all(name in told for name in names)


def test_the_digest_of_decoded_rows_is_of_their_values(built: dict[str, Path]) -> None:
    """The same values, whatever layout they are stored in."""
    import xxhash

    modules = found(verify(built["fp8"]))["modules"]
    weight = load(built["fp8"])[f"{PACKED}.weight"]
    from modelopt_convert.formats.rows import sample_rows

    rows = weight[sample_rows(weight.shape[0], 16)].float().contiguous()
    assert modules[PACKED]["digest"] == xxhash.xxh3_128_hexdigest(rows.numpy().tobytes())


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
def test_neither_record_nor_base_is_inconclusive(algorithm: str, built: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(built[algorithm], tmp_path / "bare")
    (folder / "mopt.json").unlink()
    outcome = verify(folder)
    assert outcome.exit_code == 6 and outcome.error_code == "verify.inconclusive" and "--base" in outcome.message
    assert outcome.report is not None and outcome.report["status"] == "inconclusive"


def test_a_record_of_an_unproven_build_claims_nothing(exports: Path, base: Path, tmp_path: Path) -> None:
    """The bytes are unchanged, and that is all that is said; with the base they are proven."""
    arguments = ("--preset", "flux1-dev", "--export", exports / "fp8", "--output", tmp_path / "out")
    assert run_mopt("convert-fp8", *arguments).exit_code == 0
    outcome = verify(tmp_path / "out")
    assert outcome.exit_code == 0 and statuses(outcome)["record"] == "pass"
    assert (found(outcome)["verdict"], found(outcome)["proof"]) == ("pass", "unchanged")
    assert found(outcome)["statement"].endswith(": convert-fp8 published it as not proven: no base")


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
def test_one_changed_byte_is_seen_and_named(algorithm: str, built: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(built[algorithm], tmp_path / "changed")
    tensors = load(folder)
    raw = tensors[f"{PACKED}.bias"].view(torch.uint8)
    raw[3] ^= 1
    resave(folder, tensors)
    outcome = verify(folder)
    assert outcome.exit_code == 1 and outcome.error_code == "check.verify" and f"{PACKED}.bias" in outcome.message
    assert statuses(outcome)["record"] == "fail"


def test_tensors_and_files_that_come_or_go(built: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(built["nvfp4"], tmp_path / "changed")
    tensors = load(folder)
    resave(folder, {**{name: one for name, one in tensors.items() if name != "proj_out.bias"}, "new": torch.ones(2)})
    config = config_of(folder)
    (folder / "config.json").write_text(json.dumps(config | {"in_channels": 65}))
    failures = next(level for level in found(verify(folder))["levels"] if level["level"] == "record")["failures"]
    assert [
        word for word in ("'new'", "'proj_out.bias'", "config.json") if not any(word in one for one in failures)
    ] == []


def test_the_same_bytes_under_another_shape_are_not_the_same(built: dict[str, Path], tmp_path: Path) -> None:
    for algorithm, name in (("fp8", f"{PACKED}.weight"), ("nvfp4", "x_embedder.weight")):
        folder = copy(built[algorithm], tmp_path / algorithm)
        tensors = load(folder)
        rows, columns = tensors[name].shape
        resave(folder, tensors | {name: tensors[name].reshape(columns, rows)})
        outcome = verify(folder)
        assert outcome.exit_code == 1 and statuses(outcome)["record"] == "fail"


def test_one_of_two_transformers_is_gone_or_another(families: Path, tmp_path: Path) -> None:
    for name in ("transformer", "transformer_2"):
        copy(families / "wan" / "fp8", tmp_path / "export" / name)
        copy(families / "wan" / "base", tmp_path / "base" / name)
    edit(families / "wan" / "base", tmp_path / "other", lambda tensors: tensors["proj_out.bias"].fill_(1.5))
    where = ("--export", tmp_path / "export", "--base", tmp_path / "base", "--output", tmp_path / "out")
    assert run_mopt("convert-fp8", "--preset", "wan2.2-t2v-a14b", *where).exit_code == 0
    manifest = tmp_path / "out" / "transformer_2" / "mopt.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"tool"', ' "tool"'))  # the record of another build
    outcome = verify(tmp_path / "out")
    assert outcome.exit_code == 1 and "transformer_2 is not the one" in outcome.message
    assert (found(outcome)["verdict"], found(outcome)["proof"]) == ("fail", "mismatch")
    manifest.write_text(text)
    assert verify(tmp_path / "out").exit_code == 0
    shutil.rmtree(tmp_path / "out" / "transformer_2")
    outcome = verify(tmp_path / "out")
    assert outcome.exit_code == 1 and "transformer_2 was built and is gone" in outcome.message
    assert (found(outcome)["verdict"], found(outcome)["proof"]) == ("fail", "mismatch")


def test_two_transformers_need_a_checkpoint_each(families: Path, tmp_path: Path) -> None:
    """Of one file the second would get the first's scales, and prove itself by them."""
    for name in ("transformer", "transformer_2"):
        copy(families / "wan" / "fp8", tmp_path / "export" / name)
        copy(families / "wan" / "base", tmp_path / "base" / name)
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "transformer.pt").write_bytes(b"")
    for checkpoint in (tmp_path / "ckpt", tmp_path / "ckpt" / "transformer.pt"):
        where = ("--export", tmp_path / "export", "--base", tmp_path / "base", "--output", tmp_path / "out")
        chosen = ("--preset", "wan2.2-t2v-a14b", "--checkpoint", checkpoint)
        outcome = run_mopt("convert-fp8", *chosen, *where)
        assert outcome.exit_code == 3 and outcome.error_code == "pickle.missing", outcome.stderr


@pytest.mark.parametrize("make", [lambda card: card.write_text("# mine"), Path.mkdir, os.mkfifo, lambda _card: None])
def test_an_edited_card_is_a_warning(make: Callable[[Path], object], built: dict[str, Path], tmp_path: Path) -> None:
    """And no word says that it is as recorded."""
    folder = copy(built["nvfp4"], tmp_path / "carded")
    (folder / "README.md").unlink()
    make(folder / "README.md")
    outcome = verify(folder)
    assert outcome.exit_code == 0 and statuses(outcome)["record"] == "warn"
    said = found(outcome)
    assert said["proof"] == "unchanged"
    assert said["statement"].startswith(
        "every weight is as mopt.json says, README.md is not, cpu only; its record claims"
    )


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"digests": {"algorithm": "md5", "tensors": {}, "files": {}}}'])
def test_a_record_that_cannot_be_used_is_bad_input(text: str, built: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(built["nvfp4"], tmp_path / "odd")
    (folder / "mopt.json").write_text(text)
    outcome = verify(folder)
    assert outcome.exit_code == 3 and (outcome.error_code or "").startswith("record.")


@pytest.mark.parametrize("schema", ["mopt.manifest/99", "mopt.report/1", None, 1])
def test_a_record_of_another_schema_is_not_believed(schema: object, built: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(built["nvfp4"], tmp_path / "odd")
    edit_json(folder / "mopt.json", lambda record: record.update(schema=schema))
    outcome = verify(folder)
    assert (outcome.exit_code, outcome.error_code) == (3, "record.content") and str(schema) in outcome.message


@pytest.mark.parametrize("required", ["gpu", "native"])
def test_what_is_required_and_did_not_run_is_exit_6(required: str, built: dict[str, Path]) -> None:
    outcome = verify(built["nvfp4"], "--require", required, "--device", "cpu")
    assert outcome.exit_code == 6 and outcome.error_code == "verify.required" and "0 of 24" in outcome.message
    assert (found(outcome)["verdict"], found(outcome)["proof"]) == ("inconclusive", "unchanged")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--backend", "flashinfer-trtlm"),
        ("--backend", "best,reference"),
        ("--backend", ""),
        ("--sample", "0"),
        ("--sample", "-1"),
        ("--sample", "some"),
        ("--require", "luck"),
        ("--device", "tpu"),
        ("--self-test",),
        ("--prewarm", "--require", "gpu"),
        ("--prewarm", "--require", "native"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...], built: dict[str, Path]) -> None:
    assert verify(built["nvfp4"], *arguments).exit_code == 2


def test_a_named_backend_must_run(few: dict[str, Path]) -> None:
    for name in ("flashinfer-trtllm", "flashinfer_cudnn", "bf16", "reference,triton"):
        outcome = verify(few["nvfp4"], "--backend", name, "--device", "cpu")
        assert outcome.exit_code == 6 and outcome.error_code == "verify.required", name
    assert verify(few["nvfp4"], "--backend", "torch,reference", "--device", "cpu").exit_code == 6  # FP8 alone
    assert verify(few["fp8"], "--backend", "torch,reference", "--device", "cpu").exit_code == 0


def test_sglangs_variable_is_a_preference(built: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "SGLANG_DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND"
    monkeypatch.setenv(variable, "flashinfer_cutlass")
    assert verify(built["nvfp4"], "--device", "cpu").exit_code == 0
    monkeypatch.setenv(variable, "marlin")
    assert verify(built["nvfp4"], "--device", "cpu").exit_code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_inconclusive(built: dict[str, Path]) -> None:
    outcome = verify(built["nvfp4"], "--device", "cuda")
    assert outcome.exit_code == 6 and outcome.error_code == "verify.no_gpu"


def test_a_checkpoint_is_required() -> None:
    assert run_mopt("verify").exit_code == 2


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
def test_the_reference_runs_on_the_cpu_and_alone_compares_nothing(algorithm: str, built: dict[str, Path]) -> None:
    """What the run ends with comes from the record; nothing of it from the reference against itself."""
    outcome = verify(built[algorithm], "--backend", "reference", "--device", "cpu")
    (kernels,) = (level for level in found(outcome)["levels"] if level["level"] == "L3")
    assert outcome.exit_code == 0 and statuses(outcome)["record"] == "pass"
    assert kernels["status"] == "skipped" and kernels["reason"].startswith("nothing was compared"), kernels
    for one in found(outcome)["modules"].values():
        probes = one["probes"]["reference"]
        assert {probe["status"] for probe in probes.values()} == {"pass"}
        assert probes["random"]["calc_diff"] < 1e-5
    assert {backend["name"]: backend["modules"] for backend in found(outcome)["backends"]} == {"reference": 24}


def test_the_self_test_needs_no_checkpoint() -> None:
    outcome = run_mopt("verify", "--self-test", "--backend", "all", "--device", "cpu")
    assert outcome.exit_code == 0, outcome.stderr
    by_name = {(one["name"], one["reason"].partition(":")[0]): one["status"] for one in found(outcome)["backends"]}
    assert {name for name, _ in by_name} == set(NAMES)
    assert by_name["reference", "nvfp4"] == by_name["reference", "fp8"] == by_name["torch", "fp8"] == "pass"
    assert all(one["reason"] for one in found(outcome)["backends"])
    statement = found(outcome)["statement"]
    assert statement.startswith("1 backends pass") and "NVFP4: none but the reference ran" in statement


def test_the_reference_alone_passes_no_self_test() -> None:
    outcome = run_mopt("verify", "--self-test", "--backend", "reference", "--device", "cpu")
    assert outcome.exit_code == 6 and outcome.error_code == "verify.inconclusive", outcome.stderr
    assert found(outcome)["verdict"] == "inconclusive" and "nothing was compared" in outcome.message


def test_the_kernel_level_says_which_sizes_it_compared(few: dict[str, Path]) -> None:
    outcome = verify(few["fp8"], "--backend", "torch,reference", "--device", "cpu")
    (kernels,) = (level for level in found(outcome)["levels"] if level["level"] == "L3")
    sizes = [1, 8, 17, 32, 33, 64, 128, 512, 1000, 4096, 4608]
    assert kernels["status"] == "pass"
    assert kernels["reason"] == f"all rows at M of {', '.join(map(str, sizes))}"
    swept = [one["probes"]["torch"].get("sweep") for one in found(outcome)["modules"].values()]
    assert any(swept) and all(probe["sizes"] == sizes for probe in swept if probe)


def test_what_a_cpu_left_out_is_said(few: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from modelopt_convert.verification.gemm import probes
    from modelopt_convert.verification.levels import kernels as level

    monkeypatch.setattr(probes, "_CPU_WORK", 0)
    monkeypatch.setattr(level, "self_test", lambda *_: None)  # it needs them all
    outcome = verify(few["fp8"], "--backend", "torch", "--device", "cpu")
    (kernels,) = (level for level in found(outcome)["levels"] if level["level"] == "L3")
    assert kernels["reason"].startswith("all rows at M of 1, 8, 17, 32, 33, 64, 128, 512; on a CPU 1000, 4096, 4608 ")


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
def test_prewarm_builds_kernels_for_the_shapes_and_judges_nothing(algorithm: str, built: dict[str, Path]) -> None:
    outcome = verify(built[algorithm], "--prewarm", "--backend", "reference", "--device", "cpu")
    assert outcome.exit_code == 0 and "nothing was verified" in found(outcome)["statement"]
    assert found(outcome)["verdict"] == "prewarmed"
    assert found(outcome)["levels"] == [] and found(outcome)["modules"] == {}


def test_prewarm_without_a_checkpoint_judges_nothing_either() -> None:
    outcome = run_mopt("verify", "--prewarm", "--backend", "reference", "--device", "cpu")
    assert outcome.exit_code == 0 and found(outcome)["verdict"] == "prewarmed"


def test_prewarm_of_a_backend_that_does_not_run_is_exit_6(built: dict[str, Path]) -> None:
    outcome = verify(built["nvfp4"], "--prewarm", "--backend", "bf16", "--device", "cpu")
    assert outcome.exit_code == 6 and outcome.error_code == "verify.required", outcome.stderr


def test_prewarm_says_that_the_only_backend_is_broken(built: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from modelopt_convert.verification.levels import kernels

    monkeypatch.setattr(kernels, "self_test", lambda *_: "fails on purpose")
    outcome = verify(built["fp8"], "--prewarm", "--backend", "torch", "--device", "cpu")
    assert outcome.exit_code == 7 and "fails on purpose" in outcome.message


def test_native_backends_are_compared_in_pairs() -> None:
    from modelopt_convert.report.verify import BackendReport, ModuleVerify, ProbeReport
    from modelopt_convert.verification.levels.kernels import agreement

    def module(**statuses: str) -> ModuleVerify:
        probes = {name: {"identity": ProbeReport(status=status)} for name, status in statuses.items()}
        return ModuleVerify(shape=[16, 16], probes=probes)

    reports = [BackendReport(name=name, kind="native", status="pass", modules=2) for name in ("a", "b", "c")]
    reports.append(BackendReport(name="reference", kind="reference", status="pass", modules=2))
    modules = {"one": module(a="pass", b="pass", c="pass"), "two": module(a="pass", b="fail", c="pass")}
    pairs = {tuple(one.backends): (one.modules, one.bitwise_equal) for one in agreement(modules, reports)}
    assert pairs == {("a", "b"): (2, 1), ("a", "c"): (2, 2), ("b", "c"): (2, 1)}


def test_nothing_quantized_is_bad_input(base: Path) -> None:
    outcome = verify(base)
    assert outcome.exit_code == 3 and outcome.error_code == "verify.nothing_quantized"


def test_an_export_with_its_base(exports: Path, base: Path) -> None:
    outcome = verify(exports / "nvfp4", "--base", base)
    assert outcome.exit_code == 0 and statuses(outcome)["record"] == "skipped"


def test_two_transformers_are_both_verified(families: Path, tmp_path: Path) -> None:
    for name in ("transformer", "transformer_2"):
        copy(families / "wan" / "fp8", tmp_path / "export" / name)
        copy(families / "wan" / "base", tmp_path / "base" / name)
    where = ("--export", tmp_path / "export", "--base", tmp_path / "base", "--output", tmp_path / "out")
    assert run_mopt("convert-fp8", "--preset", "wan2.2-t2v-a14b", *where).exit_code == 0
    assert verify(tmp_path / "out").exit_code == 0
    tensors = load(tmp_path / "out" / "transformer_2")
    raw = tensors["proj_out.bias"].view(torch.uint8)
    raw[0] ^= 1
    resave(tmp_path / "out" / "transformer_2", tensors)
    outcome = verify(tmp_path / "out")
    assert outcome.exit_code == 1 and "transformer_2" in outcome.message and "proj_out.bias" in outcome.message
    assert found(outcome)["proof"] == "mismatch"


def test_of_two_transformers_the_weaker_proof_is_told() -> None:
    from modelopt_convert.report.verify import VerifyReport as Found
    from modelopt_convert.report.words import PROOFS
    from modelopt_convert.verification.verdict import combine

    for stronger, weaker in itertools.pairwise(PROOFS):
        for pair in ((stronger, weaker), (weaker, stronger)):
            found = {f"{place}/": Found(verdict="pass", proof=words) for place, words in enumerate(pair)}
            assert combine(found, "out").proof == weaker


def test_a_gpu_that_fails_is_no_fault_of_the_checkpoint(
    built: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from modelopt_convert.checkpoint.reader import CheckpointReader
    from modelopt_convert.cli._output import Output, ProgressBar
    from modelopt_convert.verification import transformer as run
    from modelopt_convert.verification.levels import kernels
    from modelopt_convert.verification.options import VerifyOptions
    from modelopt_convert.verification.subject import find_subject

    def busy(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernels, "choose", busy)
    with CheckpointReader(built["nvfp4"]) as reader:
        progress = ProgressBar(Output(json=True, quiet=True))
        found = run.run_kernels(find_subject(reader, None), {}, VerifyOptions(), torch.device("cuda"), progress)
    assert found.level.status == "skipped" and "out of memory" in found.level.reason


@pytest.mark.parametrize("words", [(), ("--device", "cpu"), ("--backend", "reference"), ("--prewarm",)])
@pytest.mark.parametrize("has_driver", [False, True])
def test_torch_is_asked_for_a_device_where_a_kernel_may_run(
    words: tuple[str, ...], has_driver: bool, built: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelopt_convert.verification import subject

    asked = list[str | None]()

    def device_of(wanted: str | None) -> torch.device:
        asked.append(wanted)
        return torch.device("cpu")

    monkeypatch.setattr(subject, "may_have_gpu", lambda: has_driver)
    monkeypatch.setattr(subject, "device_of", device_of)
    outcome = verify(built["nvfp4"], *words)
    assert outcome.exit_code == 0 and outcome.report is not None
    is_needed = has_driver if not words else words[0] != "--device"
    assert bool(asked) == is_needed
    assert outcome.report["verify"]["device"] == {
        "name": "cpu",
        "capability": None,
        "torch": torch.__version__,
        "cuda": None,
    }


def test_a_page_is_written(built: dict[str, Path], tmp_path: Path) -> None:
    outcome = verify(built["nvfp4"], "--report", tmp_path / "page.html")
    assert outcome.exit_code == 0 and PACKED in (tmp_path / "page.html").read_text()
    assert verify(built["nvfp4"], "--report", tmp_path / "nowhere" / "page.html").exit_code == 2
    assert verify(built["nvfp4"], "--report", built["nvfp4"] / "page.html").exit_code == 2


def test_a_nibble_swapped_declaration_is_read_as_declared(
    exports: Path, few: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    """What is stored otherwise and says so is right."""

    def declare(config: dict[str, Any]) -> None:
        config["quantization_config"]["swap_weight_nibbles"] = True

    declared = edit(few["nvfp4"], tmp_path / "declared", swapped, declare)
    assert verify(declared, "--base", base, "--backend", "reference").exit_code == 0
    silent = edit(exports / "nvfp4", tmp_path / "silent", swapped)
    outcome = verify(silent, "--base", base)
    assert outcome.exit_code == 1 and statuses(outcome)["L1"] == "fail"


def test_a_name_that_stands_for_two_does_not_lend_the_native_ones_word(tmp_path: Path) -> None:
    """On Hopper `triton` decodes; its native path is skipped under the same name."""
    from modelopt_convert.report.verify import BackendReport, DeviceReport, LevelReport, ModuleVerify, ProbeReport
    from modelopt_convert.report.verify import VerifyReport as Found
    from modelopt_convert.run.errors import InconclusiveError
    from modelopt_convert.verification.options import VerifyOptions
    from modelopt_convert.verification.verdict import conclude

    probes = {"triton": {"identity": ProbeReport(status="pass")}}
    report = Found(
        verdict="pass",
        device=DeviceReport(name="GPU", capability="9.0", torch="2.13", cuda="13.0"),
        levels=[LevelReport(level="L3", title="kernel parity", status="pass")],
        backends=[
            BackendReport(name="triton", kind="native", status="skipped"),
            BackendReport(name="triton", kind="emulated", status="pass", modules=1),
        ],
        modules={"m": ModuleVerify(shape=[16, 16], probes=probes)},
        native_executed="0 of 1",
    )
    request = VerifyOptions(require="native")
    with pytest.raises(InconclusiveError) as caught:
        conclude(report, request)
    assert caught.value.code == "verify.required" and "0 of 1" in caught.value.message
    report.backends[0] = BackendReport(name="triton", kind="native", status="pass", modules=1)
    conclude(report, request)


def test_a_backend_that_breaks_midway_is_not_covered_by_the_reference(
    few: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelopt_convert.verification.levels import kernels

    calls = []

    def breaks(backend: Any, weight: Any, device: Any) -> Any:
        calls.append(backend.name)
        if backend.name == "torch" and calls.count("torch") > 1:
            raise ValueError("the kernel is gone")
        return random_probe(backend, weight, device)

    random_probe = kernels.random_probe
    monkeypatch.setattr(kernels, "random_probe", breaks)
    outcome = verify(few["fp8"], "--backend", "torch,reference", "--device", "cpu")
    assert outcome.exit_code == 7 and "the kernel is gone" in outcome.message
    assert found(outcome)["verdict"] == "backend broken" and statuses(outcome)["L3"] == "skipped"


@pytest.mark.parametrize("required", ["gpu", "native"])
def test_what_ran_no_level_meets_no_requirement(required: str) -> None:
    from modelopt_convert.report.verify import DeviceReport
    from modelopt_convert.report.verify import VerifyReport as Found
    from modelopt_convert.run.errors import InconclusiveError
    from modelopt_convert.verification.options import VerifyOptions
    from modelopt_convert.verification.verdict import conclude

    empty = Found(verdict="pass", device=DeviceReport(name="GPU", capability="9.0", torch="2.13", cuda="13.0"))
    with pytest.raises(InconclusiveError) as caught:
        conclude(empty, VerifyOptions(require=required))
    assert caught.value.code == "verify.required"


def test_weights_dequantized_at_build_are_compared_too(exports: Path, base: Path, tmp_path: Path) -> None:
    """They cannot equal the base; the record that names them does not excuse them either."""
    out = tmp_path / "out"
    where = ("--preset", "none", "--keep-bf16", PACKED, "--export", exports / "fp8", "--output", out)
    assert run_mopt("convert-fp8", *where).exit_code == 0
    words = f"{PACKED}.weight: near the base's"
    refused, accepted = verify(out, "--base", base), verify(out, "--base", base, "--accept-near")
    assert (refused.exit_code, refused.error_code) == (1, "check.verify")
    assert words in refused.message and "--accept-near" in refused.message
    assert accepted.exit_code == 0 and found(accepted)["verdict"] == "pass"
    assert [found(one)["proof"] for one in (refused, accepted)] == ["not proven: near"] * 2
    line = f"{words} (first at [0, 0]: expected -0.00915527344, found -0.00885009766)"
    levels = [next(one for one in found(each)["levels"] if one["level"] == "L2") for each in (refused, accepted)]
    assert [(one["status"], one["failures"], one["warnings"]) for one in levels] == [
        ("fail", [line], []),
        ("warn", [], [line]),
    ]
    tensors = load(out)
    resave(out, tensors | {f"{PACKED}.weight": tensors[f"{PACKED}.weight"] * 1.1})
    outcome = verify(out, "--base", base, "--accept-near")
    level = next(one for one in found(outcome)["levels"] if one["level"] == "L2")
    assert outcome.exit_code == 1 and any(
        one.startswith(f"{PACKED}.weight: not the base's (first at [0, 0]: expected ") for one in level["failures"]
    )
    assert "--accept-near" not in outcome.message
    assert found(outcome)["proof"] == "mismatch"


@pytest.mark.parametrize("consent", [(), ("--accept-near",)])
def test_what_is_near_the_base_and_not_as_recorded_is_a_mismatch(
    consent: tuple[str, ...], built: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    """A slight change after the build: consent to what is near would not make it pass, and is not proposed."""
    out = shutil.copytree(built["nvfp4"], tmp_path / "out")
    tensors = load(out)
    name = "norm_out.linear.weight"
    tensors[name][0, 0] *= 1.01
    resave(out, tensors)
    outcome = verify(out, "--base", base, *consent)
    levels = {one["level"]: one["status"] for one in found(outcome)["levels"]}
    assert (levels["record"], levels["L2"]) == ("fail", "warn" if consent else "fail")
    assert (outcome.exit_code, found(outcome)["proof"]) == (1, "mismatch")
    assert "near the base's" in str(found(outcome)["levels"]) and "--accept-near" not in outcome.message


@pytest.mark.parametrize("option", ["--report", "--report-json"])
def test_a_path_that_no_file_system_takes_is_a_usage_error(option: str, built: dict[str, Path], tmp_path: Path) -> None:
    assert verify(built["nvfp4"], option, tmp_path / ("a" * 5000)).exit_code == 2


def test_a_page_replaces_a_page_and_nothing_else(built: dict[str, Path], tmp_path: Path) -> None:
    page, other = tmp_path / "page.html", tmp_path / "link" / "page.html"
    (tmp_path / "link").symlink_to(tmp_path)
    assert verify(built["nvfp4"], "--report", page, "--report-json", other).exit_code == 2, "one file under two names"
    page.write_text("<html>mine</html>")
    refused = verify(built["nvfp4"], "--report", page)
    assert (refused.exit_code, refused.error_code) == (4, "report.foreign")
    assert page.read_text() == "<html>mine</html>"
    page.unlink()
    for _ in range(2):
        verify(built["nvfp4"], "--report", page)
        assert '<meta name="generator" content="mopt verify">' in page.read_text(encoding="utf-8")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["link", "page.html"]


@pytest.mark.parametrize("algorithm", ["nvfp4", "fp8"])
def test_input_scales_that_neither_base_nor_record_has_are_told(
    algorithm: str, built: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    def shrunk(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith(".input_scale"):
                tensors[name] *= 1e-3

    told = "L2: not compared: input scales of 24 modules"
    alone = edit(built[algorithm], tmp_path / "out", shrunk)  # without a record
    outcome = run_mopt("verify", alone, "--base", base, "--device", "cpu", json_report=False)
    assert outcome.exit_code == 0 and outcome.stdout.startswith("proven\n") and told in outcome.stdout
    recorded = run_mopt("verify", built[algorithm], "--base", base, "--device", "cpu", json_report=False)
    assert recorded.exit_code == 0 and told not in recorded.stdout
