"""FP8 modules in L0 and L1: nothing is packed, so nothing can lie otherwise."""

from collections.abc import Mapping, Sequence

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.layout import ScaleOrder
from modelopt_convert.verification.levels.container import StoredFormat
from modelopt_convert.verification.subject import Subject


class _Fp8Stored:
    fatal = frozenset({"ignore.misses_unpacked"})  # FP8 configs are believed
    one_layout = "FP8 has one layout"

    def stored_faults(self, subject: Subject, module: PackedModule) -> list[str]:
        return []

    def hint(self, subject: Subject, module: PackedModule) -> ScaleOrder:
        return "undetermined"

    def fused_losses(self, reader: CheckpointReader, group: Sequence[str]) -> Mapping[str, float]:
        return {}


ENTRY: StoredFormat = _Fp8Stored()
