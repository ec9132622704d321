"""How SGLang 0.5.23 asks `ignore` about a module: under which names, and by which two rules.

Copied from its runtime/models/dits/*.py (prefixes) and runtime/layers/quantization/modelopt_{fp8,quant}.py.
"""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sglang_names import spellings


def runtime_names(config: Mapping[str, Any], module: str) -> set[str]:
    """Every name under which the runtime may look a module of the checkpoint up, that on disk among them."""
    found = spellings(module, config["_class_name"])
    return found | {prefix for name in found if (prefix := _hunyuan_prefix(config, name)) is not None}


def _hunyuan_prefix(config: Mapping[str, Any], name: str) -> str | None:
    """Of what is passed a quant_config; for one f"{config.prefix}.single_blocks.{i + config.num_layers}"."""
    if matched := re.fullmatch(r"single_blocks\.(\d+)\.(linear[12])", name):
        return f"Hunyuan.single_blocks.{int(matched[1]) + config['num_layers']}.{matched[2]}"
    if re.fullmatch(r"double_blocks\.\d+\.(img|txt)_(attn_qkv|attn_proj|mlp\.fc_in|mlp\.fc_out)", name):
        return f"Hunyuan.{name}"
    return None


def is_excluded(name: str, ignore: Sequence[str]) -> bool:
    """``ModelOptQuantConfig.is_layer_excluded``: against the whole name."""
    return any(re.fullmatch(re.escape(entry).replace(r"\*", ".*"), name) for entry in ignore)


def is_ignored(name: str, ignore: Sequence[str]) -> bool:
    """``ModelOptFp8Config._is_layer_ignored``: against its first part as well."""
    first = name.split(".")[0]
    return any(fnmatch.fnmatch(name, entry) or fnmatch.fnmatch(first, entry) for entry in ignore)
