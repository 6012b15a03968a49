"""Latents to pictures, across the ranks of an axis."""

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
from .tiles import NO_TILES, Tiling


@torch.no_grad()
def decode(
    vae: LoadedVAE,
    latent: Tensor,
    axis: Axis,
    tiling: Tiling = NO_TILES,
    *,
    on_progress: Report | None = None,
    check: Check | None = None,
    memory: Memory = UNKNOWN,
) -> Tensor | None:
    """Decode `latent` `[B, C, h, w]`, the same on every rank of `axis`, to pictures `[B, H, W, 3]`: fp32, 0 to 1, CPU.

    For a VAE of videos: `[B, C, t, h, w]` to `[B, T, H, W, 3]`. The pictures are on the axis's first rank, None
    elsewhere; `run` says how the ranks share the work.
    Raises UserError for a latent that the VAE cannot decode, for sizes of tiles that make no sense, and where memory
    is too small.
    """
    check_side("decode", vae.sides, vae.source)
    latent = latent.float()
    _check(vae, latent)

    def compute(vae: LoadedVAE, part: Tensor) -> Tensor:
        sample = vae.decode(part[None])[0].movedim(0, -1).float()
        if not sample.is_meta:
            broken.add_((~torch.isfinite(sample)).sum())
        return sample.add_(1).div_(2).clamp_(0, 1)

    broken = torch.zeros((), dtype=torch.int64, device=vae.device)
    work = VaeTask(vae, vae.noised(latent), compute, Side(-2, 1), Side(-3, vae.scale))
    pictures = run(work, "decode", axis, tiling, memory, on_progress, check)
    if axis.all_reduce(broken):
        raise UserError(
            f"The VAE {vae.source} gave non-finite pixels in {vae.dtype}.",
            "Load it as bfloat16 or float32." if vae.dtype == torch.float16 else "",
        )
    return pictures


def _check(vae: LoadedVAE, latent: Tensor) -> None:
    expected = "[B, C, frames, h, w]" if vae.frames else "[B, C, h, w]"
    if latent.ndim != expected.count(",") + 1 or 0 in latent.shape:
        raise UserError(
            f"A latent of the shape {list(latent.shape)} cannot be decoded by {vae.source}: expected was {expected}."
        )
    if latent.shape[1] != vae.latent_channels:
        raise UserError(
            f"The latent has {latent.shape[1]} channels, the VAE {vae.source} takes {vae.latent_channels}.",
            "Choose the VAE that belongs to the model.",
        )
    if bad := int((~torch.isfinite(latent)).sum()):
        raise UserError(f"The latent is not finite: {bad} of its {latent.numel()} values are NaN or infinite.")
