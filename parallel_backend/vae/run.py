"""How the ranks share a VAE's work on a batch."""

from __future__ import annotations

import logging

from torch import Tensor

from ..comm import Axis, split_sizes
from ..errors import UserError
from .bands import Bands
from .linear_attention import summed_linear_attention
from .load import LoadedVAE
from .spread import Report, Work, by_bands, by_pictures, by_tiles
from .tiles import Tiling

log = logging.getLogger(__name__)


def run(vae: LoadedVAE, work: Work, axis: Axis, tiling: Tiling, on_progress: Report | None) -> Tensor | None:
    """The results of `work` on the first rank of `axis`, None elsewhere.

    Each picture is cut into bands of rows, one per rank, and equals what one rank makes of it. With fewer latent rows
    than bands need, each rank has whole pictures instead.

    With tiles, larger pictures are cut into tiles that the ranks share, and blended, for pictures that do not fit the
    ranks' memory. That is an approximation, the same for any number of ranks: a tile has normalisation statistics of
    its own.

    `on_progress(done, total)` is called after each picture, or after each round of one picture or tile per rank.
    Raises UserError for sizes of tiles that make no sense.
    """
    tile, overlap = _in_latent_rows(vae, tiling)
    report = on_progress or _ignore
    height, width = (span.size for span in work.extent)
    if tile and max(height, width) > tile:
        log.info("%s works by tiles of %d pixels: an approximation.", vae.source, tiling.tile_size)
        return by_tiles(work, axis, tile, overlap, report)
    if axis.size == 1 or height < axis.size * vae.reach:
        return by_pictures(work, axis, report)
    rows = split_sizes(height, axis.size)
    with Bands(axis, rows, joint=vae.kind.joint), summed_linear_attention(vae.module, axis):
        return by_bands(work, axis, rows, report)


def _in_latent_rows(vae: LoadedVAE, tiling: Tiling) -> tuple[int, int]:
    """Tile and overlap in latent rows; (0, 0) without tiles."""
    if tiling.tile_size == 0:
        return 0, 0
    for name, value in (("tile_size", tiling.tile_size), ("overlap", tiling.overlap)):
        if value < 0 or value % vae.scale:
            raise UserError(
                f"{name} is {value}, but must be a multiple of {vae.scale}, the VAE's pixels per latent row."
            )
    if tiling.overlap >= tiling.tile_size:
        raise UserError(
            f"Tiles of {tiling.tile_size} pixels cannot overlap by {tiling.overlap}.",
            f"Set overlap below tile_size, for example to {tiling.tile_size // 4 // vae.scale * vae.scale}.",
        )
    return tiling.tile_size // vae.scale, tiling.overlap // vae.scale


def _ignore(done: int, total: int) -> None:
    pass
