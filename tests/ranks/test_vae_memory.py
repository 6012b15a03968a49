"""A rank that runs out of memory in the middle of a decode or encode: all ranks leave it alike, and stay in step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from paralleldit.parallel_backend.distributed.axis import Axis
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.vae.decode import decode
from paralleldit.parallel_backend.vae.encode import encode
from paralleldit.parallel_backend.vae.job import Memory
from paralleldit.parallel_backend.vae.load import LoadedVAE
from paralleldit.parallel_backend.vae.tiles import NO_TILES, Tiling
from paralleldit.tests.tiny_vaes import CASES, new_vae
from torch import Tensor, nn

STARVED = 1
"""The rank that runs out of memory."""


@contextmanager
def short_memory(part: nn.Module, times: int, axis: Axis) -> Iterator[None]:
    """On one rank, the middle convolution of `part` runs out of memory, so many times."""
    convolutions = [each for each in part.modules() if isinstance(each, nn.Conv2d | nn.Conv3d)]
    left = [times if axis.rank == STARVED else 0]

    def starve(*_: object) -> None:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("the test has taken all")

    handle = convolutions[len(convolutions) // 2].register_forward_pre_hook(starve)
    try:
        yield
    finally:
        handle.remove()


def batch_of(vae: LoadedVAE, direction: str) -> Tensor:
    torch.manual_seed(1)
    if direction == "decode":
        return torch.randn(1, vae.latent_channels, *([2] if vae.frames else []), 5, 4)
    frames = [vae.frames + 1] if vae.frames else []
    return torch.rand(1, *frames, 5 * vae.scale, 4 * vae.scale, vae.image_channels)


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return other is None if one is None else torch.equal(one, other)


def starved(axis: Axis, case: str, work: Callable[..., Tensor | None], direction: str) -> tuple[str, bool]:
    """The error, and whether the work then gives what it gave before."""
    vae = new_vae(case)
    batch = batch_of(vae, direction)
    before = work(vae, batch, axis)
    with short_memory(vae.module.decoder if direction == "decode" else vae.module.encoder, 1, axis):
        try:
            work(vae, batch, axis)
        except UserError as error:
            return str(error), same(before, work(vae, batch, axis))
    return "no error", False


LAYERS_OF_ANOTHER = ("AutoencoderKL (SD)", "AutoencoderKLWan (2.2)", "AutoencoderKLQwenImage")


@pytest.mark.parametrize("case", [case for case in CASES if case not in LAYERS_OF_ANOTHER])
@pytest.mark.parametrize("work", [decode, encode])
def test_all_ranks_leave_alike_and_stay_in_step(ranks, case, work):
    answers = ranks.run(2, starved, case, work, work.__name__)
    assert len(set(answers)) == 1
    message, in_step = answers[0]
    assert message.startswith(f"Rank 1 ran out of memory: {work.__name__} ")
    assert "on_out_of_memory" in message
    assert in_step


def tiled(axis: Axis, times: int) -> tuple[list[str], list[bool]]:
    """What is said, and whether the result is that of tiles of 384 and of 256 pixels."""
    vae = new_vae("AutoencoderKL (Flux)")
    torch.manual_seed(1)
    latent = torch.randn(1, 16, 40, 104)
    truths = [decode(vae, latent, axis, Tiling(size, size // 4)) for size in (384, 256)]
    said: list[str] = []
    with short_memory(vae.module.decoder, times, axis):
        picture = decode(vae, latent, axis, NO_TILES, memory=Memory(on_short="tiles", say=said.append))
    return said, [same(truth, picture) for truth in truths]


@pytest.mark.parametrize(("times", "size"), [(1, 384), (2, 256)])
def test_smaller_and_smaller_tiles_where_the_user_allowed_them(ranks, times, size):
    answers = ranks.run(2, tiled, times)
    said, equal = answers[0]
    assert equal == [size == 384, size == 256]
    assert said[-1].startswith("Rank 1 ran out of memory: ")
    assert f"Now by tiles of {size} pixels, an approximation." in said[-1]
    assert answers[1][0] == said
