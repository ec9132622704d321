"""Black Forest Labs' own files, with q, k and v in one weight. Pure, no torch."""

from modelopt_convert.dialects.dialect import CONVERTED, Dialect, Headers, said_of
from modelopt_convert.engines.sglang import PACKED_QKV


def _bfl(headers: Headers) -> list[str]:
    names = [f"{module}.weight" for module in headers.packed() if PACKED_QKV.match(f"{module}.")]
    return said_of("have Black Forest Labs' packed-QKV names", names)


def _bfl_package(headers: Headers) -> list[str]:
    return ["manifest.json beside hf_quant_config.json"] * (
        {"manifest.json", "hf_quant_config.json"} <= set(headers.other_files)
    )


BFL = Dialect("bfl", _bfl, lambda _: CONVERTED)
BFL_PACKAGE = Dialect("bfl-package", _bfl_package)
