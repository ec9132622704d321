"""What a request is, and what a flag of the command line is made from. No torch, no pydantic."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, NoReturn, TypeVar, get_args, get_origin

from modelopt_convert.checkpoint.location import Location, is_far, parse_location
from modelopt_convert.run.errors import InputError, UsageError
from modelopt_convert.run.progress import Progress
from modelopt_convert.run.text import nearest, shown

Result = TypeVar("Result", covariant=True)
# The command line takes the first of several types.
Place = str | Path  # may be hf://
Folder = str | Path


@dataclass(frozen=True, slots=True)
class Flag:
    """How the command line shows a field; one that is not keyword-only is a positional argument there.

    Attributes:
        help: What it means, for ``--help``.
        metavar: What stands for its value; None for choices, numbers and switches.
        name: Its spelling, where that is not the field's name with dashes.
        short: One letter with a dash, if it has one.
        minimum: The smallest number that is taken.
        maximum: The largest.
        after: The field that it follows in the help, where that is not its place among the fields.
        values: Gives the values that a shell offers, where the field's type does not.
    """

    help: str
    metavar: str | None = None
    name: str | None = None
    short: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    after: str | None = None
    values: Callable[[], Sequence[str]] | None = None


def flags_of(kind: type[Any]) -> dict[str, tuple[Any, Flag]]:
    """The type and the flag of every field that has one, by name."""
    annotated = {one.name: get_args(one.type) for one in fields(kind) if get_origin(one.type) is Annotated}
    return {name: (words[0], words[1]) for name, words in annotated.items()}


Download = Annotated[bool, Flag("Fetch files of the Hub whole, into its cache, and not only what is needed.")]
Workers = Annotated[
    int | None, Flag("Tensors worked on at a time; default: one for each core, up to eight.", minimum=1, maximum=64)
]


Variant = Annotated[
    str | None,
    Flag(
        "Of weights in several precisions, these, such as fp16: of BASE where there is one, else of what is read.",
        metavar="NAME",
        after="base",
    ),
]
Config = Annotated[
    Place | None,
    Flag(
        "The transformer's config for what has none: a config.json, or a folder with one, also hf://.",
        metavar="PATH",
        after="variant",
    ),
]
# Of commands that draw.
Offload = Literal["none", "model", "sequential"]
UnquantizedBase = Annotated[Place, Flag("The unquantized base: transformer, pipeline or file.", metavar="BASE")]
Pipeline = Annotated[
    str,
    Flag("The pipeline that BASE is the transformer of: a folder, or a repo as diffusers has it.", metavar="REF"),
]
Prompts = Annotated[Folder, Flag("A text file with one prompt a line.", metavar="FILE")]
Steps = Annotated[int, Flag("Steps of the scheduler for each prompt.", minimum=1, maximum=1000)]
Size = Annotated[int, Flag("Height and width, in pixels, a multiple of 16.", minimum=16, maximum=8192)]
Frames = Annotated[int, Flag("Frames of a video; images have none.", minimum=1, maximum=1000)]
Seeds = Annotated[int, Flag("Seeds for each prompt, from 0.", minimum=1, maximum=1000)]
Offloaded = Annotated[
    Offload, Flag("What leaves the GPU while it is not needed: nothing, whole components, or layer after layer.")
]


@dataclass(frozen=True, kw_only=True)
class Request(Generic[Result]):
    """What every request has.

    Attributes:
        command: The command line's name of it.
        inputs: Fields that name what is read: a path, or ``hf://ORGANIZATION/NAME[@REVISION][/PATH]``.
        progress: Told how far the work is; None for nobody.

    Raises:
        UsageError: A value is not one that its field takes, or two exclude each other.
    """

    __slots__ = ()
    command: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]] = ()
    progress: Progress | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name, (kind, flag) in flags_of(type(self)).items():
            value = getattr(self, name)
            check_value(self.spelled(name), kind, value, flag.minimum, flag.maximum)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))  # a request is a value, and has a hash
        if self.progress is not None and not callable(getattr(self.progress, "begin", None)):
            raise UsageError("progress", f"{shown(self.progress)} is no Progress")
        self.check()
        for name in self.inputs:
            self.locate(name)

    def check(self) -> None:
        """Refuse what one value alone does not tell."""

    def spelled(self, name: str) -> str:
        """A field as the command line spells it."""
        (one,) = (one for one in fields(self) if one.name == name)
        _, flag = flags_of(type(self))[name]
        return flag.name or (f"--{name.replace('_', '-')}" if one.kw_only else flag.metavar or name)

    def refuse(self, name: str, reason: str) -> NoReturn:
        """Say what is wrong with a field.

        Raises:
            UsageError: Always.
        """
        raise UsageError(self.spelled(name), reason)

    def locate(self, name: str) -> Location | None:
        """Where an input lies, on disk or on the Hub; None if it is left out.

        Raises:
            UsageError: It is written ``hf://`` and names no repo, or so for another storage.
        """
        place: Place | None = getattr(self, name)
        return None if place is None else self.located(name, place)

    def located(self, name: str, place: Place) -> Location:
        """Where a place lies that a field names.

        Raises:
            UsageError: As ``locate``.
        """
        try:
            return parse_location(str(place), download=self.fetches_whole)
        except InputError as error:
            raise UsageError(self.spelled(name), f"{error.message}; {error.hint}") from error

    @property
    def fetches_whole(self) -> bool:
        """Whether files of the Hub are fetched whole, into its cache."""
        return bool(getattr(self, "download", False))

    def reads(self) -> list[Path]:
        """Inputs, as far as they lie on disk and are given."""
        return self._near(self.inputs)

    def on_disk(self) -> list[Path]:
        """Inputs, preset and output, as far as they lie on disk and are given."""
        return self._near((*self.inputs, "preset_file", "output"))

    def _near(self, names: Sequence[str]) -> list[Path]:
        places: list[Place | None] = [getattr(self, name, None) for name in names]
        return [Path(one) for one in places if one is not None and not is_far(one)]


def check_value(flag: str, kind: Any, value: Any, low: float | None = None, high: float | None = None) -> None:
    """Refuse a value of another type, text that is none, and numbers out of a range.

    Args:
        flag: What the value is given for.
        kind: The type that is taken.
        value: Anything.
        low: The smallest number that is taken.
        high: The largest.

    Raises:
        UsageError: It cannot be meant.
    """
    if get_origin(kind) is Sequence and isinstance(value, str):
        raise UsageError(flag, f"takes a list, found {shown(value)}")
    choices, each = choices_of(kind), get_args(kind)[0] if get_origin(kind) is Sequence else kind
    words = value if get_origin(kind) is Sequence and isinstance(value, tuple | list) else (value,)
    is_path = Path in get_args(each)
    for word in words:
        if isinstance(word, str) and not word and (is_path or word is value):  # it would be the current folder
            raise UsageError(flag, "must not be empty")
        if choices and isinstance(word, str) and word not in choices:
            raise UsageError(flag, none_of(word, choices))
        if isinstance(word, str | Path) and not _is_text(str(word), is_path and not is_far(word)):
            raise UsageError(flag, f"{shown(word)} holds NUL, or what is not UTF-8")
    if not _takes(kind, value):
        raise UsageError(flag, f"{shown(value)} is not what it takes: {_words(kind)}")
    if value is not None and ((low is not None and not value >= low) or (high is not None and not value <= high)):
        limits = f"{low:g} to {'any' if high is None else f'{high:g}'}"
        raise UsageError(flag, f"{shown(value)} is not in the range {limits}")


def choices_of(kind: Any) -> list[str]:
    """The words that a field takes; empty if it takes others too."""
    return [word for one in (kind, *get_args(kind)) if get_origin(one) is Literal for word in get_args(one)]


def none_of(word: str, known: Sequence[str]) -> str:
    """That a word is unknown, which are known, and which may have been meant."""
    near = next((one for one in known if len(word) > 1 and one.startswith(word.lower())), None) or nearest(word, known)
    return f"{shown(word)} is none of {', '.join(known)}{f'; did you mean {near}?' if near not in (None, word) else ''}"


def _is_text(text: str, is_path: bool) -> bool:
    """Whether the system, or a Hub, could be told of it: bytes that are not UTF-8 are for the system alone."""
    try:
        os.fsencode(text) if is_path else text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _takes(kind: Any, value: Any) -> bool:
    """Whether a value is of a field's type; True is no number, nor is what no float can be."""
    origin, words = get_origin(kind), get_args(kind)
    if origin is Literal:
        return isinstance(value, str) and value in words
    if origin is Sequence:
        return isinstance(value, tuple | list) and all(_takes(words[0], one) for one in value)
    if words:
        return any(_takes(one, value) for one in words)
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _words(kind: Any) -> str:
    """A type as a docstring would write it."""
    plain = str(kind).replace("collections.abc.", "").replace("pathlib.", "").replace("typing.", "")
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else plain
