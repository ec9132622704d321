"""Fuzz the header parser: whatever the bytes, only InputError; and what it accepts, safetensors accepts with the same.

    python scripts/reliability/fuzz_header.py [LIBFUZZER OPTIONS] CORPUS...

A case is the header's JSON. The length prefix and the data are made from it, or no mutation would get past the prefix:
the first byte says how far the file's size is off from what the header describes.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
MAX_DATA = 1 << 16


def file_of(case: bytes) -> bytes:
    """A whole file around a mutated header."""
    off, header = (case[0] if case else 0), case[1:]
    try:
        entries = json.loads(header)
        end = max(one["data_offsets"][1] for name, one in entries.items() if name != "__metadata__")
        size = min(max(int(end + (off if off < 8 else 0)), 0), MAX_DATA)
    except Exception:  # nothing to go by: no data
        size = 0
    return len(header).to_bytes(8, "little") + header + bytes(size)


def check(case: bytes) -> str:
    """Run one case.

    Returns:
        ``accepted`` or the code of the refusal.

    Raises:
        AssertionError: safetensors reads it otherwise, or not at all.
    """
    from safetensors import deserialize
    from safetensors_files import parse

    from modelopt_convert.run.errors import InputError

    file = file_of(case)
    try:
        found = parse(file)
    except InputError as error:
        assert error.code.startswith("header.") and error.hint and len(error.message) < 1000, error.message
        return error.code
    theirs = {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in deserialize(file)}
    ours = {n: (t.dtype, t.shape, file[t.start : t.start + t.num_bytes]) for n, t in found.tensors.items()}
    assert ours == theirs
    return "accepted"


def main() -> None:
    """Let libFuzzer choose the cases."""
    import atheris

    with atheris.instrument_imports(include=["modelopt_convert"]):
        import modelopt_convert.checkpoint.header  # noqa: F401
    atheris.Setup(sys.argv, lambda case: check(case) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
