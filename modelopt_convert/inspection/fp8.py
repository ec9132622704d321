"""FP8 modules: the format has one layout, so that their scales are all there is to look at."""

from collections.abc import Iterator, Mapping

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.dialects.packed import PackedModule
from modelopt_convert.formats.fp8.format import FORMAT
from modelopt_convert.inspection.component import FormatInspection, Seen, Subject, module_layout
from modelopt_convert.inspection.lint import is_float32, odd_input_faults, unusable
from modelopt_convert.report.inspect import LintReport


class _Fp8Inspection:
    def see(self, subject: Subject, found: Mapping[str, PackedModule], coded: Mapping[str, list[int]]) -> Seen:
        modules = {name: module_layout(FORMAT, shape, None) for name, shape in coded.items()}
        faults = [fault for name in coded for fault in _faults(subject.reader, name)]
        return Seen(modules, {}, [*faults, *odd_input_faults(subject.reader, found, FORMAT.tensor_scale)])


ENTRY: FormatInspection = _Fp8Inspection()


def _faults(reader: CheckpointReader, module: str) -> Iterator[LintReport]:
    """Missing or unusable scales."""
    for role in FORMAT.scales:
        scale = reader.tensors.get(f"{module}.{role}")
        if scale is None:
            yield LintReport(code=f"{role}.missing", message=f"FP8 without {role}", module=module)
        elif is_float32(scale):
            yield from unusable(reader, scale, module, role)
