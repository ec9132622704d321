"""Prompts, one a line of a text file. No torch."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from modelopt_convert.checkpoint.location import read_small
from modelopt_convert.run.errors import InputError

_LIMIT = 16 << 20  # bytes: no list of prompts is longer


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts of a file.

    Attributes:
        texts: In the order of the file, each once, without empty lines.
        sha256: Of the file's bytes.
        repeated: Lines that are equal to one before them, and say nothing that it does not.
    """

    texts: tuple[str, ...]
    sha256: str
    repeated: int = 0

    def warnings(self) -> list[tuple[str, str]]:
        """That lines are left aside, as a command warns of it."""
        if not self.repeated:
            return []
        words = f"{self.repeated} of {self.repeated + len(self.texts)} prompts are repeated: each counts once"
        return [("prompts.repeated", words)]


def read_prompts(path: Path) -> Prompts:
    """Read a file of prompts.

    Raises:
        InputError: ``prompts.missing``, ``prompts.too_large``, ``prompts.not_text`` or ``prompts.none``.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise InputError(
            f"{path}: expected a text file with one prompt a line, found {found}",
            code="prompts.missing",
            path=str(path),
            hint="write one, or name the one you have",
        )
    raw = read_small(path, _LIMIT, code="prompts")
    try:
        lines = raw.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: expected UTF-8 text, found byte 0x{raw[error.start]:02x} at {error.start}",
            code="prompts.not_text",
            path=str(path),
            hint="save the file as UTF-8 text with one prompt a line",
        ) from None
    every = [line.strip() for line in lines if line.strip()]
    texts = tuple(dict.fromkeys(every))
    if not texts:
        raise InputError(
            f"{path}: expected one prompt a line, found no prompt",
            code="prompts.none",
            path=str(path),
            hint="write at least one prompt",
        )
    return Prompts(texts, hashlib.sha256(raw).hexdigest(), len(every) - len(texts))
