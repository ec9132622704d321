"""Draft a preset of a model that has none, from names, dtypes, shapes and config alone. Pure, no torch.

The words that the rules go by are data (rules.toml). What a shipped preset knows of the same class stands beside them:
which modules a runtime cannot load packed is not to be seen in a header.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.names import module_of, natural_key
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.formats.format import Algorithm, Format
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.preset.block_lists import BlockLists, literal
from modelopt_convert.preset.one_input import groups_with_one_input
from modelopt_convert.preset.patterns import PatternMatcher, siblings
from modelopt_convert.preset.preset import Preset
from modelopt_convert.preset.rules import has_words, rules
from modelopt_convert.run.errors import InputError

Kind = Literal["structural", "quality"]
_BY_HAND = "a preset can be written by hand too: `mopt presets flux1-dev` prints one to start from"
_MOST_PATTERNS = 1000  # of one model; the largest of diffusers has about a hundred
_SHOWN_CHARS = 200
_MOST_KEYS = 64  # of a config.json


@dataclass(frozen=True, slots=True)
class DraftedLine:
    """Modules that one pattern stands for; those of an earlier pattern are not counted again.

    Attributes:
        pattern: The glob.
        reason: Why they stay in BF16; empty for modules that are quantized.
        modules: How many there are.
        linears: How many of them are Linears.
        num_bytes: Of their weights, as the base has them.
    """

    pattern: str
    reason: str
    modules: int
    linears: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class DraftedSet:
    """What becomes of every module in one format: kept by one of two lists, or quantized."""

    structural: tuple[DraftedLine, ...]
    quality: tuple[DraftedLine, ...]
    quantized: tuple[DraftedLine, ...]


@dataclass(frozen=True, slots=True)
class Draft:
    """A preset that is not written yet.

    Attributes:
        class_name: Of config.json.
        known: The shipped preset of the same class that was looked at; None without one.
        sets: By format; none of a format to which nothing can be quantized.
        fused: As in presets.
        shared_scale: As in presets.
        keep_fp32: As in presets.
        runtime_names: As in presets.
        config: Values of config.json.
        having: Keys of config.json that have no value.
    """

    class_name: str
    known: Preset | None
    sets: Mapping[Algorithm, DraftedSet]
    fused: tuple[tuple[str, ...], ...]
    shared_scale: tuple[tuple[str, ...], ...]
    keep_fp32: tuple[str, ...]
    runtime_names: Mapping[str, Sequence[str]]
    config: Mapping[str, bool | int | float | str]
    having: Mapping[str, bool]


def draft_preset(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], known: Preset | None, path: str
) -> Draft:
    """Draft a preset.

    Args:
        tensors: Of an unquantized transformer in BF16, F16 or F32.
        config: Its config.json.
        known: A shipped preset of its class, if there is one.
        path: The transformer, for messages.

    Raises:
        InputError: ``preset.draft``: nothing would be quantized, or a name cannot be told from others by a pattern.
    """
    model = _Model(tensors, path)
    class_name = config.get("_class_name")
    if not isinstance(class_name, str):
        found = "none" if class_name is None else repr(class_name)[:_SHOWN_CHARS]
        words = f"expected a config.json with the _class_name of a transformer, found {found}"
        raise model.refusal(words, "give --config PATH: the config.json of the transformer, or its folder")
    fused = groups_with_one_input(model.linears, [one.names for one in rules().joined])
    shared = groups_with_one_input(model.linears, [one.names for one in rules().joined if one.shared])
    if known is not None:
        fused = list(dict.fromkeys([*fused, *model.groups(known.fused)]))
        shared = model.groups(known.shared_scale or [])
    fp32 = [glob for glob in (known.keep_fp32 if known else []) if model.has(glob, tensors)]
    names = known.runtime_names if known else {}
    drafts = {algorithm: _drafted(model, one, fused, known) for algorithm, one in FORMATS.items()}
    sets = {algorithm: one for algorithm, one in drafts.items() if one.quantized}
    if not sets:
        formats = " or ".join(one.quant_algo for one in FORMATS.values())
        raise model.refusal(
            f"expected a transformer with Linears to quantize to {formats}, found none to quantize among "
            f"{len(model.linears)} weights of two dimensions"
        )
    return Draft(
        class_name=class_name,
        known=known,
        sets=sets,
        fused=tuple(fused),
        shared_scale=tuple(shared),
        keep_fp32=tuple(fp32),
        runtime_names={disk: to for disk, to in names.items() if model.has(disk)},
        config=_identifying(config),
        having={key: False for key in sorted(config) if config[key] is None and not key.startswith("_")},
    )


class _Model:
    """The modules of a model that have a weight of two dimensions or more; those with fewer are never quantized."""

    def __init__(self, tensors: Mapping[str, TensorInfo], path: str) -> None:
        self.path = path
        named = {module_of(name): info for name, info in tensors.items() if name.endswith(".weight")}
        self.all = sorted(dict.fromkeys(map(module_of, tensors)), key=lambda name: (natural_key(name), name))
        self.matcher = PatternMatcher(self.all)
        self.weights = {name: named[name] for name in self.all if name in named and len(named[name].shape) >= 2}
        self.linears = {
            name: info
            for name, info in self.weights.items()
            if len(info.shape) == 2 and 0 not in info.shape and info.dtype in HALF_AND_FLOAT
        }
        self.lists = BlockLists(named)
        self.with_weight = named.keys()
        inside = {name: self.lists.outermost(name) for name in self.weights}
        self.blocks = {name: place for name, place in inside.items() if place is not None}
        sizes = {name: info.num_bytes for name, info in self.linears.items()}
        self.has_blocks = 2 * sum(sizes[name] for name in sizes if name in self.blocks) > sum(sizes.values())
        self.above_experts = {f"{name}.".partition(".experts.")[0] for name in self.all if ".experts" in name}
        self._matching: dict[str, list[str]] = {}

    def groups(self, groups: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
        """The groups of which some parent has two names or more."""
        return [tuple(one) for one in groups if any(len(found) > 1 for found in siblings([one], self.linears))]

    def has(self, glob: str, names: Collection[str] = ()) -> bool:
        """Whether a glob matches a module, or one of the names."""
        return any(self.matcher.matches(glob, name) for name in names or self.all)

    def matching(self, pattern: str) -> list[str]:
        """The modules with a weight of two dimensions or more that a pattern matches."""
        if pattern not in self._matching:
            self.check_count(len(self._matching) + 1)
            self._matching[pattern] = [name for name in self.weights if self.matcher.matches(pattern, name)]
        return self._matching[pattern]

    def check_count(self, patterns: int) -> None:
        """Refuse more patterns than a model takes: matching them takes time, and nobody would read them."""
        if patterns > _MOST_PATTERNS:
            raise self.refusal(
                f"expected the names of a transformer's blocks, found {len(self.weights)} weights that take more than "
                f"{_MOST_PATTERNS} patterns"
            )

    def refusal(self, words: str, hint: str = _BY_HAND) -> InputError:
        """That there is nothing to draft."""
        return InputError(
            f"{self.path}: {words}",
            code="preset.draft",
            path=self.path,
            hint=hint,
        )


def _drafted(model: _Model, target: Format, fused: Sequence[Sequence[str]], known: Preset | None) -> DraftedSet:
    reasons = {name: _reason(name, model, target) for name in model.weights}
    why: dict[str, tuple[Kind, str]] = {name: ("structural", reason) for name, reason in reasons.items() if reason}
    if known is not None and (shipped := known.sets().get(target.algorithm)) is not None:
        words = f"{known.name}: the runtime cannot load it packed"
        for pattern in shipped.structural:
            for name in model.matching(pattern):
                why.setdefault(name, ("structural", words))
    of_ends: dict[str, str] = {}
    for prefix in dict.fromkeys(prefix for prefix, _ in model.blocks.values()):
        if model.lists.depth(prefix) >= rules().least_blocks:
            start = f"{literal(prefix)}." if prefix else ""
            for part, words in (("[:1]", "first block"), ("[-1:]", "last block")):
                for name in model.matching(f"{start}{part}.**"):
                    if name not in why:
                        why[name], of_ends[name] = ("quality", words), f"{start}{part}.**"
    for name in model.linears:
        first, _, below = name.partition(".")
        if below and first in why:
            why.setdefault(name, (why[first][0], f"below {literal(first)}, by whose name alone SGLang may look it up"))
    _complete_groups(model, fused, why)
    return DraftedSet(*_lines(model, why, of_ends))


def _reason(name: str, model: _Model, target: Format) -> str | None:
    """Why a module stays in BF16 by the rules; None if none of them says so."""
    shape = model.weights[name].shape
    if name not in model.linears:
        return f"no Linear: a weight of {len(shape)} dimensions" if len(shape) != 2 else "no Linear: an empty weight"
    parent, _, last = name.rpartition(".")
    parts = name.split(".")
    for rule in rules().keep:
        by_name = last in rule.names and parent in model.above_experts
        if by_name or any(has_words(part, rule.words) for part in parts):
            return rule.reason
    if target.block_size is not None and shape[1] % target.block_size:
        return f"{shape[1]} columns are no whole blocks of {target.block_size}"
    if model.has_blocks and name not in model.blocks:
        is_final = any(has_words(part, rules().final) for part in parts)
        return "final projection" if is_final else "outside the blocks"
    return None


def _complete_groups(model: _Model, fused: Sequence[Sequence[str]], why: dict[str, tuple[Kind, str]]) -> None:
    """Keep whole what engines join, where part of it is kept; a group may overlap another."""
    groups = [group for group in siblings(fused, model.with_weight) if len(group) > 1]
    changed = True
    while changed:
        changed = False
        for group in groups:
            packed = [name for name in group if name in model.linears and name not in why]
            if packed and len(packed) < len(group):
                other = next(name for name in group if name not in packed)
                words = f"joined with {other.rpartition('.')[2]}"
                why |= {name: (why[other][0] if other in why else "structural", words) for name in packed}
                changed = True


def _lines(
    model: _Model, why: Mapping[str, tuple[Kind, str]], of_ends: Mapping[str, str]
) -> Iterator[tuple[DraftedLine, ...]]:
    """The lines of each list of a set, and those of what is quantized."""
    counted: set[str] = set()
    for kind in ("structural", "quality"):
        patterns: dict[tuple[str, str], None] = {}
        for name in (name for name in model.weights if name in why and why[name][0] == kind):
            patterns |= dict.fromkeys((one, why[name][1]) for one in [of_ends.get(name) or _exact(name, model, why)])
        yield tuple(_counted(patterns, model, counted))
    places: dict[str, list[str]] = {}
    for name in (name for name in model.weights if name not in why):
        places.setdefault(model.lists.pattern(name), []).append(name)
    model.check_count(len(places))
    yield tuple(_line(pattern, "", members, model) for pattern, members in places.items())


def _exact(name: str, model: _Model, why: Mapping[str, tuple[Kind, str]]) -> str:
    """The widest pattern for a module that is kept which matches none that is quantized."""
    for pattern in (model.lists.pattern(name), literal(name)):
        found = model.matching(pattern)
        if name in found and all(one in why for one in found):
            return pattern
    raise model.refusal(
        f"module {name[:_SHOWN_CHARS]!r}: no pattern tells it from others, since patterns spell no brackets and stars"
    )


def _counted(patterns: Collection[tuple[str, str]], model: _Model, counted: set[str]) -> Iterator[DraftedLine]:
    """A line for each pattern that stands for modules which no pattern before it stands for."""
    for pattern, reason in patterns:
        members = [name for name in model.matching(pattern) if name not in counted]
        if members:
            counted.update(members)
            yield _line(pattern, reason, members, model)


def _line(pattern: str, reason: str, members: Collection[str], model: _Model) -> DraftedLine:
    linears = sum(name in model.linears for name in members)
    return DraftedLine(pattern, reason, len(members), linears, sum(model.weights[name].num_bytes for name in members))


def _identifying(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """The values of a config.json that a preset can ask for, as many as make sense."""
    keys = [key for key in sorted(config) if not key.startswith("_") and _is_plain(config[key])]
    return {key: config[key] for key in keys[:_MOST_KEYS]}


def _is_plain(value: object) -> bool:
    match value:
        case bool():
            return True
        case int():
            return abs(value) < 1 << 63
        case float():
            return isfinite(value)
        case _:
            return isinstance(value, str) and len(value) <= _SHOWN_CHARS
