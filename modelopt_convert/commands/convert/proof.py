"""Compare what was written with what was read: both described again, tensor by tensor, bit by bit. No torch."""

from dataclasses import dataclass, field

from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.checkpoint.reader import CHUNK_BYTES, CheckpointReader
from modelopt_convert.dialects.form import Canonical

_SHOWN = 10


@dataclass(slots=True)
class Compared:
    """What the comparison found.

    Attributes:
        tensors: Tensors compared.
        num_bytes: Their bytes.
        modules: Quantized modules among them, all of whose tensors were compared.
        failures: What differs, in words.
    """

    tensors: int = 0
    num_bytes: int = 0
    modules: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)


def compare(source: CheckpointReader, wanted: Canonical, output: CheckpointReader, found: Canonical) -> Compared:
    """Compare two descriptions by all bytes.

    Args:
        source: The opened source.
        wanted: Its description, as it was to be written and as a reader of the output was announced to find it.
        output: What was written, opened.
        found: Its description, by the reader of its own dialect.
    """
    done = Compared()
    for name in sorted(wanted.tensors.keys() | found.tensors.keys()):
        left, right = wanted.tensors.get(name), found.tensors.get(name)
        if left is None or right is None:
            done.failures.append(f"tensor {name!r}: {'not written' if right is None else 'invented'}")
            continue
        if (left.dtype, left.shape) != (right.dtype, right.shape):
            done.failures.append(f"tensor {name!r}: {left.dtype} {left.shape} became {right.dtype} {right.shape}")
            continue
        done.tensors += 1
        done.num_bytes += left.num_bytes
        for begin in range(0, left.num_bytes, CHUNK_BYTES):
            count = min(CHUNK_BYTES, left.num_bytes - begin)
            if source.read_of(left, begin, count) != output.read_of(right, begin, count):
                done.failures.append(f"tensor {name!r}: differs within bytes {begin} to {begin + count}")
                break
    if wanted.modules != found.modules:
        odd = sorted(
            name
            for name in wanted.modules.keys() | found.modules.keys()
            if wanted.modules.get(name) != found.modules.get(name)
        )
        done.failures.append(f"module {odd[0]!r}: {wanted.modules.get(odd[0])} became {found.modules.get(odd[0])}")
    wrong = {module_of(words.split("'")[1]) for words in done.failures}
    done.modules = set(wanted.modules) - wrong
    return done
