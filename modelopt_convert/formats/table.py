"""All quantization formats, by what their folders say. Pure, no torch.

A format is a folder beside this file; ``FORMAT`` in the folder's ``format.py`` describes it. What another room knows of
a format lies in that room, in a module with the format's name; the module's ``ENTRY`` keeps the room's contract.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from modelopt_convert.formats.format import Algorithm, Format


def _found() -> dict[Algorithm, Format]:
    folders = (path.parent.name for path in Path(__file__).parent.glob("*/format.py"))
    formats: list[Format] = [import_module(f"{__package__}.{name}.format").FORMAT for name in folders]
    return {one.algorithm: one for one in sorted(formats, key=lambda one: (one.bits, one.algorithm))}


FORMATS: Mapping[Algorithm, Format] = _found()
