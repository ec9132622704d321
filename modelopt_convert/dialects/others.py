"""Dialects of which this module knows only how they are recognised. Pure, no torch."""

from modelopt_convert.dialects.dialect import Dialect, Headers, said_of

_PLAIN = frozenset({"BF16", "F16", "F32", "F64", "I64", "BOOL"})


def _compressed_tensors(headers: Headers) -> list[str]:
    said = headers.quantization().get("quant_method") == "compressed-tensors"
    return said_of("end in .weight_packed", headers.ending(".weight_packed")) + ["config.json says so"] * said


def _mxfp4(headers: Headers) -> list[str]:
    blocks, scales = headers.ending("_blocks"), headers.ending("_scales")
    return said_of("end in _blocks", blocks) if blocks and scales else []


def _nunchaku(headers: Headers) -> list[str]:
    return said_of("end in .qweight, with .wscales", headers.ending(".qweight")) if headers.ending(".wscales") else []


def _torchao(headers: Headers) -> list[str]:
    return (
        said_of("end in _qdata", headers.ending("_qdata")) if headers.ending("_per_tensor_scale", "_scale_e4m3") else []
    )


def _torchao_fp8(headers: Headers) -> list[str]:
    names = [name for name in headers.ending("_weight_qdata") if headers.tensors[name].dtype == "F8_E4M3"]
    return said_of("end in _weight_qdata", names)


def _lightx2v(headers: Headers) -> list[str]:
    alpha = headers.ending(".alpha")
    return said_of("end in .alpha, with .weight_global_scale", alpha) if headers.ending(".weight_global_scale") else []


def _deepseek_fp8(headers: Headers) -> list[str]:
    return said_of("end in .weight_scale_inv", headers.ending(".weight_scale_inv"))


def _nvfp4_unlabelled(headers: Headers) -> list[str]:
    return said_of("are U8 weights with block scales, nothing says whose", headers.packed())


def _fp8_unlabelled(headers: Headers) -> list[str]:
    return said_of("are E4M3 weights, nothing says whose", headers.fp8())


def _unquantized(headers: Headers) -> list[str]:
    plain = all(info.dtype in _PLAIN for info in headers.tensors.values())
    return ["all tensors are floats of 16 bits or more"] * plain


COMPRESSED_TENSORS = Dialect("compressed-tensors", _compressed_tensors)
MXFP4 = Dialect("mxfp4", _mxfp4)
NUNCHAKU = Dialect("nunchaku", _nunchaku)
TORCHAO = Dialect("torchao", _torchao)
TORCHAO_FP8 = Dialect("torchao-fp8", _torchao_fp8)
LIGHTX2V = Dialect("lightx2v", _lightx2v)
DEEPSEEK_FP8 = Dialect("deepseek-fp8", _deepseek_fp8)
NVFP4_UNLABELLED = Dialect("nvfp4-unlabelled", _nvfp4_unlabelled)
FP8_UNLABELLED = Dialect("fp8-unlabelled", _fp8_unlabelled)
UNQUANTIZED = Dialect("unquantized", _unquantized)
UNKNOWN = Dialect("unknown", lambda _: ["no known names, markers or config"])
