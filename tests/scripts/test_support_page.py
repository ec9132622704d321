"""docs/support.md: read back as a person reads it, it says of every preset what presets and engine facts say, once."""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_support import DOCS, ENGINES, render
from tiny_models import FAMILIES as RUN

from modelopt_convert.engines.limits import EngineName, limits
from modelopt_convert.families.table import FAMILIES
from modelopt_convert.preset.preset import Preset, load_preset, parse_preset, preset_names


def short(class_name: str) -> str:
    """The title of a class that no key map is known of."""
    return class_name.removesuffix("Transformer3DModel").removesuffix("Transformer2DModel")


CLASSES = [name for family in FAMILIES for name in family.class_names] + ["CosmosTransformer3DModel", "A_NewModel"]
LIMITS = [
    "is slow",
    "needs *much* memory",
    "wants `a_*_b` and <more>",
    *(f"does not do {count}" for count in range(30)),
]
# The words of a cell's grade in its notes.
GRADES = {"fails": "fails to load it: ", "wrong": "loads it wrong: ", "loss": "loads it with a loss: "}
VERDICT = "fail|load|has no|does not|drop|hand"
SHIPPED = [load_preset(name).preset for name in preset_names()]


class Line(NamedTuple):
    family: str
    cells: list[str]
    notes: dict[str, str]

    def refers_to(self, cell: str) -> set[str]:
        """The sentences whose marks are in a cell."""
        return {self.notes[mark] for mark in re.findall(r"\b(\d+|[a-z]\w?)\b", cell.partition("(")[2] or cell)}


def plain(text: str) -> str:
    """Markdown as it is shown, as far as escapes go."""
    return re.sub(r"\\([*<])", r"\1", text)


def read_back(text: str) -> Iterator[Line]:
    """The lines of the tables, each with the notes that its reader finds."""
    head, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    families = {section.partition("\n")[0]: section for section in sections}
    shared = dict(re.findall(r"^- \*(\w+)\*: (.*)$", families.pop("Notes on several families", ""), re.MULTILINE))
    assert re.findall(r"^\| \[(.*?)\]", head, re.MULTILINE) == list(families)
    for title, section in families.items():
        own = dict(re.findall(r"^(\d+)\. (.*)$", section, re.MULTILINE))
        for row in re.findall(r"^\| `(.*) \|$", section, re.MULTILINE):
            name, _, rest = row.partition("` ")
            yield Line(title, [name, *rest.split(" | ")], shared | own)


def check(presets: list[Preset]) -> None:
    text = plain(render(presets))
    lines = {(line.cells[0], line.cells[1].lower()): line for line in read_back(text)}
    assert lines.keys() == {(preset.name, algorithm) for preset in presets for algorithm in preset.sets()}
    for preset in presets:
        title = next((one.title for one in FAMILIES if preset.class_name in one.class_names), short(preset.class_name))
        config = {
            "_class_name": preset.class_name,
            **preset.config,
            **{key: 1 for key, it in preset.having.items() if it},
        }
        for algorithm, rules in preset.sets().items():
            line = lines[preset.name, algorithm]
            _, _, status, gpu, flag, *words, dynamic, more = line.cells
            assert (line.family, status, flag) == (title, rules.status, f"`{preset.load_flag}`")
            assert rules.min_gpu.startswith(gpu) and rules.min_gpu in text
            assert line.refers_to(more) == {*rules.known_limits, *rules.export_limits}
            without = limits(config | {"quantization_config": {"dynamic_input_scale": True}}, algorithm, preset.repos)
            others = dict(re.findall(r"([\w-]+) (fails|wrong|loss) \(", dynamic))
            for engine, word in zip(ENGINES, words, strict=True):
                known = [one for one in limits(config, algorithm, preset.repos) if one.engine == engine]
                other = {one.grade for one in without if one.engine == engine} - {one.grade for one in known}
                assert ({others[ENGINES[engine]]} if ENGINES[engine] in others else set()) == other
                grade = word.partition(" ")[0]
                assert (grade in {one.grade for one in known}) if known else (grade in ("right", "untried"))
                assert known or (grade == "right") == was_right(engine, algorithm, preset.class_name)
                said = line.refers_to(word) if known else set()
                assert len(said) == len(known)
                assert all(any(one.what in sentence and one.figure in sentence for sentence in said) for one in known)
                assert all(GRADES[grade] in sentence for sentence in said)
    sets = [rules for preset in presets for rules in preset.sets().values()]
    for sentence in {limit for rules in sets for limit in (*rules.known_limits, *rules.export_limits)}:
        notes = re.findall(r"^(?:\d+\.|- \*\w+\*:) (.*)$", text, re.MULTILINE)
        assert notes.count(sentence) == 1
    assert all(rules.source in text for preset in SHIPPED if preset in presets for rules in preset.sets().values())
    assert all(repo in text for preset in presets for repo in preset.repos)


def was_right(engine: EngineName, algorithm: str, class_name: str) -> bool:
    rows: list[dict[str, Any]] = json.loads((DOCS / "engines.json").read_text())
    return any(
        (one["engine"], one["format"], one["outcome"]) == (engine, algorithm, "right")
        and RUN[one["family"]].class_name == class_name
        for one in rows
    )


def test_the_page_of_mopts_own_presets() -> None:
    check(SHIPPED)


@pytest.mark.parametrize("preset", SHIPPED, ids=lambda preset: preset.name)
def test_a_preset_leaves_verdicts_on_engines_to_their_facts(preset: Preset) -> None:
    """So no note can say another thing than its cell; what `source` says of a loader is what was recorded."""
    text = render([preset])
    for algorithm, rules in preset.sets().items():
        for told in (*rules.known_limits, *rules.export_limits):
            assert not re.match(rf"({'|'.join(ENGINES.values())}) [\d.]+\w* ({VERDICT})", told), told
        (line,) = (one for one in read_back(text) if one.cells[1].lower() == algorithm)
        cells = dict(zip(ENGINES.values(), line.cells[5:-2], strict=True))
        for engine in re.findall(rf"({'|'.join(ENGINES.values())})[ \d.]*'s loader h[eo]ld", rules.source):
            assert cells[engine] == "right", (engine, rules.source)
        before, its, _ = rules.source.partition(" its loader h")
        if its:
            *_, engine = re.findall("|".join(ENGINES.values()), before)
            assert cells[engine] == "right", (engine, rules.source)


def rules(limits: list[str], status: str) -> str:
    return (
        f"{{ status = '{status}', source = 'a table', min_gpu = 'SM89 (Ada, Hopper)', "
        f"known_limits = {json.dumps(limits)}, structural = [], quality = [] }}"
    )


@st.composite
def presets(draw: st.DrawFn, name: str) -> Preset:
    sets = draw(st.sets(st.sampled_from(["nvfp4", "fp8"]), min_size=1))
    told = [
        f"{one} = {rules(draw(st.lists(st.sampled_from(LIMITS), max_size=4, unique=True)), status)}"
        for one in sorted(sets)
        for status in [draw(st.sampled_from(["validated", "candidate"]))]
    ]
    having = draw(st.sampled_from(["{}", "{ added_kv_proj_dim = true }", "{ added_kv_proj_dim = false }"]))
    text = [
        f"schema = 1\nname = '{name}'\ntitle = 'Made {name}'\nbase_repo = 'some/{name}'\nrepos = ['some/{name}']",
        f"class_name = '{draw(st.sampled_from(CLASSES))}'\npipeline_tag = 'text-to-image'\nconfig = {{}}",
        f"load_flag = '--transformer-path'\nfused = []\nkeep_fp32 = []\nruntime_names = {{}}\nhaving = {having}",
    ]
    return parse_preset("\n".join([*text, *told]), path=name).preset


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 12))
def test_the_page_of_made_up_presets(data: st.DataObject, count: int) -> None:
    check([data.draw(presets(f"made-{number}")) for number in range(count)])


def test_a_sentence_of_two_families_is_a_note_on_several() -> None:
    def limited(class_name: str, *limits: str) -> Preset:
        told = SHIPPED[0].rules("nvfp4").model_copy(update={"known_limits": list(limits)})
        return SHIPPED[0].model_copy(update={"name": class_name, "class_name": class_name, "nvfp4": told, "fp8": None})

    one, several = LIMITS[0], LIMITS[1]
    page = render([limited("FluxTransformer2DModel", one, several), limited("CosmosTransformer3DModel", several)])
    assert re.search(rf"^\d\. {one}$", page, re.MULTILINE)
    assert page.rpartition("## Notes on several families")[2].count("needs \\*much\\* memory") == 1
    assert "## Cosmos\n" in page and "(#cosmos)" in page
