"""Pictures to latents, across the ranks of an axis."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed.axis import Axis
from ..errors import UserError
from .distribute import Report, Side, VaeTask
from .job import UNKNOWN, Memory, run
from .kinds import check_side
from .load import LoadedVAE
from .out_of_memory import Check
from .tiles import NO_TILES, Tiling, cropped


@torch.no_grad()
def encode(
    vae: LoadedVAE,
    image: Tensor,
    axis: Axis,
    tiling: Tiling = NO_TILES,
    *,
    on_progress: Report | None = None,
    check: Check | None = None,
    memory: Memory = UNKNOWN,
) -> Tensor | None:
    """Encode `image` `[B, H, W, 3]` (0 to 1), the same on every rank of `axis`, to latents `[B, C, h, w]`: fp32, CPU.

    For a VAE of videos: `[B, T, H, W, 3]` to `[B, C, t, h, w]`. The latent is the posterior's mode, unscaled; it is on
    the axis's first rank, None elsewhere. Sides that the VAE's scale does not divide are cropped about the middle;
    `run` says how the ranks share the work.
    Raises UserError for anything that is not such a picture, for sizes of tiles that make no sense, and where memory is
    too small.
    """
    check_side("encode", vae.sides, vae.source)
    image = image.float()
    _check(vae, image)

    def compute(vae: LoadedVAE, part: Tensor) -> Tensor:
        return vae.encode(part.movedim(-1, 0)[None].to(vae.device).mul(2).sub_(1))[0].float()

    image = cropped(image, vae.scale, -3)
    work = VaeTask(vae, image, compute, Side(-3, vae.scale), Side(-2, 1))
    return run(work, "encode", axis, tiling, memory, on_progress, check)


def _check(vae: LoadedVAE, image: Tensor) -> None:
    channels = vae.image_channels
    expected = f"[B, frames, H, W, {channels}]" if vae.frames else f"[B, H, W, {channels}]"
    if image.ndim != expected.count(",") + 1 or image.shape[-1] != channels or 0 in image.shape:
        raise UserError(
            f"An image of the shape {list(image.shape)} cannot be encoded by {vae.source}: expected was {expected}."
        )
    if vae.frames and (image.shape[1] - 1) % vae.frames:
        frames = image.shape[1]
        fitting = (frames - 1) // vae.frames * vae.frames + 1
        raise UserError(
            f"A video of {frames} frames does not fit the VAE {vae.source}, whose latent frames are one frame, "
            f"then {vae.frames} each.",
            f"Give it {fitting} or {fitting + vae.frames} frames.",
        )
    height, width = image.shape[-3:-1]
    if min(height, width) < vae.scale:
        raise UserError(f"An image of {width} x {height} pixels is smaller than the {vae.scale} of one latent row.")
    if not torch.isfinite(image).all():
        raise UserError("The image is not finite: it holds NaN or infinite values.")
