"""A VAE's work on a batch: the plan for it, and what happens when memory proves too small for the plan."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..distributed.axis import Axis
from ..errors import UserError
from ..layout.split import split_sizes
from .distribute import Report, VaeTask, by_bands, by_pictures, by_tiles
from .kinds import Direction
from .load import LoadedVAE
from .out_of_memory import Check, OutOfMemory
from .plan import USABLE, Job, Plan, choose, out_of_memory, smaller_tiles
from .tiles import Tiling

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Memory:
    """The memory of the ranks. `free_up(bytes)`, a collective: make room for so many on every rank if that can be, and
    return how many the rank with least has free; None where nobody knows. `say`: logs the plan."""

    free_up: Callable[[int], int | None] = lambda bytes: None
    on_short: Literal["error", "tiles"] = "error"
    say: Callable[[str], None] = log.info


UNKNOWN = Memory()


def run(
    work: VaeTask,
    direction: Direction,
    axis: Axis,
    tiling: Tiling,
    memory: Memory,
    on_progress: Report | None,
    check: Check | None,
) -> Tensor | None:
    """The results of `work` on the first rank of `axis`, None elsewhere, in the way that `plan.choose` chooses.

    Bands and whole pictures equal what one rank makes of them. Tiles are an approximation, the same for any number of
    ranks: a tile has normalisation statistics of its own. They are taken where `tiling` asks for them, or where memory
    is too small and `memory.on_short` allows it.

    `on_progress(done, total)` is called after each picture, or after each round of one picture or tile per rank;
    `check`, in which all ranks may leave the work alike, while they work on bands.
    Raises UserError for sizes of tiles that make no sense, and where memory is too small.
    """
    report, check = on_progress or _ignore, check or _go_on
    _check(work.vae, tiling)
    job = _job(work, direction, axis)
    tiles_allowed = memory.on_short == "tiles"
    free = memory.free_up(int(job.least(tiling) / USABLE) + 1)
    # A GPU says that it has no more; a process that takes too much of the host's memory is killed.
    plan = choose(job, free, tiling, tiles_allowed=tiles_allowed, may_try=work.vae.device.type == "cuda")
    memory.say(plan.reason)
    while True:
        try:
            return _follow(plan, work, axis, report, check)
        except OutOfMemory as error:
            refusal = out_of_memory(job, plan, error.ranks)
        if not tiles_allowed:
            raise refusal
        tiles = smaller_tiles(job, plan.tiling and plan.tiling.tile_size, None)
        reason = f"{refusal.message} Now by tiles of {tiles.tile_size} pixels, an approximation."
        plan = Plan("tiles", job.peak(tiles.tile_size, tiles.tile_size), reason, tiles)
        memory.say(reason)


def _follow(plan: Plan, work: VaeTask, axis: Axis, report: Report, check: Check) -> Tensor | None:
    match plan.way:
        case "pictures":
            return by_pictures(work, axis, report)
        case "bands":
            return by_bands(work, axis, split_sizes(work.extent.rows.size, axis.size), report, check)
        case "tiles":
            assert plan.tiling is not None
            size, overlap = (each // work.vae.scale for each in plan.tiling)
            return by_tiles(work, axis, size, overlap, report)


def _job(work: VaeTask, direction: Direction, axis: Axis) -> Job:
    vae, (height, width) = work.vae, (span.size for span in work.extent)
    frames = 1
    if vae.frames:
        frames = work.batch.shape[2] * vae.frames - vae.frames + 1 if direction == "decode" else work.batch.shape[1]
    return Job(
        name=vae.architecture,
        direction=direction,
        unit=vae.width(direction) * vae.dtype.itemsize,
        batch=len(work.batch),
        frames=frames,
        height=height * vae.scale,
        width=width * vae.scale,
        row=vae.scale,
        ranks=axis.size,
        can_band=axis.size > 1 and height >= axis.size * vae.reach,
    )


def _check(vae: LoadedVAE, tiling: Tiling) -> None:
    if tiling.tile_size == 0:
        return
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


def _go_on() -> None:
    pass


def _ignore(done: int, total: int) -> None:
    pass
