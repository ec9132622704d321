"""Fuzz the index: whatever the bytes, a checkpoint folder with it is opened or refused with InputError.

    python scripts/reliability/fuzz_index.py [LIBFUZZER OPTIONS] CORPUS...

What is accepted must name every tensor of the two shards beside it, in the file that has it, and nothing else.
"""

import json
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
INDEX = "model.safetensors.index.json"
HELD = {"a.safetensors": ("x", "x.weight"), "b.safetensors": ("y", "")}
RIGHT = {name: file for file, names in HELD.items() for name in names}


@cache
def folder() -> Path:
    """Two shards and a config; the index is what changes."""
    from modelopt_convert.checkpoint.header import TensorSpec, build_header

    found = Path(tempfile.mkdtemp(prefix="fuzz_index"))
    (found / "config.json").write_text("{}")
    for file, names in HELD.items():
        head, _, size = build_header([TensorSpec(name, "U8", (1,)) for name in names], {})
        (found / file).write_bytes(head.ljust(size, b"\0"))
    return found


def check(case: bytes) -> str:
    """Run one case.

    Returns:
        ``accepted`` or the code of the refusal.

    Raises:
        AssertionError: An index that is wrong was accepted.
    """
    from modelopt_convert.checkpoint.reader import CheckpointReader
    from modelopt_convert.run.errors import InputError

    (folder() / INDEX).write_bytes(case)
    try:
        with CheckpointReader(folder()) as reader:
            assert {name: info.file for name, info in reader.tensors.items()} == RIGHT
    except InputError as error:
        assert error.code.startswith(("index.", "input.")) and error.hint and len(error.message) < 1000, error.message
        return error.code
    assert json.loads(case)["weight_map"] == RIGHT
    return "accepted"


def main() -> None:
    """Let libFuzzer choose the cases."""
    import atheris

    with atheris.instrument_imports(include=["modelopt_convert"]):
        import modelopt_convert.checkpoint.reader  # noqa: F401
    atheris.Setup(sys.argv, lambda case: check(case) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
