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


def content_digest(headers_sha256: str, tensors: Mapping[str, str]) -> str:
    """The digest of all bytes of all weight files of a checkpoint.

    A safetensors file is its header and its tensors, with nothing between them: so these two are every byte.

    Args:
        headers_sha256: Of the files' names and headers, in the order of the names.
        tensors: xxh3-128 of each tensor's bytes, by name.
    """
    text = json.dumps([headers_sha256, dict(tensors)], sort_keys=True, ensure_ascii=True)
    return xxhash.xxh3_128_hexdigest(text.encode())
