"""How much memory is free."""

import os

import torch


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, what torch keeps for later included; or of the machine."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
