"""LATENT as what a request carries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...parallel_backend.errors import UserError
from ..handles import ModelHandle

LATENT_CHANNELS: dict[str, Callable[[dict[str, Any]], int]] = {
    "flux": lambda config: (config.get("out_channels") or config["in_channels"]) // 4,
    "sd3": lambda config: config["in_channels"],
    "pixart-alpha": lambda config: config["in_channels"],
    "pixart-sigma": lambda config: config["in_channels"],
    "hunyuandit": lambda config: config["in_channels"],
}
"""Per family: the latent's channels from the model's config."""


def to_message(latent_image: dict[str, Any], handle: ModelHandle) -> dict[str, Tensor]:
    """Tensors `latent` `[B, C, H, W]` and, if there is one, `noise_mask` `[B or 1, 1, H', W']`.

    An empty latent gets the model's number of channels. Raises `UserError` for a latent that cannot be sampled.
    """
    latent = latent_image["samples"]
    if latent.numel() == 0:
        raise UserError(
            f"The latent is empty: its shape is {list(latent.shape)}.",
            "Give a batch, a width and a height of at least 1.",
        )
    if latent.ndim != 4:
        raise UserError(
            f"The latent has {latent.ndim} dims; this model takes 4: batch, channels, rows, columns.",
            "Use a latent for pictures, not for video or sound.",
        )
    broken = int(latent.numel() - torch.isfinite(latent).sum())
    if broken:
        raise UserError(
            f"The latent is not finite: {broken} of {latent.numel()} values are NaN or infinite.",
            "Look at the node that made it: a VAE in float16 does this.",
        )
    tensors = {"latent": _with_channels(latent, LATENT_CHANNELS[handle.family](handle.config), handle.family)}
    mask = latent_image.get("noise_mask")
    if mask is not None:
        tensors["noise_mask"] = mask.reshape(-1, 1, *mask.shape[-2:])
    return tensors


def batch_index(latent_image: dict[str, Any]) -> tuple[int, ...] | None:
    indices = latent_image.get("batch_index")
    return None if indices is None else tuple(int(index) for index in indices)


def _with_channels(latent: Tensor, channels: int, family: str) -> Tensor:
    if latent.shape[1] == channels:
        return latent
    if latent.any():
        raise UserError(
            f"The latent has {latent.shape[1]} channels, but {family} samples latents of {channels}.",
            "Encode the picture with the VAE that belongs to the model.",
        )
    return latent.new_zeros(latent.shape[0], channels, *latent.shape[2:])
