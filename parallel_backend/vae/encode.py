"""Pictures to latents, on one rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from ..errors import UserError
from .load import LoadedVAE


@torch.no_grad()
def encode(vae: LoadedVAE, image: Tensor, *, on_progress: Callable[[int, int], None] | None = None) -> Tensor:
    """Encode pictures `[B, H, W, 3]` (0 to 1) to latents `[B, C, h, w]`: fp32, unscaled, on the CPU.

    The latent is the mode of the posterior. Sides that the VAE's scale does not divide are cropped about the middle.
    `on_progress(done, total)` is called after each picture. Raises UserError for anything that is not such a picture.
    """
    _check(vae, image)
    pixels = _crop(_crop(image, 1, vae.scale), 2, vae.scale).movedim(-1, 1)
    latents = []
    for index, picture in enumerate(pixels.split(1)):
        picture = (picture * 2 - 1).to(vae.device, vae.dtype)
        encoded = vae.module.encode(picture)
        assert isinstance(encoded, AutoencoderKLOutput)
        latents.append(encoded.latent_dist.mode().float().cpu())
        if on_progress:
            on_progress(index + 1, len(pixels))
    return torch.cat(latents)


def _check(vae: LoadedVAE, image: Tensor) -> None:
    if image.ndim != 4 or image.shape[-1] != vae.image_channels or 0 in image.shape:
        raise UserError(
            f"An image of the shape {list(image.shape)} cannot be encoded: "
            f"expected was [B, H, W, {vae.image_channels}]."
        )
    height, width = image.shape[1:3]
    if min(height, width) < vae.scale:
        raise UserError(f"An image of {width} x {height} pixels is smaller than the {vae.scale} of one latent row.")
    if not torch.isfinite(image).all():
        raise UserError("The image is not finite: it holds NaN or infinite values.")


def _crop(image: Tensor, dim: int, multiple: int) -> Tensor:
    excess = image.shape[dim] % multiple
    return image.narrow(dim, excess // 2, image.shape[dim] - excess)
