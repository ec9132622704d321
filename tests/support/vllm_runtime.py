"""How vllm 0.30.0 asks `ignore` about a module, as ``ModelOptQuantConfigBase.is_layer_excluded`` does.

Copied from its model_executor/layers/quantization/modelopt.py, but for fused modules.
"""

from collections.abc import Sequence
from fnmatch import fnmatch


def is_excluded(prefix: str, exclude_modules: Sequence[str]) -> bool:
    if prefix in exclude_modules:
        return True
    if any(entry != prefix and entry in prefix for entry in exclude_modules):
        return True
    return any(fnmatch(prefix, pattern) for pattern in exclude_modules)
