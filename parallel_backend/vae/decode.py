"""Latents to pictures, across the ranks of an axis."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import FloatTensor, Tensor

from ..comm import Axis
from ..errors import UserError
from .load import LoadedVAE
from .tiles import Span, Window, blend_weights, spans, windows

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


class Job(NamedTuple):
    """One window of one picture of the batch: what a single rank decodes."""

    picture: int
    window: Window


@torch.no_grad()
def decode(
    vae: LoadedVAE,
    latent: Tensor,
    axis: Axis,
    *,
    tile_size: int = 0,
    overlap: int = 64,
    on_progress: Progress | None = None,
) -> Tensor:
    """Decode `latent` `[B, C, h, w]`, the same on every rank of `axis`, to pictures `[B, H, W, 3]`: fp32, 0 to 1, CPU.

    Each picture is cut into bands of rows, one per rank, and equals the plain decode. With fewer latent rows than ranks
    each rank decodes whole pictures instead. Every rank gets all pictures.

    With `tile_size` (pixels; 0: none) larger pictures are decoded by tiles spread over the ranks, blended over at least
    `overlap` pixels, for pictures that do not fit a rank's memory. That is an approximation, the same for any number of
    ranks: a tile has normalisation statistics of its own.

    `on_progress(done, total)` is called after each picture, or after each round of one tile per rank.
    Raises UserError for a latent that the VAE cannot decode, and for sizes of tiles that make no sense.
    """
    _check_latent(vae, latent)
    tile, shared = _tile(vae, tile_size, overlap)
    height, width = latent.shape[-2:]
    latent = latent.to(vae.device, vae.dtype)
    report = on_progress or _ignore
    if tile and max(height, width) > tile:
        image = _decode_tiles(vae, latent, axis, tile, shared, report)
    elif axis.size > 1 and height >= axis.size:
        image = _decode_bands(vae, latent, axis, report)
    else:
        image = _decode_whole(vae, latent, axis, report)
    if not torch.isfinite(image).all():
        raise UserError(
            f"The VAE {vae.source} gave non-finite pixels in {vae.dtype}.",
            "Load it as bfloat16 or float32." if vae.dtype == torch.float16 else "",
        )
    return ((image + 1) / 2).clamp_(0, 1).movedim(1, -1).contiguous().cpu()


def _decode_bands(vae: LoadedVAE, latent: Tensor, axis: Axis, report: Progress) -> Tensor:
    """`[B, 3, H, W]`, one picture at a time by all ranks together."""
    assert axis.group is not None
    module = vae.row_parallel(axis.group)
    images = []
    for index in range(len(latent)):
        images.append(_pixels(module, latent[index : index + 1]))
        report(index + 1, len(latent))
    return torch.cat(images)


def _decode_whole(vae: LoadedVAE, latent: Tensor, axis: Axis, report: Progress) -> Tensor:
    """`[B, 3, H, W]`, each picture by one rank."""
    height, width = latent.shape[-2:]
    everything = Window(Span(0, height), Span(0, width))
    jobs = [Job(picture, everything) for picture in range(len(latent))]
    return torch.stack(list(_spread(vae, latent, jobs, axis, report)))


def _decode_tiles(vae: LoadedVAE, latent: Tensor, axis: Axis, tile: int, overlap: int, report: Progress) -> Tensor:
    """`[B, 3, H, W]`, each tile by one rank."""
    height, width = latent.shape[-2:]
    places = windows(height, width, tile, overlap)
    log.info("Decoding by %d tiles of %d pixels: an approximation.", len(places), tile * vae.scale)
    row_weights = blend_weights(spans(height, tile, overlap), vae.scale)
    column_weights = blend_weights(spans(width, tile, overlap), vae.scale)
    image = torch.zeros(len(latent), vae.image_channels, height * vae.scale, width * vae.scale, device=vae.device)
    jobs = [Job(picture, window) for picture in range(len(latent)) for window in places]
    for job, part in zip(jobs, _spread(vae, latent, jobs, axis, report), strict=True):
        rows, columns = job.window
        weight = row_weights[rows][:, None] * column_weights[columns]
        _cut(image[job.picture], job.window, vae.scale).add_(part * weight.to(vae.device))
    return image


def _spread(vae: LoadedVAE, latent: Tensor, jobs: list[Job], axis: Axis, report: Progress) -> Iterator[Tensor]:
    """The pictures `[3, H, W]` of `jobs`, whose windows are of one size, in their order; one job per rank at a time."""
    for start in range(0, len(jobs), axis.size):
        batch = jobs[start : start + axis.size]
        sizes = [int(rank < len(batch)) for rank in range(axis.size)]
        if sizes[axis.rank]:
            picture, window = batch[axis.rank]
            mine = _pixels(vae.module, _cut(latent[picture], window, 1)[None])
        else:
            rows, columns = batch[0].window
            shape = (0, vae.image_channels, rows.size * vae.scale, columns.size * vae.scale)
            mine = torch.empty(shape, device=vae.device)
        yield from axis.all_gather(mine, sizes, dim=0)
        report(start + len(batch), len(jobs))


def _pixels(module: AutoencoderKL, latent: Tensor) -> Tensor:
    """`[B, 3, H, W]`, fp32, -1 to 1."""
    decoded = module.decode(cast(FloatTensor, latent))
    assert isinstance(decoded, DecoderOutput)
    return decoded.sample.float()


def _cut(x: Tensor, window: Window, scale: int) -> Tensor:
    """The view of `x` `[C, h, w]` under `window`, each of whose units is `scale` of x's."""
    (top, height), (left, width) = window
    return x[:, top * scale : (top + height) * scale, left * scale : (left + width) * scale]


def _check_latent(vae: LoadedVAE, latent: Tensor) -> None:
    if latent.ndim != 4 or 0 in latent.shape:
        raise UserError(f"A latent of the shape {list(latent.shape)} cannot be decoded: expected was [B, C, h, w].")
    if latent.shape[1] != vae.latent_channels:
        raise UserError(
            f"The latent has {latent.shape[1]} channels, the VAE {vae.source} takes {vae.latent_channels}.",
            "Choose the VAE that belongs to the model.",
        )
    if bad := int((~torch.isfinite(latent)).sum()):
        raise UserError(f"The latent is not finite: {bad} of its {latent.numel()} values are NaN or infinite.")


def _tile(vae: LoadedVAE, tile_size: int, overlap: int) -> tuple[int, int]:
    """Tile and overlap in latent rows; (0, 0) without tiles."""
    if tile_size == 0:
        return 0, 0
    for name, value in (("tile_size", tile_size), ("overlap", overlap)):
        if value < 0 or value % vae.scale:
            raise UserError(
                f"{name} is {value}, but must be a multiple of {vae.scale}, the VAE's pixels per latent row."
            )
    if overlap >= tile_size:
        raise UserError(
            f"Tiles of {tile_size} pixels cannot overlap by {overlap}.",
            f"Set overlap below tile_size, for example to {tile_size // 4 // vae.scale * vae.scale}.",
        )
    return tile_size // vae.scale, overlap // vae.scale


def _ignore(done: int, total: int) -> None:
    pass
