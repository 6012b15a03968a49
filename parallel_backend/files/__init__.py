"""Weights: from a file on disk to a transformer on a device, one shared mapping for all ranks of a host.

What reads headers only is here; `load` is not, because it takes seconds to import diffusers.
"""

from .checkpoint import Checkpoint, open_checkpoint
from .detect import Detected, detect

__all__ = ["Checkpoint", "Detected", "detect", "open_checkpoint"]
