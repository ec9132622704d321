"""Documents that could go stale: what they say is compared with what is."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from root import ROOT
from support import run_mopt

FOLDERS = (ROOT, ROOT / "modelopt_convert", ROOT / "tests")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def test_support_table_is_current() -> None:
    from make_support import render

    assert (ROOT / "docs" / "support.md").read_text() == render(), "run scripts/make/make_support.py"


def test_the_page_of_codes_is_current() -> None:
    from make_errors import render

    assert (ROOT / "docs" / "errors.md").read_text() == render(), "run scripts/make/make_errors.py"


def test_the_house_is_drawn_as_it_is() -> None:
    from make_house import render

    assert (ROOT / "docs" / "house.svg").read_text() == render(), "run scripts/make/make_house.py"


def test_the_pictures_are_those_of_the_code() -> None:
    from make_pictures import FOLDER, render

    for name, text in render().items():
        assert (FOLDER / name).read_text() == text, f"{name}: run scripts/make/make_pictures.py"


def test_the_reference_of_the_command_line_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    from make_cli import TARGET, render

    monkeypatch.setenv("COLUMNS", "40")  # the page is the same in any terminal
    assert TARGET.read_text() == render(), "run scripts/make/make_cli.py"


def test_the_reference_of_the_api_is_current() -> None:
    from make_api import TARGET, render

    assert TARGET.read_text() == render(), "run scripts/make/make_api.py"


def test_every_file_that_is_named_exists() -> None:
    assert len(PAGES) > 15
    for page in PAGES:
        text = page.read_text()
        named = set(re.findall(r"`([\w./]+/[\w./]*\w\.(?:py|md|toml|svg|json|txt|sh))(?:::\w+)?`", text))
        assert [
            one for one in sorted(named) if "NAME" not in one and not any((folder / one).exists() for folder in FOLDERS)
        ] == [], page.name
        linked = set(re.findall(r"\]\(([^):#]+)\)", text))
        assert [one for one in sorted(linked) if not (page.parent / one).exists()] == [], page.name


def test_every_command_that_is_shown_has_real_flags() -> None:
    shown = [line for page in PAGES for line in re.findall(r"^mopt [a-z0-9-]+ .*$", page.read_text(), re.MULTILINE)]
    commands = {line.split()[1] for line in shown}
    assert commands >= {"build-nvfp4", "convert-fp8", "inspect", "swap-nibbles", "unswizzle-scales", "verify", "push"}
    known = {command: run_mopt(command, "--help", json_report=False).stdout for command in commands}
    for line in shown:
        for flag in re.findall(r" (--[a-z0-9-]+)", line):
            assert flag in known[line.split()[1]], (line, flag)


def test_the_readme_says_what_ci_runs() -> None:
    commands = re.findall(r"^make .*$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert len(commands) == 2
    assert "\n".join(["```", *commands, "```"]) in (ROOT / "README.md").read_text()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1200


def test_the_site_has_every_page() -> None:
    sections = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = [page for section in sections for entry in section.values() for page in _pages(entry)]
    assert sorted(pages) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def _pages(entry: str | list[dict[str, str]]) -> list[str]:
    return [entry] if isinstance(entry, str) else [page for one in entry for page in one.values()]


def test_every_exit_code_is_documented() -> None:
    from modelopt_convert.run.errors import ExitCode

    text = (ROOT / "docs" / "exit-codes.md").read_text()
    for code in ExitCode:
        assert f"| {int(code)} |" in text, code
    assert "(docs/exit-codes.md)" in (ROOT / "README.md").read_text()


def test_every_regression_names_a_test() -> None:
    rows = [line for line in (ROOT / "tests" / "REGRESSIONS.md").read_text().splitlines() if line.startswith("| ")]
    named = [row for row in rows if re.search(r"`(?:\w+/)*test_\w+\.py::test_\w+` \|$", row)]
    assert len(named) > 40
    assert len(rows) - len(named) == 3, "a row without a test"  # the heads of the tables


def test_every_test_that_is_named_exists() -> None:
    named = {
        (path.relative_to(ROOT), file.removeprefix("tests/"), test)
        for folder in ("tests", "scripts", "docs")
        for path in (ROOT / folder).rglob("*.[mp][dy]")
        for file, test in re.findall(r"\b((?:\w+/)*test_\w+\.py)::(test_\w+)", path.read_text())
    }
    assert len(named) > 100
    missing = [
        one
        for one in sorted(named)
        if not (ROOT / "tests" / one[1]).is_file() or f"\ndef {one[2]}(" not in (ROOT / "tests" / one[1]).read_text()
    ]
    assert missing == []


def test_the_wheel_carries_the_package_and_the_presets(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for module in (ROOT / "modelopt_convert").rglob("*.py"):
        assert module.relative_to(ROOT).as_posix() in names
    for preset in (ROOT / "presets").glob("*.toml"):
        assert f"modelopt_convert/preset/toml/{preset.name}" in names
    assert "modelopt_convert/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "scripts/"))]
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from modelopt_convert.cli import main; main()"
    listed = subprocess.run(
        [sys.executable, "-c", code, str(unpacked), "presets"], capture_output=True, text=True, cwd=tmp_path
    )
    assert "flux1-dev" in listed.stdout, listed.stderr
    built = subprocess.run(
        [sys.executable, "-c", code, str(unpacked), "demo", "new"], capture_output=True, text=True, cwd=tmp_path
    )
    assert built.returncode == 0 and built.stdout.startswith("proven\n"), built.stderr
