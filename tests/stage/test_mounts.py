"""Bind mounts: other names for a folder, or for a part of one, by which OUT may not reach an input. No torch."""

import os
from pathlib import Path

import pytest
from own_mounts import in_own_mounts

from modelopt_convert.stage.mounts import Mount, Place, mount_table, place_of, places_below

CHECK = """
from crash_driver import lay
from modelopt_convert.stage import output_rules
from modelopt_convert.run.errors import OutputRefusedError

def told(output, *sources):
    try:
        output_rules.check_output_allowed(output, sources, overwrite=True)
    except OutputRefusedError as error:
        return error.code
    return "allowed"

pipeline = top / "pipeline"
pipeline.mkdir()
model = lay(pipeline / "transformer", "old")
lay(model / "vae", "old")
lay(top / "free", "old")
for name in ("whole", "part", "other"):
    (top / name).mkdir()
"""


def test_an_input_is_seen_through_a_bind_mount(tmp_path: Path) -> None:
    """By another path for the same folder, which no resolving of paths would show."""
    found = in_own_mounts(
        tmp_path,
        CHECK
        + """
mount("--bind", pipeline, top / "whole")
cases = {
    "the same": told(top / "whole" / "transformer", model),
    "inside": told(top / "whole" / "transformer" / "out", model),
    "around": told(top / "whole" / "transformer", model / "vae"),
    "beside": told(top / "whole" / "out", model),
}
# Each of the two ways is enough for this: a mount that the table does not show leaves the inodes.
output_rules.mount_table = list
cases["by inodes alone"] = [
    told(top / "whole" / "transformer", model),
    told(top / "whole" / "transformer" / "out", model),
    told(top / "whole" / "transformer", model / "vae"),
]
print(json.dumps(cases))
""",
    )
    assert found == {
        "the same": "output.is_input",
        "inside": "output.inside_input",
        "around": "output.around_input",
        "beside": "allowed",
        "by inodes alone": ["output.is_input", "output.inside_input", "output.around_input"],
    }


def test_an_input_is_seen_through_a_bind_mount_of_a_part_of_it(tmp_path: Path) -> None:
    """Above such a mount the input is not among the parents, yet what is written there is written into the input."""
    found = in_own_mounts(
        tmp_path,
        CHECK
        + """
mount("--bind", model / "vae", top / "part")
(top / "part" / "deep").mkdir()
lay(top / "part" / "there", "old")
lay(top / "other" / "there", "old")
cases = {
    "inside": told(top / "part" / "out", model),
    "deep inside": told(top / "part" / "deep" / "out", model),
    "an existing one inside": told(top / "part" / "there", model),
    "of two inputs": told(top / "part" / "out", top / "free", model),
    "the part is the input": told(model / "vae" / "out", top / "part"),
    "around": told(model, top / "part" / "there"),
    "beside the part": told(top / "part" / "out", model / "vae" / "there"),
    "elsewhere": told(top / "other" / "out", model),
}
print(json.dumps(cases))
""",
    )
    assert found == {
        "inside": "output.inside_input",
        "deep inside": "output.inside_input",
        "an existing one inside": "output.inside_input",
        "of two inputs": "output.inside_input",
        "the part is the input": "output.inside_input",
        "around": "output.around_input",
        "beside the part": "allowed",
        "elsewhere": "allowed",
    }


def test_a_file_system_mounted_inside_an_input_is_part_of_it(tmp_path: Path) -> None:
    found = in_own_mounts(
        tmp_path,
        CHECK
        + """
mount("-t", "tmpfs", "tmpfs", model / "vae")
(model / "vae" / "sub").mkdir()
mount("--bind", model / "vae" / "sub", top / "part")
mount("-t", "tmpfs", "tmpfs", top / "other")
(top / "a name").mkdir()
mount("--bind", model, top / "a name")
cases = {
    "into it": told(model / "vae" / "out", model),
    "into it, by another mount": told(top / "part" / "out", model),
    "a bind mount leaves it out": told(top / "part" / "out", top / "a name"),
    "another of the kind": told(top / "other" / "out", model),
}
print(json.dumps(cases))
""",
    )
    assert found == {
        "into it": "output.inside_input",
        "into it, by another mount": "output.inside_input",
        "a bind mount leaves it out": "allowed",
        "another of the kind": "allowed",
    }


def test_an_input_that_is_gone_stands_in_no_way(tmp_path: Path) -> None:
    found = in_own_mounts(tmp_path, CHECK + 'print(json.dumps(told(top / "out", top / "gone")))')
    assert found == "allowed"


def table(*lines: str) -> list[Mount]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda _path: b"\n".join(map(os.fsencode, lines)))
        return mount_table()


def test_names_with_blanks_are_read() -> None:
    [mount] = table("41 40 0:2 /a\\040b /net\\040drive rw shared:1 master:2 - nfs4 host:/x rw")
    assert mount == Mount(41, "0:2", Path("/a b"), Path("/net drive"), "nfs4")


ODD = [
    "a\u2028b",
    "a\x0cb",
    "a\x0bb",
    "a\x1cb",
    "a\x85b",
    "a\u00a0b",
    "a\u3000b",
    "a\rb",
    "a b",
    "a\tb",
    "a\nb",
    "a\\b",
    "\udce9",
]


@pytest.mark.parametrize("name", ODD)
def test_the_table_is_split_where_the_kernel_ends_its_fields(name: str) -> None:
    """And at none of the other characters at which text may be split."""
    escaped = "".join(f"\\{ord(one):03o}" if one in " \t\n\\" else one for one in name)
    rest = "- ext4 /dev/a rw"
    found = table(f"40 1 0:1 /{escaped} /in/{escaped} rw shared:1 {rest}", f"41 40 0:2 / /next rw {rest}", "")
    assert found == [
        Mount(40, "0:1", Path(f"/{name}"), Path(f"/in/{name}"), "ext4"),
        Mount(41, "0:2", Path("/"), Path("/next"), "ext4"),
    ]


def test_an_input_is_seen_through_mounts_of_any_name(tmp_path: Path) -> None:
    found = in_own_mounts(
        tmp_path,
        CHECK
        + """
cases = []
for name in ("a\\u2028b", "a\\x0cb", "a\\u00a0b", "a b", "a\\tb", "a\\nb", "a\\\\b", os.fsdecode(b"caf\\xe9")):
    (top / name).mkdir()
    mount("--bind", os.fsencode(model / "vae"), os.fsencode(top / name))
    cases.append([told(top / name / "out", model), told(top / "free" / "out", model)])
print(json.dumps(cases))
""".replace("\\\\", "\\"),
    )
    assert found == [["output.inside_input", "allowed"]] * 8


def test_nothing_is_emptied_through_a_mount_inside_out(tmp_path: Path) -> None:
    """To remove the old tree would remove what is mounted in it."""
    found = in_own_mounts(
        tmp_path,
        CHECK
        + """
data = top / "data"
data.mkdir()
(data / "mine").write_text("mine")
(top / "free" / "transformer").mkdir()
before = told(top / "free")
mount("--bind", data, top / "free" / "transformer")
print(json.dumps([before, told(top / "free"), (data / "mine").read_text()]))
""",
    )
    assert found == ["output.foreign", "output.mount_point", "mine"]


def test_a_place_outside_the_table_is_unknown(tmp_path: Path) -> None:
    assert place_of(tmp_path, []) is None
    assert places_below(tmp_path, []) == []
    here = place_of(tmp_path, mount_table())
    assert here is not None and here.path.name == tmp_path.name


def test_places_hold_what_lies_in_them_and_nothing_else() -> None:
    place = Place("0:2", Path("/a"))
    held = [Place("0:2", Path("/a")), Place("0:2", Path("/a/b"))]
    others = [Place("0:2", Path("/ab")), Place("0:3", Path("/a")), Place("0:2", Path("/"))]
    assert all(map(place.holds, held)) and not any(map(place.holds, others))
