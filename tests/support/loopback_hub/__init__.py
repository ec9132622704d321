"""A Hugging Face Hub on loopback, for the real client: LFS and Xet, faults on request, every request logged."""

from loopback_hub.hub import LoopbackHub
from loopback_hub.records import FaultKind, Request
from loopback_hub.store import Commit
from loopback_hub.xet import XetMode

__all__ = ["Commit", "FaultKind", "LoopbackHub", "Request", "XetMode"]
