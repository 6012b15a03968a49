"""Classifier-free guidance, on one group of ranks or on two (CFG parallel). Exact."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..distributed.axis import Axis
from ..families.condition import Condition
from ..layout.split import split_sizes
from ..sampling.model_sampling import ModelSampling
from .prompt_batches import Asked, PredictAll
from .weighted_prompts import Cut, WeightedPrompt, everywhere, sum_of_weights, weighted_sum

Sided = tuple[int, WeightedPrompt]
"""An entry and the number of its side: 0 of the positive one, 1 of the negative one."""


class Guidance:
    """Makes a guided, denoised latent of a transformer's output (Ho and Salimans, arXiv 2207.12598).

    With a CFG axis of two, each of its ranks evaluates half of the entries of both sides; of a single positive and a
    single negative one that is one each. Each step they exchange a sum of predictions for every side that they have
    entries of. At `cfg` 1, or without negative entries, only the positive ones are evaluated, unless `cfg_pp` needs the
    negative ones by themselves.
    """

    def __init__(
        self,
        predict_all: PredictAll,
        model_sampling: ModelSampling,
        axis: Axis,
        positive: Sequence[WeightedPrompt],
        negative: Sequence[WeightedPrompt],
        cfg: float,
        sigmas: Tensor | None = None,
        cfg_pp: bool = False,
        norm: float | None = None,
    ) -> None:
        """`sigmas`: the run's levels, on the CPU, for models that are given the time of the next one. `norm`: the
        strength of `shortened`, None without it."""
        self.sigmas = sigmas
        self._negative: Tensor | None = None
        self.predict_all = predict_all
        self.model_sampling = model_sampling
        self.axis = axis
        self.cfg = cfg
        self.norm = norm
        self.sides = [positive] if not negative or (cfg == 1.0 and not cfg_pp) else [positive, negative]
        self._entries: list[Sided] = [(side, entry) for side, entries in enumerate(self.sides) for entry in entries]
        self._repeats = {entry: entry.again() for _, entry in self._entries}

    def negative(self) -> Tensor:
        """What the negative side alone predicts: that of the newest `combine`."""
        assert self._negative is not None
        return self._negative

    @property
    def own_conditions(self) -> list[Condition]:
        """The prompts that this rank evaluates in every step, if all entries of the run count in every step."""
        return [entry.condition for entry in self._evaluated(self._entries)[self.axis.rank]]

    def clock(self, sigma: Tensor) -> float:
        """The transformer's clock at `sigma` (0-d, on the CPU)."""
        return float(self.model_sampling.timestep(sigma).float())

    def timestep(self, sigma: Tensor, x: Tensor) -> Tensor:
        """The transformer's clock `[B]` at `sigma` (0-d, on the CPU), made on the device of `x`: nothing is copied."""
        return torch.full((x.shape[0],), self.clock(sigma), dtype=torch.float32, device=x.device)

    def next_timestep(self, sigma: Tensor, x: Tensor) -> Tensor | None:
        """The transformer's clock `[B]` at the level that follows `sigma` in the run.

        None between the levels, where some samplers evaluate the model too, and where the levels are not known.
        """
        if self.sigmas is None:
            return None
        places = (self.sigmas[:-1] == sigma).nonzero()
        return self.timestep(self.sigmas[places[0, 0] + 1], x) if len(places) else None

    def denoised(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The guided prediction of the clean latent for the noisy `x` `[B, C, ...]` at `sigma`, in fp32.

        `sigma` is 0-d and on the CPU: a number to the device, which is never asked for it.
        """
        latent = self.model_sampling.calculate_input(sigma, x)
        timestep, following = self.timestep(sigma, x), self.next_timestep(sigma, x)
        shares = [
            [Asked(entry.within(latent), timestep, entry.condition, following) for entry in share]
            for share in self._evaluated(self._counting(sigma))
        ]
        return self.combine(self.predict_all(shares, self.axis.rank), x, sigma)

    def combine(self, outputs: Sequence[Tensor], x: Tensor, sigma: Tensor, cut: Cut = everywhere) -> Tensor:
        """The guided prediction, from the outputs for what this rank evaluates.

        Elementwise where no entry has an area: `x` may then be the strip of the latent that `cut` cuts out of it.
        """
        counting = self._counting(sigma)
        shares = self._shares(counting)
        # Beyond the rank's share are outputs that were computed to keep step with the other ranks.
        own = [
            (side, entry, self.model_sampling.denoised(output.float(), entry.within(x), sigma))
            for (side, entry), output in zip(shares[self.axis.rank], outputs, strict=False)
        ]
        sums = [
            weighted_sum([(entry, prediction) for number, entry, prediction in own if number == side], x, cut)
            for side in _sides_in(shares[self.axis.rank])
        ]
        totals = self._exchanged(sums, shares, x)
        for side, total in enumerate(totals):
            total /= sum_of_weights([entry for number, entry in counting if number == side], x, cut)
        positive, guided = totals[0], totals[0]
        if len(totals) > 1:
            self._negative = negative = totals[1]
            guided = negative + (positive - negative) * self.cfg
        return guided if self.norm is None else shortened(guided, positive) * self.norm

    def _exchanged(self, sums: Sequence[Tensor], shares: Sequence[Sequence[Sided]], like: Tensor) -> list[Tensor]:
        """The sum of each side over all ranks' shares, from those of this rank's."""
        sides = [_sides_in(share) for share in shares]
        counts = [len(each) for each in sides]
        totals = [torch.zeros_like(like) for _ in self.sides]
        if not any(counts):
            return totals
        own = torch.stack(list(sums)) if sums else like.new_empty((0, *like.shape))
        gathered = self.axis.all_gather(own, counts, dim=0)
        for side, part in zip((side for each in sides for side in each), gathered, strict=True):
            totals[side] += part
        return totals

    def _counting(self, sigma: Tensor) -> list[Sided]:
        """The entries that count at `sigma`, the same on all ranks."""
        return [(side, entry) for side, entry in self._entries if entry.counts_at(sigma)]

    def _shares(self, entries: Sequence[Sided]) -> list[Sequence[Sided]]:
        """Which of them each rank of the axis evaluates."""
        edges = accumulate(split_sizes(len(entries), self.axis.size), initial=0)
        return [entries[start:end] for start, end in pairwise(edges)]

    def _evaluated(self, entries: Sequence[Sided]) -> list[list[WeightedPrompt]]:
        """The ranks' shares, with the last one again where others have more: weights are gathered by all together."""
        shares = [[entry for _, entry in share] for share in self._shares(entries)]
        most = max(map(len, shares))
        return [share + [self._repeats[entry] for _, entry in entries[-1:]] * (most - len(share)) for share in shares]


def shortened(guided: Tensor, positive: Tensor) -> Tensor:
    """`guided` `[B, C, ...]`, whose cells are no longer than those of the `positive` prediction: ComfyUI's CFGNorm."""
    lengths = (torch.linalg.vector_norm(each, dim=1, keepdim=True) for each in (positive, guided))
    wanted, found = lengths
    return guided * (wanted / (found + 1e-8)).clamp(max=1.0)


def _sides_in(share: Sequence[Sided]) -> list[int]:
    return sorted({side for side, _ in share})
