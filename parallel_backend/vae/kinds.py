"""The autoencoder classes of diffusers that the ranks run, and where they differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """One class; its numbers are read off the class's config."""

    scale: Callable[[Config], int]
    """Pixels per latent row or column."""
    frames: Callable[[Config], int] | None = None
    """Of a video: frames per latent frame, the first latent frame being one frame by itself. None: pictures."""
    latent_channels: Callable[[Config], int] = lambda config: config["latent_channels"]
    image_channels: Callable[[Config], int] = lambda config: config["out_channels"]
    joint: bool = True
    """Whether attention is over all pixels of a picture; else it is over the frames of each pixel."""
    normalised: bool = False
    """Whether latents in the graph are those of the class less their mean, over their standard deviation."""
    defaults: Config = field(default_factory=dict)
    """Of what is read above, and a config of an older diffusers may lack."""


def _halvings(config: Config) -> int:
    return 2 ** (len(config["block_out_channels"]) - 1)


def _ltx_scale(config: Config) -> int:
    return config.get("spatial_compression_ratio") or config["patch_size"] * 2 ** sum(config["spatio_temporal_scaling"])


def _ltx_frames(config: Config) -> int:
    ratio = config.get("temporal_compression_ratio")
    return ratio or config["patch_size_t"] * 2 ** sum(config["spatio_temporal_scaling"])


KINDS = {
    "AutoencoderKL": Kind(scale=_halvings),
    "AutoencoderDC": Kind(
        scale=lambda config: 2 ** (len(config["encoder_block_out_channels"]) - 1),
        image_channels=lambda config: config["in_channels"],
    ),
    "AutoencoderKLWan": Kind(
        scale=lambda config: config["scale_factor_spatial"],
        frames=lambda config: config["scale_factor_temporal"],
        latent_channels=lambda config: config["z_dim"],
        image_channels=lambda config: config["out_channels"] // (config["patch_size"] or 1) ** 2,
        defaults={
            "z_dim": 16,
            "out_channels": 3,
            "patch_size": None,
            "scale_factor_spatial": 8,
            "scale_factor_temporal": 4,
        },
    ),
    "AutoencoderKLHunyuanVideo": Kind(
        scale=lambda config: config["spatial_compression_ratio"],
        frames=lambda config: config["temporal_compression_ratio"],
    ),
    "AutoencoderKLCogVideoX": Kind(scale=_halvings, frames=lambda config: int(config["temporal_compression_ratio"])),
    "AutoencoderKLMochi": Kind(
        scale=lambda config: prod(config["spatial_expansions"]),
        frames=lambda config: prod(config["temporal_expansions"]),
        joint=False,
    ),
    "AutoencoderKLLTXVideo": Kind(scale=_ltx_scale, frames=_ltx_frames, normalised=True),
}
"""By the name of the class in diffusers."""
