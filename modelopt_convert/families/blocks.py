"""Which blocks and tensors a checkpoint lacks, by its config and its other blocks. Pure, no torch.

The keys are the arguments of diffusers' classes that count their lists of blocks.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from modelopt_convert.checkpoint.names import module_of
from modelopt_convert.families.family import Family

COUNTS: Mapping[str, str] = {
    "transformer_blocks": "num_layers",
    "single_transformer_blocks": "num_single_layers",
    "blocks": "num_layers",
    "context_embedder.token_refiner.refiner_blocks": "num_refiner_layers",
    "layers": "n_layers",
    "noise_refiner": "n_refiner_layers",
    "context_refiner": "n_refiner_layers",
}


def lacking(family: Family, names: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """The first block or tensor that is not there, in words; None if nothing is known to be missing.

    Args:
        family: Of the model; of one whose blocks differ (``needs_blocks``) whole blocks alone are looked for.
        names: Tensors that every block has, under diffusers' names: no scales.
        config: config.json; empty if there is none.
    """
    stacks: dict[str, dict[int, set[str]]] = {}
    for name in names:
        # A parameter of the block itself is in the table by its whole name.
        if counted := family.count(module_of(name), "diffusers") or family.count(name, "diffusers"):
            stack, block = counted[0], int(counted[1])
            stacks.setdefault(stack, {}).setdefault(block, set()).add(name.removeprefix(f"{stack}.{block}."))
    for stack in sorted({*stacks, *(one for one in COUNTS if f"{one}." in family.stacks)}):
        blocks, said = stacks.get(stack, {}), config.get(COUNTS.get(stack, ""))
        last = max(blocks, default=-1)
        is_said = isinstance(said, int) and not isinstance(said, bool) and said > last + 1
        gone = next((number for number in range(last + 1) if number not in blocks), last + 1 if is_said else None)
        if gone is not None:
            counts = f"config.json says {COUNTS[stack]} = {said}" if is_said else f"there is a block {last}"
            return f"no block {gone} in {stack!r}, where {counts}"
        every = set[str]().union(*blocks.values())
        for number, held in sorted(blocks.items()):
            if not family.needs_blocks and (absent := sorted(every - held)):
                return f"no '{stack}.{number}.{absent[0]}', which other blocks have"
    return None
