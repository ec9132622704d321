"""Checkpoints as bytes: headers, indexes and files, near or on the Hub, checked before anyone relies on them.

What a tensor means, and whether it is quantized, is not asked here. Nothing here writes to disk but the Hub's cache,
and nothing imports torch.
"""
