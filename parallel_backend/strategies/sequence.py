"""Sequence parallelism (Ulysses, ring, USP): every rank carries a share of the tokens through all blocks. Exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from ..attention.site import Attention
from ..caches.policy import COMPUTE_ALL, StepCache
from ..distributed.axis import Axis
from ..families.blocks import run_blocks
from ..families.condition import Condition
from ..families.family import TokenFamily
from ..families.state import Evaluation
from ..tokens.grid import Packing
from ..tokens.plan import TokenPlan


class SequenceParallel:
    """Predicts for whole latents, each rank computing its share of the tokens of every block."""

    def __init__(
        self,
        family: TokenFamily,
        axis: Axis,
        attention: Attention,
        packing: Packing | None = None,
        cache: StepCache = COMPUTE_ALL,
    ) -> None:
        """`axis`: the ranks that `attention` spans, Ulysses peers first. `packing`: of several latents."""
        self.family = family
        self.axis = axis
        self.attention = attention
        self.packing = packing or Packing({family.latent.name: ()})
        self.cache = cache

    def begin_step(self, step: int) -> None:
        """Sets the step of the run that later predictions belong to. Exact methods do not use it."""

    def finish(self) -> None:
        """The run is over, however it ended; all ranks leave it at the same step."""

    def forget(self) -> None:
        """This rank leaves the run, wherever the others are."""

    def outputs_of(self, latent: Tensor, condition: Condition) -> int:
        """How many outputs a layer of the network's width has on each rank, for one picture of `latent`."""
        streams = self.family.segments(condition, self.family.grids(self.packing.unpack(latent)))
        tokens = sum(segment.count for segments in streams.values() for segment in segments)
        return -(-tokens * self.family.hidden_size // self.axis.size)

    def predict(
        self, latent: Tensor, timestep: Tensor, condition: Condition, next_timestep: Tensor | None = None
    ) -> Tensor:
        """The transformer's output for `latent`, packed as the run's are, whole and equal on every rank.

        `timestep`, `next_timestep`: as in `Evaluation`.
        """
        family, rank = self.family, self.axis.rank
        latents = self.packing.unpack(latent)
        grids = family.grids(latents)
        plan = TokenPlan(family.segments(condition, grids), self.axis.size)
        evaluation = Evaluation(family.tokenise(latents), grids, timestep, condition, plan.shard(rank), next_timestep)
        residuals = self._residuals(evaluation, plan) if condition.controls else {}
        self.attention.set_lengths(plan.lengths())
        family.sites.attention = self.attention
        state = family.embed(evaluation)
        state = replace(state, prompts=condition.prompts_at(timestep, self.attention))
        state = run_blocks(family, state, family.blocks, policy=self.cache.policy(evaluation), residuals=residuals)
        predicted = {spec.name: plan.predicted(spec.name, rank) for spec in family.latents}
        outputs = family.head(state, predicted)
        whole = {
            name: plan.in_order(name, self.axis.all_gather(output, plan.predicted_sizes(name), dim=1))
            for name, output in outputs.items()
        }
        return self.packing.pack(family.untokenise(whole, latents))

    def _residuals(self, evaluation: Evaluation, plan: TokenPlan) -> Mapping[int, Tensor]:
        """What the controls add to this rank's tokens of the grid, by the number of the block behind which they do.

        `plan`: of the model's own streams. What follows the grid in its stream (references) gets nothing added.
        """
        family, rank, condition = self.family, self.axis.rank, evaluation.condition
        now = float(evaluation.timestep.flatten()[0])
        added: dict[int, Tensor] = {}
        for control in condition.controls:
            if not control.is_active(now):
                continue
            own = TokenPlan(control.segments(family, condition, evaluation.grids), self.axis.size)
            self.attention.set_lengths(own.lengths())
            made = control.residuals(replace(evaluation, shard=own.shard(rank)), self.attention)
            stream = family.controlled
            others = plan.size(stream, rank, plan.patches) - own.size(stream, rank, own.patches)
            padded = [F.pad(residual, (0, 0, 0, others)) for residual in made] if others else made
            for block, number in control.targets(family).items():
                added[block] = added[block] + padded[number] if block in added else padded[number]
        return added
