"""The table of errors by kind of module."""

from modelopt_convert.commands.build.error_table import error_rows, error_table, kind_of
from modelopt_convert.preset.preset import load_preset, parse_preset, preset_names
from modelopt_convert.report.report import ModuleReport


def module(error: float | None, codes: int = 100, equal: int = 100) -> ModuleReport:
    return ModuleReport(verdict="reproduced", codes=codes, codes_equal=equal, relative_error=error)


def test_kinds() -> None:
    assert kind_of("transformer_blocks.17.attn.to_out.0") == "transformer_blocks.*.attn.to_out.0"
    assert kind_of("blocks.3.ffn.net.2") == "blocks.*.ffn.net.2"
    assert kind_of("text.refiner_blocks.1") == "text.refiner_blocks.*"
    assert kind_of("proj_out") == "proj_out"


def test_the_mean_does_not_depend_on_the_order() -> None:
    modules = {f"blocks.{number}.q": module(0.09 + number / 7000) for number in range(9)}
    packed = list(modules)
    assert error_rows(modules, packed) == error_rows(modules, packed[::-1])
    (row,) = error_rows(modules, packed)
    assert (row.modules, row.max_error) == (9, round((0.09 + 8 / 7000) * 10_000))


def test_what_is_not_packed_or_not_measured_has_no_row() -> None:
    modules = {"blocks.0.q": module(0.1, 1000, 999), "blocks.0.k": module(None), "blocks.0.v": module(0.2)}
    assert error_table(modules, ["blocks.0.q", "blocks.0.k"])[2:] == ["| `blocks.*.q` | 1 | 99.90% | 0.1000 | 0.1000 |"]
    assert error_table(modules, ["blocks.0.k"]) == []


def test_a_license_is_the_presets_own() -> None:
    schnell = load_preset("flux1-schnell").preset
    assert (schnell.license, schnell.license_name, schnell.license_link) == ("apache-2.0", None, None)
    mine = parse_preset('extends = "flux1-dev"\nname = "mine"\nbase_repo = "me/mine"\n', path="mine.toml").preset
    assert mine.license is None and mine.license_name is None
    for name in preset_names():
        preset = load_preset(name).preset
        assert (preset.license == "other") == (preset.license_name is not None), name
        assert (preset.license_link is None) or preset.license_link.startswith("https://"), name
