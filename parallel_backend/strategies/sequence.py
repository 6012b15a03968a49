"""Sequence parallelism (Ulysses, ring, USP): every rank carries a share of the tokens through all blocks. Exact."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from ..attention.site import Attention
from ..distributed.axis import Axis
from ..families.condition import Condition
from ..families.family import Family
from ..tokens.plan import TokenPlan


class SequenceParallel:
    """Predicts for whole pictures, each rank computing its share of the tokens of every block."""

    def __init__(self, family: Family, axis: Axis, attention: Attention) -> None:
        """`axis`: the ranks that `attention` spans, Ulysses peers first."""
        self.family = family
        self.axis = axis
        self.attention = attention

    def begin_step(self, step: int) -> None:
        """What is predicted from now on belongs to that step of the run. Exact methods do not mind."""

    def finish(self) -> None:
        """The run is over, however it ended; all ranks leave it at the same step."""

    def forget(self) -> None:
        """This rank leaves the run, wherever the others are."""

    def predict(self, latent: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """The transformer's output for `latent` `[B, C, H, W]` at `timestep` `[B]`, whole and equal on every rank."""
        family, rank = self.family, self.axis.rank
        height, width = latent.shape[-2:]
        patch = family.patch_size
        grid = (-(-height // patch), -(-width // patch))
        tokens = family.tokenize_all(latent, condition)
        residuals = self._residuals(tokens, timestep, condition, grid) if condition.controls else {}
        plan = TokenPlan.even(family.text_length(condition), tokens.shape[1], self.axis.size)
        self.attention.set_lengths(plan.text_sizes, plan.image_sizes)
        family.use_attention(self.attention)
        state = family.embed(tokens, timestep, condition, plan.shard(rank), grid)
        state = replace(state, prompts=condition.prompts_at(timestep, self.attention))
        for number, block in enumerate(family.blocks):
            state = block(state)
            if number in residuals:
                state = family.add_residual(state, number, residuals[number])
        # What becomes of references is of no use.
        sizes = plan.of_first(grid[0] * grid[1]).image_sizes
        output = family.head(replace(state, image=state.image[:, : sizes[rank]]))
        return family.untokenize(self.axis.all_gather(output, sizes, dim=1), height, width)

    def _residuals(
        self, tokens: Tensor, timestep: Tensor, condition: Condition, grid: tuple[int, int]
    ) -> dict[int, Tensor]:
        """What the controls add to this rank's image tokens, by the number of the block behind which they do.

        `tokens`: of the picture, of which they are made, and of references, to which nothing is added.
        """
        family, rank, now, picture = self.family, self.axis.rank, float(timestep[0]), grid[0] * grid[1]
        added: dict[int, Tensor] = {}
        for control in condition.controls:
            if not control.is_active(now):
                continue
            text_length = family.text_length(condition) + control.extra_text
            plan = TokenPlan.even(text_length, tokens.shape[1], self.axis.size)
            own = plan.of_first(picture)
            self.attention.set_lengths(own.text_sizes, own.image_sizes)
            made = control.residuals(tokens[:, :picture], timestep, condition, own.shard(rank), grid, self.attention)
            of_references = plan.image_sizes[rank] - own.image_sizes[rank]
            padded = [F.pad(residual, (0, 0, 0, of_references)) for residual in made] if of_references else made
            for block, number in control.targets(family).items():
                added[block] = added[block] + padded[number] if block in added else padded[number]
        return added
