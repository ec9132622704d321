"""What a file is that is called .safetensors and is none, by its first eight bytes. Pure, no torch."""

import re
from dataclasses import dataclass

from modelopt_convert.run.errors import InputError

_FETCH = "`hf download ORGANIZATION/NAME --local-dir FOLDER`"
_READS = "mopt reads safetensors alone: give the original model's, fetched with " + _FETCH
_TEXTS = ("a JSON text", "a text")
_UNPACK = "unpack it: `{} -dc FILE > OTHER.safetensors`"


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of file: its name for people, the pattern of its first bytes, and what to do."""

    name: str
    magic: re.Pattern[bytes]
    hint: str


def _kind(name: str, magic: bytes, hint: str) -> _Kind:
    return _Kind(name, re.compile(magic, re.DOTALL | re.IGNORECASE), hint)


_KINDS = (
    _kind("a pointer of git-lfs", rb"version ", "run `git lfs pull` in the folder, or fetch it with " + _FETCH),
    _kind("a GGUF file", rb"GGUF", _READS),
    _kind("a zip archive, as torch.save writes it (.pt, .ckpt, .bin)", rb"PK\x03\x04", _READS),
    # A header's length can begin so; the last four bytes of one that is allowed are zero.
    _kind(
        "a pickle, as old torch.save writes it (.pt, .ckpt, .bin)",
        rb"\x80([\x04\x05]\x95|[\x02-\x05]..(?!\0{4}))",
        _READS,
    ),
    _kind("an image (PNG)", rb"\x89PNG\r\n\x1a\n", _READS),
    _kind("an image (JPEG)", rb"\xff\xd8\xff[\xdb\xe0-\xef]", _READS),
    _kind("an HDF5 file (.h5)", rb"\x89HDF\r\n\x1a\n", _READS),
    _kind("a web page, not the file behind it", rb"\s{0,4}<(!do|htm|hea|\?xm)", "fetch it with " + _FETCH),
    _kind(
        "an answer of the Hub, not the file",
        rb"(Access t|Entry no|Reposito|Invalid |Not Foun|Unauthor)",
        "log in with `hf auth login`, accept the model's terms on its page, and fetch it with " + _FETCH,
    ),
    _kind("a JSON text", rb'\{\s*"', "fetch it with " + _FETCH),
    _kind("a gzip archive", rb"\x1f\x8b\x08", _UNPACK.format("gzip")),
    _kind("an xz archive", rb"\xfd7zXZ\0", _UNPACK.format("xz")),
    _kind("a zstd archive", rb"\x28\xb5\x2f\xfd", _UNPACK.format("zstd")),
    _kind("a text", rb"[\t\n\r\x20-\x7e]{8}", "fetch it with " + _FETCH),
)


def foreign(prefix: bytes, file: str) -> InputError | None:
    """The refusal of another kind of file; None where its first bytes say nothing.

    For a file that is refused anyway: the length of a header may begin as some of these kinds do.

    Args:
        prefix: The first eight bytes.
        file: Its name, for messages.
    """
    found = next((one for one in _KINDS if one.magic.match(prefix)), None)
    if found is None:
        return None
    is_other = found.name in _TEXTS and not file.endswith(".safetensors")
    return InputError(
        f"{file}: expected a safetensors file, found {found.name}",
        code="header.foreign",
        path=file,
        hint="give the folder of the checkpoint, or its .safetensors file" if is_other else found.hint,
    )
