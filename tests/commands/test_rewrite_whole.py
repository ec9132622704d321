"""What few values of a weight tell: verify and rewrites go by all bytes, and by no sample."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import QUANTIZATION_CONFIG, swap, swizzle, write_transformer
from producers import Packed, dequantized, max_calibration
from support import Tensors, load, packed_in, run_mopt
from weights import NEARLY_CONSTANT, weight

from modelopt_convert.formats.rows import SAMPLED_ROWS, sample_rows

NIBBLES_AND_SCALES = [("high", "linear"), ("low", "128x4"), ("high", "128x4")]


def laid(one: Packed, nibbles: str, order: str) -> Packed:
    scale = swizzle(one.scale.view(torch.uint8)).view(torch.float8_e4m3fn) if order == "128x4" else one.scale
    return Packed(swap(one.packed) if nibbles == "high" else one.packed, scale, one.global_scale)


def one_value_tells() -> Tensors:
    """One value in a row that is not sampled. The smaller one does not even change a scale."""
    row = next(row for row in range(40, 384) if row not in sample_rows(384, SAMPLED_ROWS))
    smaller, single = torch.ones(384, 128, dtype=torch.bfloat16), torch.zeros(384, 128, dtype=torch.bfloat16)
    smaller[row, 22] = 0.5
    single[row, 22] = 1.0
    return {"one_smaller": smaller, "one_nonzero": single}


def told_by_one_value(room: Path, nibbles: str, order: str) -> tuple[Path, Path, Path]:
    """An export of weights that few values tell the layout of, the same as ModelOpt lays it, and their base."""
    base: Tensors = {"norm.weight": torch.ones(8, dtype=torch.bfloat16)}
    right, laid_out = dict(base), dict(base)
    made = {
        kind: weight(kind, 384, 128, seed)
        for seed, kind in enumerate((*NEARLY_CONSTANT, "sparse", "constant", "gaussian"))
    }
    for seed, (kind, values) in enumerate((made | one_value_tells()).items()):
        module = f"blocks.{seed}.{kind}"
        base[f"{module}.weight"] = values
        one = max_calibration(base[f"{module}.weight"])
        for tensors, parts in ((right, one), (laid_out, laid(one, nibbles, order))):
            roles = ("weight", "weight_scale", "weight_scale_2")
            tensors |= {f"{module}.{role}": part.contiguous() for role, part in zip(roles, parts, strict=True)}
            tensors[f"{module}.input_scale"] = torch.tensor(0.01 + 0.001 * seed)
    config: dict[str, Any] = {"_class_name": "SmallTransformer"}
    quantized = config | {"quantization_config": QUANTIZATION_CONFIG | {"group_size": 16}}
    source = write_transformer(room / "source", laid_out, quantized)
    return source, write_transformer(room / "right", right, quantized), write_transformer(room / "base", base, config)


@pytest.mark.parametrize(("nibbles", "order"), NIBBLES_AND_SCALES)
def test_what_sampled_rows_cannot_tell_is_not_proven_as_it_is_declared(
    tmp_path: Path, nibbles: str, order: str
) -> None:
    source, right, base = told_by_one_value(tmp_path, nibbles, order)
    wrong = run_mopt("verify", source, "--base", base, "--device", "cpu")
    assert (wrong.exit_code, wrong.report["verify"]["proof"]) == (1, "mismatch"), wrong.stderr
    fits = run_mopt("verify", right, "--base", base, "--device", "cpu")
    assert (fits.exit_code, fits.report["verify"]["proof"]) == (0, "proven"), fits.stderr
    # Each module by itself: one whose layouts say the same is not wrong, and one that is right speaks for no other.
    told = [words for level in wrong.report["verify"]["levels"] for words in level["failures"]]
    found, wanted = load(source), load(right)
    differ = {name for name in packed_in(found) if not torch.equal(decoded(found, name), decoded(wanted, name))}
    assert {name for name in packed_in(found) if any(words.startswith(f"{name}:") for words in told)} == differ


@pytest.mark.parametrize(("nibbles", "order"), NIBBLES_AND_SCALES)
def test_rewrites_put_in_order_what_sampled_rows_cannot_tell(tmp_path: Path, nibbles: str, order: str) -> None:
    """Also a source of which both orders are wrong, one command after the other; each result is what verify passes."""
    source, right, base = told_by_one_value(tmp_path, nibbles, order)
    commands = ["swap-nibbles"] * (nibbles == "high") + ["unswizzle-scales"] * (order == "128x4")
    for commands_in_order in (commands, commands[::-1]):
        now = source
        for command in commands_in_order:
            out = now.parent / f"{now.name}-{command}"
            done = run_mopt(command, now, out, "--base", base)
            assert done.exit_code == 0 and done.report["proof"]["words"] == "proven", done.stderr
            checked = run_mopt("verify", out, "--base", base, "--device", "cpu")
            assert (checked.exit_code, checked.report["verify"]["proof"]) == (0, "proven"), checked.stderr
            now = out
        found, wanted = load(now), load(right)
        assert found.keys() == wanted.keys()
        base_values = {name: decoded(found, name) for name in packed_in(found)}
        assert all(torch.equal(base_values[name], decoded(wanted, name)) for name in base_values)
        for folder in tmp_path.glob("source-*"):
            shutil.rmtree(folder)


def decoded(tensors: Tensors, module: str) -> torch.Tensor:
    packed, scale, scale_2 = (tensors[f"{module}.{role}"] for role in ("weight", "weight_scale", "weight_scale_2"))
    return dequantized(Packed(packed, scale, scale_2))


@pytest.mark.parametrize(("nibbles", "order"), NIBBLES_AND_SCALES)
def test_weights_that_tell_nothing_are_right_under_any_declared_layout(
    tmp_path: Path, nibbles: str, order: str
) -> None:
    source, _, base = told_by_one_value(tmp_path, nibbles, order)
    config = json.loads((source / "config.json").read_text())
    scales = "swizzled" if order == "128x4" else "linear"
    keys = {"swap_weight_nibbles": nibbles == "high", "checkpoint_weight_scale_layout": scales}
    config["quantization_config"] |= keys
    (source / "config.json").write_text(json.dumps(config))
    declared = run_mopt("verify", source, "--base", base, "--device", "cpu")
    assert (declared.exit_code, declared.report["verify"]["proof"]) == (0, "proven"), declared.stderr
