"""FP8 modules in L0 and L1: nothing is packed, so nothing can lie otherwise."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.floats import values_of
from modelopt_convert.formats.fp8.format import FORMAT
from modelopt_convert.formats.layout import ScaleOrder
from modelopt_convert.proof.scale_values import tensor_scale
from modelopt_convert.verification.levels.container import StoredFormat
from modelopt_convert.verification.subject import Subject

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class _Fp8Stored:
    fatal = frozenset({"ignore.misses_unpacked"})  # FP8 configs are believed
    one_layout = "FP8 has one layout"

    def stored_faults(self, subject: Subject, module: PackedModule) -> list[str]:
        return []

    def decoded(self, subject: Subject, module: PackedModule, rows: Sequence[int]) -> "NDArray[np.float32]":
        import numpy as np

        tensor_scale(subject.reader, module, FORMAT.tensor_scale)
        row_bytes = module.weight.shape[1]
        raw = subject.reader.read_rows(module.weight.name, rows, row_bytes)
        return values_of("F8_E4M3")[np.frombuffer(raw, np.uint8).reshape(len(rows), row_bytes)]

    def hint(self, subject: Subject, module: PackedModule) -> ScaleOrder:
        return "undetermined"

    def fused_losses(self, reader: CheckpointReader, group: Sequence[str]) -> Mapping[str, float]:
        return {}


ENTRY: StoredFormat = _Fp8Stored()
