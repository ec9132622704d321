"""What must not leave this machine inside a file: access tokens and local paths. Pure."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
_SHORTEST_TOKEN = 8  # a shorter one would be found in plain words
# Not within a URL or a longer path: those have a character of their own before it.
_PATH = re.compile(
    r"(?:file://|(?<![\w.~/-]))/(?:home|root|Users|mnt|tmp)(?:/[^\s\"'`)>,;]*|(?![\w.-]))|(?<!\w)[A-Z]:\\\w[^\s\"']*"
)


def holds_token(text: str, token: str | None) -> bool:
    """Whether an access token stands in ``text``: the one in use, or any that looks like one."""
    mine = token is not None and len(token) >= _SHORTEST_TOKEN and token in text
    return mine or _TOKEN.search(text) is not None


def local_path(text: str, own: Sequence[str]) -> str | None:
    """The first local path in ``text``, or None; ``own`` are folders of this machine that count too."""
    if found := _PATH.search(text):
        return found[0]
    for path in own:
        # A single name such as /model is also a word of prose.
        if path.count("/") > 1 and re.search(rf"(?<![\w.~/-]){re.escape(path)}(?![\w-])", text):
            return path
    return None


def strings_of(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string value of a JSON document, with its dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from strings_of(one, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from strings_of(one, f"{key}[{number}]")
