"""How the several entries of a side make one prediction, by ComfyUI's rule for CONDITIONING. Exact.

Each entry predicts for its area of the latent, at those noise levels at which it counts. In every cell of the latent
the side's prediction is the mean of those of the entries that count there, weighted by strength and mask; an area
without a mask fades towards its inner borders. Where no entry counts, the prediction is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..families.condition import Condition

NO_WEIGHT = 1e-37
"""What the sum of weights begins with, so that it divides where nothing counts."""
FADE = 8
"""The most cells over which an area fades, at a border that is none of the picture's."""

Cut = Callable[[Tensor], Tensor]
"""Cuts the current strip out of a tensor of the latent's size."""


def everywhere(whole: Tensor) -> Tensor:
    """The `Cut` of a whole latent."""
    return whole


@dataclass(frozen=True)
class Area:
    """A rectangle of a latent, in its cells."""

    height: int
    width: int
    top: int
    left: int

    def of(self, latent: Tensor) -> Tensor:
        """The view of it in `[..., H, W]`."""
        return latent[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def faded(self, height: int, width: int) -> Tensor:
        """Weights `[1, 1, h, w]` of this area of a latent of `height` and `width`."""
        rows = _ramp(self.height, self.top > 0, self.top + self.height < height)
        columns = _ramp(self.width, self.left > 0, self.left + self.width < width)
        return (rows[:, None] * columns)[None, None]


@dataclass(frozen=True, eq=False)
class WeightedPrompt:
    """One entry of a side.

    `weight` `[B or 1, 1, h, w]` over its area, of a video also `[B or 1, 1, T or 1, h, w]`, or `[1, 1, 1, 1]`; without
    an `area` it is for the whole latent. It counts while the noise level is from `start` down to `end`.
    """

    condition: Condition
    weight: Tensor
    area: Area | None = None
    start: float = math.inf
    end: float = -math.inf

    @classmethod
    def plain(cls, condition: Condition) -> WeightedPrompt:
        """Makes a prompt that covers the whole picture and run."""
        return cls(condition, torch.ones(1, 1, 1, 1, device=next(iter(condition.tensors.values())).device))

    def part(self, part: slice, batch: int) -> WeightedPrompt:
        """Selects the pictures `part` of a batch."""
        weight = self.weight[part] if self.weight.shape[0] == batch else self.weight[:1]
        return replace(self, condition=self.condition.part(part, batch), weight=weight)

    def again(self) -> WeightedPrompt:
        """The same, for an evaluation that shares nothing with this one's."""
        return replace(self, condition=replace(self.condition, name=f"{self.condition.name} again"))

    def counts_at(self, sigma: Tensor) -> bool:
        return not (sigma > self.start or sigma < self.end)

    def within(self, latent: Tensor) -> Tensor:
        """The entry's area of `latent` `[B, C, ..., H, W]`, as a view."""
        return latent if self.area is None else self.area.of(latent)

    def weight_of(self, like: Tensor, cut: Cut) -> Tensor:
        """The weight for what is `like` the latent, or like the strip that `cut` cuts out of it."""
        if self.weight.numel() == 1:
            return self.weight.view([1] * like.ndim)
        return cut(self.weight.unsqueeze(2) if like.ndim > self.weight.ndim else self.weight)


def weighted_sum(predicted: Iterable[tuple[WeightedPrompt, Tensor]], like: Tensor, cut: Cut) -> Tensor:
    """The sum of entries' predictions, each of its area and weighted, for a latent or a strip of it: `[B, C, ...]`."""
    total = torch.zeros_like(like)
    for entry, prediction in predicted:
        entry.within(total).add_(prediction * entry.weight_of(like, cut))
    return total


def sum_of_weights(entries: Sequence[WeightedPrompt], like: Tensor, cut: Cut) -> Tensor:
    """`[B, 1, ...]`: what divides a `weighted_sum` of all `entries` that count."""
    total = like.new_full((like.shape[0], 1, *like.shape[2:]), NO_WEIGHT)
    for entry in entries:
        entry.within(total).add_(entry.weight_of(like, cut))
    return total


def _ramp(length: int, rises: bool, falls: bool) -> Tensor:
    """Ones `[length]`, and fractions up to one at the ends that rise or fall."""
    steps = min(FADE, length // 4)
    ramp, fractions = torch.ones(length), torch.arange(1, steps + 1) / max(steps, 1)
    if rises:
        ramp[:steps] = fractions
    if falls:
        ramp[length - steps :] = fractions.flip(0)
    return ramp
