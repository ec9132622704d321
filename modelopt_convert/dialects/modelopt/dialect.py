"""ModelOpt's checkpoints: recognised, and declared as mopt writes them. Pure, no torch."""

from collections.abc import Mapping
from typing import Any

from modelopt_convert.dialects.dialect import Dialect, Headers
from modelopt_convert.formats.format import Format
from modelopt_convert.formats.nvfp4.shapes import round_up
from modelopt_convert.formats.table import is_modelopts

FILE_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json"
# Of an export's quantization_config these mean what they say in the output too; the rest is rebuilt or left out.
_KEPT_CONFIG_KEYS = ("quant_method", "quant_algo", "config_groups", "producer", "kv_cache_scheme")
_REBUILT_CONFIG_KEYS = ("ignore", "quant_type", "group_size")


def _modelopt_llm(headers: Headers) -> list[str]:
    return ["hf_quant_config.json"] * ("hf_quant_config.json" in headers.other_files)


def _modelopt_says(headers: Headers, *algorithms: str) -> list[str]:
    found = headers.quantization()
    algorithm = found.get("quant_algo")
    if not is_modelopts(found) or algorithm not in algorithms:
        return []
    return [f"config.json: quant_method {found['quant_method']}, quant_algo {algorithm}"]


def _modelopt_postprocessed(headers: Headers) -> list[str]:
    said = _modelopt_says(headers, "NVFP4")
    if not said:
        return []
    header = [entries for entries in headers.metadata.values() if "quantization_config" in entries]
    padded = [module for module in headers.packed() if _is_padded(headers, module)]
    because = ["header carries quantization_config"] * bool(
        (header and headers.layers()) or (header and not _is_flat(header))
    )
    because += [f"{len(padded)} modules have padded scales ({padded[0]} first)"] if padded else []
    return said + because if because else []


def _is_flat(header: list[Mapping[str, str]]) -> bool:
    # SGLang's builder writes the same flat config under both keys; ModelOpt only under quantization_config.
    return any("_quantization_metadata" in entries for entries in header)


def _is_padded(headers: Headers, module: str) -> bool:
    weight, scale = headers.tensors[f"{module}.weight"].shape, headers.tensors[f"{module}.weight_scale"].shape
    if len(weight) != 2 or len(scale) != 2:
        return True
    plain = (weight[0], weight[1] // 8)
    return scale != plain and scale[0] in (weight[0], round_up(weight[0], 128))


def _modelopt(headers: Headers) -> list[str]:
    return _modelopt_says(headers, "NVFP4")


def _modelopt_fp8(headers: Headers) -> list[str]:
    return _modelopt_says(headers, "FP8")


def _modelopt_other(headers: Headers) -> list[str]:
    found = headers.quantization()
    said = found.get("quant_method") == "modelopt"
    return [f"config.json: quant_method modelopt, quant_algo {found.get('quant_algo')}"] * said


def output_config(
    config: Mapping[str, Any], keys: Mapping[str, Any], ignore: list[str], target: Format
) -> dict[str, Any]:
    """config.json of a transformer in the canonical layout.

    Args:
        config: Of the input.
        keys: Of its quantization_config, beside ``ignore`` and what the format declares.
        ignore: Names of the modules that are not quantized.
        target: The format.
    """
    # _name_or_path is where the machine that saved it kept the model.
    rest = {key: value for key, value in config.items() if key not in ("_name_or_path", "quantization_config")}
    return rest | {"quantization_config": {**keys, "ignore": ignore, **target.declared}}


def split_keys(said: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The keys of an export's quantization_config that the output keeps, and the names of those that it lacks."""
    kept = {key: said[key] for key in _KEPT_CONFIG_KEYS if key in said}
    return kept, sorted(said.keys() - {*_KEPT_CONFIG_KEYS, *_REBUILT_CONFIG_KEYS})


MODELOPT_LLM = Dialect("modelopt-llm", _modelopt_llm)
MODELOPT_POSTPROCESSED = Dialect("modelopt-postprocessed", _modelopt_postprocessed)
MODELOPT = Dialect("modelopt", _modelopt)
MODELOPT_FP8 = Dialect("modelopt-fp8", _modelopt_fp8)
MODELOPT_OTHER = Dialect("modelopt-other", _modelopt_other)
