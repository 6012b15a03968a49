"""The autoencoder classes of diffusers that the ranks run, and where they differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """One class; its numbers are read off the class's config."""

    scale: Callable[[Config], int]
    """Pixels per latent row or column."""
    latent_channels: str = "latent_channels"
    """Its name in the config."""
    joint: bool = True
    """Whether attention is over all pixels of a picture; else it is over the frames of each pixel."""
    reach: int = 1
    """The most rows that a convolution takes of a neighbour's band."""


KINDS = {
    "AutoencoderKL": Kind(scale=lambda config: 2 ** (len(config["block_out_channels"]) - 1)),
}
"""By the name of the class in diffusers."""
