"""Where noise comes from: the numbers that ComfyUI draws for the same seed.

Noise is always drawn for the whole batch and the whole latent; whoever cuts (data parallel, strips) slices it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import cast

import torch
import torchsde
from torch import Tensor

from ..errors import UserError
from .late import sent_to
from .solver import NoiseSource

Cut = Callable[[Tensor], Tensor]
"""Cuts a part out of a draw for the whole latent."""


def _generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed % 2**64)


def initial_noise(
    shape: Sequence[int], dtype: torch.dtype, seed: int, batch_index: Sequence[int] | None = None
) -> Tensor:
    """Unit noise `[B, C, ...]`, drawn on the CPU, as `initial_noises` of a single latent."""
    return initial_noises([shape], dtype, seed, batch_index)[0]


def initial_noises(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, seed: int, batch_index: Sequence[int] | None = None
) -> list[Tensor]:
    """Unit noise `[B, C, ...]` for each of several latents, drawn on the CPU one after the other in fp32, of `dtype`.

    With `batch_index`, row i is the draw number `batch_index[i]` of the seed, so that a member of a batch can be made
    again alone. Raises UserError when `batch_index` does not fit the batch.
    """
    generator = _generator(seed)
    if batch_index is None:
        return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
    if any(len(batch_index) != shape[0] for shape in shapes) or min(batch_index, default=-1) < 0:
        raise UserError(
            f"The latent's batch_index of {len(batch_index)} numbers from {min(batch_index, default=0)} on does not "
            f"fit its batch of {shapes[0][0]}.",
            "It needs one number, 0 or more, for every latent in the batch.",
        )
    return [_noise_by_index(shape, dtype, generator, batch_index) for shape in shapes]


def _noise_by_index(
    shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, batch_index: Sequence[int]
) -> Tensor:
    wanted = set(batch_index)
    draws: dict[int, Tensor] = {}
    for number in range(max(wanted) + 1):
        draw = torch.randn(1, *shape[1:], generator=generator).to(dtype)
        if number in wanted:
            draws[number] = draw
    return torch.cat([draws[number] for number in batch_index])


def mask_noise(shape: Sequence[int], seed: int) -> Tensor:
    """The other noise of a seed: what `ddim` puts under a mask instead of the initial noise."""
    return torch.randn(*shape, generator=_generator(seed + 1))


class GaussianNoise:
    """Independent draws on the latent's own device.

    A CPU draw with the run's seed would repeat the initial noise, so the CPU takes the next seed, as ComfyUI has
    done since 2026; `cpu_seed_offset=0` gives what earlier versions draw.
    """

    def __init__(self, like: Tensor, seed: int, cpu_seed_offset: int = 1) -> None:
        self._like = like
        self._generator = _generator(seed + (cpu_seed_offset if like.device.type == "cpu" else 0), like.device)

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        like = self._like
        return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=self._generator)


class BrownianNoise:
    """Increments of one Brownian path over sigma (torchsde): the noise between two levels does not depend on the steps
    in between."""

    DIGITS = 6
    """Decimals of sigma that the path distinguishes: torchsde's default, as in ComfyUI."""

    def __init__(self, like: Tensor, seed: int, sigmas: Tensor, device: torch.device | str = "cpu") -> None:
        """`sigmas` are the run's levels; the path spans the positive ones. It is drawn on `device`."""
        self._like = like
        positive = sigmas[sigmas > 0]
        self._start, self._end = (round(float(end), self.DIGITS) for end in (positive.min(), positive.max()))
        origin = torch.zeros(like.shape, dtype=like.dtype, device=device)
        self._path = torchsde.BrownianTree(self._start, origin, self._end, entropy=seed, tol=10.0**-self.DIGITS)

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        low, high = (min(max(float(s), self._start), self._end) for s in sorted((sigma, sigma_next)))
        increment = cast(Tensor, self._path(low, high)) / (sigma_next - sigma).abs().sqrt().cpu()
        return sent_to(increment if sigma < sigma_next else -increment, self._like)


class NoiseKind(Enum):
    NONE = "none"
    GAUSSIAN = "gaussian"
    BROWNIAN = "brownian"
    DEVICE_BROWNIAN = "brownian on the device"


def no_noise(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def noise_source(kind: NoiseKind, like: Tensor, seed: int, sigmas: Tensor) -> NoiseSource:
    """ComfyUI's noise for a sampler of this kind; `like` `[B, C, ...]` is the whole latent of the whole batch."""
    match kind:
        case NoiseKind.NONE:
            return no_noise
        case NoiseKind.GAUSSIAN:
            return GaussianNoise(like, seed)
        case NoiseKind.BROWNIAN:
            return BrownianNoise(like, seed, sigmas)
        case NoiseKind.DEVICE_BROWNIAN:
            return BrownianNoise(like, seed, sigmas, like.device)


class SlicedNoise:
    """One whole noise source shared by several samplers, each of which steps its own part of the latent.

    The n-th call of every part returns its cut of the n-th draw. A draw is kept until all parts had it.
    """

    def __init__(self, whole: NoiseSource, parts: Sequence[Cut]) -> None:
        self._whole = whole
        self._parts = parts
        self._asked = [0] * len(parts)
        self._draws: dict[int, Tensor] = {}
        self._drawn = 0

    def part(self, number: int) -> NoiseSource:
        """The source for the part that `parts[number]` cuts out of a draw."""

        def noise(sigma: Tensor, sigma_next: Tensor) -> Tensor:
            turn = self._asked[number]
            if turn == self._drawn:
                self._draws[turn] = self._whole(sigma, sigma_next)
                self._drawn += 1
            self._asked[number] += 1
            draw = self._draws[turn]
            if min(self._asked) > turn:
                del self._draws[turn]
            return self._parts[number](draw)

        return noise
