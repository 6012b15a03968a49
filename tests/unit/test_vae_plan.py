"""The way that the ranks share a VAE's work turns where the measured memory says so."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.vae.kinds import KINDS
from paralleldit.parallel_backend.vae.plan import BAND_EXCESS, PEAKS, USABLE, Job, choose, smaller_tiles
from paralleldit.parallel_backend.vae.tiles import NO_TILES, Tiling


def is_video(name: str) -> bool:
    return KINDS[name.split(" ")[0]].frames is not None


EVERY = [(name, direction, 17 if is_video(name) else 1) for name in PEAKS for direction in PEAKS[name]]


def job(name="AutoencoderKL", direction="decode", frames=1, **changes) -> Job:
    usual = {"unit": 256, "batch": 1, "height": 2048, "width": 1024, "row": 8, "ranks": 4, "can_band": True}
    return Job(name, direction, frames=frames, **(usual | changes))


def way(work: Job, free: int | None, tiling: Tiling = NO_TILES, *, tiles: bool = False) -> str:
    return choose(work, free, tiling, tiles_allowed=tiles).way


@pytest.mark.parametrize(("name", "direction", "frames"), EVERY)
def test_bands_give_way_to_tiles_where_the_measured_peak_no_longer_fits(name, direction, frames):
    work = job(name, direction, frames)
    peak = PEAKS[name][direction]
    at_once = min(frames, peak.chunk or frames)
    band = 2048 * 1024 * (256 * (peak.picture + peak.frame * at_once) + peak.result * frames) * BAND_EXCESS / 4
    enough, short = int(band / USABLE) + 2, int(band / USABLE) - 2
    assert way(work, enough) == "bands"
    assert way(work, enough, tiles=True) == "bands"
    with pytest.raises(UserError, match=r"2048 pixels.* bands of rows over 4 ranks takes about"):
        way(work, short)
    tried = choose(work, short, NO_TILES, tiles_allowed=False, may_try=True)
    assert (tried.way, "may take" in tried.reason) == ("bands", True)
    plan = choose(work, short, NO_TILES, tiles_allowed=True)
    assert plan.way == "tiles"
    assert plan.bytes <= USABLE * short
    assert "an approximation" in plan.reason


@pytest.mark.parametrize(
    ("changes", "share", "expected"),
    [
        ({}, 3.0, "bands"),
        ({"batch": 4}, 1.1, "pictures"),  # whole pictures fit, and every rank has as many
        ({"batch": 4}, 0.9, "bands"),
        ({"batch": 5}, 3.0, "bands"),
        ({"can_band": False}, 1.1, "pictures"),
        ({"ranks": 1, "can_band": False}, 1.1, "pictures"),
    ],
)
def test_whole_pictures_are_for_batches_that_fit(changes, share, expected):
    work = job(**changes)
    assert way(work, int(share * work.whole / USABLE)) == expected


def test_unknown_memory_is_taken_as_enough():
    assert way(job(), None) == "bands"
    assert way(job(can_band=False), None) == "pictures"


def test_tiles_that_are_asked_for_are_taken_or_refused():
    work, tiling = job(), Tiling(512, 64)
    need = work.peak(512, 512)
    assert way(work, int(need / USABLE) + 1, tiling) == "tiles"
    with pytest.raises(UserError, match="tiles of 512 pixels takes about"):
        way(work, int(need / USABLE) - 2, tiling)
    assert way(work, None, Tiling(4096, 64)) == "bands"


def test_an_error_names_what_is_needed_what_is_free_and_how_many_ranks_would_do():
    work = job()
    with pytest.raises(UserError) as caught:
        choose(work, work.band // 2, NO_TILES, tiles_allowed=False)
    need, free = map(float, re.findall(r"([\d.]+) GB", caught.value.message))
    assert (need, free) == (round(work.band / 1e9, 2), round(work.band / 2e9, 2))
    ranks = int(re.search(r"(\d+) ranks", caught.value.hint)[1])
    assert way(replace(work, ranks=ranks), work.band // 2) == "bands"
    assert "on_out_of_memory to tiles" in caught.value.hint


def test_tiles_grow_smaller_until_there_are_none():
    work, size = job(row=32), 2048
    while size > 128:
        smaller, overlap = smaller_tiles(work, size, None)
        assert smaller < size
        assert smaller % work.row == overlap % work.row == 0
        size = smaller
    with pytest.raises(UserError, match="smallest tiles, of 128 pixels"):
        smaller_tiles(work, size, None)


def test_every_class_has_a_measured_peak():
    assert {name.split(" ")[0] for name in PEAKS} == KINDS.keys()
    for name, directions in PEAKS.items():
        assert directions.keys() == {"decode", "encode"}
        for peak in directions.values():
            assert peak.picture + peak.frame > 0
            assert (peak.frame > 0) == is_video(name)
