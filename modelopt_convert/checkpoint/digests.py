"""Digests of what a checkpoint is beside its tensors' bytes. No torch."""

import json
from collections.abc import Iterable, Mapping

import xxhash

from modelopt_convert.checkpoint.header import TensorInfo, TensorSpec


def headers_digest(tensors: Iterable[TensorSpec | TensorInfo], metadata: Iterable[Mapping[str, str]]) -> str:
    """The digest of names, dtypes, shapes and header metadata, however they are spread over files.

    The same bytes under another shape or dtype are another tensor.
    """
    specs = {one.name: [one.dtype, *one.shape] for one in tensors}
    text = json.dumps([specs, [dict(one) for one in metadata]], sort_keys=True, ensure_ascii=True)
    return xxhash.xxh3_128_hexdigest(text.encode())
