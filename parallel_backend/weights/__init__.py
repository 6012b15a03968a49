"""Weights: from a file on disk to a transformer on a device, one shared mapping for all ranks of a host."""

from .checkpoint import Checkpoint, fingerprint, open_checkpoint
from .detect import Detected, detect
from .load import LoadedTransformer, load_transformer

__all__ = [
    "Checkpoint",
    "Detected",
    "LoadedTransformer",
    "detect",
    "fingerprint",
    "load_transformer",
    "open_checkpoint",
]
