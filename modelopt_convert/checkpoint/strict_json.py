"""JSON that means one thing only: UTF-8, no duplicate keys, no NaN, bounded depth and integers."""

import json
from typing import Any

from modelopt_convert.run.errors import InputError

# Enough for a million tensors, each with a shape and offsets. Python makes 30 to 250 bytes of two or three bytes of
# JSON, so 100 MB of empty lists would become gigabytes.
_MOST = {b"{": 1 << 20, b"[": 2 << 20, b",": 12 << 20}
_SHOWN_CHARS = 200


def parse_json_object(raw: bytes, *, code: str, path: str) -> dict[str, Any]:
    """Parse ``raw`` as one JSON object, refusing what two parsers could read differently.

    Args:
        raw: The bytes, UTF-8 without a byte order mark.
        code: Prefix of the error codes: ``<code>.json``, ``<code>.duplicate_key`` and ``<code>.too_large``.
        path: The file, for the message.

    Raises:
        InputError: Not UTF-8, not JSON, not an object, a duplicate key at any level, ``NaN`` or ``Infinity``,
            a lone surrogate, an over-long integer, nesting beyond the parser's depth, or more values than a million
            tensors need.
    """

    def refuse(message: str, kind: str = "json") -> InputError:
        return InputError(
            f"{path}: {message}",
            code=f"{code}.{kind}",
            path=path,
            hint="the file is damaged or was not written by a known producer; download or export it again",
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise refuse(f"key {key[:_SHOWN_CHARS]!r} stands twice in one JSON object", "duplicate_key")
            found[key] = value
        return found

    def constant(text: str) -> Any:
        raise refuse(f"{text} is not JSON")

    for char, most in _MOST.items():
        if (found := raw.count(char)) > most:
            raise refuse(f"expected at most {most} times {char.decode()!r}, found it {found} times", "too_large")
    # -0 is a float to the reference, and the integer 0 to Python. The hook costs a call per number: only where needed.
    integer = (lambda text: -0.0 if text == "-0" else int(text)) if b"-0" in raw else None
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant, parse_int=integer)
        if not isinstance(value, dict):
            raise refuse(f"expected a JSON object, found {type(value).__name__}")
        if b"\\u" in raw:
            # An escaped lone surrogate is JSON to Python and not to the reference parser; it cannot be encoded.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:  # UnicodeError and JSONDecodeError are ValueErrors
        raise refuse(f"not valid JSON ({str(error).splitlines()[0][:120]})") from error
    except MemoryError as error:
        raise refuse(f"{len(raw)} bytes of JSON take more memory than there is", "too_large") from error
    return value


def json_bytes(value: Any) -> bytes:
    """JSON as it is written to disk: sorted, ASCII, the same on every machine."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=True) + "\n").encode()
