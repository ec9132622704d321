"""What a dialect is: how a producer names, packs and declares quantized weights. Pure, no torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from modelopt_convert.checkpoint.header import TensorInfo, json_object
from modelopt_convert.formats.layout import Layout, declared_layout

_SHOWN = 2
CONVERTED = Layout("high", "128x4", nibbles_by="declared", scales_by="declared")
"""How Black Forest Labs' files and those of ComfyUI lie: their loaders read no other layout."""


@dataclass(frozen=True, slots=True)
class Headers:
    """What a dialect is recognised by: headers, config, and the names of the files beside them.

    Attributes:
        tensors: Every tensor by name.
        metadata: Header metadata by file.
        config: config.json.
        other_files: Names of the files that are neither shard, index nor config.
        is_named: Whether the user named the dialect: it holds where no mark is.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Mapping[str, str]]
    config: Mapping[str, Any]
    other_files: tuple[str, ...]
    is_named: bool = False

    def ending(self, *suffixes: str) -> list[str]:
        """Tensors whose names end so."""
        return [name for name in self.tensors if name.endswith(suffixes)]

    def quantization(self) -> Mapping[str, Any]:
        """quantization_config of config.json or else, as ModelOpt's post-processing writes it too, of a header."""
        found = self.config.get("quantization_config")
        headers = [json_object(entries.get("quantization_config")) for entries in self.metadata.values()]
        return found if isinstance(found, dict) else next((one for one in headers if one), {})

    def layers(self) -> dict[str, Any]:
        """Layers that a ComfyUI-style header names, over all files."""
        found: dict[str, Any] = {}
        for entries in self.metadata.values():
            layers = json_object(entries.get("_quantization_metadata")).get("layers")
            found |= layers if isinstance(layers, dict) else {}
        return found

    def packed(self) -> list[str]:
        """Modules with a U8 weight and a tensor of block scales."""
        return [
            name.removesuffix(".weight")
            for name, info in self.tensors.items()
            if name.endswith(".weight") and info.dtype == "U8" and f"{name}_scale" in self.tensors
        ]

    def fp8(self) -> list[str]:
        """Modules with an E4M3 weight."""
        return [
            name.removesuffix(".weight")
            for name, info in self.tensors.items()
            if name.endswith(".weight") and info.dtype == "F8_E4M3"
        ]


def _by_config(headers: Headers) -> Layout:
    found = headers.config.get("quantization_config")
    return declared_layout(found if isinstance(found, dict) else {})


@dataclass(frozen=True, slots=True)
class Dialect:
    """One dialect.

    Attributes:
        name: As ``mopt inspect`` says it.
        recognise: The evidence that a checkpoint is in it, in words; nothing if this is not the dialect.
        layout: How its packed weights are declared to lie.
    """

    name: str
    recognise: Callable[[Headers], list[str]]
    layout: Callable[[Headers], Layout] = _by_config


def said_of(what: str, names: list[str]) -> list[str]:
    """Evidence from the names of tensors; none if there are none."""
    return [f"{len(names)} tensors {what}: {', '.join(names[:_SHOWN])}"] if names else []
