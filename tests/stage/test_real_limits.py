"""Real file systems at their limits, made in a mount namespace of their own: full, read-only, layered, without rights.

What the tests of errors replace or inject, the kernel itself says here.
"""

from pathlib import Path
from typing import Any

import pytest
from figures import note
from own_mounts import in_own_mounts

HEAD = """
from crash_driver import files_of, fill, held_by, lay
from modelopt_convert.run.errors import MoptError
from modelopt_convert.stage.directory import StagingDir

VERSIONS = {name: files_of(name) for name in ("old", "new")}
place = top / "place"
place.mkdir(exist_ok=True)
out = place / "out"

def attempt(before_publish=lambda: None, need_bytes=0):
    try:
        with StagingDir(out, (), overwrite=True, need_bytes=need_bytes) as stage:
            fill(stage, "new")
            before_publish()
            published = stage.publish()
            told = {"code": published.method, "warnings": list(published.warnings)}
    except MoptError as error:
        told = {"code": error.code, "exit": int(error.exit_code), "message": error.message}
        if getattr(error, "kept_at", None):
            told["kept"] = [name for name, files in VERSIONS.items() if files == held_by(Path(error.kept_at))]
    return told

def state():
    held = held_by(out)
    version = next((name for name, files in VERSIONS.items() if files == held), "torn" if held else "absent")
    return version, sorted(name for name in os.listdir(place) if name not in ("out", "ballast"))

def tell(found):
    print(json.dumps(found))
"""


def test_a_full_file_system(tmp_path: Path) -> None:
    """64 kB, and every number of free pages from none to enough: it fits and is in place, or OUT stands."""
    found = in_own_mounts(
        tmp_path,
        HEAD
        + """
mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", place)
cases = []
for present in (True, False):
    for pages in range(16):
        subprocess.run(f"rm -rf {out} {place}/ballast", shell=True, check=True)
        if present:
            lay(out, "old")
        status = os.statvfs(place)
        if status.f_bavail < pages:
            break
        with (place / "ballast").open("wb") as file:
            file.write(bytes(4096 * (status.f_bavail - pages)))
        cases.append([present, pages, attempt(), *state()])
refused = attempt(need_bytes=1 << 20)
tell([cases, refused, state()])
""",
    )
    cases, refused, _state = found
    outcomes = {"in place": 0, "refused": 0}
    for present, pages, told, version, litter in cases:
        assert litter == [], (pages, told)
        if told["code"] in ("rename", "exchange"):
            assert version == "new" and told["warnings"] == []
            outcomes["in place"] += 1
        else:
            assert (told["code"], told["exit"]) == ("storage.no_space", 5), told
            assert "ENOSPC" in told["message"] and str(tmp_path) in told["message"]
            assert version == ("old" if present else "absent")
            outcomes["refused"] += 1
    assert all(outcomes.values()) and outcomes["refused"] >= 4, outcomes
    assert refused["code"] == "storage.no_space" and str(1 << 20) in refused["message"]
    note(12, limit="full tmpfs", cases=len(cases), torn=0, litter=0, **outcomes)


def test_no_inodes_left(tmp_path: Path) -> None:
    found = in_own_mounts(
        tmp_path,
        HEAD
        + """
mount("-t", "tmpfs", "-o", "nr_inodes=12", "tmpfs", place)
cases = []
for spare in range(7):
    subprocess.run(f"rm -rf {place}/*", shell=True, check=True)
    lay(out, "old")
    (place / "ballast").mkdir()
    for number in range(os.statvfs(place).f_ffree - spare):
        (place / "ballast" / str(number)).touch()
    cases.append([spare, attempt(), *state()])
tell(cases)
""",
    )
    assert [told["code"] for _, told, _, _ in found] == ["storage.no_space"] * 5 + [
        "exchange"
    ] * 2  # stage, marker, three files
    assert all(version == ("old" if spare < 5 else "new") and litter == [] for spare, _, version, litter in found)


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    """As ``ulimit -f`` sets it: found when the file's size is reserved, or in a short write and then EFBIG."""
    found = in_own_mounts(
        tmp_path,
        HEAD
        + """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
lay(out, "old")
shard = max(len(data) for data in VERSIONS["new"].values())
cases = []
for limit in (100, shard - 1, shard):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    cases.append([attempt(), *state()])
    subprocess.run(["rm", "-r", out], check=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    lay(out, "old")
resource.setrlimit(resource.RLIMIT_FSIZE, (shard, resource.RLIM_INFINITY))
try:
    with StagingDir(out, (), overwrite=True, need_bytes=1) as stage:
        fill(stage, "new")
        stage.write_file("README.md", bytes(shard + 1))
except MoptError as error:
    cases.append([{"code": error.code, "message": error.message}, *state()])
tell(cases)
""",
    )
    *too_large, fits, short = found
    for told, version, litter in (*too_large, short):
        assert told["code"] == "storage.failed" and "EFBIG" in told["message"]
        assert (version, litter) == ("old", [])
    assert fits[0]["code"] == "exchange" and fits[1:] == ["new", []]


def test_a_read_only_parent(tmp_path: Path) -> None:
    """From the start, and from just before the swap; then the stage stays until the next run."""
    found = in_own_mounts(
        tmp_path,
        HEAD
        + """
lay(out, "old")
mount("--bind", place, place)

def remount(how):
    mount("-o", f"remount,bind,{how}", place)

remount("ro")
from_the_start = [attempt(), *state()]
remount("rw")
in_between = [attempt(lambda: remount("ro")), *state()]
remount("rw")
tell([from_the_start, in_between, [attempt(), *state()]])
""",
    )
    start, between, after = found
    for told, version, _ in (start, between):
        assert (told["code"], told["exit"]) == ("storage.failed", 5) and "EROFS" in told["message"]
        assert version == "old"
    assert start[2] == [] and len(between[2]) == 2
    assert all(name.startswith(f".out.mopt-{kind}-") for kind, name in zip(("mark", "stage"), between[2], strict=True))
    assert (after[0]["code"], *after[1:]) == ("exchange", "new", [])


def test_an_output_in_a_lower_layer(tmp_path: Path) -> None:
    """overlayfs cannot move a folder that lies in a lower layer, as in a container's image: EXDEV."""
    found = in_own_mounts(
        tmp_path,
        HEAD
        + """
for name in ("lower", "upper", "work"):
    (top / name).mkdir()
lay(top / "lower" / "out", "old")
layers = f"lowerdir={top}/lower,upperdir={top}/upper,workdir={top}/work"
mount("-t", "overlay", "-o", f"{layers},userxattr", "overlay", place)
first = [attempt(), *state()]
out = place / "made here"
tell([first, [attempt(), *state()], [attempt(), *state()]])
""",
    )
    first, absent, present = found
    assert (first[0]["code"], first[0]["exit"], first[0]["kept"]) == ("storage.swap_refused", 5, ["new"])
    assert first[1] == "old" and [name.startswith("out.mopt-kept-") for name in first[2]] == [True]
    # What was made in the upper layer moves there.
    assert [(told["code"], version) for told, version, _ in (absent, present)] == [
        ("rename", "new"),
        ("exchange", "new"),
    ]


def test_an_output_that_is_a_mount_point(tmp_path: Path) -> None:
    found = in_own_mounts(
        tmp_path,
        HEAD
        + """
out.mkdir()
mount("-t", "tmpfs", "tmpfs", out)
for name, data in VERSIONS["old"].items():
    (out / name).write_bytes(data)
tell([attempt(), *state()])
""",
    )
    assert (found[0]["code"], found[0]["exit"], *found[1:]) == ("output.mount_point", 4, "old", [])


@pytest.mark.parametrize(
    ("mode", "code"),
    [("0555", "storage.failed"), ("0333", "storage.failed"), ("0111", "storage.failed"), ("0700", "exchange")],
)
def test_without_rights(tmp_path: Path, mode: str, code: str) -> None:
    """A parent that may not be written or not be listed: one that cannot be listed could hide another run."""
    told, version, litter = without_rights(tmp_path, mode, "tell([attempt(), *state()])")
    assert told["code"] == code
    assert (version, litter) == ("new" if code == "exchange" else "old", [])
    if code != "exchange":
        assert told["exit"] == 5 and "EACCES" in told["message"]


def test_a_stage_that_may_not_be_opened_is_busy(tmp_path: Path) -> None:
    body = 'lay(place / ".out.mopt-stage-0badcafe", "new").chmod(0)\ntell([attempt(), *state()])'
    told, version, litter = without_rights(tmp_path, "0700", body)
    assert (told["code"], told["exit"]) == ("output.busy", 4)
    assert (version, litter) == ("old", [".out.mopt-stage-0badcafe"])


def test_a_removed_current_folder(tmp_path: Path) -> None:
    """A relative OUT has no parent then; an absolute one is what it is."""
    found = in_own_mounts(
        tmp_path,
        HEAD
        + """
lay(out, "old")
(top / "gone").mkdir()
os.chdir(top / "gone")
(top / "gone").rmdir()
absolute = attempt()
cases = []
for out in (Path("out"), Path(), Path("..")):
    cases.append(attempt())
out = place / "out"
tell([absolute, state(), cases])
""",
    )
    absolute, (version, litter), cases = found
    assert (absolute["code"], version, litter) == ("exchange", "new", [])
    assert [(told["code"], told["exit"]) for told in cases] == [("output.no_parent", 4)] * 3


def without_rights(top: Path, mode: str, body: str) -> Any:
    """Run ``body`` beside an old OUT in a parent of this mode, without root's right to do all the same."""
    rest = HEAD + body
    command = 'os.chdir("/")\nos.execvp("setpriv", [*SET, sys.executable, "-S", "-B", "-c", REST, str(top)])'
    imports = "import json, os, sys\nfrom pathlib import Path\ntop = Path(sys.argv[1])\n"
    # What tells the state needs to look; the mode is set back for that.
    opened = rest.replace("def state():\n", "def state():\n    place.chmod(0o700)\n")
    prepared = f"{HEAD}\nlay(out, 'old')\nplace.chmod(0o{mode})\nREST = {imports + opened!r}\n"
    rights = 'SET = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]\n'
    return in_own_mounts(top, prepared + rights + command)
