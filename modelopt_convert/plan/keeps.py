"""What stays in BF16: patterns, fused groups and F32 tensors, matched against a model's modules. Pure, no torch."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.names import module_of, natural_key
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.dtypes import HALF_AND_FLOAT
from modelopt_convert.formats.format import Format
from modelopt_convert.plan.plan import Keeps, RuleCount, Source, Step
from modelopt_convert.preset.patterns import PatternMatcher, check_pattern, siblings
from modelopt_convert.preset.preset import Preset
from modelopt_convert.run.errors import Faults, InputError, MoptError, joint


def apply_patterns(
    keeps: Keeps, matcher: PatternMatcher, modules: Mapping[str, PackedModule], faults: Faults
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Packed modules to replace with their first pattern, and every pattern's matches.

    Args:
        keeps: The patterns.
        matcher: Knows the model's modules.
        modules: The packed ones.
        faults: Gets ``preset.no_match`` and ``preset.pattern``.
    """
    replaced: dict[str, str] = {}
    matched: dict[str, list[str]] = {}
    for _, pattern in keeps.patterns():
        with faults.taken(pattern):
            check_pattern(pattern)
            matched[pattern] = matcher.find(pattern)
        for module in matched.get(pattern, ()):
            if module in modules:
                replaced.setdefault(module, pattern)
    return replaced, matched


def count_rules(
    keeps: Keeps, matched: Mapping[str, Sequence[str]], replaced: Mapping[str, str], steps: Mapping[str, Step]
) -> Iterator[RuleCount]:
    """What each pattern did."""
    sizes: dict[str, int] = {}
    for name, step in steps.items():
        sizes[module_of(name)] = sizes.get(module_of(name), 0) + step.output.num_bytes
    for kind, pattern in dict((pattern, (kind, pattern)) for kind, pattern in keeps.patterns()).values():
        yield RuleCount(
            kind,
            pattern,
            matched=len(matched[pattern]),
            replaced=sum(by == pattern for by in replaced.values()),
            num_bytes=sum(sizes.get(module, 0) for module in matched[pattern]),
        )


def fused_groups(
    preset: Preset | None,
    modules: Mapping[str, PackedModule],
    replaced: Mapping[str, str],
    export: Source,
    refused: Collection[str] = (),
) -> tuple[tuple[str, ...], ...]:
    """Groups of sibling modules that stay packed together.

    Args:
        preset: Says which.
        modules: All that are packed.
        replaced: Those that will not be.
        export: The export.
        refused: Modules that are refused for faults of their own: of their groups nothing is said.

    Raises:
        InputError: ``preset.fused_group``: a group would be part packed, part BF16; runtimes refuse such a mix.
    """
    groups: list[tuple[str, ...]] = []
    faults = Faults()
    linears = {module_of(name) for name in export.tensors if name.endswith(".weight")}
    for members in siblings(preset.fused if preset else [], linears):
        packed = tuple(member for member in members if member in modules and member not in replaced)
        if packed and len(packed) < len(members) and not set(members).intersection(refused):
            rest = ", ".join(member for member in members if member not in packed)
            fault = InputError(
                f"{export.path}: the fused group {', '.join(members)} would be kept in part: {rest} in BF16",
                code="preset.fused_group",
                path=str(export.path),
                hint="keep the whole group or none of it: " + " ".join(f"--keep-bf16 '{one}'" for one in members),
            )
            faults.add(members[0].rpartition(".")[0], fault)
        if packed:
            groups.append(packed)
    faults.refuse()
    # A group within a larger one says nothing of its own; a larger one has its first member too.
    having: dict[str, list[set[str]]] = {}
    for group in dict.fromkeys(groups):
        for member in group:
            having.setdefault(member, []).append(set(group))
    return tuple(one for one in dict.fromkeys(groups) if not any(set(one) < other for other in having[one[0]]))


def with_keep(fault: InputError, name: str, fused: Iterable[Sequence[str]]) -> InputError:
    """The fault, or joint fault, of a module, with the option that keeps it in BF16, where that is a way out.

    Args:
        fault: Of scales that are missing; or with a hint such as ``--keep-bf16 'NAME'``; or another one.
        name: Of the module.
        fused: By ``fused_groups``; a group is kept whole.
    """
    members = dict.fromkeys([name, *(member for group in fused if name in group for member in group)])
    alone, whole = f"--keep-bf16 '{name}'", " ".join(f"--keep-bf16 '{member}'" for member in members)

    def kept(one: MoptError) -> InputError:
        hint = (one.hint or "").replace(alone, whole)
        hint += f", or {whole}" if one.code.startswith("export.missing_") else ""
        return InputError(one.message, code=one.code, path=one.path, hint=hint)

    return joint([(name, kept(one)) for one in fault.each()])


def plain_dtype(info: TensorInfo, fp32: Collection[str]) -> str:
    """The dtype in which a tensor that is not quantized is written; ``fp32`` names those that keep F32."""
    as_is = info.dtype not in HALF_AND_FLOAT or info.dtype == "BF16" or info.name in fp32
    return info.dtype if as_is else "BF16"


def keep_fp32(preset: Preset | None, matcher: PatternMatcher, source: Source) -> frozenset[str]:
    """Tensors of the base, or of the export where there is none, that keep F32.

    Raises:
        InputError: ``preset.no_match``.
    """
    found: set[str] = set()
    faults = Faults()
    for pattern in preset.keep_fp32 if preset else []:
        names = [name for name in source.tensors if matcher.matches(pattern, name)]
        if not names:
            fault = InputError(
                f"keep_fp32 pattern {pattern!r} matches no tensor of the model",
                code="preset.no_match",
                path=str(source.path),
                hint="correct the pattern: keep_fp32 is matched against whole tensor names",
            )
            faults.add(pattern, fault)
        found.update(names)
    faults.refuse()
    return frozenset(found)


def structural_warnings(
    preset: Preset, target: Format, matcher: PatternMatcher, packed: Collection[str], config: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """What is packed against the structural set of its class, where the user wants no preset.

    A preset of another model of the class knows what the class cannot load, and is not offered.
    """
    rules = preset.sets().get(target.algorithm)
    found = {module for pattern in (rules.structural if rules else ()) for module in matcher.find(pattern)}
    against = sorted(found.intersection(packed), key=natural_key)
    if against:
        yield (
            "preset.structural",
            f"SGLang cannot load {len(against)} of the packed modules in packed form ({against[0]} first): "
            + (f"--preset {preset.name}" if preset.fits(config) else "--keep-bf16")
            + " keeps them in BF16",
        )
