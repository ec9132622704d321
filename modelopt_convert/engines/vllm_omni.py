"""vLLM-omni's view of ``ignore``: which entries exclude more than the module that they name. Pure, no torch.

Written from vllm 0.30.0, ``ModelOptQuantConfigBase.is_layer_excluded`` in
``model_executor/layers/quantization/modelopt.py``: a module is excluded if an entry is its name, is a part of its name,
or is a pattern that fits the whole name.
"""

from bisect import bisect_left
from collections.abc import Collection, Sequence


def widened(entries: Collection[str], names: Collection[str]) -> set[str]:
    """The entries without ``*`` that are a part of some name: vLLM excludes that module too.

    It takes time by the length of both, however many there are.
    """
    firsts = {entry.partition(".")[0] for entry in entries}
    words = {word for name in names for word in name.split(".")}
    # Where an entry may begin within a word: anywhere, if it ends in that word; where it ends with the word otherwise.
    within = sorted({word[at:] for word in words for at in range(len(word))})
    begun = {word: [tail for at in range(len(word)) if (tail := word[at:]) in firsts] for word in words}
    across: list[str] = []
    for name in names:
        segments = name.split(".")
        for number, word in enumerate(segments[:-1]):
            across += (".".join((tail, *segments[number + 1 :])) for tail in begun[word])
    across.sort()
    return {entry for entry in entries if begins_one(across if "." in entry else within, entry)}


def begins_one(texts: Sequence[str], start: str) -> bool:
    """Whether one of the texts, which are in order, begins so."""
    place = bisect_left(texts, start)
    return place < len(texts) and texts[place].startswith(start)
