"""Presets of one class: which is chosen by config.json and repo, and what is said where nothing tells them apart."""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loopback_hub import LoopbackHub
from pipelines import make_pipeline
from support import run_mopt

from modelopt_convert.preset import preset as presets
from modelopt_convert.preset.preset import choose_preset, load_preset, preset_names
from modelopt_convert.run.errors import InputError

SHIPPED = [load_preset(name).preset for name in preset_names()]
FLUX1 = Path(presets.__file__).resolve().parents[2] / "presets" / "flux1-dev.toml"


def sibling(name: str, config: str = "{}", having: str = "{}", quality: str | None = None) -> str:
    """A preset of FLUX.1's class with a name, a title, a repo, a license and a limit of its own."""
    text = FLUX1.read_text()
    for key, value in {
        "name": name,
        "title": f"Title of {name}",
        "base_repo": f"org/Repo-{name}",
        "license_name": f"license-of-{name}",
        "license_link": f"https://example.org/{name}",
        "pipeline_tag": f"task-of-{name}",
    }.items():
        text = re.sub(rf"^{key} = .*$", f'{key} = "{value}"', text, flags=re.MULTILINE)
    text = re.sub(r"^repos = .*$", f'repos = ["org/Repo-{name}", "org/Other-{name}"]', text, flags=re.MULTILINE)
    text = re.sub(
        r"^known_limits = \[", f'known_limits = ["limit of {name}", "limit of all", ', text, flags=re.MULTILINE
    )
    text = re.sub(r"^\[config\]\n(?:[^\[\n].*\n)*", "", text, flags=re.MULTILINE)
    if quality is not None:
        text = re.sub(r"^quality = \[", f'quality = ["{quality}", ', text, flags=re.MULTILINE)
    return f"config = {config}\nhaving = {having}\n{text}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the presets lie that mopt knows."""
    made = tmp_path / "presets"
    made.mkdir()
    monkeypatch.setattr(presets, "_FOLDERS", (made,))
    return made


def put(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text)


def chosen(repo: str | None = None, **config: Any) -> tuple[str, list[str], bool]:
    found = choose_preset({"_class_name": "FluxTransformer2DModel", **config}, "nvfp4", repo)
    return found.loaded.preset.name, found.also, found.is_named


def test_one_value_tells_two_apart(folder: Path) -> None:
    put(folder, small=sibling("small", "{ layers = 5 }"), large=sibling("large", "{ layers = 8 }"))
    assert chosen(layers=5) == ("small", [], False) and chosen(layers=8) == ("large", [], False)
    # Whatever repo is given: a preset that does not fit is not chosen.
    assert chosen("org/Repo-large", layers=5) == ("small", [], False)
    with pytest.raises(InputError) as caught:
        chosen(layers=6)
    assert caught.value.code == "preset.none_fits"


@pytest.mark.parametrize("more", [("{ layers = 5 }", "{}"), ("{}", "{ image = true }")])
def test_what_says_more_goes_first(folder: Path, more: tuple[str, str]) -> None:
    put(folder, any=sibling("any", quality="proj_out"), special=sibling("special", *more))
    assert chosen(layers=5, image=3) == ("special", [], False)
    assert chosen(layers=6) == ("any", [], False)
    assert chosen("org/Repo-any", layers=5, image=3) == ("any", [], True)


def test_a_repo_alone_tells_two_apart(folder: Path) -> None:
    put(folder, one=sibling("one"), two=sibling("two"))
    for name, repo in itertools.product(("one", "two"), ("org/Repo-", "org/Other-")):
        assert chosen(f"{repo}{name}") == (name, [], True)
    for unknown in (None, "me/Repo-two", "org/repo-two"):
        assert chosen(unknown) == ("one", ["two"], False)
    found = choose_preset({"_class_name": "FluxTransformer2DModel"}, "nvfp4")
    assert found.made_for(None) is None and found.made_for("me/tuned") is None
    told = found.limits("nvfp4", exported=True)
    assert "limit of all" in told and not [one for one in told if "of one" in one]
    for repo in ("org/Repo-two", "org/Other-two"):
        made = found.made_for(repo)
        assert made is not None and made.name == "two"


def test_sets_that_differ_are_not_guessed(folder: Path) -> None:
    put(folder, one=sibling("one"), two=sibling("two", quality="proj_out"))
    with pytest.raises(InputError) as caught:
        chosen()
    assert caught.value.code == "preset.ambiguous" and "one, two" in caught.value.message
    assert "--base-model" in str(caught.value.hint)
    assert chosen("org/Repo-two") == ("two", [], True)


@given(st.data())
def test_no_shipped_preset_is_chosen_for_a_sibling(data: st.DataObject) -> None:
    """A config with all that two presets ask for is of the one that asks for more, or both give the same."""
    one, two = data.draw(st.sampled_from([pair for pair in itertools.permutations(SHIPPED, 2) if _of_a_kind(*pair)]))
    config = {**_config(one), **_config(two)}
    if one.fits(config) and two.fits(config):
        shared = _asked(one) <= _asked(two) or _asked(two) <= _asked(one)
        algorithm = data.draw(st.sampled_from(sorted(one.sets().keys() & two.sets().keys())))
        assert shared or presets._rule_key(one, algorithm) == presets._rule_key(two, algorithm), (one.name, two.name)


@pytest.mark.parametrize("preset", SHIPPED, ids=lambda preset: preset.name)
def test_a_shipped_preset_is_chosen_by_its_repos_and_names_no_other_model(preset: presets.Preset) -> None:
    for algorithm in preset.sets():
        for repo in preset.repos:
            found = choose_preset(_config(preset), algorithm, repo)
            assert (found.loaded.preset.name, found.also, found.is_named) == (preset.name, [], True)
            assert found.made_for(repo) == preset
        found = choose_preset(_config(preset), algorithm)
        assert not found.is_named and found.made_for(None) is None and found.made_for("me/tuned") is None


@pytest.mark.parametrize("name", ["flux1-dev", "flux1-krea-dev"])
def test_a_base_on_the_hub_gets_its_own_name(name: str, hub: LoopbackHub, exports: Path, tmp_path: Path) -> None:
    """FLUX.1 Krea [dev] has the config.json of FLUX.1 [dev]: its repo alone tells them apart."""
    names = [name, *({"flux1-dev", "flux1-krea-dev"} - {name})]
    wanted, other = (load_preset(one).preset for one in names)
    hub.seed(wanted.base_repo, make_pipeline(exports / "base", tmp_path / "base"))
    request = ["build-nvfp4", "--export", exports / "nvfp4", "--base", f"hf://{wanted.base_repo}", "--pipeline-output"]
    text = everything(request, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"# {wanted.title}, NVFP4" in card and f"pipeline_tag: {wanted.pipeline_tag}" in card
    assert f"--model-id {wanted.base_repo.partition('/')[2]} " in text
    others = other.title, other.base_repo, f"`{other.name}`", str(other.license_link)
    assert not [word for word in others if word in text]


def _of_a_kind(one: presets.Preset, two: presets.Preset) -> bool:
    return one.class_name == two.class_name


def _config(preset: presets.Preset) -> dict[str, Any]:
    there = {key: 1 for key, is_there in preset.having.items() if is_there}
    return {"_class_name": preset.class_name, **there, **preset.config}


def _asked(preset: presets.Preset) -> set[tuple[str, str]]:
    return {(key, repr(value)) for key, value in {**preset.config, **preset.having}.items()}


WORDS = ("Title of {}", "Repo-{}", "Other-{}", "license-of-{}", "example.org/{}", "task-of-{}", "limit of {}")


def everything(request: list[str | Path], out: Path) -> str:
    """All that is said of a checkpoint: its cards, records, the report, the terminal, ``inspect`` and ``verify``."""
    report = out.with_suffix(".json")
    outcome = run_mopt(*request, "--output", out, "--report-json", report, json_report=False)
    assert outcome.exit_code == 0, outcome.stderr
    files = [path.read_text() for path in out.rglob("*") if path.name in ("README.md", "mopt.json")]
    later = [run_mopt(command, out).stdout for command in ("inspect", "verify")]
    return "\n".join([*files, report.read_text(), outcome.stderr, outcome.stdout, *later])


def said_of(text: str, name: str) -> list[str]:
    return [word.format(name) for word in WORDS if word.format(name) in text]


CASES: Mapping[str, tuple[str | None, str | None]] = {  # the repo that the base is of, and the one that is claimed
    "the first's repo": ("org/Repo-alpha", None),
    "the second's repo": ("org/Other-beta", None),
    "a repo of somebody": ("me/tuned", None),
    "a local folder": (None, None),
    "said to be the second": (None, "org/Repo-beta"),
    "said to be another": (None, "me/tuned"),
}


@pytest.mark.parametrize(
    ("case", "whole"), [*((case, True) for case in CASES), ("the second's repo", False), ("a local folder", False)]
)
def test_nothing_is_called_by_a_siblings_name(
    case: str, whole: bool, folder: Path, hub: LoopbackHub, exports: Path, tmp_path: Path
) -> None:
    put(folder, alpha=sibling("alpha"), beta=sibling("beta"))
    repo, claimed = CASES[case]
    pipeline = make_pipeline(exports / "base", tmp_path / "base")
    if repo is not None:
        hub.seed(repo, pipeline)
    base = f"hf://{repo}" if repo is not None else pipeline
    request = ["build-nvfp4", "--export", exports / "nvfp4", "--base", base, *(["--pipeline-output"] * whole)]
    request += ["--base-model", claimed] if claimed is not None else []
    text = everything(request, tmp_path / "out")
    known = str(claimed or repo)
    for name in ("alpha", "beta"):
        is_it = known.endswith(f"-{name}")
        assert (said_of(text, name) != []) == is_it, said_of(text, name)
        if is_it:
            card = (tmp_path / "out" / "README.md").read_text()
            assert f"# Title of {name}, NVFP4" in card and f"license_name: license-of-{name}" in card
            assert "presets `alpha`" not in card
    named = set(re.findall(r"--model-id (\S+)", text))
    assert named == ({known.rpartition("/")[2]} if whole and (repo or claimed) else set())
    if not known.endswith(("alpha", "beta")):
        assert "Built with the sets that presets `alpha`, `beta` have in common." in text


def test_an_output_is_not_named_after_one_of_two(folder: Path, exports: Path, tmp_path: Path) -> None:
    put(folder, alpha=sibling("alpha"), beta=sibling("beta"))
    request = ["build-nvfp4", "--export", exports / "nvfp4", "--base", exports / "base"]
    outcome = run_mopt(*request)
    assert (outcome.exit_code, outcome.error_code) == (3, "output.unnamed") and "alpha, beta" in outcome.message
    planned = run_mopt(*request, "--dry-run")
    assert planned.exit_code == 0 and planned.report is not None and planned.report["output"]["path"] == ""
    assert "alpha, beta" in next(
        one["message"] for one in planned.report["warnings"] if one["code"] == "output.unnamed"
    )
    assert "would write OUT: " in run_mopt(*request, "--dry-run", json_report=False).stdout
    request.append("--dry-run")
    assert run_mopt(*request, "--base-model", "org/Repo-beta").report["output"]["path"].endswith("/beta-nvfp4")  # type: ignore[index]
