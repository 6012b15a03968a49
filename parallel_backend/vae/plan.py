"""How the ranks share a VAE's work: whole pictures, bands of rows, or tiles, by the memory that they have free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..errors import UserError
from .kinds import Direction
from .tiles import Tiling

Way = Literal["pictures", "bands", "tiles"]


class Peak(NamedTuple):
    """The most memory in use at a time on one rank, for every pixel, in two kinds of unit.

    `picture` and `frame`, the latter for each frame that is computed at a time (`chunk` at most, all where it is None):
    in values of the level of most pixels, so that they hold for any width and dtype. `result`, for each frame of the
    whole video: bytes of what has been computed before.
    """

    picture: float
    frame: float = 0.0
    result: float = 0.0
    chunk: int | None = None


PEAKS: dict[str, dict[Direction, Peak]] = {
    "AutoencoderKL": {"decode": Peak(8.9), "encode": Peak(6.1)},
    "AutoencoderDC": {"decode": Peak(5.3), "encode": Peak(5.2)},
    "AutoencoderKLWan": {
        "decode": Peak(36.7, 27.98, 100, chunk=4),
        "encode": Peak(13.5, 31.91, 112, chunk=4),
    },
    "AutoencoderKLWan (residual)": {
        "decode": Peak(85.1, 54.18, 104, chunk=4),
        "encode": Peak(83.4, 47.92, 69, chunk=4),
    },
    "AutoencoderKLQwenImage": {  # the layers of Wan's
        "decode": Peak(36.7, 27.98, 100, chunk=4),
        "encode": Peak(13.5, 31.91, 112, chunk=4),
    },
    "AutoencoderKLHunyuanVideo": {
        "decode": Peak(63.6, 9.05, 20, chunk=17),
        "encode": Peak(33.0, 9.45, 26, chunk=17),
    },
    "AutoencoderKLCogVideoX": {
        "decode": Peak(70.4, 35.35),
        "encode": Peak(49.5, 8.55),
    },
    "AutoencoderKLMochi": {
        "decode": Peak(45.4, 6.12),
        "encode": Peak(35.6, 4.35),
    },
    "AutoencoderKLLTXVideo": {
        "decode": Peak(27.9, 8.13),
        "encode": Peak(27.2, 8.87),
    },
}
"""Peaks of memory by architecture, measured with `tools/bench_vae.py peaks`; docs/MEASURED.md has the command."""

BAND_EXCESS = 1.25
"""The most that a band of 1/N of the rows may need of one rank's peak, times N: halos, gathered keys and values."""
USABLE = 0.9
"""Share of the free memory to plan with: allocators need room between what they give out."""
TILE_SIZES = (1024, 768, 512, 384, 256, 192, 128)
GB = 1e9


@dataclass(frozen=True)
class Job:
    """A VAE's work on a batch. Sides in pixels; `row` pixels to a latent row.

    `unit`: bytes of a pixel in the level of most pixels, one value per channel. `can_band`: whether there are rows
    enough for every rank.
    """

    name: str
    direction: Direction
    unit: float
    batch: int
    frames: int
    height: int
    width: int
    row: int
    ranks: int
    can_band: bool

    def __str__(self) -> str:
        frames = f", {self.frames} frames" if self.frames > 1 else ""
        return f"{self.direction} {self.width} x {self.height} pixels{frames}"

    def peak(self, height: int, width: int) -> int:
        """Bytes that one rank needs for so many pixels of each frame."""
        peak = PEAKS[self.name][self.direction]
        at_once = min(self.frames, peak.chunk or self.frames)
        per_pixel = self.unit * (peak.picture + peak.frame * at_once) + peak.result * self.frames
        return int(height * width * per_pixel)

    @property
    def whole(self) -> int:
        return self.peak(self.height, self.width)

    @property
    def band(self) -> int:
        return int(BAND_EXCESS * self.whole / self.ranks)

    def least(self, tiling: Tiling) -> int:
        """Bytes that each rank needs for the tiles that are asked for, or for the exact way that needs least."""
        if self.is_cut_by(tiling):
            return self.peak(min(tiling.tile_size, self.height), min(tiling.tile_size, self.width))
        return self.band if self.can_band else self.whole

    def is_cut_by(self, tiling: Tiling) -> bool:
        return 0 < tiling.tile_size < max(self.height, self.width)


@dataclass(frozen=True)
class Plan:
    """`bytes`: what each rank is expected to need. `reason`: for the user."""

    way: Way
    bytes: int
    reason: str
    tiling: Tiling | None = None


def choose(job: Job, free: int | None, tiling: Tiling, *, tiles_allowed: bool, may_try: bool = False) -> Plan:
    """The way for `job`, where every rank has `free` bytes (None: unknown, taken as enough).

    Tiles when they are asked for, or allowed where nothing exact fits. Raises UserError when nothing fits; not with
    `may_try`, where a rank survives that it runs out of memory: then the estimate is only a warning.
    """
    known = "" if free is None else f"; {free / GB:.2f} GB are free"
    if job.is_cut_by(tiling):
        return _tiles(job, tiling, free, known, may_try)
    if job.can_band and not (free is not None and job.batch % job.ranks == 0 and _fits(job.whole, free)):
        way: Way = "bands"
        text = f"in bands of rows over {job.ranks} ranks"
    else:
        way, text = "pictures", f"whole, one by each of {job.ranks} ranks" if job.ranks > 1 else "on one rank"
    need = job.band if way == "bands" else job.whole
    if _fits(need, free):
        return Plan(way, need, f"{job} {text}: about {need / GB:.2f} GB a rank{known}.")
    if not tiles_allowed and may_try:
        return Plan(way, need, f"{job} {text}: this may take about {need / GB:.2f} GB a rank{known}.")
    if not tiles_allowed:
        raise UserError(
            f"To {job} {text} takes about {need / GB:.2f} GB a rank, but {(free or 0) / GB:.2f} GB are free.",
            _remedy(job, free),
        )
    tiles = smaller_tiles(job, None, free)
    return Plan(
        "tiles",
        job.peak(tiles.tile_size, tiles.tile_size),
        f"{job} by tiles of {tiles.tile_size} pixels, an approximation: {text} it would take about "
        f"{need / GB:.2f} GB a rank{known}.",
        tiles,
    )


def smaller_tiles(job: Job, than: int | None, free: int | None) -> Tiling:
    """The largest tiles that fit, of less than `than` pixels. Raises UserError when there are none."""
    longest = max(job.height, job.width) if than is None else than
    for size in TILE_SIZES:
        if size < longest and _fits(job.peak(size, size), free):
            return Tiling(size, size // 4 // job.row * job.row)
    least = min(longest, TILE_SIZES[-1])
    raise UserError(
        f"To {job} by the smallest tiles, of {least} pixels, takes about {job.peak(least, least) / GB:.2f} GB a rank"
        + (f", but {free / GB:.2f} GB are free." if free is not None else ", which the ranks have not."),
        "Free memory that other programs hold, or use fewer frames.",
    )


def out_of_memory(job: Job, plan: Plan, ranks: list[int]) -> UserError:
    """The error to raise when `ranks` ran out of memory, whatever the estimate was."""
    who = f"Rank {ranks[0]}" if len(ranks) == 1 else f"Ranks {', '.join(map(str, ranks))}"
    return UserError(
        f"{who} ran out of memory: {plan.reason}", "Nothing was lost: the ranks stay ready. " + _remedy(job, None)
    )


def _remedy(job: Job, free: int | None) -> str:
    ways = ["Set on_out_of_memory to tiles (an approximation)", "use a smaller picture or fewer frames"]
    if free:
        ranks = -(-int(BAND_EXCESS * job.whole) // int(USABLE * free))
        if job.ranks < ranks <= job.height // job.row:
            ways.insert(1, f"{ranks} ranks")
    return f"{', '.join(ways)}, or free memory that other programs hold."


def _tiles(job: Job, tiling: Tiling, free: int | None, known: str, may_try: bool) -> Plan:
    side, need = tiling.tile_size, job.least(tiling)
    if not _fits(need, free) and not may_try:
        raise UserError(
            f"To {job} by tiles of {side} pixels takes about {need / GB:.2f} GB a rank, but "
            f"{(free or 0) / GB:.2f} GB are free.",
            "Set a smaller tile_size, or free memory that other programs hold.",
        )
    text = f"{job} by tiles of {side} pixels, an approximation: about {need / GB:.2f} GB a rank{known}."
    return Plan("tiles", need, text, tiling)


def _fits(need: int, free: int | None) -> bool:
    return free is None or need <= USABLE * free
