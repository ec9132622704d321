"""Where build-nvfp4 will not write, and command lines that it will not take. Nothing may change in either case."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults import PACKED, SHARD, entries, reciprocal
from stage_support import with_record
from support import Tensors, build, copy, edit, run_mopt, tree


@dataclass(frozen=True)
class Room:
    """A folder with an export in a pipeline, a base, and space for an OUT."""

    path: Path
    export: Path
    base: Path

    @property
    def pipeline(self) -> Path:
        return self.export.parent

    def checkpoint(self, name: str = "out") -> Path:
        """A folder that --overwrite may replace."""
        return with_record(copy(self.export, self.path / name))


@pytest.fixture
def room(nvfp4: Path, base: Path, tmp_path: Path) -> Room:
    path = tmp_path / "room"
    export = copy(nvfp4, path / "pipeline" / "transformer")
    (path / "pipeline" / "model_index.json").write_text("{}")
    (path / "pipeline" / "vae").mkdir()
    (path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights of another model")
    return Room(path, export, copy(base, path / "base"))


def aliases_of_inputs(room: Room) -> dict[str, tuple[Path, Path, str]]:
    """Cases of OUT and an input being one place: how --export is spelled, OUT, and the code."""
    link = room.path / "link"
    link.symlink_to(room.pipeline)
    chain = room.path / "chain"
    chain.symlink_to(link)
    deep = room.export / "sub"
    deep.mkdir()
    return {
        "the export": (room.export, room.export, "is_input"),
        "the export's pipeline": (room.pipeline, room.pipeline, "is_input"),
        "the transformer of the pipeline": (room.pipeline, room.export, "inside_input"),
        "the base": (room.export, room.base, "is_input"),
        "the export, by ..": (room.export, room.export / ".." / "transformer", "is_input"),
        "the export, by . and /": (room.export, Path(f"{room.pipeline}/./transformer/"), "is_input"),
        "the export, by a linked parent": (room.export, link / "transformer", "is_input"),
        "the export, by two links": (room.export, chain / "transformer", "is_input"),
        "the export, itself given by a link": (link / "transformer", room.export, "is_input"),
        "the pipeline, given by a link": (chain, room.pipeline, "is_input"),
        "inside the export": (room.export, room.export / "out", "inside_input"),
        "deep inside the export": (room.export, deep / "out", "inside_input"),
        "inside the pipeline": (room.pipeline, room.pipeline / "out", "inside_input"),
        "a sibling component of the pipeline": (room.pipeline, room.pipeline / "vae", "inside_input"),
        "inside the base": (room.export, room.base / "out", "inside_input"),
        "inside the export, by a linked parent": (room.export, link / "transformer" / "out", "inside_input"),
        "inside the pipeline, given by a link": (link, room.pipeline / "out", "inside_input"),
        "around the export": (room.export, room.pipeline, "around_input"),
        "around both": (room.export, room.path, "around_input"),
        "around the export, by ..": (room.export, room.export / "..", "around_input"),
        "around the export, given by a link": (link / "transformer", room.pipeline, "around_input"),
    }


# The names of a checkpoint's files, and not its own.
MINE = ("my_lora.safetensors", "train_log.json", "notes.md", "LICENSE", ".gitattributes", "model_index.json")
ALIASES = (
    "the export",
    "the export's pipeline",
    "the transformer of the pipeline",
    "the base",
    "the export, by ..",
    "the export, by . and /",
    "the export, by a linked parent",
    "the export, by two links",
    "the export, itself given by a link",
    "the pipeline, given by a link",
    "inside the export",
    "deep inside the export",
    "inside the pipeline",
    "a sibling component of the pipeline",
    "inside the base",
    "inside the export, by a linked parent",
    "inside the pipeline, given by a link",
    "around the export",
    "around both",
    "around the export, by ..",
    "around the export, given by a link",
)


def output_refused(room: Room, export: Path, output: Path, *more: str, code: str) -> None:
    """Exit 4 with the code, OUT named, a hint, and the whole tree as it was: also what lies beside the room."""
    top = room.path.parent
    before, content = entries(top), tree(top)
    outcome = build(export, room.base, output, *more)
    assert (outcome.exit_code, outcome.error_code) == (4, f"output.{code}"), outcome.stderr
    assert outcome.report is not None
    error = outcome.report["error"]
    place = output.resolve() if output.name in ("", "..") else output.parent.resolve() / output.name
    assert error["message"].startswith(f"output {place}: ") and error["path"] == str(place)
    assert error["hint"]
    assert outcome.report["status"] == "refused" and outcome.report["output"]["published"] is False
    assert entries(top) == before and tree(top) == content


@pytest.mark.parametrize("more", [("--overwrite",), (), ("--overwrite", "--dry-run")])
@pytest.mark.parametrize("case", ALIASES)
def test_out_may_not_be_in_or_around_an_input(case: str, more: tuple[str, ...], room: Room) -> None:
    """Other builders delete the source, the base, or the whole pipeline, and fail after that."""
    cases = aliases_of_inputs(room)
    assert tuple(cases) == ALIASES
    export, output, code = cases[case]
    output_refused(room, export, output, *more, code=code)


def unrecorded(room: Room) -> Path:
    """A checkpoint that mopt did not write: the export itself, or a BF16 original."""
    return copy(room.export, room.path / "out")


def edited_card(room: Room) -> Path:
    output = room.checkpoint()
    (output / "README.md").write_text("as it was written")
    with_record(output)
    (output / "README.md").write_text("as I want it")
    return output


def with_file(name: str, content: str = "mine") -> Callable[[Room], Path]:
    def make(room: Room) -> Path:
        path = room.checkpoint() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return room.path / "out"

    return make


def existing_pipeline(room: Room) -> Path:
    return Path(shutil.copytree(room.pipeline, room.path / "out"))


def two_components(room: Room) -> Path:
    for name in ("transformer", "vae"):
        copy(room.export, room.path / "out" / name)
    (room.path / "out" / "model_index.json").write_text("{}")
    return room.path / "out"


def empty(room: Room) -> Path:
    (room.path / "out").mkdir()
    return room.path / "out"


def no_weights(room: Room) -> Path:
    (room.checkpoint() / SHARD).unlink()
    return room.path / "out"


def no_config(room: Room) -> Path:
    (copy(room.export, room.path / "out") / "config.json").unlink()
    return room.path / "out"


def linked_weights(room: Room) -> Path:
    shard = room.checkpoint() / SHARD
    shard.rename(room.path / "elsewhere.safetensors")
    shard.symlink_to(room.path / "elsewhere.safetensors")
    return room.path / "out"


def linked_component(room: Room) -> Path:
    (room.checkpoint() / "transformer").symlink_to(room.export)
    return room.path / "out"


def link_to_checkpoint(room: Room) -> Path:
    (room.path / "out").symlink_to(room.checkpoint("real"))
    return room.path / "out"


def dangling_link(room: Room) -> Path:
    (room.path / "out").symlink_to(room.path / "nowhere")
    return room.path / "out"


def link_to_input(room: Room) -> Path:
    (room.path / "out").symlink_to(room.export)
    return room.path / "out"


def plain_file(room: Room) -> Path:
    (room.path / "out").write_text("mine")
    return room.path / "out"


def no_parent(room: Room) -> Path:
    return room.path / "no" / "such" / "out"


def parent_is_a_file(room: Room) -> Path:
    (room.path / "file").write_text("mine")
    return room.path / "file" / "out"


@pytest.mark.parametrize(
    ("make", "code"),
    [
        pytest.param(existing_pipeline, "foreign", id="a pipeline with vae/"),
        pytest.param(two_components, "foreign", id="a pipeline of two checkpoints"),
        pytest.param(with_file(".git/config"), "not_a_checkpoint", id=".git"),
        pytest.param(with_file("vae/config.json"), "foreign", id="vae/"),
        pytest.param(with_file("transformer/notes.txt"), "foreign", id="transformer/notes.txt"),
        pytest.param(with_file("transformer/deeper/config.json"), "foreign", id="transformer/deeper/"),
        pytest.param(with_file("train.py"), "foreign", id="train.py"),
        pytest.param(with_file(".env"), "foreign", id=".env"),
        pytest.param(with_file("pytorch_model.bin"), "foreign", id="pytorch_model.bin"),
        pytest.param(empty, "not_a_checkpoint", id="empty"),
        pytest.param(no_weights, "not_a_checkpoint", id="no weights"),
        pytest.param(no_config, "not_a_checkpoint", id="no config"),
        pytest.param(linked_weights, "foreign", id="linked weights"),
        pytest.param(linked_component, "foreign", id="linked component"),
        pytest.param(unrecorded, "foreign", id="no record"),
        pytest.param(edited_card, "foreign", id="an edited card"),
        *(pytest.param(with_file(name), "foreign", id=name) for name in MINE),
        pytest.param(link_to_checkpoint, "symlink", id="a link to a checkpoint"),
        pytest.param(link_to_input, "symlink", id="a link to an input"),
        pytest.param(dangling_link, "symlink", id="a dangling link"),
        pytest.param(plain_file, "not_a_directory", id="a file"),
        pytest.param(no_parent, "no_parent", id="no parent"),
        pytest.param(parent_is_a_file, "no_parent", id="parent is a file"),
    ],
)
@pytest.mark.parametrize("more", [("--overwrite",), ("--overwrite", "--dry-run")])
def test_only_a_plain_checkpoint_is_replaced(
    make: Callable[[Room], Path], code: str, more: tuple[str, ...], room: Room
) -> None:
    output_refused(room, room.export, make(room), *more, code=code)


@pytest.mark.parametrize(
    "make", [existing_pipeline, two_components, with_file("train.py"), linked_weights, unrecorded, edited_card]
)
def test_the_consent_to_lose_what_is_foreign_names_it(make: Callable[[Room], Path], room: Room) -> None:
    output = make(room)
    before = tree(room.path)
    planned = build(room.export, room.base, output, "--overwrite-foreign", "--dry-run")
    assert planned.exit_code == 0 and tree(room.path) == before
    outcome = build(room.export, room.base, output, "--overwrite-foreign")
    assert outcome.exit_code == 0 and outcome.report is not None and planned.report is not None
    told = [one["message"] for one in outcome.report["warnings"] if one["code"] == "output.foreign_replaced"]
    would = [one["message"] for one in planned.report["warnings"] if one["code"] == "output.foreign_replaced"]
    assert len(told) == 1 and [one.replace("would go", "went") for one in would] == told
    named = {
        existing_pipeline: "model_index.json, transformer/, vae/",
        two_components: "model_index.json, transformer/, vae/",
        linked_weights: SHARD,
        edited_card: "README.md",
    }.get(make, SHARD if make is unrecorded else "train.py")
    assert named in told[0]
    assert (output / "mopt.json").exists() and (room.path / "pipeline" / "vae").is_dir()
    # What mopt wrote itself needs no such consent.
    assert build(room.export, room.base, output, "--overwrite").exit_code == 0


@pytest.mark.parametrize("make", [Room.checkpoint, empty, existing_pipeline, with_file("train.py")])
def test_what_exists_is_not_touched_without_overwrite(make: Callable[[Room], Path], room: Room) -> None:
    output_refused(room, room.export, make(room), code="exists")


@pytest.mark.parametrize("where", ["home", "current"])
def test_home_and_the_current_folder_are_not_replaced(where: str, room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    output = room.checkpoint()
    if where == "home":
        monkeypatch.setenv("HOME", str(output))
    else:
        monkeypatch.chdir(output)
    output_refused(room, room.export, output, "--overwrite", code="special_folder")
    if where == "current":
        output_refused(room, room.export, Path(), "--overwrite", code="special_folder")


def test_a_default_out_that_is_an_input_is_refused(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --output it is ./<preset>-nvfp4."""
    export = copy(room.export, room.path / "flux1-dev-nvfp4")
    monkeypatch.chdir(room.path)
    before = entries(room.path)
    for preset in ("--preset", "flux1-dev"), ("--base-model", "black-forest-labs/FLUX.1-dev"):
        outcome = run_mopt("build-nvfp4", *preset, "--export", export, "--base", room.base, "--overwrite")
        assert (outcome.exit_code, outcome.error_code) == (4, "output.is_input")
    assert entries(room.path) == before


def uncalibrated(tensors: Tensors) -> None:
    del tensors[f"{PACKED}.input_scale"]


def damaged(tensors: Tensors) -> None:
    tensors[f"{PACKED}.weight"][0] = 0


@pytest.mark.parametrize(("fault", "exit_code"), [(uncalibrated, 3), (damaged, 1), (reciprocal, 3)])
def test_a_good_out_outlives_a_bad_input(fault: Callable[[Tensors], None], exit_code: int, room: Room) -> None:
    """Other builders delete OUT before they look at the input."""
    output = room.checkpoint()
    export = edit(room.export, room.path / "bad", fault)
    before = entries(room.path)
    outcome = build(export, room.base, output, "--overwrite")
    assert outcome.exit_code == exit_code
    assert entries(room.path) == before
    # The same line with a good export replaces it.
    assert build(room.export, room.base, output, "--overwrite").exit_code == 0
    after = entries(room.path)
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == {
        f"out/{name}" for name in (SHARD, "config.json", "README.md", "mopt.json")
    }


GOOD = ("--export", "{export}", "--base", "{base}", "--output", "{room}/out")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--export", "{export}", "--output", "{room}/out"), "--base"),
        ((), "--base"),
        (("--export", "{export}", "--base", "{base}", "--preset", "none"), "--output"),
        *((((*GOOD, "--max-shard-size", size)), "--max-shard-size") for size in ("abc", "GB", "", "5GX", "+5GB")),
        *((((*GOOD, "--max-shard-size", size)), "--max-shard-size") for size in ("0GB", "-1GB", "nanGB", "infGB")),
        ((*GOOD, "--max-error", "-0.1"), "--max-error"),
        ((*GOOD, "--max-error", "small"), "--max-error"),
        ((*GOOD, "--colour"), "--colour"),
        ((*GOOD, "extra"), "extra"),
        ((*GOOD, "--report-json", "{room}/no/such.json"), "no/such.json"),
        ((*GOOD, "--report-json", "{room}"), "room"),
    ],
)
@pytest.mark.parametrize("json_report", [False, True])
def test_usage_errors_exit_2_and_name_the_flag(
    arguments: tuple[str, ...], named: str, json_report: bool, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(room.path)
    words = [word.format(export=room.export, base=room.base, room=room.path) for word in arguments]
    before = entries(room.path)
    outcome = run_mopt("build-nvfp4", *words, json_report=json_report)
    assert outcome.exit_code == 2
    assert named in outcome.stderr and "Traceback" not in outcome.stderr
    if json_report:
        report = json.loads(outcome.stdout)
        assert (report["exit_code"], report["error"]["code"]) == (2, "usage") and named in report["error"]["message"]
    else:
        assert outcome.stdout == ""
    assert entries(room.path) == before


def test_a_report_inside_out_is_a_usage_error(room: Room) -> None:
    """It would be swapped away with the old OUT, or become part of the checkpoint."""
    output = room.checkpoint()
    before = entries(room.path)
    outcome = build(room.export, room.base, output, "--overwrite", "--report-json", output / "report.json")
    assert outcome.exit_code == 2 and "report.json" in outcome.stderr
    assert entries(room.path) == before
