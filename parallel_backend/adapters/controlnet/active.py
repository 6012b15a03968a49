"""A control bound to its model for one run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ...attention.site import Attention
from ...families.condition import Condition
from ...families.family import Family
from ...tokens.plan import Shard
from .nets import ControlNet, Given


@dataclass(frozen=True)
class Control:
    """A ControlNet at work on a control picture. `picture`: what it sees of it, `[B, C, H, W]`.

    It works while the model's clock is from `start` down to `end`.
    """

    net: ControlNet
    picture: Tensor
    strength: float
    mode: int | None
    start: float
    end: float

    @property
    def extra_text(self) -> int:
        return self.net.extra_text

    def part(self, part: slice, batch: int) -> Control:
        """For the pictures `part` of a batch; one control picture for all of them stays one."""
        return replace(self, picture=self.picture[part] if len(self.picture) == batch else self.picture[:1])

    def is_active(self, timestep: float) -> bool:
        return self.strength != 0.0 and self.end <= timestep <= self.start

    def targets(self, family: Family) -> dict[int, int]:
        return self.net.targets(family)

    def residuals(
        self,
        tokens: Tensor,
        timestep: Tensor,
        condition: Condition,
        shard: Shard,
        grid: tuple[int, int],
        attention: Attention,
    ) -> list[Tensor]:
        """As `ControlNet.residuals`, for whole-picture latent `tokens` `[B, S, c]`, times the strength.

        `shard.text` counts from the ControlNet's own first text token.
        """
        view = self.net.view
        view.use_attention(attention)
        picture = view.tokenize(self.picture).expand(len(tokens), -1, -1)
        state = self.net.embed(Given(tokens, timestep, condition, shard, grid, picture, self.mode))
        return [self.strength * residual for residual in self.net.residuals(state)]
