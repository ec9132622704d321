"""The padding of a packed NVFP4 module: it must be zero, is counted, and takes no other part in a proof."""

from threading import Event

from modelopt_convert.checkpoint.header import TensorInfo
from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.nvfp4.format import BLOCK_SIZE
from modelopt_convert.formats.tensor_bytes import from_bytes
from modelopt_convert.run.errors import InputError
from modelopt_convert.run.workers import until

_PIECE_BYTES = 1 << 20


def padding_bytes(export: CheckpointReader, module: PackedModule, stopped: Event) -> int:
    """How many bytes pad the codes and scales of a module, once all of the codes' are known to be zero.

    Those of the scales were looked at when the scales were read (``scale_readings``).

    Raises:
        InputError: ``export.padding``.
        Stopped: The event was set meanwhile.
    """
    info, half = module.weight, module.columns // 2
    padding = info.num_bytes - module.rows * half
    if padding:
        top, width = 0, info.shape[1]
        for piece in until(stopped, export.buffered(info.name, max(1, _PIECE_BYTES // width) * width)):
            stored = from_bytes(piece, "U8", (-1, width))
            found = stored[:, half:].count_nonzero() + stored[max(0, module.rows - top) :, :half].count_nonzero()
            if found:
                raise not_padding(export, info, "codes")
            top += len(stored)
    return padding + module.scales["weight_scale"].num_bytes - module.rows * module.columns // BLOCK_SIZE


def not_padding(export: CheckpointReader, info: TensorInfo, found: str) -> InputError:
    """The error for padding that holds something: codes, or scales."""
    return InputError(
        f"{export.folder / info.file}: tensor {info.name!r}: expected zeros in the padding, found {found}",
        code="export.padding",
        path=str(export.folder / info.file),
        hint=f"these {found} are not those of this weight; export again",
    )
