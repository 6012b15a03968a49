"""Pictures to latents, across the ranks of an axis."""

from __future__ import annotations

import torch
from torch import Tensor

from ..comm import Axis
from ..errors import UserError
from .load import LoadedVAE
from .run import NO_TILES, Tiling, run
from .spread import Report, Side, Work


@torch.no_grad()
def encode(
    vae: LoadedVAE, image: Tensor, axis: Axis, tiling: Tiling = NO_TILES, *, on_progress: Report | None = None
) -> Tensor | None:
    """Encode `image` `[B, H, W, 3]` (0 to 1), the same on every rank of `axis`, to latents `[B, C, h, w]`: fp32, CPU.

    The latent is the mode of the posterior, unscaled; it is on the axis's first rank, None elsewhere. Sides that the
    VAE's scale does not divide are cropped about the middle; `run` says how the ranks share the work.
    Raises UserError for anything that is not such a picture, and for sizes of tiles that make no sense.
    """
    _check(vae, image)

    def compute(part: Tensor) -> Tensor:
        pixels = part.to(vae.device, vae.dtype).movedim(-1, 0)[None]
        return vae.module.encode(pixels.mul(2).sub_(1)).latent_dist.mode()[0].float()

    cropped = _crop(_crop(image, -3, vae.scale), -2, vae.scale)
    return run(vae, Work(cropped, compute, Side(-3, vae.scale), Side(-2, 1)), axis, tiling, on_progress)


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
