"""The autoencoder classes of diffusers that the ranks run, and where they differ."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from ..errors import UserError

Config = Mapping[str, Any]
Direction = Literal["decode", "encode"]
SIDES: dict[Direction, str] = {"decode": "decoder", "encode": "encoder"}
"""The part of a VAE that works in each direction. Some files hold only one."""


def check_side(direction: Direction, held: Collection[Direction], source: str) -> None:
    """Raises UserError when the VAE of `source`, which can do what is `held`, cannot work in this direction."""
    if direction not in held:
        raise UserError(
            f"{source} cannot {direction}: it holds no {SIDES[direction]}, only another part of a VAE.",
            f"Choose a file that holds the {SIDES[direction]}, too, or the VAE's diffusers folder.",
        )


@dataclass(frozen=True)
class Kind:
    """One class; its numbers are read off the class's config."""

    scale: Callable[[Config], int]
    """Pixels per latent row or column."""
    frames: Callable[[Config], int] | None = None
    """Frames per latent frame of a video; the first latent frame is one frame by itself. None for pictures."""
    latent_channels: Callable[[Config], int] = lambda config: config["latent_channels"]
    image_channels: Callable[[Config], int] = lambda config: config["out_channels"]
    widths: Callable[[Config], tuple[float, float]] = lambda config: (config["block_out_channels"][0],) * 2
    """Channels per pixel in the level of most pixels, of the encoder and of the decoder."""
    joint: bool = True
    """Whether attention is over all pixels of a picture; else it is over the frames of each pixel."""
    normalised: bool = False
    """Whether latents in the graph are those of the class less their mean, over their standard deviation."""
    defaults: Config = field(default_factory=dict)
    """Values of config entries read above that an older diffusers may not have written."""


def _halvings(config: Config) -> int:
    return 2 ** (len(config["block_out_channels"]) - 1)


def _ltx_scale(config: Config) -> int:
    return config.get("spatial_compression_ratio") or config["patch_size"] * 2 ** sum(config["spatio_temporal_scaling"])


def _ltx_frames(config: Config) -> int:
    ratio = config.get("temporal_compression_ratio")
    return ratio or config["patch_size_t"] * 2 ** sum(config["spatio_temporal_scaling"])


def _ltx_widths(config: Config) -> tuple[float, float]:
    patch = config["patch_size"] ** 2 * config["patch_size_t"]
    return config["block_out_channels"][0] / patch, config["decoder_block_out_channels"][0] / patch


def _wan_widths(config: Config) -> tuple[float, float]:
    patch = (config["patch_size"] or 1) ** 2
    return config["base_dim"] / patch, (config["decoder_base_dim"] or config["base_dim"]) / patch


def _of_both(config: Config) -> tuple[float, float]:
    return config["encoder_block_out_channels"][0], config["decoder_block_out_channels"][0]


KINDS = {
    "AutoencoderKL": Kind(scale=_halvings),
    "AutoencoderDC": Kind(
        scale=lambda config: 2 ** (len(config["encoder_block_out_channels"]) - 1),
        image_channels=lambda config: config["in_channels"],
        widths=_of_both,
    ),
    "AutoencoderKLWan": Kind(
        scale=lambda config: config["scale_factor_spatial"],
        frames=lambda config: config["scale_factor_temporal"],
        latent_channels=lambda config: config["z_dim"],
        image_channels=lambda config: config["out_channels"] // (config["patch_size"] or 1) ** 2,
        widths=_wan_widths,
        defaults={
            "z_dim": 16,
            "out_channels": 3,
            "patch_size": None,
            "scale_factor_spatial": 8,
            "scale_factor_temporal": 4,
        },
    ),
    "AutoencoderKLQwenImage": Kind(
        scale=lambda config: 2 ** len(config["temperal_downsample"]),
        frames=lambda config: 2 ** sum(config["temperal_downsample"]),
        latent_channels=lambda config: config["z_dim"],
        image_channels=lambda config: config["input_channels"],
        widths=lambda config: (config["base_dim"],) * 2,
        defaults={"z_dim": 16, "input_channels": 3, "base_dim": 96, "temperal_downsample": [False, True, True]},
    ),
    "AutoencoderKLHunyuanVideo": Kind(
        scale=lambda config: config["spatial_compression_ratio"],
        frames=lambda config: config["temporal_compression_ratio"],
    ),
    "AutoencoderKLCogVideoX": Kind(scale=_halvings, frames=lambda config: int(config["temporal_compression_ratio"])),
    "AutoencoderKLMochi": Kind(
        scale=lambda config: prod(config["spatial_expansions"]),
        frames=lambda config: prod(config["temporal_expansions"]),
        widths=_of_both,
        joint=False,
    ),
    "AutoencoderKLLTXVideo": Kind(scale=_ltx_scale, frames=_ltx_frames, widths=_ltx_widths, normalised=True),
}
"""Kinds of VAE by the name of their class in diffusers."""
