"""Checkpoints that are not quantized: read as they are, and written by decoding what is packed. Pure, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from modelopt_convert.checkpoint.header import METADATA, TensorInfo
from modelopt_convert.dialects.awq import folded, is_transformed
from modelopt_convert.dialects.decoded import decoded
from modelopt_convert.dialects.dialect import Headers
from modelopt_convert.dialects.form import SCALES, Canonical, Naming, ReadBytes, Written, grouped, wrong
from modelopt_convert.dialects.packed import TRANSFORM_ROLES
from modelopt_convert.formats.dtypes import DTYPE_BITS
from modelopt_convert.run.errors import Faults

_QUANTIZATION = "quantization_config"


@dataclass(frozen=True, slots=True)
class _Bf16:
    name: str = "bf16"
    naming: Naming = "diffusers"

    def read(
        self, headers: Headers, read: ReadBytes, true_shapes: Mapping[str, tuple[int, int]], where: str
    ) -> Canonical:
        faults = Faults()
        for info in headers.tensors.values():
            if info.name.endswith(".weight") and DTYPE_BITS[info.dtype] < 16:
                expected = "BF16, F16 or F32, as it is said to be unquantized"
                hint = "leave --from out, or name the dialect that the file is in"
                faults.add(info.name, wrong(where, info, expected, code="dialect.contradiction", hint=hint))
        faults.refuse()
        config = {key: value for key, value in headers.config.items() if key != _QUANTIZATION}
        return Canonical(headers.tensors, {}, {}, config)

    def write(self, described: Canonical, read: ReadBytes) -> Written:
        weights: dict[str, TensorInfo] = {}
        scales: dict[str, None] = {}
        for module, roles in grouped(described.tensors.values()).items():
            quantized = described.modules.get(module)
            if is_transformed(roles):
                weight = folded(roles, quantized)
            elif quantized is not None:
                weight = decoded(quantized, roles)
            else:
                continue
            weights[weight.name] = weight
            scales |= dict.fromkeys(
                roles[role].name for role in sorted(roles.keys() & (SCALES | TRANSFORM_ROLES.keys()))
            )
        tensors = {name: info for name, info in described.tensors.items() if name not in scales} | weights
        config = {key: value for key, value in described.config.items() if key != "_name_or_path"}
        why = dict.fromkeys(weights, "decoded, and rounded to BF16 once") | dict.fromkeys(
            scales, "its weight is decoded"
        )
        return Written(tensors, METADATA, config or None, scales, weights, why, unpacked=frozenset(described.modules))


FORM = _Bf16()
