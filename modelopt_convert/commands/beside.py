"""What lies in a checkpoint beside its transformer, such as a VAE and text encoders: left out, and said. No torch."""

from collections import Counter

from modelopt_convert.checkpoint.reader import CheckpointReader
from modelopt_convert.commands.command import Warned
from modelopt_convert.families.table import Found, beside, recognise


def beside_transformer(reader: CheckpointReader, found: Found | None) -> tuple[dict[str, str], list[Warned]]:
    """What lies in a source beside its transformer: what becomes of each tensor, and what is said of all."""
    fates = beside(reader.tensors, found)
    if not fates:
        return {}, []
    counts = sorted(Counter(fates.values()).items())
    words = ", ".join(f"{count} of {fate.removeprefix('left out: ')}" for fate, count in counts)
    message = f"source {reader.path}: tensors that are not the transformer's are left out: {words}"
    return fates, [("input.left_out", message)]


def present_transformer(reader: CheckpointReader) -> tuple[dict[str, str], list[Warned]]:
    """Present the transformer alone, of a whole checkpoint; the rest as ``beside_transformer`` returns it."""
    found = recognise({name: info.shape for name, info in reader.tensors.items()})
    fates, warned = beside_transformer(reader, found)
    if fates:
        reader.present({name: one for name, one in reader.tensors.items() if name not in fates})
    return fates, warned
