"""The TOML of a drafted preset: the same text for the same base, wherever it lies. Pure.

Names of tensors and keys of configs may hold anything, so all of them are written as TOML's basic strings, also in
comments.
"""

import re
from collections.abc import Iterator, Sequence

from modelopt_convert.formats.format import Algorithm, Format
from modelopt_convert.formats.table import FORMATS
from modelopt_convert.preset.draft import Draft, DraftedLine

_ESCAPED = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_MOST_NAME = 60
_HEAD = """\
# Drafted by `mopt presets new` from names, shapes and config.json of a base. It is a proposal: nobody has shown the
# result in an engine. Bytes are those of the weights in the base; a module counts for the first pattern that has it.

# Fill in what you know, nothing here is guessed; without them the card of a build leaves them out:
# title = "the model's name for people"
# base_repo = "ORGANIZATION/NAME"
# repos = ["ORGANIZATION/NAME"]
# license = "as the base's model card has it"
# pipeline_tag = "text-to-image"
"""


def draft_text(draft: Draft) -> str:
    """The preset as TOML, ready for ``--preset ./FILE.toml``."""
    name = re.sub(r"[^a-z0-9]+", "-", draft.class_name.lower())[:_MOST_NAME].strip("-") or "transformer"
    known = draft.known
    lines = [
        _HEAD,
        "schema = 1",
        f"name = {_string(f'{name}-draft')}",
        f"class_name = {_string(draft.class_name)}",
        'load_flag = "--transformer-path"',
        "",
        "# Siblings that engines may join to one GEMM: all of a group are packed, or none is.",
        *_lists("fused", draft.fused),
        "",
        "# Siblings with the same input, to which ModelOpt's export gives one global scale"
        + (f"; as preset {known.name} has it." if known else ", as far as their names tell."),
        *_lists("shared_scale", draft.shared_scale),
        "",
        "# Tensors that stay in F32 where the base holds F32; all others are rounded to BF16.",
        f"keep_fp32 = [{', '.join(map(_string, draft.keep_fp32))}]",
        "",
        "# Values of config.json that the model must have: leave those that tell it from others of its class.",
        "[config]",
        *(f"{_key(key)} = {_value(value)}" for key, value in draft.config.items()),
        "",
    ]
    if draft.having:
        lines += ["# Keys of config.json that have no value.", "[having]"]
        lines += [*(f"{_key(key)} = {_value(value)}" for key, value in draft.having.items()), ""]
    lines += [
        "# Other names under which an engine may look a module up in `ignore` (disk name = engine's names).",
        "[runtime_names]",
        *(f"{_string(disk)} = [{', '.join(map(_string, to))}]" for disk, to in draft.runtime_names.items()),
    ]
    for algorithm, one in FORMATS.items():
        lines += ["", *(_section(algorithm, draft) if algorithm in draft.sets else _absent(one))]
    return "\n".join([*lines, ""])


def _section(algorithm: Algorithm, draft: Draft) -> Iterator[str]:
    known, drafted = draft.known, draft.sets[algorithm]
    more = f"; what the runtime cannot load packed as preset {known.name} of the same class has it" if known else ""
    yield f"[{algorithm}]"
    yield 'status = "candidate"'
    yield f"source = {_string(f'drafted by mopt from names and shapes of a base{more}; no published checkpoint')}"
    yield f"min_gpu = {_string(FORMATS[algorithm].min_gpu)}"
    yield 'known_limits = ["a draft: nobody has shown the result in an engine"]'
    yield "# What no engine can be expected to load packed."
    yield from _patterns("structural", drafted.structural)
    yield "# These would load packed; they are kept for quality."
    yield from _patterns("quality", drafted.quality)
    kept = sum(line.linears for line in (*drafted.structural, *drafted.quality))
    packed = sum(line.linears for line in drafted.quantized)
    yield f"# Of {kept + packed} Linears {kept} are kept by these patterns. The rest, {packed}, is quantized:"
    yield from (f"#   {_string(line.pattern)}: {_counted(line)}" for line in drafted.quantized)


def _absent(target: Format) -> Iterator[str]:
    """Why a preset has no set of one format."""
    yield f"# No [{target.algorithm}]: no Linear is left that {target.quant_algo} could hold, in whole blocks of "
    yield f"# {target.block_size} columns."


def _patterns(key: str, lines: Sequence[DraftedLine]) -> Iterator[str]:
    if not lines:
        yield f"{key} = []"
        return
    yield f"{key} = ["
    yield from (f"  {_string(line.pattern)},  # {_shown(line.reason)}: {_counted(line)}" for line in lines)
    yield "]"


def _counted(line: DraftedLine) -> str:
    """How many modules, and their bytes."""
    others = line.modules - line.linears
    words = [
        f"{count} {one}{'' if count == 1 else 's'}"
        for count, one in ((line.linears, "Linear"), (others, "other module"))
        if count
    ]
    return f"{' and '.join(words)}, {line.num_bytes:,} bytes"


def _lists(key: str, groups: Sequence[Sequence[str]]) -> Iterator[str]:
    if not groups:
        yield f"{key} = []"
        return
    yield f"{key} = ["
    yield from (f"  [{', '.join(map(_string, group))}]," for group in groups)
    yield "]"


def _value(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return _string(value) if isinstance(value, str) else repr(value)


def _key(text: str) -> str:
    return text if _BARE.fullmatch(text) else _string(text)


def _string(text: str) -> str:
    """A basic string of TOML in one line, without characters that a terminal could act on."""
    return f'"{_shown("".join(_ESCAPED.get(char, char) for char in text))}"'


def _shown(text: str) -> str:
    return "".join(char if char.isprintable() else _escape(ord(char)) for char in text)


def _escape(code: int) -> str:
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
