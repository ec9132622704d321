"""The one safetensors header parser and builder of the project: pure, strict, no torch.

The parser follows the reference (safetensors/src/tensor.rs: ``Metadata::validate`` and ``prepare``). It also refuses
what the reference's README disallows and the reference's parser lets pass, such as identical duplicate keys.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelopt_convert.checkpoint.foreign import foreign
from modelopt_convert.checkpoint.strict_json import parse_json_object
from modelopt_convert.formats.dtypes import DTYPE_BITS, DTYPE_RANK, num_bits, num_bytes
from modelopt_convert.run.errors import InputError

if TYPE_CHECKING:
    from modelopt_convert.checkpoint.recipe import Recipe
else:
    Recipe = Any  # for pydantic, which sends these to other processes, without their recipes

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the reference's limit
METADATA: Mapping[str, str] = {"format": "pt"}  # diffusers writes this into every file
MAX_RANK = 64
MAX_NAME_BYTES = 4096
MAX_INT = 1 << 63

_DAMAGED = "the file is damaged or was cut short; download or export it again"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What an output tensor is: name, safetensors dtype name, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the data in bytes."""
        return num_bytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file's header says of a tensor, or what a tensor is made of.

    Attributes:
        name: Full tensor name.
        dtype: safetensors dtype name.
        shape: Logical shape.
        file: Name of the file inside the checkpoint folder; of several, the one that messages name.
        start: Offset of the data from the beginning of the file, in bytes.
        num_bytes: Size of the data in bytes.
        recipe: How the data comes from files, where it is not one stretch of one; then ``start`` means nothing.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    num_bytes: int
    recipe: "Recipe | None" = None


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: tensors by name in file order, and the string-to-string metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header_length(prefix: bytes, *, file: str, file_bytes: int) -> int:
    """Length of the JSON header, from the file's first 8 bytes, checked before anyone reads that many.

    Raises:
        InputError: ``header.too_small``, ``header.too_large`` or ``header.truncated``; ``header.foreign`` for a file of
            another kind.
    """
    if len(prefix) < PREFIX_BYTES or file_bytes < PREFIX_BYTES:
        raise InputError(
            f"{file}: expected at least {PREFIX_BYTES} bytes, found {file_bytes}",
            code="header.too_small",
            path=file,
            hint=_DAMAGED,
        )
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise foreign(prefix, file) or InputError(
            f"{file}: the header claims {length} bytes, the format allows {MAX_HEADER_BYTES}",
            code="header.too_large",
            path=file,
            hint="this is not a safetensors file; download or export it again",
        )
    if length > file_bytes - PREFIX_BYTES:
        raise foreign(prefix, file) or InputError(
            f"{file}: the header claims {length} bytes, the file holds {file_bytes - PREFIX_BYTES} after its prefix",
            code="header.truncated",
            path=file,
            hint=_DAMAGED,
        )
    return length


def parse_header(raw: bytes, *, file: str, file_bytes: int) -> Header:
    """Parse and validate the JSON header of a safetensors file.

    Args:
        raw: The header's bytes, without the 8-byte prefix.
        file: The file's name, for messages and ``TensorInfo.file``.
        file_bytes: Size of the whole file: tensors must fill it exactly, without gap, overlap or tail.

    Raises:
        InputError: With the ``header.*`` code of the first rule broken.
    """
    if not raw.startswith(b"{"):
        raise foreign(len(raw).to_bytes(PREFIX_BYTES, "little"), file) or InputError(
            f"{file}: the header must start with '{{', found {raw[:1]!r}", code="header.json", path=file, hint=_DAMAGED
        )
    entries = parse_json_object(raw, code="header", path=file)
    metadata = _metadata(entries.pop("__metadata__", {}), file)
    data_start = PREFIX_BYTES + len(raw)
    tensors = [_tensor_info(name, entry, file, data_start) for name, entry in entries.items()]
    # An empty tensor shares its start with a neighbour; (start, size) puts the empty one first, as the reference does.
    tensors.sort(key=lambda info: (info.start, info.num_bytes))
    expected = data_start
    for info in tensors:
        if info.start != expected:
            raise _refuse(
                file,
                info.name,
                f"starts at data byte {info.start - data_start}, the tensor before it ends at {expected - data_start}",
                "offset_gap_or_overlap",
            )
        expected += info.num_bytes
    if expected != file_bytes:
        raise InputError(
            f"{file}: the header describes {expected} bytes, the file has {file_bytes}",
            code="header.file_length",
            path=file,
            hint=_DAMAGED,
        )
    return Header({info.name: info for info in tensors}, metadata)


def build_header(
    specs: Iterable[TensorSpec], metadata: Mapping[str, str]
) -> tuple[bytes, list[tuple[TensorSpec, int]], int]:
    """Lay tensors out as ``safetensors.torch.save_file`` does, to the byte.

    Args:
        specs: The tensors, in any order.
        metadata: The ``__metadata__`` entry; written only if not empty.

    Returns:
        The prefix and header (to be written at offset 0), each tensor with its offset from the beginning of the file
        in file order, and the size of the whole file.

    Raises:
        ValueError: A name that is reserved, too long or given twice.
    """
    ordered = sorted(specs, key=lambda spec: (-DTYPE_RANK[spec.dtype], spec.name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    sizes: list[tuple[TensorSpec, int]] = []
    end = 0
    for spec in ordered:
        if spec.name == "__metadata__" or len(spec.name.encode()) > MAX_NAME_BYTES or spec.name in entries:
            raise ValueError(f"tensor name {spec.name[:80]!r} is reserved, too long or given twice")
        size = spec.num_bytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [end, end + size]}
        sizes.append((spec, end))
        end += size
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the reference pads with spaces so that the data is 8-byte aligned
    head = len(text).to_bytes(PREFIX_BYTES, "little") + text
    return head, [(spec, len(head) + offset) for spec, offset in sizes], len(head) + end


def _refuse(file: str, name: str, what: str, kind: str) -> InputError:
    return InputError(f"{file}: tensor {name[:200]!r} {what}", code=f"header.{kind}", path=file, hint=_DAMAGED)


def _metadata(value: Any, file: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise InputError(
            f"{file}: __metadata__ must map strings to strings", code="header.metadata", path=file, hint=_DAMAGED
        )
    return value


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_INT  # type(), because True is an int to isinstance


def _tensor_info(name: str, entry: Any, file: str, data_start: int) -> TensorInfo:
    if len(name.encode()) > MAX_NAME_BYTES:
        raise _refuse(file, name, f"has a name of more than {MAX_NAME_BYTES} bytes", "entry")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _refuse(file, name, "must have exactly dtype, shape and data_offsets", "entry")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _refuse(file, name, f"has the unknown dtype {str(dtype)[:40]!r}", "dtype")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_is_size, shape)):
        raise _refuse(file, name, f"has the invalid shape {str(shape)[:80]}", "shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)) or offsets[0] > offsets[1]:
        raise _refuse(file, name, f"has the invalid data_offsets {str(offsets)[:80]}", "offsets")
    begin, end = offsets
    bits = num_bits(dtype, shape)
    if bits % 8:
        raise _refuse(file, name, f"takes {bits} bits, not a whole number of bytes", "misaligned")
    if bits // 8 != end - begin:
        raise _refuse(
            file, name, f"spans {end - begin} bytes, {dtype} {shape} needs {bits // 8}"[:300], "size_mismatch"
        )
    if math.prod(size for size in shape if size) >= MAX_INT:
        # The tensor is empty; yet the reference or torch refuses it, depending on where the zero stands.
        raise _refuse(file, name, f"has the shape {str(shape)[:80]}, whose strides overflow 64 bits", "shape")
    return TensorInfo(name, dtype, tuple(shape), file, data_start + begin, end - begin)


def json_object(text: str | None) -> dict[str, Any]:
    """A value of header metadata as a JSON object; empty where it is none."""
    try:
        found = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
