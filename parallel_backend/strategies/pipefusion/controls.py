"""Controls under PipeFusion: the first stage, which has the latent, makes a patch's residuals; they travel with it.

A control sees patches as the model does: its keys and values of the other patches are kept, and some are one step old.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ...attention.patch_kv import PatchAttention
from ...attention.usp import AttentionCore
from ...families.condition import Condition
from ...families.family import TokenFamily
from ...families.state import Evaluation
from ...tokens.grid import Grid
from ...tokens.plan import TokenPlan

Key = tuple[tuple[int, int], ...]
"""The residuals added behind a block: pairs of a control's number and the number of one of its residuals."""


class StagedControls:
    """The controls of one run. `clocks`: the model's clock at each call of the sampler."""

    def __init__(
        self,
        family: TokenFamily,
        conditions: Sequence[Condition],
        clocks: Sequence[float],
        grids: Mapping[str, Grid],
        core: AttentionCore,
        ranks: int,
        patches: int,
    ) -> None:
        self._family = family
        self._conditions = conditions
        self._clocks = clocks
        self._attentions = {
            (index, number): PatchAttention(
                core, [TokenPlan(control.segments(family, condition, grids), ranks, patches)]
            )
            for index, condition in enumerate(conditions)
            for number, control in enumerate(condition.controls)
        }
        self._patches = patches

    def added(self, call: int, index: int) -> dict[int, Key]:
        """The residuals added behind the model's blocks, by block number, for a call under the condition `index`."""
        added: dict[int, Key] = {}
        for number in self._active(call, index):
            for block, residual in self._conditions[index].controls[number].targets(self._family).items():
                added[block] = (*added.get(block, ()), (number, residual))
        return added

    def needed(self, call: int, index: int, first_block: int) -> list[Key]:
        """What the blocks from `first_block` on need, without repetition, in the order of their need."""
        added = self.added(call, index)
        return list(dict.fromkeys(added[block] for block in sorted(added) if block >= first_block))

    def make(
        self, call: int, index: int, patches: Sequence[int], rank: int, evaluation: Evaluation
    ) -> dict[Key, Tensor]:
        """Everything that is needed for `patches`, of this rank's tokens of the grid, for the whole `evaluation`."""
        condition = self._conditions[index]
        made = {}
        for number in self._active(call, index):
            attention, control = self._attentions[index, number], condition.controls[number]
            has_begun = call and control.is_active(self._clocks[call - 1])
            attention.begin(0, patches, seen=self._patches if has_begun else patches[-1] + 1)
            shard = attention.plan(0).shard(rank, patches)
            made[number] = control.residuals(replace(evaluation, shard=shard), attention)
        residuals: dict[Key, Tensor] = {}
        for key in self.needed(call, index, 0):
            parts = [made[number][residual] for number, residual in key]
            residuals[key] = sum(parts[1:], start=parts[0])
        return residuals

    def forget(self) -> None:
        """Free what is kept."""
        for attention in self._attentions.values():
            attention.forget()

    def _active(self, call: int, index: int) -> list[int]:
        controls = self._conditions[index].controls
        return [number for number, control in enumerate(controls) if control.is_active(self._clocks[call])]
